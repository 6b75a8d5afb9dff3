"""Starting a run, and resuming one: everything is checked before anything is written.

Owns what happens before and around the stages: checks, the summary of what will be done, the executor, the tracker.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..data import Corpus, ShowStage, load_corpus, open_texts
from ..errors import RunFailed, UserError, did_you_mean, one_of
from ..export.measure import require_tasks
from ..files import require_writable
from ..sharing.objectives import said_limit
from ..sharing.primitives import OWN
from ..sharing.space import SpaceSize
from ..tracking import Tracker, sync, unsent
from ..workers import Executor, executor
from .budget import Budget, budget_lines
from .context import BaseModel, Context, presets_in, read_base_model, require_base_model, require_tokenizer
from .evaluators import EVALUATORS
from .final import require_score, score_front, train_base_model, train_final
from .front import Front
from .progress import BUDGET, Progress, Recorded, StageBudget, forget_after, read_budget
from .publish import publish, start_tracking
from .run import FRONT, Run, provenance, require_free, require_parts
from .trial import Trial
from .trial_file import require_name


@dataclass(frozen=True)
class Launch:
    """How a search is started: the trial's file, the folder of runs, and overrides from the command line; `settings` are those of
    the trial's own keys (`Document.with_settings`)."""

    trial: Path
    runs: Path
    name: str | None = None
    address: str | None = None
    workers: int | None = None
    overwrite: bool = False
    settings: tuple[str, ...] = ()

    def folder(self, name: str) -> Path:
        """Where the run is, or will be, given the name in the file. Raises UserError if nothing can be written there."""
        if self.name is not None:
            require_name(self.name, "--name")
        folder = self.runs / (name if self.name is None else self.name)
        require_writable(folder)
        return folder

    def command(self, name: str) -> str:
        """What a person types to start the same again."""
        said = {"name": self.name, "runs": None if self.runs == Path("runs") else self.runs, "workers": self.workers}
        options = (f"--{option}={value}" for option, value in said.items() if value is not None)
        return shlex.join(["nas", name, str(self.trial), *options, *(f"--set={setting}" for setting in self.settings)])


@dataclass(frozen=True)
class Ready:
    """A search that was checked and planned, before anything is written."""

    trial: Trial
    corpus: Corpus
    base_model: BaseModel | None
    work: Executor
    budget: list[StageBudget]


def start(launch: Launch, progress: Progress) -> tuple[Run, Front]:
    """Check a trial, make its run, and run it. Raises UserError before anything is written, RunFailed after."""
    with _launched(launch, progress) as (ready, folder):
        if launch.overwrite and (folder / "trial.yaml").is_file():
            Run(folder).remove()
        trial, corpus, base_model = ready.trial, ready.corpus, ready.base_model
        made = provenance(trial.file.name, trial.file.seed, corpus, launch.command("search"))
        made |= base_model.provenance() if base_model else {}
        run = Run.create(folder, trial, corpus, made, base_model.metadata if base_model else None)
        with run.locked():
            run.write_json(BUDGET, {"stages": list(map(asdict, ready.budget))})
            return run, _run(run, trial, corpus, base_model, progress, ready.work)


def dry_run(launch: Launch, progress: Progress) -> list[StageBudget]:
    """Check a trial and plan it, as `start` does before it writes anything. Raises UserError."""
    with _launched(launch, progress) as (ready, _):
        return ready.budget


@contextmanager
def _launched(launch: Launch, progress: Progress) -> Iterator[tuple[Ready, Path]]:
    trial = Trial.load(launch.trial, settings=launch.settings)
    trial = _placed(trial, launch.address, launch.workers)
    folder = launch.folder(trial.file.name)
    require_free(folder, launch.overwrite)
    if trial.file.tracking.enabled:
        trial.file.tracking.resolve(launch.runs)
    with planned(trial, progress) as ready:
        yield ready, folder


@contextmanager
def planned(trial: Trial, progress: Progress) -> Iterator[Ready]:
    """A trial that is checked, and whose cost is estimated on its workers; what will be done is said. Raises UserError."""
    corpus, size = check(trial, progress.stage)
    base_model = read_base_model(trial, corpus)
    for line in summary(trial, corpus, size, base_model):
        progress.say(line)
    with executor(trial.file.run) as work:
        progress.say(workers_line(work, trial))
        yield Ready(trial, corpus, base_model, work, _budget(trial, base_model, progress, work))


def _budget(trial: Trial, base_model: BaseModel | None, progress: Progress, work: Executor) -> list[StageBudget]:
    """What each stage will take; it is said as well."""
    budget = Budget(trial, base_model.dtype if base_model else torch.float32, work)
    found = budget.timed()
    for line in budget_lines(found, budget.state_bytes):
        progress.say(line)
    return found


def resume(
    run: Run, progress: Progress, address: str | None = None, workers: int | None = None, tracking: str | None = None
) -> Front:
    """Go on with a run from where it stands; of a finished one only what MLflow lacks is written. `address` and `workers` are
    this time's, in place of the trial's. It is tracked as `TrackingSpec.of_run` says: `tracking` is an address, or `none`.

    Raises UserError if another process works on it, its text or its base model has changed, or it was tracked elsewhere.
    """
    if run.has(FRONT):
        if unsent(run.folder) and run.trial().file.tracking.of_run(run.folder, tracking, "nas resume").enabled:
            try:
                progress.say(f"mlflow  {sync(run.folder, tracking)} entries written that MLflow had not taken")
            except UserError as error:  # that it does not answer is no reason to give no front
                progress.say(f"mlflow  {error}")
        return run.front()
    with run.locked():
        return _resume(run, _placed(run.trial(), address, workers), progress, tracking)


def extend(
    run: Run,
    progress: Progress,
    evaluations: int | str | None = None,
    candidates: int | str | None = None,
    address: str | None = None,
    workers: int | None = None,
    tracking: str | None = None,
) -> Front:
    """Go on with a run, finished or stopped, to more evaluations and candidates (`Trial.extended`), from all that was measured.

    The search proposes what it would have proposed with so many evaluations from the start. Candidates are chosen anew from all
    of them; those that are not trained yet are trained, and models of before stay. Raises as `resume` does, before anything is
    changed.
    """
    with run.locked():
        extended = run.trial().extended(evaluations, candidates)
        return _resume(run, _placed(extended, address, workers), progress, tracking, extended)


def _resume(run: Run, trial: Trial, progress: Progress, tracking: str | None, extended: Trial | None = None) -> Front:
    where = trial.file.tracking.of_run(run.folder, tracking, "nas resume")
    trial = replace(trial, file=replace(trial.file, tracking=where))
    corpus, _ = check(trial, progress.stage)
    began = run.provenance()
    require_parts(run)
    if corpus.sha256 != began["text_sha256"]:
        hint = "put the old text back, or start a new run"
        raise UserError("the text is not the one this run began with", where=trial.file.data.text, hint=hint)
    base_model = read_base_model(trial, corpus)
    if base_model and base_model.sha256 != began["from_sha256"]:
        hint = "put the old weights back, or start a new run"
        raise UserError("the base model is not the one this run began with", where=str(base_model.folder), hint=hint)
    with executor(trial.file.run) as work:
        progress.say(workers_line(work, trial))
        if extended:
            progress.say(f"extend  to {trial.file.search.evaluations} evaluations and {trial.file.final.candidates} candidates")
            planned = _budget(trial, base_model, progress, work)
            run.reopen(extended)
            run.write_json(BUDGET, {"stages": list(map(asdict, planned))})
            forget_after(run.folder, "search")
        return _run(run, trial, corpus, base_model, progress, work)


def _placed(trial: Trial, address: str | None, workers: int | None) -> Trial:
    return replace(trial, file=replace(trial.file, run=trial.file.run.with_given(address, workers)))


def _run(run: Run, trial: Trial, corpus: Corpus, base_model: BaseModel | None, progress: Progress, work: Executor) -> Front:
    """Every stage: train the base model, if the trial asks for it, and the evaluator; search, train the candidates, publish."""
    with Tracker(trial.file.tracking, run.folder, trial.file.name) as tracker:
        progress = Recorded(progress, run.folder, read_budget(run.folder), tracker.log_series, run.began)
        ctx = Context(run, trial, corpus, progress, tracker, work, base_model)
        start_tracking(ctx)
        if trial.file.dense:
            ctx = replace(ctx, base_model=train_base_model(ctx))
        evaluator = EVALUATORS[trial.evaluator].train(ctx)
        searched = evaluator.search()
        front = score_front(ctx, train_final(ctx, evaluator, evaluator.compared(searched)))
        publish(ctx, evaluator, searched, front)
        if not run.has("trial.yaml"):  # what was written since is not a run
            raise RunFailed(f"{run.folder} was deleted, or moved, while it was worked on")
        tracker.end()  # before the front is there: of a run that has one, `resume` sends no more than the outbox holds
        run.write_json(FRONT, front.to_data())
        return front


def check(trial: Trial, stage: ShowStage | None = None) -> tuple[Corpus, SpaceSize]:
    """Check what can be wrong although the trial's file is right, in its text, too. Raises UserError."""
    size = check_unread(trial)
    corpus = load_corpus(trial.file.data, trial.space.shape.vocab_size, trial.base, stage)
    for seq in trial.lengths.values():
        corpus.require(seq)
    return corpus, size


def check_unread(trial: Trial) -> SpaceSize:
    """Check all of it that takes no time: decisions, limits, base model, text files, tokenizer; neither text nor weights are
    read. Raises UserError."""
    file = trial.file
    if trial.evaluator not in EVALUATORS:
        hint = did_you_mean(trial.evaluator, EVALUATORS)
        raise UserError(f"unknown evaluator {trial.evaluator!r}", where="search.evaluator", hint=hint)
    for key, spec in trial.trainings.items():
        file.run.require_batch(spec.batch, f"{key}.batch")
    if file.split:
        file.split.check(trial.space, file.memory)
    theirs = require_base_model(trial)
    _, tokenizer = open_texts(file.data, trial.space.shape.vocab_size, trial.base)
    if theirs:
        require_tokenizer(trial, theirs, tokenizer.json if tokenizer else None)
    if trial.tasks:
        require_score(file.final.objective, require_tasks(trial.tasks))
    size = trial.space.size(file.memory)
    trial.space.require_reachable(size)
    return size


def summary(trial: Trial, corpus: Corpus, size: SpaceSize, base_model: BaseModel | None = None) -> list[str]:
    """What will be done, before anything is trained."""
    file, shape = trial.file, trial.space.shape
    limits = ", ".join(said_limit(name, limit) for name, limit in trial.space.limits.items())
    model, memory = f"model   {shape.words}", file.memory
    where = f"{memory.batch} × {memory.context:,} tokens in {memory.dtype}, with random weights"
    return [
        f"text    {corpus.summary}",
        f"from    {base_model.summary}" if base_model else model,
        f"space   {size.summary()}" + (f"; limits: {limits}" if limits else ""),
        f"search  {file.search.evaluations} configs by {file.search.sampler}, {trial.search_summary}; "
        f"{file.final.candidates} candidates {trial.final_summary}",
        *([f"measure {', '.join(trial.measured)}: {where}"] if trial.measured else ()),
        *(f"note    {note}" for note in (*(base_model.notes if base_model else ()), *_warnings(trial))),
    ]


def workers_line(work: Executor, trial: Trial) -> str:
    """The plan's line on who computes, on which devices and in which dtype."""
    autocast = {spec.autocast for spec in (trial.file.final, trial.file.supernet) if spec}
    dtype = " and ".join("bfloat16" if each else "float32" for each in sorted(autocast, reverse=True))
    return f"run     {work.summary}, in {dtype} with weights in float32"


def _warnings(trial: Trial) -> Iterator[str]:
    seq, search, workers = trial.file.final.seq, trial.file.search, trial.file.run.workers
    windows = {w for name, found in trial.space.options.items() if name.endswith(".window") for w in found}
    if unused := sorted(w for w in windows if w != OWN and w >= seq):  # they save cache, and no training feels them
        yield f"sequences of {seq} tokens are too short for windows of {one_of(unused)}: they seem to cost nothing"
    if trial.file.predictor:  # a proxy training may be a preset's, so that a little more may be left
        proxies, presets = trial.predictor.configs, len(presets_in(trial.space, trial.file.memory)) * search.presets
        left, enough = max(search.evaluations - proxies - presets, 0), 2 * (proxies + presets)
        if search.evaluations < enough:
            first = f"{proxies} configs of proxy trainings and {presets} presets are proposed first"
            yield f"{first}, which leaves the sampler some {left}: search.evaluations of {enough} or more cost nothing"
    if trial.evaluator == "supernet" and search.batch < workers:  # a batch is evaluated whole before the next is proposed
        idle = f"leave {workers - search.batch} of {workers} workers idle: search.batch of {4 * workers}"
        yield f"batches of {search.batch} configs {idle}"
