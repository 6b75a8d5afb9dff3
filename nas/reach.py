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

from .loading import format_bytes
from .memory import LIMITS, LayerCost, MemorySpec, layer_cost, total_bytes
from .model import LayerPlan
from .shape import ModelShape
from .sharing import Draft, ties_norms

DESCENTS = 400
WORK = 60_000
"""Nodes that an estimate may visit, after its first 50 descents: a second or two, however deep the model."""


@dataclass(frozen=True)
class Reach:
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
        """What can be reached, for a person: `about 3.7e+07 distinct configs, memory 467.3 KiB to 5.4 MiB`."""
        count = f"{self.count:.0f}" if self.exact else f"about {self.count:.2g}"
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

    def layer_outcomes(self, draft: Draft) -> Mapping[LayerPlan, Any]:
        """Every plan that the draft's current layer can have."""


@dataclass(frozen=True)
class Prefix:
    """The layers decided so far, and what they cost together."""

    norms: str
    layers: tuple[LayerPlan, ...] = ()
    params: int = 0
    kv_numbers: int = 0

    def grow(self, layer: LayerPlan, cost: LayerCost) -> Prefix:
        """The prefix one layer on."""
        return Prefix(self.norms, (*self.layers, layer), self.params + cost.params, self.kv_numbers + cost.kv_numbers)


class Tree:
    """The prefixes of a space, each grown once."""

    def __init__(self, space: Choices, spec: MemorySpec) -> None:
        self.space, self.spec = space, spec
        self.roots = [Prefix(norms) for norms in space.options.get("norms", ("private",))]
        self._grown: dict[tuple[str, tuple[LayerPlan, ...]], list[Prefix]] = {}

    def children(self, prefix: Prefix) -> list[Prefix]:
        """The prefixes one layer on; of the leaves, only the first of those that compute the same."""
        key = (prefix.norms, prefix.layers)
        if key not in self._grown:
            draft, shape = Draft.after(self.space.shape, prefix.norms, prefix.layers), self.space.shape
            outcomes = self.space.layer_outcomes(draft)
            grown = [prefix.grow(layer, layer_cost(shape, draft.index, layer)) for layer in outcomes]
            last = draft.index == shape.num_hidden_layers - 1 and len(self.roots) > 1
            self._grown[key] = [leaf for leaf in grown if not last or ties_norms(leaf.layers) == (leaf.norms == "tied")]
        return self._grown[key]

    def reach(self, width: int, rng: random.Random) -> Reach:
        """Exact where no level has more than `width` prefixes; else estimated from the last level that has no more."""
        level = self.roots
        for depth in range(self.space.shape.num_hidden_layers):
            wider = list(islice((child for prefix in level for child in self.children(prefix)), width + 1))
            if len(wider) > width:
                count, error = self._estimate(level, depth, rng)
                return Reach(count, error, self._extremes(1), self._extremes(-1))
            level = wider
        sizes = [self.bytes(leaf) for leaf in level]
        least, most = ({name: pick(size[name] for size in sizes) for name in LIMITS} for pick in (min, max))
        return Reach(len(level), 0.0, least, most)

    def bytes(self, prefix: Prefix) -> dict[str, int]:
        """What a prefix costs, by the names in `LIMITS`."""
        return total_bytes(self.space.shape, self.spec, LayerCost(prefix.params, prefix.kv_numbers))

    def extreme(self, name: str, sign: int, width: int) -> Prefix:
        """The leaf of least (`sign` 1) or most (-1) bytes by one of `LIMITS`, by a beam over prefixes."""
        level = self.roots
        for _ in range(self.space.shape.num_hidden_layers):
            wider = [child for prefix in level for child in self.children(prefix)]
            level = heapq.nsmallest(width, wider, key=lambda prefix: sign * self.bytes(prefix)[name])
        return level[0]

    def _extremes(self, sign: int) -> dict[str, int]:
        return {name: self.bytes(self.extreme(name, sign, width=40))[name] for name in LIMITS}

    def _estimate(self, level: Sequence[Prefix], depth: int, rng: random.Random) -> tuple[float, float]:
        """The number of leaves below a level, and its relative standard error, by random descents (Knuth, 1975)."""
        leaves: list[float] = []
        work = 0
        while len(leaves) < DESCENTS and (len(leaves) < 50 or work < WORK):
            prefix, weight = rng.choice(level), float(len(level))
            for _ in range(depth, self.space.shape.num_hidden_layers):
                children = self.children(prefix)
                weight, work = weight * len(children), work + len(children)
                if not children:
                    break
                prefix = rng.choice(children)
            leaves.append(weight)
        mean = sum(leaves) / len(leaves)
        deviation = math.sqrt(sum((leaf - mean) ** 2 for leaf in leaves) / (len(leaves) - 1))
        return mean, max(deviation / math.sqrt(len(leaves)) / max(mean, 1.0), 1e-9)
