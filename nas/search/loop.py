"""The search itself: configs are proposed in batches, evaluated, and told to the study.

Owns this loop, the Optuna study, what is proposed first, and what is written to the journal. What is proposed is a function of
the seed and of what the study was told: each batch has a sampler of its own, seeded by the batch's number, and is told in the
order in which it was proposed. So a run that is resumed proposes the very same configs, and takes those in its journal as done.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from ..pareto import Point, front, hypervolume, reference_point
from ..report.page import front_page
from ..sharing.label import names_of
from ..sharing.memory import MemorySpec
from ..sharing.objectives import DEFAULT
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import Assignment, SearchSpace
from ..training.evaluation import Evaluation, Stopwatch
from ..workers import Failure
from .context import Context
from .progress import Stage
from .samplers import SAMPLERS, SamplerInputs
from .trial_file import SearchSpec


@dataclass(frozen=True)
class Proposal:
    """A proposed config and its number in the search."""

    number: int
    config: SharingConfig


class Study:
    """Minimises the costs of objectives, and the loss, over a space; `excess` is how far a config is beyond the limits, 0 where
    it meets them."""

    def __init__(
        self,
        space: SearchSpace,
        spec: SearchSpec,
        seed: int,
        memory: MemorySpec = MemorySpec(),  # noqa: B008
        objectives: tuple[str, ...] = DEFAULT,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)  # NSGA-III and TPE's groups: known, and tested here
        self.space, self.spec, self.seed, self.memory, self.objectives = space, spec, seed, memory, objectives
        self.study = optuna.create_study(directions=["minimize"] * len(objectives), sampler=RandomSampler(seed=0))
        self._configs: dict[int, SharingConfig] = {}
        self._proposed: dict[int, optuna.Trial] = {}
        self._batches = 0

    def enqueue(self, assignments: Sequence[Assignment]) -> None:
        for assignment in assignments:
            self.study.enqueue_trial(assignment)

    def ask(self, count: int) -> list[Proposal]:
        seed = self.seed * 1_000_003 + self._batches
        given = SamplerInputs(seed, self.spec.batch, self.space, self.memory, self._configs, self.objectives)
        self.study.sampler = SAMPLERS[self.spec.sampler].make(given)
        self._batches += 1
        batch = []
        for _ in range(count):
            trial = self.study.ask()
            self._proposed[trial.number] = trial
            self._configs[trial.number] = self.space.suggest(trial)
            batch.append(Proposal(trial.number, self._configs[trial.number]))
        return batch

    def tell(self, number: int, values: Point | None, excess: float = 0.0) -> None:
        """Record a config's `(*costs, loss)`, or None if it failed. Batches are told in the order in which they were proposed."""
        trial = self._proposed.pop(number)
        if values is None:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_constraint("limits", excess)
        self.study.tell(trial, values)


Evaluate = Callable[[Sequence[Proposal]], Iterator[tuple[Proposal, Evaluation | Failure]]]
"""Yields each proposal with its evaluation, or why it has none, as they come."""


def neighbours(space: SearchSpace, config: SharingConfig) -> dict[SharingConfig, Assignment]:
    """A config of the space and all that differ from it by one decision, each with its assignment; empty for another config."""
    decided = space.encode(config)
    if decided is None:
        return {}
    found = {config: decided}
    setting = {name: options[0] for name, options in space.options.items()} | decided
    for name, options in space.options.items():
        for option in options:
            other, assignment = space.decode_setting(setting | {name: option})
            found.setdefault(other, assignment)
    return found


REFRESH = 60.0  # seconds between two pages of the front so far, which have some megabytes


@dataclass
class SearchLoop:
    """A search under way. No config is evaluated twice. With `dry_run` nothing is written. `first` are proposed before the
    sampler proposes anything, after the presets."""

    ctx: Context
    evaluate: Evaluate
    first: Collection[SharingConfig] = ()
    dry_run: bool = False
    found: dict[SharingConfig, Evaluation] = field(default_factory=dict)
    failed: dict[SharingConfig, str] = field(default_factory=dict)
    _reference: Point | None = None
    _since_page: Stopwatch = field(default_factory=Stopwatch)

    def run(self) -> list[Evaluation]:
        """Every evaluation of the search, in the order in which configs were first proposed."""
        if not self.dry_run:
            self._read_journal()
        spec = self.ctx.trial.file.search
        trial = self.ctx.trial
        study = Study(trial.space, spec, trial.file.seed, trial.file.memory, trial.objectives)
        first = self._proposed_first()
        study.enqueue(first)
        proposed: dict[SharingConfig, int] = {}
        wanted = spec.planned if self.dry_run else spec.evaluations
        with self.ctx.progress.stage("dry run" if self.dry_run else "search", wanted, "configs") as bar:
            done = 0
            while done < wanted:
                batch = study.ask(min(max(spec.batch, len(first) if not done else 0), wanted - done))
                for proposal in batch:
                    proposed.setdefault(proposal.config, proposal.number)
                self._evaluate_batch(batch, bar, done)
                for proposal in batch:
                    self._tell(study, proposal)
                done += len(batch)
                self._show(bar, done, self._found_of(proposed))
        return self._found_of(proposed)

    def _proposed_first(self) -> list[Assignment]:
        """The presets, `first` and, in a search from a base model, configs with one decision that differs from it."""
        space, spec = self.ctx.trial.space, self.ctx.trial.file.search
        named = list(dict.fromkeys([*(self.ctx.presets if spec.presets else ()), *self.first]))
        found = [space.encode(config) or {} for config in named]
        if self.ctx.base_model is None:
            return found
        alone = [a for config, a in neighbours(space, SharingConfig.dense(space.shape)).items() if config not in named]
        dense, single = alone[:1], alone[1:]
        count = min(len(single), max(int(spec.planned * SAMPLERS[spec.sampler].single) - 1, 0))
        return [*found, *dense, *random.Random(self.ctx.trial.file.seed).sample(single, count)]

    def _found_of(self, configs: Iterable[SharingConfig]) -> list[Evaluation]:
        return [self.found[config] for config in configs if config in self.found]

    def _read_journal(self) -> None:
        shape = self.ctx.trial.space.shape
        for entry in self.ctx.run.journal().read():
            if "failure" in entry:
                self.failed[SharingConfig.from_data(shape, entry["config"])] = entry["failure"]
            else:
                evaluation = Evaluation.from_data(shape, entry, self.ctx.trial.objectives)
                self.found[evaluation.config] = evaluation

    def _evaluate_batch(self, batch: Sequence[Proposal], bar: Stage, done: int) -> None:
        """Evaluate the batch's configs that are new and within the limits, also of what is measured first; each is in the journal
        as soon as it is done."""
        space, memory = self.ctx.trial.space, self.ctx.trial.file.memory
        new: dict[SharingConfig, Proposal] = {}
        for proposal in batch:
            config = proposal.config
            if config not in self.found and config not in self.failed and space.meets_limits(config, memory):
                new.setdefault(config, proposal)
        unmeasured = self.ctx.measure(new).items()
        results = [(new.pop(config), Failure(f"it could not be measured: {reason}")) for config, reason in unmeasured]
        within = [proposal for config, proposal in new.items() if not self.ctx.excess(config)]
        for count, (proposal, result) in enumerate(itertools.chain(results, self.evaluate(within)), 1):
            config = proposal.config
            if isinstance(result, Failure):
                self.failed[config] = result.reason
                head = {"number": proposal.number, **names_of(config)}
                entry = head | {"config": config.to_data(), "failure": result.reason}
            else:
                self.found[config] = result
                entry = result.to_data()
            if not self.dry_run:
                self.ctx.run.journal().append(entry)
                if isinstance(result, Failure):
                    self.ctx.tracker.log_failures(self.failed)
            bar.update(min(done + count, done + len(batch)))

    def _tell(self, study: Study, proposal: Proposal) -> None:
        if proposal.config in self.found:
            loss: float | None = self.found[proposal.config].losses.loss_nats_per_token
        else:
            loss = None if proposal.config in self.failed else float("inf")
        values = None if loss is None else (*self.ctx.costs(proposal.config), loss)
        study.tell(proposal.number, values, self.ctx.excess(proposal.config))

    def _show(self, bar: Stage, done: int, evaluations: Sequence[Evaluation]) -> None:
        """Show and log the front so far. The reference point is that of the first batch, so that hypervolumes compare."""
        if not evaluations:
            return bar.update(done)
        points = [e.point for e in evaluations]
        self._reference = self._reference or reference_point(points)
        members = front(points)
        bar.update(done, f"front of {len(members)}, perplexity from {min(point[-1] for point in points):.2f}", evaluations)
        if not self.dry_run:
            self.ctx.tracker.log_series("hypervolume", hypervolume(points, self._reference), done)
            if self._since_page.seconds > REFRESH:
                self._refresh_page(evaluations)

    def _refresh_page(self, evaluations: Sequence[Evaluation]) -> None:
        """Write the page of the front so far, and log it; that of the models of the front will take its place."""
        run, trial = self.ctx.run, self.ctx.trial
        title = f"{run.name}: the search so far, before its models are trained"
        page = front_page(evaluations, title, trial.space.shape, trial.file.memory)
        self.ctx.tracker.log_artifact(run.write("front.html", page))
        self._since_page = Stopwatch()
