"""What a run leaves for people: pictures, a page, tables, and its place in MLflow.

Owns which figures a run has and what they are called. How they are drawn is `nas.report`'s, how they look in MLflow
`nas.tracking`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..report import draw_sharing
from ..report.front import draw_front
from ..report.page import front_page
from ..report.splits import draw_agreement, draw_tree
from ..report.tables import front_csv
from ..sharing.sharing_config import SharingConfig
from ..splitting import SplitTree
from ..tracking import Kind, front_note
from ..training.evaluation import Evaluation
from .context import Context
from .final import Front
from .trial import Trial


@dataclass(frozen=True)
class SearchResult:
    """What a search saw before its front: every config that was judged, the tokens that took, and how its supernet was split."""

    evaluations: Sequence[Evaluation]
    spent: int
    tree: SplitTree = field(default_factory=SplitTree)


def start_tracking(ctx: Context) -> None:
    """Begin the run in MLflow."""
    file, shape = ctx.trial.file, ctx.trial.space.shape
    made = ctx.run.read_json("run.json")
    params = {
        "sampler": file.search.sampler,
        "evaluations": file.search.evaluations,
        "final_steps": file.final.steps,
        "num_hidden_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "seed": file.seed,
    }
    if file.predictor:
        params |= {"predictor_configs": file.predictor.configs, "predictor_steps": ctx.trial.lesson.steps}
    if file.supernet:
        params |= {
            "supernet_strategy": file.supernet.strategy,
            "supernet_steps": file.supernet.steps,
            "split": ctx.trial.split.method,
        }
    if ctx.origin:
        params["from"] = ctx.origin.folder.resolve().name
    tags = {"text_sha256": made["text_sha256"], "commit": str(made["commit"]), "folder": str(ctx.run.folder.resolve())}
    ctx.tracker.start(ctx.run.name, params, tags, front_note(facts(ctx), [], ctx.run.name))


def seen_on(trial: Trial) -> str:
    """How the search sees its configs: by whose losses, or on which weights."""
    predictor = trial.file.predictor
    if predictor:
        return f"predicted from {predictor.configs} trained for {trial.lesson.tokens:,} tokens each"
    if trial.checkpoint and not trial.supernet.steps:
        return "on the checkpoint's own weights"
    trained = f"on a supernet of {trial.supernet.steps} steps by the {trial.supernet.strategy} strategy"
    return trained if trial.split.method == "none" else f"{trained}, split by {trial.split.method}"


def trained(trial: Trial) -> str:
    """How the models of the front are trained."""
    kind, spec = trial.weights, trial.file.final
    learnt = " on the checkpoint's probabilities" if trial.distills else ""
    return f"{kind} for {spec.tokens:,} tokens each{learnt}" if spec.steps else f"measured as they are, {kind}"


def facts(ctx: Context, spent: int = 0, front: Front | None = None) -> dict[str, str]:
    """What a run's figures rest on, by a word for each; `spent` are the tokens that the search took, before its front."""
    file, space = ctx.trial.file, ctx.trial.space
    found = {
        "text": f"{ctx.corpus.source}, {len(ctx.corpus.train):,} tokens to train on",
        **({"from": ctx.origin.words} if ctx.origin else {}),
        "model": f"{space.shape.num_hidden_layers} layers of width {space.shape.hidden_size}",
        "memory": f"weights and KV cache of {file.memory.context:,} tokens × {file.memory.batch}, {file.memory.dtype}",
        "choices": ", ".join(dict.fromkeys(name.partition(".")[2] or name for name, o in space.options.items() if len(o) > 1)),
        "search": f"{file.search.evaluations} configs by {file.search.sampler}, {seen_on(ctx.trial)}",
        "models": f"{trained(ctx.trial)}; {file.final.seeds} seed(s) from {file.seed}, rate {file.final.learning_rate:g}",
    }
    if front:
        found["tokens trained in all"] = f"{spent + sum(e.tokens for e in front.evaluations):,}"
    return found


def publish(ctx: Context, saw: SearchResult, front: Front) -> None:
    """Write the run's pictures, page and tables, and log them."""
    pictures = _pictures(ctx, front)
    figure, page = write_figures(ctx, front)
    ctx.run.write("evaluations.csv", front_csv(saw.evaluations))
    ctx.run.write(f"{front.weights}.csv", front_csv(front.evaluations))
    members = [m.first for m in front.members]
    on_front = {e.config for e in members}
    rest = [e for e in front.evaluations if e.config not in on_front]
    models: dict[Kind, list[Evaluation]] = {
        "front": members,
        "preset": [e for e in rest if e.name],
        front.weights: [e for e in rest if not e.name],
    }
    ctx.tracker.log_models(models, {config.hash: path for config, path in pictures.items()})
    ctx.tracker.log_table([*front.evaluations, *saw.evaluations])
    for path in (figure, page, *_split_pictures(ctx, saw.tree)):
        ctx.tracker.log_artifact(path)
    ctx.tracker.describe(front_note(facts(ctx, saw.spent, front), members, ctx.run.name))


def _split_pictures(ctx: Context, tree: SplitTree) -> list[Path]:
    """The tree of sub-supernets, and for each split by gradients how much its options disagree."""
    if not tree.children:
        return []
    drawn = [draw_tree(tree.to_data(), ctx.run.folder / "pictures" / "splits.png")]
    for node in tree.nodes():
        if node.split is not None and node.split.distances:
            drawn.append(draw_agreement(asdict(node.split), ctx.run.folder / "pictures" / f"agreement-{node.name}.png"))
    return drawn


def write_figures(ctx: Context, front: Front) -> tuple[Path, Path]:
    """The front as `front.png` and as the page `front.html`."""
    begun = f", {front.weights} from {ctx.origin.folder.resolve().name}" if ctx.origin else ""
    title = f"{ctx.run.name}: memory against perplexity{begun}"
    figure = draw_front(front.evaluations, ctx.run.folder / "front.png", title)
    shape, memory = ctx.trial.space.shape, ctx.trial.file.memory
    page = ctx.run.write("front.html", front_page(front.evaluations, title, shape, memory))
    return figure, page


def _pictures(ctx: Context, front: Front) -> Mapping[SharingConfig, Path]:
    """Who shares what, for each member of the front."""
    folder = ctx.run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    shape, memory = ctx.trial.space.shape, ctx.trial.file.memory
    named = {m.first.config: m.label for m in front.members}
    return {c: draw_sharing(shape, c, folder / f"{c.hash}.png", memory, name) for c, name in named.items()}
