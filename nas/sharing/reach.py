"""How many configs a space has, and the fewest and the most bytes among them.

Owns the tree of layer prefixes and what is read off it: the exact count of a small space, the estimate of a large one, and the
extremes. A node is the layers decided so far, its children are the distinct plans of the next layer. Two different prefixes are
two different configs, so the configs are the leaves. What may be decided at a layer is `nas.space`'s.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from ..config import format_bytes
from .builder import ModelOptions, PlanBuilder
from .memory import LIMITS, LayerCost, MemorySpec, layer_cost, outside_cost, total_bytes
from .plan import LayerPlan, Plan
from .shape import ModelShape
from .sharing_config import ties_norms

DESCENTS, FEWEST_DESCENTS = 400, 8
WORK = 60_000
"""Nodes that an estimate visits before it makes do with fewer descents, and a beam over all its levels with fewer prefixes."""


@dataclass(frozen=True)
class SpaceSize:
    """What a space can reach: `count` configs (exact, or estimated with a relative standard error), `least` to `most` bytes."""

    count: float
    relative_error: float
    least: Mapping[str, int]
    most: Mapping[str, int]

    @property
    def exact(self) -> bool:
        """Whether every config was counted."""
        return self.relative_error == 0.0

    def words(self) -> str:
        """What can be reached, for a person: `about 3.7e+07 distinct configs, memory 467.3 KiB to 5.4 MiB`; an error of more than
        a tenth leaves one digit."""
        count = f"{self.count:.0f}" if self.exact else f"about {self.count:.{1 if self.relative_error > 0.1 else 2}g}"
        least, most = format_bytes(self.least["memory_bytes"]), format_bytes(self.most["memory_bytes"])
        return f"{count} distinct configs, memory {least} to {most}"


class Choices(Protocol):
    """What of a search space is used here."""

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""

    @property
    def options(self) -> Mapping[str, tuple[Any, ...]]:
        """Each decision's options."""

    def beginnings(self) -> Mapping[ModelOptions, Any]:
        """Every way to decide what is decided once for the whole model."""

    def layer_outcomes(self, builder: PlanBuilder) -> Mapping[LayerPlan, Any]:
        """Every plan that the builder's current layer can have."""


@dataclass(frozen=True)
class Prefix:
    """The layers decided so far, and what they cost together."""

    whole: ModelOptions
    layers: tuple[LayerPlan, ...]
    cost: LayerCost

    @property
    def plan(self) -> Plan:
        """The plan that a whole prefix is."""
        return Plan(self.layers, self.whole.outside)


class Tree:
    """The prefixes of a space; what can follow one is found once."""

    def __init__(self, space: Choices, spec: MemorySpec) -> None:
        self.space, self.spec = space, spec
        self.depth = space.shape.num_hidden_layers
        self.roots = [Prefix(whole, (), outside_cost(space.shape, whole.outside)) for whole in space.beginnings()]
        self._both_norms = len({root.whole.norms for root in self.roots}) > 1
        self._found: dict[tuple[str, tuple[LayerPlan, ...]], list[LayerPlan]] = {}

    def children(self, prefix: Prefix) -> list[LayerPlan]:
        """The next layer's plans after a prefix.

        A whole config that says `norms: tied` and ties none is left out where it is found as `private` too.
        """
        key = (prefix.whole.norms, prefix.layers)
        if key not in self._found:
            found = list(self.space.layer_outcomes(PlanBuilder.after(self.space.shape, prefix.whole, prefix.layers)))
            if len(prefix.layers) == self.depth - 1 and self._both_norms:
                tied = prefix.whole.norms == "tied"
                found = [layer for layer in found if ties_norms((*prefix.layers, layer)) == tied]
            self._found[key] = found
        return self._found[key]

    def grow(self, prefix: Prefix, layer: LayerPlan) -> Prefix:
        """The prefix one layer on."""
        cost = layer_cost(self.space.shape, len(prefix.layers), layer, self.spec.context)
        return Prefix(prefix.whole, (*prefix.layers, layer), prefix.cost + cost)

    def reach(self, width: int, rng: random.Random) -> SpaceSize:
        """Exact where no level has more than `width` prefixes; else estimated from the last level that has no more."""
        level = self.roots
        for _ in range(self.depth):
            wider = list(islice(((prefix, layer) for prefix in level for layer in self.children(prefix)), width + 1))
            if len(wider) > width:
                count, error = self._estimate(level, rng)
                return SpaceSize(count, error, self._extremes(1), self._extremes(-1))
            level = [self.grow(*pair) for pair in wider]
        sizes = [self.bytes(leaf) for leaf in level]
        least, most = ({name: pick(size[name] for size in sizes) for name in LIMITS} for pick in (min, max))
        return SpaceSize(len(level), 0.0, least, most)

    def bytes(self, prefix: Prefix) -> dict[str, int]:
        """What a prefix costs, by the names in `LIMITS`."""
        return total_bytes(self.spec, prefix.cost)

    def extreme(self, name: str, sign: int, width: int) -> Prefix:
        """Leaf of least (`sign` 1) or most (-1) bytes by one of `LIMITS`, by a beam over prefixes, widened if it has none."""
        level = self.beam(name, sign, width)
        assert level or width < WORK, "the space has no config, or none that a beam can find"
        return level[0] if level else self.extreme(name, sign, 4 * width)

    def beam(self, name: str, sign: int, width: int) -> list[Prefix]:
        """The leaves that a beam of `width` prefixes ends with, the extreme one first; none, if all of them were dead ends."""
        level = self.roots
        for _ in range(self.depth):
            wider: list[Prefix] = []
            for prefix in level:
                if len(wider) < WORK // self.depth:
                    wider += [self.grow(prefix, layer) for layer in self.children(prefix)]
            level = heapq.nsmallest(width, wider, key=lambda prefix: sign * self.bytes(prefix)[name])
        return level

    def _extremes(self, sign: int) -> dict[str, int]:
        return {name: self.bytes(self.extreme(name, sign, width=16))[name] for name in LIMITS}

    def _estimate(self, level: Sequence[Prefix], rng: random.Random) -> tuple[float, float]:
        """The number of leaves below a level, and its relative standard error, by random descents (Knuth, 1975)."""
        leaves: list[float] = []
        work = 0
        while len(leaves) < DESCENTS and (len(leaves) < FEWEST_DESCENTS or work < WORK):
            prefix, weight = rng.choice(level), float(len(level))
            while weight and len(prefix.layers) < self.depth:
                children = self.children(prefix)
                weight, work = weight * len(children), work + len(children)
                prefix = self.grow(prefix, rng.choice(children)) if children else prefix
            leaves.append(weight)
        mean = sum(leaves) / len(leaves)
        deviation = math.sqrt(sum((leaf - mean) ** 2 for leaf in leaves) / (len(leaves) - 1))
        return mean, max(deviation / math.sqrt(len(leaves)) / max(mean, 1.0), 1e-9)
