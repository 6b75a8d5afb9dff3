"""The Optuna study: proposes configs a batch at a time, and is told their losses.

Owns the study and the samplers. What is proposed is a function of the seed and of what the study was told: each batch has a
sampler of its own, seeded by the batch's number, and is told in the order in which it was proposed. So a run that is resumed
proposes the very same configs, and takes those in its journal as done.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from ..pareto import front
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import Assignment, SearchSpace
from .trial import SAMPLERS, SearchSpec

TOURNAMENT = 4
"""Of the living, so many are drawn at random, and one of their front is the parent."""


class RegularizedEvolution(BaseSampler):  # type: ignore[misc]
    """Regularised evolution (1802.01548) for two objectives, as a sampler of Optuna.

    A child has its parent's decisions, each drawn anew with a probability of one in their number. The `population` youngest
    configs within the limits live: an older one is no parent, however good, so that one lucky measurement does not rule the
    search. Decisions that the parent does not have are drawn anew. What is enqueued first, the presets, is the first population.
    """

    def __init__(self, population: int, seed: int) -> None:
        self._population, self._rng = population, random.Random(seed)
        self._parent: Mapping[str, Any] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Choose the parent."""
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        living = [t for t in done if all(value <= 0 for value in t.constraints.values())][-self._population :] or done
        drawn = self._rng.sample(living, min(TOURNAMENT, len(living)))
        best = front([(t.values[0], t.values[1]) for t in drawn])
        self._parent = drawn[self._rng.choice(best)].params if best else {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See `BaseSampler`: every decision is drawn independently."""
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Mapping[str, Any]) -> dict[str, Any]:
        """See `infer_relative_search_space`."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The parent's decision, or another."""
        assert isinstance(param_distribution, CategoricalDistribution)
        options: Sequence[Any] = param_distribution.choices
        inherited = self._parent.get(param_name)
        if inherited not in options or self._rng.random() * len(self._parent) < 1:
            return self._rng.choice(options)
        return inherited


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
    """A proposed config and its number in the search."""

    number: int
    config: SharingConfig


class Study:
    """Minimises (bytes, loss) over a space; `excess` is how far a config is beyond the limits, 0 where it meets them."""

    def __init__(self, space: SearchSpace, spec: SearchSpec, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)  # NSGA-III and TPE's groups: known, and tested here
        self.space, self.spec, self.seed = space, spec, seed
        self.study = optuna.create_study(directions=["minimize", "minimize"], sampler=RandomSampler(seed=seed))
        self._proposed: dict[int, optuna.Trial] = {}
        self._batches = 0

    def enqueue(self, assignments: Sequence[Assignment]) -> None:
        """Propose these first."""
        for assignment in assignments:
            self.study.enqueue_trial(assignment)

    def ask(self, count: int) -> list[Proposal]:
        """The next batch of configs."""
        self.study.sampler = MAKE[self.spec.sampler](self.seed * 1_000_003 + self._batches, self.spec)
        self._batches += 1
        batch = []
        for _ in range(count):
            trial = self.study.ask()
            self._proposed[trial.number] = trial
            batch.append(Proposal(trial.number, self.space.suggest(trial)))
        return batch

    def tell(self, number: int, values: tuple[float, float] | None, excess: float = 0.0) -> None:
        """Record a config's `(bytes, loss)`, or None if it failed. Batches are told in the order in which they were proposed."""
        trial = self._proposed.pop(number)
        if values is None:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_constraint("limits", excess)
        self.study.tell(trial, values)
