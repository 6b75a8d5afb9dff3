"""The commands about one model: `export`, `train`, `eval`, `convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import format_bytes
from ..sharing.memory import MemorySpec
from ..sharing.objectives import OBJECTIVES
from .show import Terminal, column_option, device_option, json_option, print_json, print_table, renamed_option, runs_option

if TYPE_CHECKING:
    from ..search.convert import Converted
    from ..search.train import TrackedTraining


class _WithTables(click.Command):
    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ..export import FORMATS, TRAINERS

        for title, rows in (("Formats", FORMATS.values()), ("Trainers", TRAINERS.values())):
            with formatter.section(title):
                formatter.write_dl([(row.name, row.meaning) for row in rows])


@click.command(cls=_WithTables)
@click.argument("run")
@click.option(
    "--pick",
    default="knee",
    show_default=True,
    help="knee, lowest-perplexity, smallest, max-memory=300MiB (-weights, -cache), 'memory_bytes<=300MiB,perplexity<=6', "
    "trial=17, a preset, a label, a hash.",
)
@click.option("--to", "directory", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--format", "kind", default="hf", show_default=True, help="One of the formats below.")
@click.option("--trainer", "trainers", multiple=True, help="Write what this trainer starts from, too; may be repeated.")
@click.option("--text", type=click.Path(path_type=Path), help="The .jsonl file that it trains on; by default DIR/text.jsonl.")
@click.option("--overwrite", is_flag=True, help="Write over a folder that is no export.")
@runs_option
@json_option
def export(
    run: str,
    pick: str,
    directory: Path,
    kind: str,
    trainers: tuple[str, ...],
    text: Path | None,
    overwrite: bool,
    runs: str,
    as_json: bool,
) -> None:
    """Write a model of RUN's front as a folder that trainers load.

    No architecture of transformers shares weights and caches as these models do (reports/native_formats), so a folder has the
    code that runs it, names what builds it, or holds a dense model.
    """
    from ..export import FORMATS, TRAINERS, Start
    from ..export.formats import exported_files
    from ..export.trainers import TEXT
    from ..search.publish import export_run
    from ..search.run import Run

    found = Run.find(run, Path(runs))
    start = Start(tuple(dict.fromkeys(trainers)), str(text.resolve()) if text else TEXT)
    evaluation = export_run(found, pick, directory, kind, overwrite, start)
    launch = {name: TRAINERS[name].launch for name in start.names}
    files, trial = exported_files(directory), found.trial()
    cost = FORMATS[kind].cost(trial.space.shape, evaluation.config, trial.file.memory)
    if as_json:
        head = {"directory": str(directory), "format": kind, "files": files, "bytes": sum(files.values()), "cost": cost}
        head |= {"launch": launch} if launch else {}
        return print_json(head | evaluation.to_data())
    perplexity = evaluation.losses.perplexity
    size = ", ".join(OBJECTIVES[name].show(evaluation.value(name)) for name in evaluation.objectives[:-1])
    written = f"format {kind}, {len(files)} files of {format_bytes(sum(files.values()))}"
    click.echo(f"{directory}: {evaluation.label}, {size}, perplexity {perplexity:.3f}; {written}")
    if cost:
        click.echo(cost)
    for line in launch.values():
        click.echo(f"in {directory}: {line}")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--text", required=True, help="A file of text or .jsonl, a folder of them, a saved dataset, or `python`.")
@column_option
@click.option("--eval-text", help="Text to evaluate on; by default the last tenth of the text, which is not trained on.")
@click.option("--to", type=click.Path(path_type=Path), help="Folder for the trained model; by default DIR.")
@click.option("--epochs", default=1.0, show_default=True, help="Passes over the text.")
@click.option("--steps", type=int, help="Steps, in place of epochs.")
@click.option("--batch", default=16, show_default=True, help="Rows per step, over all processes.")
@click.option("--grad-accumulation", default=1, show_default=True, help="Parts of a batch, computed in turn: less memory.")
@click.option("--gradient-checkpointing", is_flag=True, help="Recompute layers in the backward pass: less memory.")
@click.option("--seq", default=128, show_default=True, help="Tokens per row.")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--warmup", default=0.05, show_default=True, help="Fraction of the steps in which the learning rate rises.")
@click.option("--weight-decay", default=0.1, show_default=True)
@click.option("--autocast/--no-autocast", default=True, show_default=True, help="Compute in bfloat16 where supported.")
@device_option
@click.option("--from-scratch", is_flag=True, help="Start from new weights, drawn with the seed.")
@renamed_option("--fresh", "--from-scratch", is_flag=True)
@click.option("--distill-from", metavar="TEACHER", help="Learn the probabilities of the model in this folder.")
@click.option("--distill-weight", default=1.0, show_default=True, help="Their fraction of the loss.")
@click.option("--dtype", help="Of the weights that are written; by default unchanged. Training is in float32.")
@click.option("--seed", default=0, show_default=True)
@click.option("--save-steps", default=500, show_default=True, help="Write a checkpoint every so many steps.")
@click.option("--eval-steps", type=int, help="Evaluate every so many steps, for the curve in MLflow.")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint of the same training.")
@click.option("--tracking", metavar="URI", help="MLflow's address, or `none`; by default MLFLOW_TRACKING_URI, or nowhere.")
@json_option
def train(directory: Path, text: str, to: Path | None, tracking: str | None, as_json: bool, **settings: Any) -> None:
    """Train the model in DIR further, by transformers' Trainer.

    On several GPUs, or machines: torchrun --nproc-per-node 2 -m nas train DIR …
    """
    from ..export.trainers import TrainSettings, is_main_process
    from ..search.train import train_folder

    if not is_main_process():
        train_folder(directory, text, TrainSettings(**settings), to)
        return
    with Terminal().stage("train", 1, "steps") as bar:
        done = train_folder(directory, text, TrainSettings(**settings), to, tracking, bar.follow)
    if as_json:
        return print_json(done.to_data())
    _print_trained(done)


def _print_trained(done: TrackedTraining) -> None:
    trained, data = done.trained, done.trained.to_data()
    pairs = [(data[f"{name}_before"], data[f"{name}_after"]) for name in ("perplexity", "perplexity_standard_error")]
    bits = [f"{data[f'bits_per_byte_{when}']:.4f}" for when in ("before", "after")]
    perplexity = [f"{value:.3f} ± {error:.3f}" for value, error in zip(*pairs, strict=True)]
    nats = [f"{data[f'loss_nats_per_token_{when}']:.4f}" for when in ("before", "after")]
    rows = [["perplexity", *perplexity], ["bits per byte", *bits], ["loss, nats a token", *nats]]
    print_table(["on the evaluation text", "before", "after"], rows)
    spent = f"{trained.steps:,} steps, {trained.tokens:,} tokens, {trained.seconds:.0f} s"
    click.echo(f"{trained.directory}: {spent}, weights in {trained.dtype}")
    for note in trained.notes:
        click.echo(note)
    if done.link:
        click.echo(f"MLflow: run {done.link.run_id} in `{done.experiment}`, {done.link.uri}")


@click.command("eval")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--text", help="A file of text or .jsonl, a folder of them, a saved dataset, or `python`.")
@click.option("--task", "tasks", multiple=True, type=click.Path(path_type=Path), help="A task file of lm-eval; may be repeated.")
@column_option
@click.option("--seq", default=128, show_default=True, help="Tokens in an evaluation sequence.")
@click.option("--eval-sequences", default=512, show_default=True, help="At most so many sequences, spread over the text.")
@renamed_option("--windows", "--eval-sequences")
@click.option("--context", default=1024, show_default=True, help="Tokens in the cache.")
@click.option("--batch", default=1, show_default=True, help="Sequences in the cache.")
@click.option("--dtype", default="bfloat16", show_default=True, help="Of weights and cache.")
@device_option
@click.option(
    "--bos",
    type=click.Choice(["auto", "yes", "no"]),
    default="auto",
    show_default=True,
    help="Whether sequences begin with the BOS token; auto: as the tokenizer's post-processor does.",
)
@json_option
def evaluate(
    directory: Path,
    text: str | None,
    tasks: tuple[Path, ...],
    context: int,
    batch: int,
    dtype: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Print the perplexity of the model in DIR on a text and its memory, predicted and counted; with --task, its scores."""
    from ..export.measure import EvalSettings, eval_export, eval_tasks, require_lm_eval

    if text is None and not tasks:
        raise click.UsageError("give --text, or --task, or both")
    if tasks:
        require_lm_eval()
    given = EvalSettings(**settings, memory=MemorySpec(context, batch, dtype))
    measured = eval_export(directory, text, given).to_data() if text else {}
    scores = list(map(asdict, eval_tasks(directory, tasks, given.batch, given.device))) if tasks else []
    if as_json:
        return print_json(measured | ({"tasks": scores} if tasks else {}))
    if measured:
        _print_measured(measured)
    if scores:
        _print_scores(scores)


def _print_scores(scores: list[dict[str, Any]]) -> None:
    rows = []
    for row in scores:
        error = row["standard_error"]
        value = f"{row['value']:.4f}" + (f" ± {error:.4f}" if error is not None else "")
        rows.append([row["task"], row["metric"], value, "higher" if row["higher_is_better"] else "lower", f"{row['samples']:,}"])
    print_table(["task", "metric", "value", "better", "samples"], rows, words=2)


def _print_measured(data: dict[str, Any]) -> None:
    error = data["perplexity_standard_error"]
    rows = [
        ["perplexity", f"{data['perplexity']:.3f} ± {error:.3f}", f"over {data['tokens']:,} tokens"],
        ["bits per byte", f"{data['bits_per_byte']:.4f}", ""],
    ]
    for words, name in (("weights", "weight_bytes"), ("KV cache", "kv_cache_bytes")):
        counted = data[f"measured_{name}"]
        rows.append([words, format_bytes(counted), f"{counted:,} bytes, predicted {data[name]:,}"])
    rows.append(["weights' file", format_bytes(data["file_bytes"]), f"{data['file_bytes']:,} bytes"])
    where = f"cache of {data['context']:,} tokens × {data['batch']}, {data['dtype']}"
    print_table(["measured", "", where], rows)
    for note in data["notes"]:
        click.echo(note)


def _list_methods(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from ..pretrained.conversions import METHODS

    wide = max(len(f"{row.name} {row.size_name}") for row in METHODS.values())
    for row in METHODS.values():
        init = f" [init: {', '.join(row.starts)}]" if row.starts else ""
        click.echo(f"{row.name} {row.size_name}".ljust(wide) + f"  {row.paper}  {row.meaning}{init}")
    context.exit()


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--methods", is_flag=True, is_eager=True, expose_value=False, callback=_list_methods, help="List the methods.")
@click.option("--method", required=True, help="How it is converted; --methods lists them.")
@click.option("--size", help="Of the method, such as 2 or 3x8; by default a usual one.")
@click.option("--text", required=True, help="A file of text or .jsonl, a folder of them, a saved dataset, or `python`.")
@column_option
@click.option("--to", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--init", help="lower, stepwise or average: what a matrix that layers share begins as.")
@click.option("--fine-tune", default=100, show_default=True, help="Steps of training afterwards; 0 for none.")
@renamed_option("--heal", "--fine-tune")
@click.option("--distill", is_flag=True, help="Fine-tune on the dense model's probabilities.")
@click.option("--align", type=int, help="Steps of drawing heads together before they are tied (headwise-post: 100).")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--seq", default=128, show_default=True, help="Tokens in a row.")
@click.option("--calibration", default=32, show_default=True, help="Rows of training text by which a method chooses.")
@click.option("--windows", default=512, show_default=True, help="At most so many evaluation windows.")
@click.option("--context", default=1024, show_default=True, help="Tokens in the cache whose bytes are said.")
@device_option
@click.option("--seed", default=0, show_default=True)
@json_option
def convert(directory: Path, text: str, to: Path, context: int, as_json: bool, **said: Any) -> None:
    """Convert the dense model in DIR into one that shares, by a published method.

    Perplexity is measured before, after, and fine-tuned by a short training, on the last tenth of the text, which is used for
    nothing else.
    """
    from ..search.convert import ConvertSettings, convert_export

    done = convert_export(directory, text, to, ConvertSettings(**said, memory=MemorySpec(context)), Terminal())
    if as_json:
        return print_json(done.to_data())
    _print_converted(done, context)


def _print_converted(done: Converted, context: int) -> None:
    rows, first = [], done.stages[0]
    for stage in done.stages:
        losses, names = stage.losses, ("weight_bytes", "kv_cache_bytes", "memory_bytes")
        sizes = [(getattr(stage.memory, name), getattr(first.memory, name)) for name in names]
        words = [format_bytes(now) + (f" ({now / was - 1:+.0%})" if stage is not first else "") for now, was in sizes]
        rows.append([stage.name, f"{losses.perplexity:.3f} ± {losses.perplexity_standard_error:.3f}", *words])
    begun = f" ({done.init})" if done.init else ""
    title = f"{done.directory}: {done.method} {done.size}{begun}, cache of {context:,} tokens, bfloat16"
    print_table(["", "perplexity", "weights", "KV cache", "memory"], rows, title)
    for note in done.notes:
        click.echo(note)
