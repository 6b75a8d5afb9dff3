"""Which leaf of a split supernet a config belongs to, and the search space of a leaf.

Owns the tree of splits (`SplitTree`) and the part of a search space that is left at a leaf (`LeafSpace`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from ..errors import UserError
from ..sharing.builder import PlanBuilder
from ..sharing.distribution import ConfigDistribution
from ..sharing.label import label
from ..sharing.memory import MemorySpec, measure
from ..sharing.plan import LayerPlan
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import Assignment, Decision, SearchSpace

Options = tuple[Any, ...]
ROOT = "0"
DESCENTS = 8  # starts of the descent to a leaf's extreme


@dataclass(frozen=True)
class Split:
    """One leaf's options of one decision, partitioned into `groups`. Gradient matching adds what it measured: `distances[i][j]`
    between `options[i]` and `options[j]`, and for every decision the criterion of its best partition (`scores`)."""

    decision: str
    groups: tuple[Options, ...]
    options: Options = ()
    distances: tuple[tuple[float, ...], ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)

    def group_of(self, option: Any) -> int:
        """The number of the group that holds an option."""
        found = [n for n, group in enumerate(self.groups) if option in group]
        assert len(found) == 1, f"{self.decision}: {option} is in {len(found)} groups of {self.groups}"
        return found[0]

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Split:
        """The inverse of `dataclasses.asdict`, after JSON has made lists of tuples."""
        groups, rows = (tuple(map(tuple, data[name])) for name in ("groups", "distances"))
        return Split(data["decision"], groups, tuple(data["options"]), rows, dict(data["scores"]))


@dataclass(frozen=True)
class SplitTree:
    """A leaf is one sub-supernet; a node that was split has a child for each group of options. A node's name is its path:
    `0-1-0` is the first child of the second child of the root, `0`."""

    name: str = ROOT
    split: Split | None = None
    children: tuple[SplitTree, ...] = ()

    def leaves(self) -> tuple[str, ...]:
        """The leaves' names, from first to last."""
        return tuple(name for child in self.children for name in child.leaves()) or (self.name,)

    def nodes(self) -> Iterator[SplitTree]:
        """Every node, a parent before its children."""
        yield self
        for child in self.children:
            yield from child.nodes()

    def route(self, space: SearchSpace, config: SharingConfig) -> str:
        """The one leaf that a config of the (whole) space belongs to.

        Each split sends it to the group of the option that `space.encode(config)` has for the decision. Where the decision
        was not open, that is the space's first option of it (`own`, where a source is chosen): a layer that is tied as a whole
        stays with those that share nothing more. Raises UserError if the space has no such config.
        """
        node, decided = self, space.encode(config) if self.children else {}
        if decided is None:
            raise UserError(f"config {label(config)} is not in this search space", hint="use one that the space can choose")
        while node.split is not None:
            node = node.children[node.split.group_of(_option(space, decided, node.split.decision))]
        return node.name

    def restrictions(self, leaf: str) -> dict[str, Options]:
        """The options that a leaf has left, of the decisions split above it."""
        node, found = self, dict[str, Options]()
        while node.split is not None:
            n = next(n for n, child in enumerate(node.children) if leaf in child.leaves())
            found[node.split.decision] = node.split.groups[n]
            node = node.children[n]
        assert leaf == node.name, f"no leaf {leaf}"
        return found

    def space_of(self, space: SearchSpace, leaf: str, memory: MemorySpec | None = None) -> LeafSpace:
        """The part of the (whole) space that routes to a leaf, within the space's limits if `memory` is given."""
        options = {**space.options, **self.restrictions(leaf)}
        return LeafSpace(space.shape, options, space.limits, space.measured, whole=space, tree=self, leaf=leaf, memory=memory)

    def spaces(self, space: SearchSpace, memory: MemorySpec | None = None) -> dict[str, LeafSpace]:
        return {leaf: self.space_of(space, leaf, memory) for leaf in self.leaves()}

    def grow(self, splits: Mapping[str, Split]) -> SplitTree:
        """The tree with the named leaves split."""
        if self.children:
            return replace(self, children=tuple(child.grow(splits) for child in self.children))
        split = splits.get(self.name)
        groups = split.groups if split else ()
        return SplitTree(self.name, split, tuple(SplitTree(f"{self.name}-{n}") for n in range(len(groups))))

    def to_data(self) -> dict[str, Any]:
        children = [child.to_data() for child in self.children]
        return {"name": self.name} | ({"split": asdict(self.split), "children": children} if self.split else {})

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> SplitTree:
        children = tuple(SplitTree.from_data(child) for child in data.get("children", ()))
        return SplitTree(data["name"], Split.from_data(data["split"]) if "split" in data else None, children)


def ancestor(leaf: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The nearest of the known nodes at or above a leaf, whose weights and optimizer state it inherits."""
    above = [name for name in known if f"{leaf}-".startswith(f"{name}-")]
    return max(above, key=len)


def _option(space: SearchSpace, decided: Assignment, decision: str) -> Any:
    return decided.get(decision, space.options[decision][0])


@dataclass(frozen=True, kw_only=True)
class LeafSpace(SearchSpace):
    """The configs of `whole` that a tree routes to one leaf; with `memory`, those of them within the limits.

    `options` are restricted to the leaf's. A walk can still leave the leaf (a decision that was not open, or two sources with one
    root), so `sample` draws again there, and `layer_outcomes` leaves out the configs of other leaves.
    """

    whole: SearchSpace
    tree: SplitTree
    leaf: str
    memory: MemorySpec | None = None

    @cached_property
    def distribution(self) -> ConfigDistribution:
        return ConfigDistribution.of(self, self.memory or MemorySpec())

    def contains(self, config: SharingConfig) -> bool:
        """See `SearchSpace.contains`: whether a config of the whole space routes to this leaf, within the limits."""
        if self.memory is not None and not self.whole.meets_limits(config, self.memory):
            return False
        return self.tree.route(self.whole, config) == self.leaf

    def sample(self, rng: random.Random, predicate: Callable[[SharingConfig], bool] | None = None) -> SharingConfig:
        """See `SearchSpace.sample`; only configs that this leaf holds."""
        return super().sample(rng, lambda config: (predicate is None or predicate(config)) and self.contains(config))

    def layer_outcomes(
        self, draft: PlanBuilder, target: LayerPlan | None = None, unlike: bool = False
    ) -> dict[LayerPlan, Assignment]:
        """See `SearchSpace.layer_outcomes`; only plans with which the draft can still become one of this leaf's configs."""
        left = self.tree.restrictions(self.leaf)
        here = [name for name in left if Decision.parse(name).layer == draft.index]
        found = self.whole.layer_outcomes(draft, target, unlike and not here)
        return {plan: d for plan, d in found.items() if all(_option(self.whole, d, name) in left[name] for name in here)}

    def extra_parameters(self) -> dict[str, tuple[int, ...]]:
        """See `SearchSpace.extra_parameters`; the whole space's, so that a leaf can start from its parent's weights."""
        return self.whole.extra_parameters()

    def extreme(self, spec: MemorySpec, name: str, sign: int, width: int = 40) -> SharingConfig:
        """See `SearchSpace.extreme`; where no prefix in the beam leads to the leaf, by `DESCENTS` from random configs of it. A
        split of a high layer can require a low one to own its parts, which the prefixes of fewest bytes do not."""
        level = self.prefixes(spec).beam(name, sign, width)
        if level:
            return SharingConfig.of_plan(self.shape, level[0].plan)
        rng = random.Random(0)

        def cost(config: SharingConfig) -> int:
            return sign * measure(self.shape, config, spec).to_data()[name]

        return min((self._descend(self.sample(rng), cost) for _ in range(DESCENTS)), key=cost)

    def _descend(self, config: SharingConfig, cost: Callable[[SharingConfig], int]) -> SharingConfig:
        """The config of least cost that is reached by changing one decision at a time, to the best neighbour in the leaf."""
        best, least = config, cost(config)
        setting = {name: options[0] for name, options in self.options.items()} | (self.whole.encode(config) or {})
        for decision, options in self.options.items():
            for option in options:
                near = self.config_of(setting | {decision: option})
                if cost(near) < least and self.contains(near):
                    best, least = near, cost(near)
        return config if best == config else self._descend(best, cost)

    def largest(self) -> SharingConfig:
        """See `SearchSpace.largest`; the config of most weights, should that one belong to another leaf."""
        config = super().largest()
        routed = self.tree.route(self.whole, config)
        return config if routed == self.leaf else self.extreme(MemorySpec(), "weight_bytes", -1)


CONFIGS: dict[str, Callable[[LeafSpace, random.Random], SharingConfig]] = {
    "uniform": LeafSpace.sample,
    "near_front": lambda space, rng: space.distribution.draw(rng),
}
"""The configs of a leaf among which options are compared: each open decision drawn uniformly, or from `ConfigDistribution`."""
