"""How configs are proposed: Optuna's samplers, and regularised evolution.

Owns `SAMPLERS`: a new sampler is a row there. The study that asks them is `nas.search.study`'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from ..pareto import front

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


NUMPY_SEEDS = 2**32
"""Seeds of numpy's generators, which Optuna's samplers use, are below this."""


@dataclass(frozen=True)
class Sampler:
    """A row of `SAMPLERS`: `make(seed, batch)` gives the sampler of a batch of so many configs."""

    meaning: str
    make: Callable[[int, int], BaseSampler]


SAMPLERS: dict[str, Sampler] = {
    "tpe": Sampler(
        "TPE: the best front of some hundred evaluations",
        lambda seed, batch: TPESampler(seed=seed % NUMPY_SEEDS, multivariate=True, group=True),
    ),
    "nsga2": Sampler(
        "NSGA-II: thousands of evaluations, in no time",
        lambda seed, batch: NSGAIISampler(population_size=batch, seed=seed % NUMPY_SEEDS),
    ),
    "nsga3": Sampler("NSGA-III", lambda seed, batch: NSGAIIISampler(population_size=batch, seed=seed % NUMPY_SEEDS)),
    "evolution": Sampler("regularised evolution, from the presets on", lambda seed, batch: RegularizedEvolution(2 * batch, seed)),
    "random": Sampler("random search, the baseline", lambda seed, batch: RandomSampler(seed=seed % NUMPY_SEEDS)),
}
"""The samplers, by their names in a trial."""
