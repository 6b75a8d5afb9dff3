"""How configs are proposed: Optuna's samplers, regularised evolution, and the solutions of a surrogate.

Owns `SAMPLERS`: a new sampler is a row there. The study that asks them is `nas.search.loop`'s.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from ..pareto import front
from ..sharing.memory import MemorySpec
from ..sharing.objectives import DEFAULT
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import Assignment, SearchSpace
from .surrogate import Known, Solver

TOURNAMENT = 4  # of the living, so many are drawn at random, and one of their front is the parent


@dataclass(frozen=True, eq=False)
class SamplerInputs:
    """What a sampler may know: a seed, how many configs a batch has, the space, where memory is measured, the configs of the
    study's trials by their numbers, and the objectives, perplexity the last."""

    seed: int
    batch: int
    space: SearchSpace
    memory: MemorySpec
    configs: Mapping[int, SharingConfig]
    objectives: tuple[str, ...] = DEFAULT

    @property
    def numpy_seed(self) -> int:
        """The seed for numpy's generators, which Optuna's samplers use."""
        return self.seed % 2**32


class OneByOne(BaseSampler):  # type: ignore[misc]
    """A sampler that takes each decision by itself."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Mapping[str, Any]) -> dict[str, Any]:
        return {}


class RegularizedEvolution(OneByOne):
    """Regularised evolution (1802.01548) for several objectives, as a sampler of Optuna.

    A child has its parent's decisions, each drawn anew with a probability of one in their number. The `population` youngest
    configs within the limits live: an older one is no parent, however good, so that one lucky measurement does not rule the
    search. Decisions that the parent does not have are drawn anew. What is enqueued first, the presets, is the first population.
    """

    def __init__(self, population: int, seed: int) -> None:
        self._population, self._rng = population, random.Random(seed)
        self._parent: Mapping[str, Any] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        living = [t for t in done if all(value <= 0 for value in t.constraints.values())][-self._population :] or done
        drawn = self._rng.sample(living, min(TOURNAMENT, len(living)))
        best = front([tuple(t.values) for t in drawn])
        self._parent = drawn[self._rng.choice(best)].params if best else {}

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


class SurrogateSampler(OneByOne):
    """The solutions of a surrogate that is fitted to every config that was told (`nas.search.surrogate`), for a batch at once.

    Where there is no new solution, a config is drawn from the distribution near the front.
    """

    def __init__(self, given: SamplerInputs) -> None:
        self._given, self._rng, self._least = given, random.Random(given.seed), given.space.least_sharing()
        self._solver: Solver | None = None
        self._solutions: list[Assignment] = []
        self._next: Assignment = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Solve for the batch before its first config."""
        if self._solver is None:
            given = self._given
            self._solver = Solver(given.space, given.memory, self._known(study), self._rng, given.objectives)
            self._solutions = self._solver.solve(self._given.batch)[::-1]
        self._next = self._solutions.pop() if self._solutions else self._solver.draw()

    def _known(self, study: optuna.Study) -> list[Known]:
        """What the study was told, each config once."""
        found: dict[SharingConfig, Known] = {}
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            *costs, loss = trial.values
            if math.isfinite(loss):
                decided = {name: option for name, option in trial.params.items() if option != self._least[name]}
                config = self._given.configs[trial.number]
                found.setdefault(config, Known(config, decided, tuple(costs), loss))
        return list(found.values())

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The solution's decision, or else the option that shares least."""
        return self._next.get(param_name, self._least[param_name])


@dataclass(frozen=True)
class Sampler:
    """A row of `SAMPLERS`: `make` gives the sampler of one batch of configs. In a search from a base model, a part `single` of
    all evaluations are single decisions, before it proposes any."""

    meaning: str
    make: Callable[[SamplerInputs], BaseSampler]
    single: float = 0.5


SAMPLERS: dict[str, Sampler] = {
    "tpe": Sampler(
        "TPE: the best front of some hundred evaluations",
        lambda given: TPESampler(seed=given.numpy_seed, multivariate=True, group=True),
    ),
    "nsga2": Sampler(
        "NSGA-II: thousands of evaluations, in no time",
        lambda given: NSGAIISampler(population_size=given.batch, seed=given.numpy_seed),
    ),
    "nsga3": Sampler("NSGA-III", lambda given: NSGAIIISampler(population_size=given.batch, seed=given.numpy_seed)),
    "evolution": Sampler(
        "regularised evolution, from the presets on", lambda given: RegularizedEvolution(2 * given.batch, given.seed)
    ),
    "surrogate": Sampler(
        "solutions of what single decisions cost, corrected by what was evaluated", SurrogateSampler, single=0.1
    ),
    "random": Sampler("random search, the baseline", lambda given: RandomSampler(seed=given.numpy_seed)),
}
"""The samplers, by their names in a trial."""
