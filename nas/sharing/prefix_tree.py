"""The size of a search space, and the fewest and most bytes among its configs.

Owns the tree of layer prefixes: the exact count of a small space, the estimate for a large one, and the extremes. A node is the
layers decided so far; its children are the distinct plans of the next layer. Different prefixes are different configs, so the
configs are the leaves. Which plans a layer can have is `nas.sharing.space`'s.
"""

from __future__ import annotations

import heapq
import math
import random
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
WIDEST = 480  # bits of the numbers whose squares are added up as floats; with twice as many the largest size that is told
NODE_BUDGET = 60_000
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
        count = f"{self.count:.0f}" if self.exact else f"about {self.count:.{1 if self.relative_error > 0.1 else 2}g}"
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

    `outcomes` gives the distinct plans that a builder's current layer can have.
    """

    def __init__(
        self,
        shape: ModelShape,
        spec: MemorySpec,
        model_options: Iterable[ModelOptions],
        outcomes: Callable[[PlanBuilder], Iterable[LayerPlan]],
    ) -> None:
        self.shape, self.spec, self.outcomes = shape, spec, outcomes
        self.depth = shape.num_hidden_layers
        self.roots = [Prefix(options, (), outside_cost(shape, options.outside)) for options in model_options]
        self._both_norms = len({root.model_options.norms for root in self.roots}) > 1
        self._found: dict[tuple[str, tuple[LayerPlan, ...]], list[LayerPlan]] = {}

    def children(self, prefix: Prefix) -> list[LayerPlan]:
        """The next layer's plans after a prefix.

        A complete config with `norms: tied` that ties no norm is left out where the space has it with `private` norms too.
        """
        key = (prefix.model_options.norms, prefix.layers)
        if key not in self._found:
            found = list(self.outcomes(PlanBuilder(self.shape, prefix.model_options, prefix.layers)))
            if len(prefix.layers) == self.depth - 1 and self._both_norms:
                tied = prefix.model_options.norms == "tied"
                found = [layer for layer in found if ties_norms((*prefix.layers, layer)) == tied]
            self._found[key] = found
        return self._found[key]

    def grow(self, prefix: Prefix, layer: LayerPlan) -> Prefix:
        cost = layer_cost(self.shape, len(prefix.layers), layer, self.spec.context)
        return Prefix(prefix.model_options, (*prefix.layers, layer), prefix.cost + cost)

    def size(self, width: int, rng: random.Random) -> SpaceSize:
        """Exact if no level has more than `width` prefixes; else estimated from the last level that has no more."""
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
        """The leaf of least (`sign` 1) or most (-1) bytes by one of `LIMITS`: beam search, widened until it finds a leaf."""
        level = self.beam(name, sign, width)
        assert level or width < NODE_BUDGET, "the space has no config, or none that a beam can find"
        return level[0] if level else self.extreme(name, sign, 4 * width)

    def beam(self, name: str, sign: int, width: int) -> list[Prefix]:
        """The leaves that a beam of `width` prefixes ends with, the extreme one first; empty if all prefixes were dead ends."""
        level = self.roots
        for _ in range(self.depth):
            wider: list[Prefix] = []
            for prefix in level:
                if len(wider) < NODE_BUDGET // self.depth:
                    wider += [self.grow(prefix, layer) for layer in self.children(prefix)]
            level = heapq.nsmallest(width, wider, key=lambda prefix: sign * self.bytes(prefix)[name])
        return level

    def _extremes(self, sign: int) -> dict[str, int]:
        return {name: self.bytes(self.extreme(name, sign, width=16))[name] for name in LIMITS}

    def _estimate(self, level: Sequence[Prefix], rng: random.Random) -> tuple[float, float]:
        """The number of leaves below a level, and its relative standard error, by random descents (Knuth, 1975)."""
        leaves: list[int] = []
        work = 0
        while len(leaves) < DESCENTS and (len(leaves) < FEWEST_DESCENTS or work < NODE_BUDGET):
            prefix, weight = rng.choice(level), len(level)
            while weight and len(prefix.layers) < self.depth:
                children = self.children(prefix)
                weight, work = weight * len(children), work + len(children)
                prefix = self.grow(prefix, rng.choice(children)) if children else prefix
            leaves.append(weight)
        shift = max(max(leaves).bit_length() - WIDEST, 0)  # a deep space has more configs than a float's square can hold
        scaled = [float(leaf >> shift) for leaf in leaves]
        mean = sum(scaled) / len(scaled)
        deviation = math.sqrt(sum((leaf - mean) ** 2 for leaf in scaled) / (len(scaled) - 1))
        return math.ldexp(mean, min(shift, WIDEST)), max(deviation / math.sqrt(len(scaled)) / max(mean, 1.0), 1e-9)
