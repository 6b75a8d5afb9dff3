"""Splitting a supernet: which configs get a sub-supernet of their own, so that their gradients no longer conflict.

Owns a trial's `split:` (`SplitSpec`) and the methods it may name (`METHODS`). They grow a tree (`SplitTree`: which leaf a config
belongs to), of which each leaf has a search space (`LeafSpace`). Training the supernets is `nas.training`'s; when to split, and
which weights and optimizer state a leaf starts from, is the caller's:

    tree, nets = SplitTree(), {"0": supernet}
    for _ in range(spec.rounds):
        tree, tokens = split_leaves(spec, tree.spaces(space, memory), in_process(nets), batches, rng)
        nets = {leaf: copy.deepcopy(nets[ancestor(leaf, nets)]) for leaf in tree.leaves()}
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from ..config import OneOf, OpenFraction, PositiveInt, Strict
from ..errors import UserError, did_you_mean, one_of
from ..model.supernet import Supernet
from ..sharing.memory import MemorySpec
from ..sharing.space import Assignment, Decision, SearchSpace
from .gradients import CRITERIA, DISTANCES, Compare, Compared, Comparison, best_partition, compare, conflicts
from .tree import CONFIGS, LeafSpace, Options, Split, SplitTree, ancestor

__all__ = [
    "METHODS", "Compare", "Compared", "Comparison", "LeafSpace", "Split", "SplitSpec", "SplitTree", "ancestor", "compare",
    "conflicts", "draw_assignments", "in_process", "options_in_use", "split_leaves",
]  # fmt: skip


@dataclass(frozen=True)
class SplitSpec(Strict):
    """How a supernet is split.

    method: a row of `METHODS`.
    splits: rounds, each of which splits every leaf in two; `exhaustive` splits once, into a leaf for each option.
    batches, batch: gradients are taken on so many batches of so many rows (2203.15207: 100 batches).
    at: the fraction of all steps that is trained before the last split.
    decision: what `exhaustive` splits by.
    restart: the leaves of the last split start from new weights (2203.15207), not from their parent's.
    similarity, criterion: rows of `DISTANCES` and `CRITERIA`.
    configs: a row of `CONFIGS`, the configs in which options are compared.
    """

    method: Annotated[str, OneOf(METHODS)] = "gradient-matching"
    splits: PositiveInt = 1
    batches: PositiveInt = 20
    batch: PositiveInt = 4
    at: OpenFraction = 0.5
    decision: str | None = None
    restart: bool = False
    similarity: Annotated[str, OneOf(DISTANCES)] = "global"
    criterion: Annotated[str, OneOf(CRITERIA)] = "variance_reduction"
    configs: Annotated[str, OneOf(CONFIGS)] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decision is not None and self.method != "exhaustive":
            hint = "leave it out, or use method: exhaustive"
            raise UserError(f"{self.method} finds its decision itself", where="split.decision", hint=hint)

    @property
    def rounds(self) -> int:
        """How many times the leaves are split."""
        return METHODS[self.method].rounds(self)

    def stages(self, steps: int) -> tuple[int, ...]:
        """The steps of each stage, over all its leaves: one stage before each round of splits, one after the last."""
        if not self.rounds:
            return (steps,)
        before = round(self.at * steps)
        ends = [before * n // self.rounds for n in range(self.rounds + 1)]
        return (*(end - start for start, end in itertools.pairwise(ends)), steps - before)

    def check(self, space: SearchSpace, memory: MemorySpec | None = None) -> None:
        """Raise UserError unless `decision` is a decision of the space's layers of which random configs use several options,
        within the space's limits if `memory` is given."""
        known = [name for name, options in space.options.items() if Decision.parse(name).layer is not None and len(options) > 1]
        if self.decision is not None and self.decision not in known:
            message = "has one option only" if self.decision in space.options else "is no decision of this space"
            raise UserError(f"{self.decision} {message}", where="split.decision", hint=did_you_mean(self.decision, known))
        if self.decision is not None:
            whole = SplitTree().space_of(space, "0", memory)
            drawn = draw_assignments(whole, random.Random(0), DRAWN)
            if self.decision not in (in_use := options_in_use(whole, drawn)):
                message = f"fewer than two options of {self.decision} are in use among {len(drawn)} random configs"
                raise UserError(message, where="split.decision", hint=f"use {one_of(in_use)}")


@dataclass(frozen=True)
class SplitMethod:
    """A row of `METHODS`: `choose` returns one leaf's split (None: it stays whole) and the tokens used. It is given the leaf's
    space, what compares options by their gradients (`conflicts`), and batches `(batch, seq + 1)` of training text."""

    choose: Callable[[SplitSpec, Compare, LeafSpace, Sequence[Tensor], random.Random], tuple[Split | None, int]]
    rounds: Callable[[SplitSpec], int] = lambda spec: spec.splits


DRAWN = 1_000  # random configs by which it is told whether an option is in use


def draw_assignments(space: LeafSpace, rng: random.Random, draws: int = 200, configs: str = "uniform") -> list[Assignment]:
    """The decisions of random configs of a leaf, as the whole space knows them; `configs` is a row of `CONFIGS`."""
    found = (space.whole.encode(CONFIGS[configs](space, rng)) for _ in range(draws))
    return [decided for decided in found if decided is not None]


def options_in_use(space: LeafSpace, drawn: Sequence[Assignment]) -> dict[str, Options]:
    """For each layer's decisions, the options that any of the drawn configs has; decisions with fewer than two are left out.

    An option in a leaf's `options` may be of (nearly) no use: one that the limits forbid, one of a decision that is hardly ever
    asked, a source whose root is another option's too.
    """
    used = {(name, option) for decided in drawn for name, option in decided.items()}
    found = {name: tuple(o for o in options if (name, o) in used) for name, options in space.options.items()}
    return {name: options for name, options in found.items() if len(options) > 1 and Decision.parse(name).layer is not None}


def _exhaustive(
    spec: SplitSpec, compare_all: Compare, space: LeafSpace, batches: Sequence[Tensor], rng: random.Random
) -> tuple[Split | None, int]:
    """A leaf for each option of the given decision, by default of the first that every config is asked whose options are nearest
    in number to 2 ** splits. The leaf stays whole where only one option is in use."""
    drawn = draw_assignments(space, rng, DRAWN, spec.configs)
    in_use = options_in_use(space, drawn)
    always = [name for name in in_use if all(name in decided for decided in drawn)]
    usual = min(always or in_use, key=lambda name: abs(len(in_use[name]) - 2**spec.splits), default=None)
    decision = spec.decision or usual
    if decision not in in_use:
        return None, 0
    return _split(space, decision, [(option,) for option in in_use[decision]]), 0


def _random(
    spec: SplitSpec, compare_all: Compare, space: LeafSpace, batches: Sequence[Tensor], rng: random.Random
) -> tuple[Split | None, int]:
    """A decision that a random config is asked, its options partitioned at random, every partition equally likely."""
    drawn = draw_assignments(space, rng, configs=spec.configs)
    in_use = options_in_use(space, drawn)
    candidates = [name for name in rng.choice(drawn) if name in in_use] or list(in_use)
    if not candidates:
        return None, 0
    decision = rng.choice(candidates)
    options = in_use[decision]
    bits = rng.randrange(1, 2 ** (len(options) - 1)) << 1  # bit n is the group of option n, the first's 0
    return _split(space, decision, _halves(options, [bits >> n & 1 for n in range(len(options))])), 0


def _gradient_matching(
    spec: SplitSpec, compare_all: Compare, space: LeafSpace, batches: Sequence[Tensor], rng: random.Random
) -> tuple[Split | None, int]:
    """The decision and partition of the highest criterion over the distances of gradients (2203.15207)."""
    in_use = options_in_use(space, draw_assignments(space, rng, configs=spec.configs))
    distances, tokens = conflicts(compare_all, space, in_use, batches, rng, spec.similarity, spec.configs)
    found = {name: best_partition(matrix, spec.criterion) for name, matrix in distances.items()}
    scores = {name: score for name, (_, score) in found.items()}
    best = max(scores, key=lambda name: scores[name], default=None)
    if best is None or scores[best] <= 0:
        return None, tokens
    split = _split(space, best, _halves(in_use[best], found[best][0]))
    return replace(split, options=in_use[best], distances=tuple(map(tuple, distances[best].tolist())), scores=scores), tokens


def _halves(options: Options, side: Sequence[int]) -> list[Options]:
    return [tuple(option for option, s in zip(options, side, strict=True) if s == n) for n in (0, 1)]


def _split(space: LeafSpace, decision: str, groups: Sequence[Options]) -> Split:
    """The split in groups, in the options' order; the first also has the options that are in none, which are hardly used."""
    options = space.options[decision]
    rest = [option for option in options if not any(option in group for group in groups)]
    whole = [(*groups[0], *rest), *groups[1:]]
    return Split(decision, tuple(tuple(option for option in options if option in group) for group in whole))


METHODS: dict[str, SplitMethod] = {
    "none": SplitMethod(lambda spec, compare_all, space, batches, rng: (None, 0), rounds=lambda spec: 0),
    "exhaustive": SplitMethod(_exhaustive, rounds=lambda spec: 1),
    "random": SplitMethod(_random),
    "gradient-matching": SplitMethod(_gradient_matching),
}
"""How a leaf is split. A new method is a row here, and nothing elsewhere.

`none`: one-shot. `exhaustive`: a leaf for each option of one decision (few-shot NAS, 2006.06863). `random`: the control, with as
many leaves as `gradient-matching` (2203.15207), which splits where the options' gradients disagree most. `splits` rounds make up
to 2 ** splits leaves; fewer where a leaf has no decision left whose options differ.
"""


def in_process(supernets: Mapping[str, Supernet]) -> Compare:
    """Comparisons done here, one after the other, on the supernets by leaf."""
    return lambda given: [compare(supernets[one.space.leaf], one) for one in given]


def split_leaves(
    spec: SplitSpec,
    spaces: Mapping[str, LeafSpace],
    compare_all: Compare,
    batches: Sequence[Tensor],
    rng: random.Random,
) -> tuple[SplitTree, int]:
    """One round: every leaf is split by its own supernet. Returns the grown tree and the tokens used for gradients.

    `spaces` are `SplitTree.spaces`, and batches `(batch, seq + 1)` of training text, never of evaluation text; `compare_all` does
    comparisons on each leaf's own supernet, such as `in_process(supernets)`. A `decision` of which a leaf
    uses one option only leaves it whole.
    """
    (tree,) = {id(space.tree): space.tree for space in spaces.values()}.values()
    splits, tokens = {}, 0
    for leaf, space in spaces.items():
        split, used = METHODS[spec.method].choose(spec, compare_all, space, batches, rng)
        tokens += used
        if split is not None:
            splits[leaf] = split
    return tree.grow(splits), tokens
