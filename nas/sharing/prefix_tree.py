"""The size of a search space, and the fewest and most bytes among its configs.

Owns the tree of layer prefixes: the exact count of a small space, the estimate for a large one, and the extremes. A node is the
layers decided so far; its children are the distinct plans of the next layer. Different prefixes are different configs, so the
configs are the leaves. Which plans a layer can have is `nas.sharing.space`'s.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from ..config import format_bytes
from .builder import ModelOptions, PlanBuilder
from .memory import LIMITS, LayerCost, MemorySpec, layer_cost, outside_cost, total_bytes
from .plan import LayerPlan, Plan
from .shape import ModelShape
from .sharing_config import ties_norms

DESCENTS, FEWEST_DESCENTS = 400, 8
MANY = 10**30  # a space that is known to have more configs is not counted to its end
NODES_COUNTED, NODES_IN_BEAM = 60_000, 20_000
"""Nodes visited before an estimate stops early (with fewer descents), and before a beam over all levels is cut."""


@dataclass(frozen=True)
class SpaceSize:
    """The size of a space: `count` configs (exact, or estimated with a relative standard error), and `least` to `most` bytes."""

    count: float
    relative_error: float
    least: Mapping[str, int]
    most: Mapping[str, int]

    @property
    def exact(self) -> bool:
        return self.relative_error == 0.0

    def summary(self) -> str:
        """Such as `about 3.7e+07 distinct configs, memory 467.3 KiB to 5.4 MiB`; one digit if the error is above a tenth."""
        digits = f"{self.count:.{1 if self.relative_error > 0.1 else 2}g}"
        count = f"{self.count:.0f}" if self.exact else f"more than {digits}" if self.count >= MANY else f"about {digits}"
        least, most = format_bytes(self.least["memory_bytes"]), format_bytes(self.most["memory_bytes"])
        return f"{count} distinct configs, memory {least} to {most}"


@dataclass(frozen=True)
class Prefix:
    """The layers decided so far, and their total cost."""

    model_options: ModelOptions
    layers: tuple[LayerPlan, ...]
    cost: LayerCost

    @property
    def plan(self) -> Plan:
        """The plan of a prefix that has all layers."""
        return Plan(self.layers, self.model_options.outside)


class PrefixTree:
    """The prefixes of a space; the children of each are found once.

    `outcomes` gives the distinct plans that a builder's current layer can have; if its second argument is true, only those of the
    first of the sources that are alike, which cost the same.
    """

    def __init__(
        self,
        shape: ModelShape,
        spec: MemorySpec,
        model_options: Iterable[ModelOptions],
        outcomes: Callable[[PlanBuilder, bool], Iterable[LayerPlan]],
    ) -> None:
        self.shape, self.spec, self.outcomes = shape, spec, outcomes
        self.depth = shape.num_hidden_layers
        self.roots = [Prefix(options, (), outside_cost(shape, options.outside)) for options in model_options]
        self._both_norms = len({root.model_options.norms for root in self.roots}) > 1
        self._found: dict[tuple[str, tuple[LayerPlan, ...], bool], list[LayerPlan]] = {}

    def children(self, prefix: Prefix, unlike: bool = False) -> list[LayerPlan]:
        """The next layer's plans after a prefix; if `unlike`, by one of the sources that are alike.

        A complete config with `norms: tied` that ties no norm is left out where the space has it with `private` norms too.
        """
        key = (prefix.model_options.norms, prefix.layers, unlike)
        if key not in self._found:
            found = list(self.outcomes(PlanBuilder(self.shape, prefix.model_options, prefix.layers), unlike))
            if len(prefix.layers) == self.depth - 1 and self._both_norms:
                tied = prefix.model_options.norms == "tied"
                found = [layer for layer in found if ties_norms((*prefix.layers, layer)) == tied]
            self._found[key] = found
        return self._found[key]

    def grow(self, prefix: Prefix, layer: LayerPlan) -> Prefix:
        return Prefix(prefix.model_options, (*prefix.layers, layer), self._cost(prefix, layer))

    def _cost(self, prefix: Prefix, layer: LayerPlan) -> LayerCost:
        """The total cost of a prefix and the next layer."""
        return prefix.cost + layer_cost(self.shape, len(prefix.layers), layer, self.spec.context)

    def size(self, width: int, rng: random.Random, names: Iterable[str] = LIMITS) -> SpaceSize:
        """Exact if no level has more than `width` prefixes; else estimated from the last level that has no more.

        Of a space that is estimated only, the fewest and most bytes are found by these names of `LIMITS`.
        """
        level = self.roots
        for _ in range(self.depth):
            wider = list(islice(((prefix, layer) for prefix in level for layer in self.children(prefix)), width + 1))
            if len(wider) > width:
                count, error = self._estimate(level, rng)
                least, most = ({name: self.bytes(self.extreme(name, sign, 16))[name] for name in names} for sign in (1, -1))
                return SpaceSize(count, error, least, most)
            level = [self.grow(*pair) for pair in wider]
        sizes = [self.bytes(leaf) for leaf in level]
        least, most = ({name: pick(size[name] for size in sizes) for name in LIMITS} for pick in (min, max))
        return SpaceSize(len(level), 0.0, least, most)

    def bytes(self, prefix: Prefix) -> dict[str, int]:
        """What a prefix costs, by the names in `LIMITS`."""
        return total_bytes(self.spec, prefix.cost)

    def extreme(self, name: str, sign: int, width: int) -> Prefix:
        """The leaf of least (`sign` 1) or most (-1) bytes by one of `LIMITS`: beam search, widened until it finds a leaf."""
        level = self.beam(name, sign, width)
        assert level or width < NODES_IN_BEAM, "the space has no config, or none that a beam can find"
        return level[0] if level else self.extreme(name, sign, 4 * width)

    def beam(self, name: str, sign: int, width: int) -> list[Prefix]:
        """The leaves that a beam of `width` prefixes ends with, the extreme one first; empty if all prefixes were dead ends."""
        level = self.roots
        for _ in range(self.depth):
            wider: list[tuple[Prefix, LayerPlan]] = []
            for prefix in level:
                if len(wider) < NODES_IN_BEAM // self.depth:
                    wider += [(prefix, layer) for layer in self.children(prefix, unlike=True)]
            least = heapq.nsmallest(width, wider, key=lambda pair: sign * total_bytes(self.spec, self._cost(*pair))[name])
            level = [self.grow(*pair) for pair in least]
        return level

    def _estimate(self, level: Sequence[Prefix], rng: random.Random) -> tuple[float, float]:
        """The number of leaves below a level, and its relative standard error, by random descents (Knuth, 1975).

        A descent ends where it has found more than `MANY`; if most of the first do, no more are made.
        """
        leaves: list[float] = []
        work = 0
        while len(leaves) < DESCENTS and (len(leaves) < FEWEST_DESCENTS or work < NODES_COUNTED):
            prefix, weight = rng.choice(level), len(level)
            while 0 < weight <= MANY and len(prefix.layers) < self.depth:
                children = self.children(prefix)
                weight, work = weight * len(children), work + len(children)
                prefix = self.grow(prefix, rng.choice(children)) if children else prefix
            leaves.append(float(weight))
            if len(leaves) == FEWEST_DESCENTS and statistics.median(leaves) > MANY:
                return float(MANY), math.inf
        mean = statistics.fmean(leaves)
        return mean, max(statistics.stdev(leaves, mean) / math.sqrt(len(leaves)) / max(mean, 1.0), 1e-9)
