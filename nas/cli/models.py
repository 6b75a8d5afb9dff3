"""The commands about a found model: `export`, `train`, `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .show import json_option, print_json, runs_option


class _WithFormats(click.Command):
    """Lists the table of formats under its help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Command`."""
        from ..export import FORMATS

        with formatter.section("Formats"):
            formatter.write_dl([(row.name, row.meaning) for row in FORMATS.values()])


@click.command(cls=_WithFormats)
@click.argument("run")
@click.option(
    "--pick",
    default="knee",
    show_default=True,
    help="knee, lowest-perplexity, smallest, max-memory=300MiB (-weights, -cache), trial=17, a preset, a hash.",
)
@click.option("--to", "directory", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--format", "kind", default="hf", show_default=True, help="How it is written: one of the formats below.")
@click.option("--overwrite", is_flag=True, help="Write over a folder that is no export.")
@runs_option
@json_option
def export(run: str, pick: str, directory: Path, kind: str, overwrite: bool, runs: str, as_json: bool) -> None:
    """Write a model of RUN's front as a folder that trainers load."""
    from ..export.artifact import exported_files
    from ..search.published import export_run
    from ..search.run import Run

    evaluation = export_run(Run.find(run, Path(runs)), pick, directory, kind, overwrite)
    files = exported_files(directory)
    if as_json:
        head = {"directory": str(directory), "format": kind, "files": files, "bytes": sum(files.values())}
        return print_json(head | evaluation.to_data())
    from ..loading import format_bytes

    size, perplexity = format_bytes(evaluation.memory.memory_bytes), evaluation.losses.perplexity
    click.echo(f"{directory}: {evaluation.label}, {size}, perplexity {perplexity:.3f}")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--text", required=True, help="A text file, a folder of them, a saved dataset, or `python`.")
@click.option("--to", type=click.Path(path_type=Path), help="Write the trained model here; by default in its own folder.")
@click.option("--epochs", default=1.0, show_default=True, help="Passes over the text.")
@click.option("--steps", type=int, help="Steps, in place of epochs.")
@click.option("--batch", default=16, show_default=True)
@click.option("--seq", default=128, show_default=True, help="Tokens in a row.")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the same training.")
@json_option
def train(directory: Path, text: str, to: Path | None, as_json: bool, **settings: Any) -> None:
    """Train the model in DIR further, by transformers' Trainer."""
    from ..export.train import TrainSettings, train_export
    from .show import Terminal

    terminal = Terminal()
    with terminal.stage("train", 1, "steps") as bar:
        trained = train_export(directory, text, TrainSettings(**settings), to, bar.follow)
    if as_json:
        return print_json(trained.to_data())
    before, after = trained.before.perplexity, trained.after.perplexity
    click.echo(
        f"{trained.directory}: perplexity {before:.3f} before, {after:.3f} after {trained.tokens:,} tokens, on held-out text"
    )


@click.command("eval")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--text", required=True, help="A text file, a folder of them, a saved dataset, or `python`.")
@click.option("--seq", default=128, show_default=True, help="Tokens in an evaluation window.")
@click.option("--windows", default=512, show_default=True, help="At most so many windows, spread over the text.")
@click.option("--context", default=1024, show_default=True, help="Tokens the cache is filled with.")
@click.option("--batch", default=1, show_default=True, help="Sequences in the cache.")
@click.option("--dtype", default="bfloat16", show_default=True, help="Of weights and cache.")
@json_option
def evaluate(directory: Path, text: str, seq: int, windows: int, context: int, batch: int, dtype: str, as_json: bool) -> None:
    """Perplexity of the model in DIR on a text, and its memory: predicted and measured."""
    from ..export.measure import EvalSettings, eval_export
    from ..memory import MemorySpec

    settings = EvalSettings(seq=seq, windows=windows, memory=MemorySpec(context, batch, dtype))
    measured = eval_export(directory, text, settings)
    if as_json:
        return print_json(measured.to_data())
    _print_measured(measured.to_data())


def _print_measured(data: dict[str, Any]) -> None:
    from ..loading import format_bytes
    from .show import print_table

    error = data["perplexity_standard_error"]
    rows = [
        ["perplexity", f"{data['perplexity']:.3f} ± {error:.3f}", f"over {data['tokens']:,} tokens"],
        ["bits per byte", f"{data['bits_per_byte']:.4f}", ""],
    ]
    for words, name in (("weights", "weight_bytes"), ("KV cache", "kv_cache_bytes")):
        rows.append(
            [words, format_bytes(data[f"measured_{name}"]), f"{data[f'measured_{name}']:,} bytes, predicted {data[name]:,}"]
        )
    rows.append(["weights' file", format_bytes(data["file_bytes"]), f"{data['file_bytes']:,} bytes"])
    where = f"cache of {data['context']:,} tokens × {data['batch']}, {data['dtype']}"
    print_table(["measured", "", where], rows)
