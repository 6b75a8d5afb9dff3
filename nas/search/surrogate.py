"""The surrogate of a search: what single decisions cost, added up and compounded, corrected by all configs that were evaluated.

Owns the model of the loss (`Surrogate`), and the solutions that it proposes (`Solver`): configs of few decisions other than those
of the best that are known, at every amount of memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..sharing.distribution import NOISE, ConfigDistribution, single_decisions
from ..sharing.memory import MemorySpec
from ..sharing.objectives import DEFAULT, config_costs
from ..sharing.primitives import PRIMITIVES
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import Assignment, Decision, SearchSpace, SingleDecision
from .candidates import Numbers, greedy_hypervolume

EPSILON = 0.02  # nats added to every loss increase before its logarithm is taken
HORIZON = 4.0  # a config that loses more nats a token than this to the best is of no worth, however small
USUAL = math.log(0.1), 2.0  # mean and standard deviation of the logarithm of what any option costs, before anything is known

LAYER, PRIMITIVE, BOTH, ALONE = 0.85, 0.7, 0.5, 0.3
"""Standard deviations of the logarithm of an option's cost: of what it has in common with its layer, with its primitive, with
both in layers nearby, and with nothing."""

NEARBY = 2.0  # layers over which costs are alike

INTERACTION, ALIKE = 0.3, 8.0
"""Standard deviation of what a config's loss increase is beside its options' costs, and the number of options over which that is
alike."""

JITTER = 0.02  # the standard deviation of an evaluation's loss increase, as a part of it
MOST = 1_000  # the most evaluations that the surrogate is fitted to: those with the least loss for their costs
ROUNDS = 12  # linearisations of the model

GENERATIONS, CHILDREN, PARENTS = 4, 6, 40
"""How configs are bred on the surrogate: generations, children in each for a proposal, and parents."""

TRUSTED = 2
"""Half of the proposals differ by so many options at most from a config that was evaluated and lost less than `HORIZON`: where
little is known, configs of many options are mostly broken."""

MUTATIONS = 1.0  # the mean number of changes of a child beyond the first
PER_PROPOSAL = 8  # configs of the best predicted losses, for each that is proposed, among which the expected hypervolume decides
DRAWS = 64  # draws of the losses around what is predicted


@dataclass(frozen=True)
class Known:
    """A config that was evaluated, with its decisions other than those that share least, what else is minimised and its loss."""

    config: SharingConfig
    decided: Assignment
    costs: tuple[float, ...]
    loss: float


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The loss of a config by the options that it takes.

    Options cost what they do alone, and costs compound: with s their sum, the loss increase is s (1 + s) but for interactions.
    The logarithms of the costs are a Gaussian process over layers and primitives. So are the interactions, as a factor, over sets
    of options; their covariance falls exponentially with the number of options in which two configs differ. Both follow from all
    that was evaluated, single decisions or many, by a Gauss-Newton fit; where little is like a config, its error is large.
    """

    columns: Mapping[tuple[str, Any], int]
    prior: Numbers
    rows: Numbers
    targets: Numbers
    base: float

    @staticmethod
    def fit(singles: Sequence[SingleDecision], known: Sequence[Known]) -> Surrogate:
        """The surrogate of known configs and of the single decisions whose loss increases are known."""
        columns = {(one.decision, one.option): n for n, one in enumerate(singles)}
        base = next((one.loss for one in known if not one.decided), min(one.loss for one in known))
        empty = Surrogate(columns, _covariance(singles), np.zeros((0, len(columns))), np.zeros(0), base)
        alone = {(one.decision, one.option): one.loss_increase for one in singles if one.loss_increase is not None}
        rows = empty.encode([*({name: option} for name, option in alone), *(one.decided for one in known)])
        increase = np.array([*alone.values(), *(one.loss - base for one in known)])
        return replace(empty, rows=rows, targets=np.log(np.maximum(increase, 0) + EPSILON))

    def encode(self, decided: Sequence[Assignment]) -> Numbers:
        """Which options configs take `(configs, options)`, zero or one."""
        rows = np.zeros((len(decided), len(self.columns)))
        for row, one in zip(rows, decided, strict=True):
            row[[self.columns[pair] for pair in one.items() if pair in self.columns]] = 1
        return rows

    def __call__(self, decided: Sequence[Assignment]) -> tuple[Numbers, Numbers]:
        """Mean and standard deviation `(configs,)` of the logarithm of the loss increase."""
        from scipy.linalg import solve_triangular

        rows, (costs, slopes, factor, weights) = self.encode(decided), self._fitted
        value, slope = _compounded(rows, costs)
        shared = slope @ self.prior @ slopes.T + _interactions(rows, self.rows)
        explained = solve_triangular(factor, shared.T, lower=True)
        variance = ((slope @ self.prior) * slope).sum(1) + INTERACTION**2 - np.square(explained).sum(0)
        return value - slope @ (costs - USUAL[0]) + shared @ weights, np.sqrt(np.maximum(variance, JITTER**2))

    @property
    def costs(self) -> Numbers:
        """What each option costs alone, in nats."""
        return np.asarray(np.exp(self._fitted[0]))

    @cached_property
    def _fitted(self) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """The likeliest logarithms of the costs, the targets' slopes there, the Cholesky factor of their covariance, and their
        weights."""
        from scipy.linalg import cho_solve

        costs, root = np.full(len(self.columns), USUAL[0]), np.linalg.cholesky(self.prior)
        beside = _interactions(self.rows, self.rows) + JITTER**2 * np.eye(len(self.rows))
        for n in range(ROUNDS):
            value, slope = _compounded(self.rows, costs)
            half = slope @ root
            factor = np.linalg.cholesky(half @ half.T + beside)
            weights = cho_solve((factor, True), self.targets - value + slope @ (costs - USUAL[0]))
            if n < ROUNDS - 1:
                costs = (costs + USUAL[0] + self.prior @ (weights @ slope)) / 2
        return costs, slope, np.asarray(factor), weights


def _covariance(singles: Sequence[SingleDecision]) -> Numbers:
    """The covariance `(options, options)` of the logarithms of what options cost alone."""
    places = [Decision.parse(one.decision) for one in singles]
    layers = np.array([place.layer or 0 for place in places], dtype=np.float64)
    words = [f"{p.primitive} {o.option if isinstance(o.option, str) else ''}" for p, o in zip(places, singles, strict=True)]
    kinds = np.array([sorted(set(words)).index(word) for word in words])
    numbers = np.array([0.0 if isinstance(one.option, str) else float(one.option) for one in singles])
    numbers -= [place.layer or 0 if PRIMITIVES[place.primitive].sources else 0 for place in places]  # how far a source is away
    same = kinds[:, None] == kinds
    apart = np.abs(layers[:, None] - layers)
    near = np.exp(-(apart + np.abs(numbers[:, None] - numbers)) / NEARBY)
    return (
        USUAL[1] ** 2
        + LAYER**2 * np.exp(-2 * apart / NEARBY)
        + same * (PRIMITIVE**2 + BOTH**2 * near)
        + ALONE**2 * np.eye(len(singles))
    )


def _compounded(rows: Numbers, costs: Numbers) -> tuple[Numbers, Numbers]:
    """The logarithm of the loss increase without interactions `(configs,)`, given the logarithms of the costs, and its slope."""
    each = rows * np.exp(np.minimum(costs, 5.0))
    total = each.sum(1)
    increase = total * (1 + total) + EPSILON
    return np.log(increase), each * ((1 + 2 * total) / increase)[:, None]


def differences(rows: Numbers, others: Numbers) -> Numbers:
    """The number of options `(rows, others)` that one has and the other has not."""
    return np.asarray(rows.sum(1)[:, None] + others.sum(1) - 2 * rows @ others.T)


def _interactions(rows: Numbers, others: Numbers) -> Numbers:
    """The covariance of the interactions of configs `(rows, others)`."""
    return np.asarray(INTERACTION**2 * np.exp(-differences(rows, others) / ALIKE))


@dataclass(frozen=True, eq=False)
class Solver:
    """Proposes configs of a space by a surrogate of the configs that are `known`."""

    space: SearchSpace
    memory: MemorySpec
    known: Sequence[Known]
    rng: random.Random
    objectives: tuple[str, ...] = DEFAULT

    def solve(self, count: int) -> list[Assignment]:
        """`count` new configs that are expected to add most hypervolume to what is known, or fewer.

        Each is a draw from the distribution, or differs by few decisions from a known config near the front or, over some
        generations, from another such config of a low predicted loss.
        """
        pool = self.breed(count) if self.known else []
        near = self._select(self._trusted(pool), (count + 1) // 2, [])
        return [one.decided for one in (*near, *self._select(pool, count - len(near), near))]

    def breed(self, count: int) -> list[Known]:
        """New configs within the limits with their predicted losses, of which so many are proposed: draws from the distribution,
        then generations of children of the best."""
        pool: dict[SharingConfig, Known] = {}
        self._predict(pool, [self.draw() for _ in range(CHILDREN * count // 3)])
        for _ in range(GENERATIONS):
            parents = nearest_front([*self.fitted, *pool.values()], PARENTS)
            self._predict(pool, [self._child(self.rng.choice(parents).decided) for _ in range(CHILDREN * count)])
        return list(pool.values())

    def _trusted(self, pool: Sequence[Known]) -> list[Known]:
        """Those that differ by few options from a config that works."""
        works = [one for one in self.fitted if one.loss <= self.surrogate.base + HORIZON]
        if not pool:
            return []
        rows, others = (self.surrogate.encode([one.decided for one in some]) for some in (pool, works))
        return [one for one, apart in zip(pool, differences(rows, others), strict=True) if apart.min() <= TRUSTED]

    def draw(self) -> Assignment:
        return self.space.encode(self.distribution.draw(self.rng, NOISE * self.rng.choice((1, 2)))) or {}

    @cached_property
    def singles(self) -> list[SingleDecision]:
        """Every option, with its loss increase where that was measured alone."""
        measured = {(one.decision, one.option): one.loss_increase for one in self.space.measured}
        plain = single_decisions(self.space, self.memory)
        return [replace(one, loss_increase=measured.get((one.decision, one.option))) for one in plain]

    @cached_property
    def fitted(self) -> list[Known]:
        """The known configs that the surrogate is fitted to."""
        return nearest_front(self.known, MOST, math.inf)

    @cached_property
    def surrogate(self) -> Surrogate:
        return Surrogate.fit(self.singles, self.fitted)

    @cached_property
    def distribution(self) -> ConfigDistribution:
        """Configs near the front, by the costs that the surrogate knows."""
        if not self.known:
            return ConfigDistribution.of(self.space, self.memory)
        costs = self.surrogate.costs
        singles = [replace(one, loss_increase=float(costs[n])) for n, one in enumerate(self.singles)]
        return ConfigDistribution.by_costs(self.space, self.memory, singles)

    def _child(self, decided: Assignment) -> Assignment:
        """Decisions of which some are left and others taken."""
        setting, kept = dict(decided), self.distribution.kept
        for _ in range(1 + int(self.rng.expovariate(1 / MUTATIONS))):
            kind = self.rng.choice(("take", "leave", "swap"))
            if setting and kind != "take":
                del setting[self.rng.choice(list(setting))]
            if kind != "leave" and kept:
                one = self.rng.choice(kept)
                setting[one.decision] = one.option
        return setting

    def _predict(self, pool: dict[SharingConfig, Known], settings: Sequence[Assignment]) -> None:
        """Add configs that are new and within the limits to the pool, with their predicted losses."""
        least, seen = self.space.least_sharing(), {one.config for one in self.known}
        new: dict[SharingConfig, Assignment] = {}
        for setting in settings:
            config, asked = self.space.decode_setting(least | setting)
            if config not in seen and config not in pool and self.space.meets_limits(config, self.memory):
                new[config] = {name: option for name, option in asked.items() if option != least[name]}
        means = self.surrogate(list(new.values()))[0] if new else ()
        for (config, decided), mean in zip(new.items(), means, strict=True):
            costs = config_costs(self.space.shape, config, self.memory, self.objectives[:-1])
            pool[config] = Known(config, decided, costs, self.surrogate.base + float(np.exp(mean)) - EPSILON)

    def _select(self, pool: Sequence[Known], count: int, before: Sequence[Known]) -> list[Known]:
        """Of configs near the front by their predicted losses, those that should add most hypervolume to the known ones and
        to those selected before."""
        pool = [*before, *nearest_front([one for one in pool if one not in before], count * PER_PROPOSAL)]
        if not pool:
            return []
        mean, deviation = self.surrogate([one.decided for one in pool])
        noise = np.random.default_rng(self.rng.getrandbits(32)).normal(size=(DRAWS, len(pool)))
        known = np.tile([one.loss - self.surrogate.base for one in self.fitted], (DRAWS, 1))
        losses = np.concatenate([np.exp(mean + noise * deviation) - EPSILON, known], 1)
        costs = np.array([one.costs for one in (*pool, *self.fitted)])
        taken, most = [*range(len(before)), *range(len(pool), len(costs))], costs.max(0)
        reference = (*np.maximum(1.05 * most, 0.95 * most).tolist(), HORIZON)
        return [pool[n] for n in greedy_hypervolume(costs, losses, reference, count, taken)]


def nearest_front(configs: Sequence[Known], count: int, horizon: float = HORIZON) -> list[Known]:
    """Those of the least loss increase for their costs, as a ratio to the best of no more costs, none beyond a horizon."""
    if not configs:
        return []
    base = min(one.loss for one in configs)
    ordered = sorted((one for one in configs if one.loss <= base + horizon), key=lambda one: (one.costs, one.loss))
    increase = np.log(np.array([one.loss for one in ordered]) - base + EPSILON)
    behind = increase - _least_of_no_more(np.array([one.costs for one in ordered]), increase)
    return [ordered[n] for n in np.argsort(behind, kind="stable")[:count]]


def _least_of_no_more(costs: Numbers, values: Numbers) -> Numbers:
    """For each of `(configs, objectives)` in ascending order the least value of those that cost no more, its own among them."""
    if costs.shape[1] == 1:
        return np.minimum.accumulate(values)
    return np.array([values[(costs <= one).all(1)].min() for one in costs])
