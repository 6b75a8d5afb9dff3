"""Starting a run, and going on with one: everything is checked before anything is written.

Owns what happens before and after the stages: checking, saying what the space can reach, the cluster, the tracker.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from ..data import Corpus, eval_sequences, load_corpus
from ..errors import UserError, one_of
from ..sharing.primitives import OWN
from ..sharing.space import SpaceSize
from ..tracking import Tracker, sync, unsent
from ..workers import Executor, RunSpec, executor
from .context import Context, published
from .conversions import convert_all
from .final import Front
from .inherited import SupernetEvaluator
from .loop import Search
from .origin import BaseModel, read_base_model, require_base_model
from .predicted import learn
from .progress import Progress
from .publish import SearchResult, publish, seen_on, start_tracking, trained
from .retrain import candidates, retrain
from .run import FRONT, Run, provenance
from .supernets import train_supernets
from .trial import Trial


@dataclass(frozen=True)
class Launch:
    """How a search is started: the trial's file, where runs lie, and what the command line says otherwise."""

    trial: Path
    runs: Path
    name: str | None = None
    address: str | None = None
    workers: int | None = None
    overwrite: bool = False

    def run(self, spec: RunSpec) -> RunSpec:
        """Where work runs, by a file and by what the command line says otherwise."""
        workers = spec.workers if self.workers is None else self.workers
        return replace(spec, address=self.address or spec.address, workers=workers)


def start(launch: Launch, progress: Progress) -> tuple[Run, Front]:
    """Check a trial, make its run and carry it through. Raises UserError before anything is written, RunFailed after."""
    trial = Trial.load(launch.trial)
    trial = _with_run(trial, launch.run(trial.file.run))
    folder = launch.runs / (launch.name or trial.file.name)
    corpus, reach = check(trial)
    origin = read_base_model(trial, corpus)
    for line in plan(trial, corpus, reach, origin):
        progress.say(line)
    with executor(trial.file.run) as work:
        if launch.overwrite and (folder / "trial.yaml").is_file():
            Run(folder).remove()
        command = f"nas search {shlex.quote(str(launch.trial))}"
        made = provenance(trial.file.name, trial.file.seed, corpus, command, origin)
        run = Run.create(folder, trial, corpus, made, origin.extras if origin else None)
        return run, _run(run, trial, corpus, origin, progress, work)


def resume(run: Run, progress: Progress, address: str | None = None) -> Front:
    """Go on with a run from where it stands; of a finished one only what MLflow lacks is written.

    Raises UserError if its text or its checkpoint has changed.
    """
    if run.has(FRONT):
        if unsent(run.folder):
            progress.say(f"mlflow  {sync(run.folder)} entries written that MLflow had not taken")
        return run.front()
    trial = run.trial()
    if address:
        trial = _with_run(trial, replace(trial.file.run, address=address))
    corpus, _ = check(trial)
    if corpus.sha256 != run.read_json("run.json")["text_sha256"]:
        hint = "put the old text back, or start a new run"
        raise UserError("the text is not the one this run began with", where=trial.file.data.text, hint=hint)
    origin = read_base_model(trial, corpus)
    if origin:
        origin.require(run.read_json("run.json")["from_sha256"])
    with executor(trial.file.run) as work:
        return _run(run, trial, corpus, origin, progress, work)


def check(trial: Trial) -> tuple[Corpus, SpaceSize]:
    """Everything about a trial that can be wrong without its file being wrong: text, limits, lengths, decisions."""
    file, shape = trial.file, trial.space.shape
    lengths = {file.final.seq} | ({file.supernet.seq} if file.supernet else set())
    longest = max(*lengths, file.memory.context)
    if longest > shape.max_position_embeddings:
        message = f"{longest} tokens are more than the model's max_position_embeddings={shape.max_position_embeddings}"
        raise UserError(message, where=file.name, hint="shorten seq and memory.context, or raise max_position_embeddings")
    if file.split:
        file.split.check(trial.space)
    require_base_model(trial)
    reach = trial.space.size(file.memory)
    trial.space.require_reachable(reach)
    corpus = load_corpus(file.data, shape.vocab_size, trial.base)
    for seq in lengths:
        eval_sequences(corpus.eval, seq, 1)
        eval_sequences(corpus.train, seq, 1)
    return corpus, reach


def plan(trial: Trial, corpus: Corpus, reach: SpaceSize, origin: BaseModel | None = None) -> list[str]:
    """What is about to be done, before anything is trained."""
    file, shape = trial.file, trial.space.shape
    limits = ", ".join(f"{name} ≤ {limit:,}" for name, limit in trial.space.limits.items())
    model = f"model   {shape.num_hidden_layers} layers of width {shape.hidden_size}"
    return [
        f"text    {corpus.source}: {len(corpus.train):,} tokens to train on, {len(corpus.eval):,} to evaluate on",
        f"from    {origin.words}" if origin else model,
        f"space   {reach.summary()}" + (f"; limits: {limits}" if limits else ""),
        f"search  {file.search.evaluations} configs by {file.search.sampler}, {seen_on(trial)}; "
        f"{file.final.candidates} candidates {trained(trial)}",
        *(f"note    {note}" for note in (origin.notes if origin else ())),
        *_warn_unused_windows(trial),
        *_warn_small_budget(trial),
    ]


def _warn_small_budget(trial: Trial) -> list[str]:
    """Lessons and published schemes are asked first; a person should know if that leaves the sampler the smaller half.

    A lesson may be a published scheme, so it may be left a little more.
    """
    if trial.file.predictor is None:
        return []
    space, search = trial.space, trial.file.search
    within = sum(space.meets_limits(config, trial.file.memory) for config in published(space))
    lessons, schemes = trial.predictor.configs, within * search.presets
    left, enough = max(search.evaluations - lessons - schemes, 0), 2 * (lessons + schemes)
    if search.evaluations >= enough:
        return []
    what = f"{lessons} configs that it learns from and {schemes} published schemes are asked first"
    return [f"note    {what}, which leaves the sampler some {left}: search.evaluations of {enough} or more cost nothing"]


def _warn_unused_windows(trial: Trial) -> list[str]:
    """Windows that no row is long enough for save cache and cost no perplexity: a person should know."""
    seq, options = trial.file.final.seq, trial.space.options.items()
    idle = sorted({w for name, found in options if name.endswith(".window") for w in found if w != OWN and w >= seq})
    return [f"note    rows of {seq} tokens do not feel windows of {one_of(idle)}: they seem to cost nothing"] if idle else []


def _with_run(trial: Trial, run: RunSpec) -> Trial:
    return replace(trial, file=replace(trial.file, run=run))


def _run(run: Run, trial: Trial, corpus: Corpus, origin: BaseModel | None, progress: Progress, work: Executor) -> Front:
    with run.locked(), Tracker(trial.file.tracking, run.folder, trial.file.name) as tracker:
        ctx = Context(run, trial, corpus, progress, tracker, work, origin)
        start_tracking(ctx)
        saw, front = _predicted(ctx) if trial.file.predictor else _inherited(ctx)
        publish(ctx, saw, front)
        run.write_json(FRONT, front.to_data())
        return front


def _predicted(ctx: Context) -> tuple[SearchResult, Front]:
    """A search by what a few trainings tell of all others; candidates are what adds to what is trained anyway."""
    learned = learn(ctx)
    searched = learned.search()
    always = list(ctx.presets) if ctx.trial.file.final.presets else []
    chosen = learned.select_candidates(searched, ctx.trial.file.final.candidates, there=always)
    return SearchResult(searched, learned.spent), retrain(ctx, [*chosen, *always], searched)


def _inherited(ctx: Context) -> tuple[SearchResult, Front]:
    """A search on the weights of supernets, and of a checkpoint's conversions if it is from one."""
    converted, supernets = convert_all(ctx), train_supernets(ctx)
    with SupernetEvaluator(ctx, supernets) as judge:
        searched = Search(ctx, judge).run()
    seen = [*converted, *searched]
    front = retrain(ctx, candidates(ctx, seen), seen, supernets)
    return SearchResult([*searched, *converted], supernets.spent, supernets.tree), front
