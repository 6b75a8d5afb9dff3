"""What a run leaves for people: figures, a page, tables and its place in MLflow; exported models; a report.

Owns which of these a run has, what they are called, and what they say of the run.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import read_text
from ..export import ModelCard, Provenance, Start, export
from ..export.formats import require_free
from ..export.load import read_tokenizer
from ..export.trainers import require_start
from ..files import require_writable
from ..pareto import hypervolume, reference_point
from ..report.front import draw_agreement, draw_front, draw_tree
from ..report.measured import CHOSEN_BY_VALIDATION
from ..report.page import front_page
from ..report.sharing import draw_sharing
from ..report.tables import front_csv
from ..report.write import Report, command_without_folders, without_folders, write_report
from ..sharing.objectives import OBJECTIVES
from ..splitting import SplitTree
from ..tracking import Kind, Link, front_note
from ..training.evaluation import Evaluation
from .front import Front
from .jobs import read_model
from .run import Run

if TYPE_CHECKING:  # an export or a report needs no Optuna
    from .context import Context
    from .evaluators import Evaluator


def start_tracking(ctx: Context) -> None:
    """Begin the run in MLflow."""
    file, shape = ctx.trial.file, ctx.trial.space.shape
    made = ctx.run.provenance()
    params = {
        "sampler": file.search.sampler,
        "evaluations": file.search.planned,
        "final_steps": file.final.steps,
        "num_hidden_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "seed": file.seed,
    }
    if file.predictor:
        params |= {"predictor_configs": file.predictor.configs, "predictor_steps": ctx.trial.proxy_training.steps}
    if file.supernet:
        params |= {
            "supernet_strategy": file.supernet.strategy,
            "supernet_steps": file.supernet.steps,
            "split": ctx.trial.split.method,
        }
    if file.dense:
        params["dense_steps"] = file.dense.steps
    if ctx.base_model:
        params["from"] = ctx.base_model.name
    tags = {"text_sha256": made["text_sha256"], "commit": str(made["commit"]), "folder": str(ctx.run.folder.resolve())}
    if file.search.began_with:  # a parameter cannot change, a tag can
        tags["extended"] = f"to {file.search.evaluations} evaluations, {file.final.candidates} candidates"
    ctx.tracker.start(ctx.run.name, params, tags, front_note(facts(ctx), [], ctx.run.argument))


def facts(ctx: Context, spent: int = 0, front: Front | None = None) -> dict[str, str]:
    """What a run's figures depend on, by topic; `spent` are the tokens that were trained on before the front."""
    file, space = ctx.trial.file, ctx.trial.space
    found = {
        "text": ctx.corpus.summary,
        "perplexity": f"of the test text; {CHOSEN_BY_VALIDATION}",
        **({"from": ctx.base_model.summary} if ctx.base_model else {}),
        "model": space.shape.words,
        "memory": f"weights and KV cache of {' or '.join(m.words for m in ctx.trial.memories)}, {file.memory.dtype}",
        "objectives": ", ".join(ctx.trial.objectives),
        "choices": ", ".join(dict.fromkeys(name.partition(".")[2] or name for name, o in space.options.items() if len(o) > 1)),
        "search": f"{file.search.evaluations} configs by {file.search.sampler}, {ctx.trial.search_summary}",
        "models": f"{ctx.trial.final_summary}; {file.final.seeds} seed(s) from {file.seed}, "
        f"learning rate {file.final.learning_rate:g}",
    }
    if front:
        before = spent + (ctx.base_model.tokens if ctx.base_model else 0)
        found["tokens trained in all"] = f"{before + sum(e.tokens for e in front.evaluations):,}"
    return found


def publish(ctx: Context, evaluator: Evaluator, searched: Sequence[Evaluation], front: Front) -> None:
    """Write the run's figures, page and tables, and log them."""
    evaluations = [*searched, *evaluator.conversions]
    run, shape, memory = ctx.run, ctx.trial.space.shape, ctx.trial.file.memory
    folder = run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    pictures = {
        m.first.config.hash: draw_sharing(shape, m.first.config, folder / f"{m.first.config.hash}.png", memory, m.label)
        for m in front.members
    }
    begun = f", {front.kind} from {ctx.base_model.name}" if ctx.base_model else ""
    title = f"{run.name}: {OBJECTIVES[ctx.trial.objectives[0]].words} against perplexity{begun}"
    samples = {m.label: run.samples(m.first) for m in front.configs}
    drawn = list[Path]()
    for spec in ctx.trial.memories:  # a front each
        there, end = (front, "") if spec == memory else (front.at(shape, spec), f"-{spec.name}")
        drawn.append(draw_front(there.evaluations, run.folder / f"front{end}.png", title))
        drawn.append(run.write(f"front{end}.html", front_page(there.evaluations, title, shape, spec, samples)))
    run.write("evaluations.csv", front_csv(evaluations))
    run.write(f"{front.weights}.csv", front_csv(front.evaluations))
    members = [m.first for m in front.members]
    rest = [e for e in front.evaluations if e.config not in {member.config for member in members}]
    models: dict[Kind, list[Evaluation]] = {
        "front": members,
        "preset": [e for e in rest if e.name],
        front.weights: [e for e in rest if not e.name],
    }
    beside = {m.first.config: front.panel.beside(m) for m in front.configs}
    ctx.tracker.log_models(models, pictures, beside)
    ctx.tracker.log_table([*front.evaluations, *evaluations])
    for path in (*drawn, *_draw_splits(run, evaluator.tree)):
        ctx.tracker.log_artifact(path)
    names = {config: row["label"] for config, row in beside.items()}
    ctx.tracker.describe(front_note(facts(ctx, evaluator.spent, front), members, run.argument, names))


def _draw_splits(run: Run, tree: SplitTree) -> list[Path]:
    """The tree of sub-supernets, and for each split by gradients how much its options disagree."""
    if not tree.children:
        return []
    drawn = [draw_tree(tree.to_data(), run.folder / "pictures" / "splits.png")]
    for node in tree.nodes():
        if node.split is not None and node.split.distances:
            drawn.append(draw_agreement(asdict(node.split), run.folder / "pictures" / f"agreement-{node.name}.png"))
    return drawn


def export_run(
    run: Run, pick: str, directory: Path, kind: str = "hf", overwrite: bool = False, start: Start | None = None
) -> Evaluation:
    """Write the picked model of a run's front to a folder; returns its evaluation. Raises UserError. What trainers start from
    has the length of rows, the batch and the learning rate of the trial's last stage."""
    start = start or Start()
    require_start(start, kind)
    require_free(directory, overwrite)
    trial, evaluation = run.trial(), run.front().pick(pick)
    if start.names:
        start = replace(start, settings=replace(start.settings, **{name: getattr(trial.file.final, name) for name in TRAINED_BY}))
    model = read_model(trial.space.shape, evaluation.config, run.weights(evaluation))
    made = run.provenance()
    found = f"Found by the search `{run.name}` (trial `{made['trial']}`, seed {made['seed']}) as its pick `{pick}`."
    if trial.file.dense:
        found += f" Initialised from a dense model that it trained for {trial.file.dense.tokens:,} tokens."
    if "from" in made:
        found += f" Initialised from `{Path(made['from']).name}`, whose perplexity was {made['from_perplexity']:.4g}."
    provenance, link = Provenance(run.name, trial.file.name), Link.load(run.folder)
    if link is not None:
        experiment, child = trial.file.tracking.experiment or trial.file.name, link.model(evaluation.config.hash)
        provenance = Provenance(run.name, trial.file.name, experiment, link.run_id, link.uri, child or "")
    card = ModelCard(
        title=f"{run.name}: {evaluation.label}",
        found=found,
        command=command_without_folders(f"{run.command()}\nnas export {run.argument} --pick {shlex.quote(pick)} --to DIR"),
        data=without_folders(made["text"]),
        evaluation=evaluation,
        memory=trial.file.memory,
        provenance=provenance,
        figure=run.folder / "front.png" if run.has("front.png") else None,
    )
    read_tokenizer(run.folder, trial.space.shape.vocab_size)  # or it is refused here, in the run's name
    tokenizer = read_text(run.folder / "tokenizer.json")
    metadata = run.metadata()
    export(model, evaluation.config, tokenizer, directory, card, kind, overwrite, metadata, start)
    return evaluation


TRAINED_BY = ("seq", "batch", "learning_rate", "warmup", "weight_decay", "clip", "autocast")
"""The settings of a training that `nas.export` and a trial have under one name."""


def write_run_report(run: Run, directory: Path) -> Path:
    """Write a finished run's page, figures and table into a folder of its name; returns the page."""
    require_writable(directory / run.name)
    trial, front, made = run.trial(), run.front(), run.provenance()
    searched, splits = run.searched(), sorted(run.folder.glob("split-*.json"))
    return write_report(
        directory / run.name,
        Report(
            title=f"{run.name}: the front of a search",
            command=f"{run.command()}\nnas report {run.argument}",
            shape=trial.space.shape,
            spec=trial.file.memory,
            evaluations=[*front.evaluations, *searched, *run.converted()],
            provenance={key: value for key, value in made.items() if key not in ("command", "versions")} | made["versions"],
            tree=run.read_json(splits[-1].name)["tree"] if splits else None,
            progress={run.name: hypervolumes(searched)},
            elsewhere={spec: front.at(trial.space.shape, spec).evaluations for spec in trial.file.other_memory},
        ),
    )


def hypervolumes(searched: Sequence[Evaluation]) -> list[float]:
    """The hypervolume after each evaluation of a search, against one reference point."""
    points = [e.point for e in searched]
    return [hypervolume(points[: n + 1], reference_point(points)) for n in range(len(points))]
