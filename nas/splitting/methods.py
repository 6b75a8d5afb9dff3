"""How a leaf is cut: what a user may ask for (`SplitSpec`) and the methods that do it (`METHODS`).

The two are one module because each needs the other: a spec names a method, and a method reads the spec.
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
from ..sharing.space import Assignment, SearchSpace
from .gradients import DISTANCES, conflicts
from .partition import CRITERIA, best_partition
from .tree import LeafSpace, Options, Split, SplitTree


@dataclass(frozen=True)
class SplitSpec(Strict):
    """How a supernet is split.

    `splits` rounds cut every leaf in two (`exhaustive` cuts once, by `decision`, into a leaf an option); `at` is the part of all
    steps that is trained before the last cut; gradients are taken on `batches` batches of `batch` rows (2203.15207: 100
    batches), which are compared by a row of `DISTANCES`, and a cut is judged by one of `CRITERIA`. With `restart` the last cut's
    leaves start from new weights (2203.15207), not from their parent's.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decision is not None and self.method != "exhaustive":
            hint = "leave it out, or use method: exhaustive"
            raise UserError(f"{self.method} finds its decision itself", where="split.decision", hint=hint)

    @property
    def rounds(self) -> int:
        """How many times the leaves are cut."""
        return METHODS[self.method].rounds(self)

    def stages(self, steps: int) -> tuple[int, ...]:
        """Steps of each stage, over all its leaves: one stage before each round of cuts, one after the last; they add up."""
        if not self.rounds:
            return (steps,)
        before = round(self.at * steps)
        ends = [before * n // self.rounds for n in range(self.rounds + 1)]
        return (*(end - start for start, end in itertools.pairwise(ends)), steps - before)

    def check(self, space: SearchSpace) -> None:
        """Raise UserError if `decision` is none of the space's layers', or has one option only."""
        known = [name for name, options in space.options.items() if _of_a_layer(name) and len(options) > 1]
        if self.decision is not None and self.decision not in known:
            message = "has nothing to cut by" if self.decision in space.options else "is no decision of this space"
            raise UserError(f"{self.decision} {message}", where="split.decision", hint=did_you_mean(self.decision, known))


def _of_a_layer(decision: str) -> bool:
    """Whether a decision can be cut by: `norms` is the whole model's, and is not."""
    return decision.startswith("layer_")


@dataclass(frozen=True)
class SplitInputs:
    """What a method may look at: the supernet of a leaf, the leaf's space, and batches `(batch, seq + 1)` of training text."""

    supernet: Supernet
    space: LeafSpace
    batches: Sequence[Tensor]


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`: `choose` finds one leaf's cut (None: it stays whole) and the tokens spent on it."""

    choose: Callable[[SplitSpec, SplitInputs, random.Random], tuple[Split | None, int]]
    rounds: Callable[[SplitSpec], int]


def draw_assignments(space: LeafSpace, rng: random.Random, draws: int = 200) -> list[Assignment]:
    """The decisions of random configs of a leaf, as the whole space knows them."""
    found = (space.whole.assignment(space.sample(rng)) for _ in range(draws))
    return [decided for decided in found if decided is not None]


def options_in_use(space: LeafSpace, drawn: Sequence[Assignment]) -> dict[str, Options]:
    """For each layer's decisions, the options that any of the drawn configs has; decisions with fewer than two are left out.

    An option may stand in a leaf's `options` and be of (nearly) no use: one that the limits forbid, one of a decision that is
    hardly ever asked, a source whose root is another option's too.
    """
    used = {(name, option) for decided in drawn for name, option in decided.items()}
    found = {name: tuple(o for o in options if (name, o) in used) for name, options in space.options.items()}
    return {name: options for name, options in found.items() if len(options) > 1 and _of_a_layer(name)}


def _never(spec: SplitSpec, material: SplitInputs, rng: random.Random) -> tuple[Split | None, int]:
    return None, 0


def _exhaustive(spec: SplitSpec, material: SplitInputs, rng: random.Random) -> tuple[Split | None, int]:
    """A leaf for each option of the given decision, or of `_usual_decision`."""
    spec.check(material.space)
    drawn = draw_assignments(material.space, rng, draws=1_000)
    in_use = options_in_use(material.space, drawn)
    decision = spec.decision or _usual_decision(in_use, drawn, 2**spec.splits)
    if decision is None:
        return None, 0
    if decision not in in_use:
        message = f"fewer than two options of {decision} were in use among {len(drawn)} random configs"
        raise UserError(message, where="split.decision", hint=f"use {one_of(in_use)}")
    return Split(decision, _with_rest(material.space.options[decision], [(option,) for option in in_use[decision]])), 0


def _usual_decision(in_use: Mapping[str, Options], drawn: Sequence[Assignment], leaves: int) -> str | None:
    """Of the decisions that every config is asked, the first whose options are nearest in number to the leaves wanted."""
    always = [name for name in in_use if all(name in decided for decided in drawn)]
    return min(always or in_use, key=lambda name: abs(len(in_use[name]) - leaves), default=None)


def _random(spec: SplitSpec, material: SplitInputs, rng: random.Random) -> tuple[Split | None, int]:
    """A decision that a random config is asked, its options divided at random, every division equally likely."""
    drawn = draw_assignments(material.space, rng)
    in_use = options_in_use(material.space, drawn)
    candidates = [name for name in rng.choice(drawn) if name in in_use] or list(in_use)
    if not candidates:
        return None, 0
    decision = rng.choice(candidates)
    options = in_use[decision]
    division = rng.randrange(1, 2 ** (len(options) - 1)) << 1  # bit n is the group of option n, the first's 0
    return _cut_in_two(material.space, decision, options, [division >> n & 1 for n in range(len(options))]), 0


def _gradient_matching(spec: SplitSpec, material: SplitInputs, rng: random.Random) -> tuple[Split | None, int]:
    """The decision and division that remove most disagreement (2203.15207, with the criterion of `best_partition`)."""
    in_use = options_in_use(material.space, draw_assignments(material.space, rng))
    distances, tokens = conflicts(material.supernet, material.space, in_use, material.batches, rng, spec.similarity)
    cuts = {name: best_partition(matrix, spec.criterion) for name, matrix in distances.items()}
    scores = {name: score for name, (_, score) in cuts.items()}
    best = max(scores, key=lambda name: scores[name], default=None)
    if best is None or scores[best] <= 0:
        return None, tokens
    cut = _cut_in_two(material.space, best, in_use[best], cuts[best][0])
    rows = tuple(map(tuple, distances[best].tolist()))
    return replace(cut, options=in_use[best], distances=rows, scores=scores), tokens


def _cut_in_two(space: LeafSpace, decision: str, options: Options, side: Sequence[int]) -> Split:
    groups = [tuple(option for option, s in zip(options, side, strict=True) if s == n) for n in (0, 1)]
    return Split(decision, _with_rest(space.options[decision], groups))


def _with_rest(options: Options, groups: Sequence[Options]) -> tuple[Options, ...]:
    """The groups in the options' order, the first with the options that are in none: they reach (next to) nothing."""
    rest = [option for option in options if not any(option in group for group in groups)]
    whole = [(*groups[0], *rest), *groups[1:]]
    return tuple(tuple(option for option in options if option in group) for group in whole)


METHODS: dict[str, Method] = {
    "none": Method(_never, rounds=lambda spec: 0),
    "exhaustive": Method(_exhaustive, rounds=lambda spec: 1),
    "random": Method(_random, rounds=lambda spec: spec.splits),
    "gradient-matching": Method(_gradient_matching, rounds=lambda spec: spec.splits),
}
"""How a leaf is cut. A new method is a row here, and nothing elsewhere.

`none`: one-shot. `exhaustive`: a leaf for each option of one decision, given or `_usual_decision` (few-shot NAS, 2006.06863).
`random`: the control, with as many leaves as `gradient-matching` (2203.15207), which cuts where the options' gradients
disagree most. `splits` rounds make up to 2 ** splits leaves; fewer where a leaf has no decision left whose options differ.
"""


def split_leaves(
    spec: SplitSpec,
    spaces: Mapping[str, LeafSpace],
    supernets: Mapping[str, Supernet],
    batches: Sequence[Tensor],
    rng: random.Random,
) -> tuple[SplitTree, int]:
    """One round: every leaf's cut chosen with its own supernet; the tree they make, and the tokens spent on gradients.

    `spaces` are `SplitTree.spaces` and `supernets` each leaf's; batches `(batch, seq + 1)` are training text, never evaluation's.
    Raises UserError for a `decision` that the space does not have.
    """
    (tree,) = {id(space.tree): space.tree for space in spaces.values()}.values()
    cuts, tokens = {}, 0
    for leaf, space in spaces.items():
        cut, spent = METHODS[spec.method].choose(spec, SplitInputs(supernets[leaf], space, batches), rng)
        tokens += spent
        if cut is not None:
            cuts[leaf] = cut
    return tree.grow(cuts), tokens
