"""The Optuna study: asks for configs a batch at a time and is told what became of them.

Owns the study; the one sampler that is not Optuna's own is `evolution`'s. What is asked is a function of the seed and of what was
told, and of nothing else: each batch has a sampler of its own, seeded by the batch's number, and is told in the order in which it
was asked. So a run that is resumed asks for the very same configs, and takes those that its journal holds as done.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from ..sharing.sharing_config import SharingConfig
from ..sharing.space import Assignment, SearchSpace
from .evolution import RegularizedEvolution
from .trial import SAMPLERS, SearchSpec

MAKE: dict[str, Callable[[int, SearchSpec], BaseSampler]] = {
    "nsga2": lambda seed, spec: NSGAIISampler(population_size=spec.batch, seed=seed),
    "nsga3": lambda seed, spec: NSGAIIISampler(population_size=spec.batch, seed=seed),
    "tpe": lambda seed, spec: TPESampler(seed=seed, multivariate=True, group=True),
    "evolution": lambda seed, spec: RegularizedEvolution(2 * spec.batch, seed),
    "random": lambda seed, spec: RandomSampler(seed=seed),
}
assert MAKE.keys() == SAMPLERS.keys()


@dataclass(frozen=True)
class Proposal:
    """One proposed config and its number in the search."""

    number: int
    config: SharingConfig


class Study:
    """Minimises (bytes, loss) over a space; `excess` is how far a config is beyond the limits, 0 where it meets them."""

    def __init__(self, space: SearchSpace, spec: SearchSpec, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)  # NSGA-III and TPE's groups: known, and tested here
        self.space, self.spec, self.seed = space, spec, seed
        self.study = optuna.create_study(directions=["minimize", "minimize"], sampler=RandomSampler(seed=seed))
        self._asked: dict[int, optuna.Trial] = {}
        self._batches = 0

    def enqueue(self, assignments: Sequence[Assignment]) -> None:
        """Ask for these first."""
        for assignment in assignments:
            self.study.enqueue_trial(assignment)

    def ask(self, count: int) -> list[Proposal]:
        """The next batch of configs."""
        self.study.sampler = MAKE[self.spec.sampler](self.seed * 1_000_003 + self._batches, self.spec)
        self._batches += 1
        asked = []
        for _ in range(count):
            trial = self.study.ask()
            self._asked[trial.number] = trial
            asked.append(Proposal(trial.number, self.space.suggest(trial)))
        return asked

    def tell(self, number: int, values: tuple[float, float] | None, excess: float = 0.0) -> None:
        """What became of a config: `(bytes, loss)`, or None if it failed. Tell a batch in the order it was asked."""
        trial = self._asked.pop(number)
        if values is None:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_constraint("limits", excess)
        self.study.tell(trial, values)
