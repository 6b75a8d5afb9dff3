"""`ConfigDistribution`: configs of a space near its front, every amount of memory equally likely.

Owns what each option costs alone, which options are ruled out, and how a config is drawn from the rest. Uniform draws from a deep
space are all broken; a config near the front shares where that costs little loss for the bytes that it saves.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from .memory import MemorySpec, measure, plan_cost, total_bytes
from .sharing_config import SharingConfig
from .space import Assignment, Decision, SearchSpace, SingleDecision

HOPELESS = 2.0  # an option that alone increases the loss by more nats a token is ruled out
NOISE = 0.3  # Gumbel noise on the logarithm of loss per byte, by which options are ordered
EXPLORED = 0.1  # the part of the draws whose first option is drawn uniformly, so that every option is drawn however dear it is
FLOOR = 1e-3  # nats that the cheapest option is taken to cost: an increase below is within the error of a measurement
TRIES = 100  # draws of a config within the limits before any config within them is taken


def single_decisions(space: SearchSpace, spec: MemorySpec) -> dict[SingleDecision, SharingConfig]:
    """Every option but the one that shares least, taken alone, with its config; the loss increases are those in `measured`.

    An option that was not measured has that of the nearest one that was: of its primitive, in its layer if possible.
    """
    least = space.least_sharing()
    most = setting_bytes(space, least, spec)
    measured: dict[str, list[SingleDecision]] = {}
    for one in space.measured:
        measured.setdefault(Decision.parse(one.decision).primitive, []).append(one)
    found = {}
    for name, options in space.options.items():
        for option in options:
            if option != least[name]:
                config = space.config_of(least | {name: option})
                one = SingleDecision(name, option, most - measure(space.shape, config, spec).memory_bytes)
                near = min(measured.get(Decision.parse(name).primitive, ()), key=lambda other: _distance(one, other), default=one)
                found[replace(one, loss_increase=near.loss_increase)] = config
    return found


def sums_of_single_decisions(space: SearchSpace, configs: Sequence[SharingConfig]) -> list[float]:
    """What the decisions of each config of the space cost alone, added up, in nats a token."""
    cost = {(one.decision, one.option): one.loss_increase or 0.0 for one in single_decisions(space, MemorySpec())}
    return [sum(cost.get(pair, 0.0) for pair in (space.encode(config) or {}).items()) for config in configs]


def setting_bytes(space: SearchSpace, setting: Assignment, spec: MemorySpec) -> int:
    """The bytes of memory of a setting, which has an option for every decision, without its config."""
    return total_bytes(spec, plan_cost(space.shape, space.plan_of(setting), spec))["memory_bytes"]


def _distance(one: SingleDecision, other: SingleDecision) -> tuple[bool, bool, int, int]:
    """How unlike two options of a primitive are: first if they are different words, then in layers, then in bytes."""
    layers = [Decision.parse(decision).layer or 0 for decision in (one.decision, other.decision)]
    words = one.option != other.option and isinstance(one.option, str)
    same = one.option == other.option and one.decision == other.decision
    return words, not same, abs(layers[0] - layers[1]), abs(one.memory_bytes_saved - other.memory_bytes_saved)


@dataclass(frozen=True)
class ConfigDistribution:
    """Configs of a space: an amount of memory is drawn evenly from what can be reached, and options that save memory are taken
    until it is met, in the order of loss per byte with Gumbel noise, so that cheap sharing is likelier.

    `kept` are the options drawn from, `ruled_out` those that are hopeless alone. Without a measured loss every order of options
    is equally likely. An option that saves nothing alone, such as a correction of tied weights, is taken or not by a coin.
    """

    space: SearchSpace
    memory: MemorySpec
    kept: tuple[SingleDecision, ...]
    ruled_out: tuple[SingleDecision, ...] = ()

    @staticmethod
    def of(space: SearchSpace, memory: MemorySpec) -> ConfigDistribution:
        """The distribution over a space, by the costs in `space.measured`."""
        return ConfigDistribution.by_costs(space, memory, list(single_decisions(space, memory)))

    @staticmethod
    def by_costs(space: SearchSpace, memory: MemorySpec, costs: Sequence[SingleDecision]) -> ConfigDistribution:
        """The distribution over a space, by what each of its options costs."""
        hopeless = {(one.decision, one.option) for one in costs if (one.loss_increase or 0.0) > HOPELESS}
        kept, ruled_out = (tuple(o for o in costs if ((o.decision, o.option) in hopeless) is some) for some in (False, True))
        return ConfigDistribution(space, memory, kept, ruled_out)

    @property
    def summary(self) -> str:
        """How many options are left, and of which primitives some are not, for a person."""
        count = Counter(Decision.parse(one.decision).primitive for one in self.ruled_out)
        said = ", ".join(f"{n} of {name}" for name, n in sorted(count.items()))
        left_out = f"; left out, since each alone costs more than {HOPELESS:g} nats: {said}" if said else ""
        return f"{len(self.kept)} options near the front{left_out}"

    @cached_property
    def least(self) -> Assignment:
        """The decisions of the config that shares least."""
        return self.space.least_sharing()

    @cached_property
    def savers(self) -> tuple[SingleDecision, ...]:
        """The options that save memory alone."""
        return tuple(one for one in self.kept if one.memory_bytes_saved > 0)

    @cached_property
    def _others(self) -> dict[str, list[Any]]:
        """The options that do not, by decision."""
        found: dict[str, list[Any]] = {}
        for one in self.kept:
            if one.memory_bytes_saved <= 0:
                found.setdefault(one.decision, []).append(one.option)
        return found

    @cached_property
    def range(self) -> tuple[int, int]:
        """The least and the most bytes that are drawn."""
        most = self.bytes(self.least)
        least = measure(self.space.shape, self.reach(0, self.order(lambda: 0.0)), self.memory).memory_bytes
        limit = int(self.space.limits.get("memory_bytes", most))
        return min(least, limit), min(most, limit)

    def bytes(self, setting: Assignment) -> int:
        return setting_bytes(self.space, setting, self.memory)

    def draw(self, rng: random.Random, noise: float = NOISE) -> SharingConfig:
        """A config of the space within its limits. Raises UserError if there seems to be none."""
        noise = noise if any(one.loss_increase is not None for one in self.savers) else 1.0
        for _ in range(TRIES):
            others = {name: rng.choice(options) for name, options in self._others.items() if rng.random() < 0.5}
            order = self.order(lambda: -noise * math.log(-math.log(rng.random() or 0.5)))
            if order and rng.random() < EXPLORED:
                order.insert(0, rng.choice(order))
            config = self.reach(rng.uniform(*self.range), order, others)
            if self.space.contains(config) and self.space.meets_limits(config, self.memory):
                return config
        return self.space.sample(rng, lambda config: self.space.meets_limits(config, self.memory))

    def order(self, noise: Callable[[], float]) -> list[SingleDecision]:
        """The options that save memory, by the logarithm of loss per byte saved and the noise of each."""
        return sorted(self.savers, key=lambda one: _cost(one) + noise())

    def reach(self, goal: float, order: Sequence[SingleDecision], others: Assignment | None = None) -> SharingConfig:
        """The config nearest to a goal of bytes that has the first options in an order, of a decision's the first."""

        def first(count: int) -> Assignment:
            taken = {one.decision: one.option for one in reversed(order[:count])}
            return self.least | (others or {}) | taken

        size = cache(lambda count: self.bytes(first(count)))
        few, many = 0, len(order)
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if size(middle) <= goal else (middle, many)
        return self.space.config_of(first(min(few, many, key=lambda count: abs(size(count) - goal))))


def _cost(one: SingleDecision) -> float:
    """The logarithm of an option's loss increase per byte saved; 0 where it was not measured."""
    if one.loss_increase is None:
        return 0.0
    return math.log(max(one.loss_increase, 0.0) + FLOOR) - math.log(one.memory_bytes_saved)
