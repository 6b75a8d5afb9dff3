"""The Optuna study: proposes configs a batch at a time, and is told their losses.

Owns the study. What is proposed is a function of the seed and of what the study was told: each batch has a
sampler of its own, seeded by the batch's number, and is told in the order in which it was proposed. So a run that is resumed
proposes the very same configs, and takes those in its journal as done.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from ..pareto import Point
from ..sharing.memory import MemorySpec
from ..sharing.objectives import DEFAULT
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import Assignment, SearchSpace
from .samplers import SAMPLERS, SamplerInputs
from .trial import SearchSpec


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
        """Propose these first."""
        for assignment in assignments:
            self.study.enqueue_trial(assignment)

    def ask(self, count: int) -> list[Proposal]:
        """The next batch of configs."""
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
