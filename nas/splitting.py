"""Splitting a supernet: which configs get a sub-supernet of their own, so that they stop spoiling one another's weights.

Owns the methods of splitting (`METHODS`), the tree they grow (`SplitTree`: which leaf a config belongs to), the space of a leaf
(`LeafSpace`) and the copying of weights to the leaves (`inherit`). Training the supernets is `nas.training`'s; when to split, and
the optimiser's state, are the caller's:

    tree, nets = SplitTree(), {"0": supernet}
    for _ in range(spec.rounds):
        tree, tokens = split_leaves(spec, tree.spaces(space, memory), nets, batches, rng)
        nets = inherit(tree, nets)
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import UserError, did_you_mean, one_of
from .evaluate import NotFinite, window_losses
from .loading import Strict
from .memory import MemorySpec, measure
from .model import LayerPlan, Plan
from .reach import Tree
from .sharing import Draft, SharingConfig
from .space import Assignment, SearchSpace
from .supernet import Supernet

Options = tuple[Any, ...]
ROOT = "0"
MOST_TRIED = 16
"""Options of which every division is tried (32,767 of them)."""
DESCENTS = 8
"""Starts of the descent to a leaf's extreme."""


@dataclass(frozen=True)
class SplitSpec(Strict):
    """How a supernet is split.

    `splits` rounds cut every leaf in two (`exhaustive` cuts once, by `decision`, into a leaf an option); `at` is the part of all
    steps that is trained before the last cut; gradients are taken on `batches` batches of `batch` rows (2203.15207: 100
    batches). With `restart` the last cut's leaves start from new weights (2203.15207), not from their parent's.
    """

    method: str = "gradient-matching"
    splits: int = 1
    batches: int = 20
    batch: int = 4
    at: float = 0.5
    decision: str | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown method {self.method!r}", where="split.method", remedy=did_you_mean(self.method, METHODS))
        for name in ("splits", "batches", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{getattr(self, name)} is too small", where=f"split.{name}", remedy="use 1 or more")
        if not 0 < self.at < 1:
            raise UserError(
                f"{self.at} is not between 0 and 1", where="split.at", remedy="use 0.5 to cut after half of the steps"
            )
        if self.decision is not None and self.method != "exhaustive":
            remedy = "leave it out, or use method: exhaustive"
            raise UserError(f"{self.method} finds its decision itself", where="split.decision", remedy=remedy)

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
            rule = "has nothing to cut by" if self.decision in space.options else "is no decision of this space"
            raise UserError(f"{self.decision} {rule}", where="split.decision", remedy=did_you_mean(self.decision, known))


@dataclass(frozen=True)
class Cut:
    """One leaf's options of one decision, divided into `groups`.

    What gradient matching saw: `distances[i][j]` between `options[i]` and `options[j]`, and for every decision the conflict that
    its best cut removes (`scores`, see `best_partition`). The other methods leave these empty.
    """

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
    def from_data(data: Mapping[str, Any]) -> Cut:
        """The inverse of `dataclasses.asdict`, after JSON has made lists of tuples."""
        groups, rows = (tuple(map(tuple, data[name])) for name in ("groups", "distances"))
        return Cut(data["decision"], groups, tuple(data["options"]), rows, dict(data["scores"]))


@dataclass(frozen=True)
class SplitTree:
    """Who trains what: a leaf is one sub-supernet; a node that was cut has a child for each group of its cut's options.

    A leaf's name is its path: `0-1-0` is the first child of the second child of the root, `0`.
    """

    name: str = ROOT
    cut: Cut | None = None
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

        At each cut it goes with the option that `space.assignment(config)` has for the decision. Where the decision was not
        open, the config goes with the space's first option of it (`own`, where a source is chosen): a layer that is tied as a
        whole stays with those that share nothing more. Raises UserError if the space has no such config.
        """
        if not self.children:
            return self.name
        decided = space.assignment(config)
        if decided is None:
            raise UserError(f"config {config.hash} is not in this search space", remedy="use one that the space can choose")
        return self._route(space, decided)

    def _route(self, space: SearchSpace, decided: Assignment) -> str:
        if self.cut is None:
            return self.name
        option = _option(space, decided, self.cut.decision)
        return self.children[self.cut.group_of(option)]._route(space, decided)

    def restrictions(self, leaf: str) -> dict[str, Options]:
        """The options that a leaf has left, of the decisions cut above it."""
        if self.cut is None:
            assert leaf == self.name, f"no leaf {leaf}"
            return {}
        n = next(n for n, child in enumerate(self.children) if leaf in child.leaves())
        return {self.cut.decision: self.cut.groups[n]} | self.children[n].restrictions(leaf)

    def space_of(self, space: SearchSpace, leaf: str, memory: MemorySpec | None = None) -> LeafSpace:
        """The part of the (whole) space that routes to a leaf, within the space's limits if told where memory is measured."""
        options = {**space.options, **self.restrictions(leaf)}
        return LeafSpace(space.shape, options, space.limits, whole=space, tree=self, leaf=leaf, memory=memory)

    def spaces(self, space: SearchSpace, memory: MemorySpec | None = None) -> dict[str, LeafSpace]:
        """Every leaf's space, by its name."""
        return {leaf: self.space_of(space, leaf, memory) for leaf in self.leaves()}

    def grow(self, cuts: Mapping[str, Cut]) -> SplitTree:
        """The tree with the named leaves cut."""
        if self.children:
            return replace(self, children=tuple(child.grow(cuts) for child in self.children))
        cut = cuts.get(self.name)
        groups = cut.groups if cut else ()
        return SplitTree(self.name, cut, tuple(SplitTree(f"{self.name}-{n}") for n in range(len(groups))))

    def describe(self) -> Iterator[str]:
        """A line for each node: the decision and its groups, then the children, further in."""
        groups = " | ".join(" ".join(map(str, group)) for group in self.cut.groups) if self.cut else ""
        yield f"{self.name}  {self.cut.decision}: {groups}" if self.cut else self.name
        for child in self.children:
            yield from (f"  {line}" for line in child.describe())

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        children = [child.to_data() for child in self.children]
        return {"name": self.name} | ({"cut": asdict(self.cut), "children": children} if self.cut else {})

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> SplitTree:
        """The inverse of `to_data`."""
        children = tuple(SplitTree.from_data(child) for child in data.get("children", ()))
        return SplitTree(data["name"], Cut.from_data(data["cut"]) if "cut" in data else None, children)


def _of_a_layer(decision: str) -> bool:
    """Whether a decision can be cut by: `norms` is the whole model's, and is not."""
    return decision.startswith("layer_")


def _option(space: SearchSpace, decided: Assignment, decision: str) -> Any:
    return decided.get(decision, space.options[decision][0])


@dataclass(frozen=True, kw_only=True)
class LeafSpace(SearchSpace):
    """The configs of `whole` that a tree routes to one leaf; with `memory`, those of them within the limits.

    `options` are cut down to the leaf's, so that a walk mostly stays in it; `sample` draws again where one has left it (by a
    decision that was not open, or by another name for a config: two sources may have one root). `layer_outcomes`, and all that
    is made of it, has the leaf's configs and no others.
    """

    whole: SearchSpace
    tree: SplitTree
    leaf: str
    memory: MemorySpec | None = None

    def holds(self, config: SharingConfig) -> bool:
        """See `SearchSpace.holds`: whether a config of the whole space routes to this leaf, within the limits."""
        if self.memory is not None and not self.whole.meets_limits(config, self.memory):
            return False
        return self.tree.route(self.whole, config) == self.leaf

    def sample(self, rng: random.Random, keep: Callable[[SharingConfig], bool] | None = None) -> SharingConfig:
        """See `SearchSpace.sample`; only configs that this leaf holds."""
        return super().sample(rng, lambda config: (keep is None or keep(config)) and self.holds(config))

    def layer_outcomes(self, draft: Draft) -> dict[LayerPlan, Assignment]:
        """See `SearchSpace.layer_outcomes`; only plans with which the draft can still become one of this leaf's configs."""
        cuts = self.tree.restrictions(self.leaf)
        here = [name for name in cuts if name.startswith(f"layer_{draft.index}.")]
        found = self.whole.layer_outcomes(draft)
        return {plan: d for plan, d in found.items() if all(_option(self.whole, d, name) in cuts[name] for name in here)}

    def extreme(self, spec: MemorySpec, name: str, sign: int, width: int = 40) -> SharingConfig:
        """See `SearchSpace.extreme`; where no prefix in the beam leads to the leaf, by `DESCENTS` from random configs of it.

        A cut in a high layer can ask a low one to own its parts, which the prefixes of fewest bytes do not.
        """
        level = Tree(self, spec).beam(name, sign, width)
        if level:
            return SharingConfig.of_plan(self.shape, Plan(level[0].layers))
        rng = random.Random(0)

        def cost(config: SharingConfig) -> int:
            return sign * measure(self.shape, config, spec).to_data()[name]

        return min((self._descend(self.sample(rng), cost) for _ in range(DESCENTS)), key=cost)

    def _descend(self, config: SharingConfig, cost: Callable[[SharingConfig], int]) -> SharingConfig:
        """The config of least cost that is reached by changing one decision at a time, to the best neighbour in the leaf."""
        best, least = config, cost(config)
        setting = {name: options[0] for name, options in self.options.items()} | (self.whole.assignment(config) or {})
        for decision, options in self.options.items():
            for option in options:
                near = _apply(self, setting | {decision: option})
                if cost(near) < least and self.holds(near):
                    best, least = near, cost(near)
        return config if best == config else self._descend(best, cost)

    def largest(self) -> SharingConfig:
        """See `SearchSpace.largest`; the config of most weights, should that one belong to another leaf."""
        config = super().largest()
        routed = self.tree.route(self.whole, config)
        return config if routed == self.leaf else self.extreme(MemorySpec(), "weight_bytes", -1)


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


@dataclass(frozen=True)
class Gradient:
    """One config's gradient of the supernet's Parameters, in their order.

    `flat` `(numbers,)` holds zeros where a Parameter is not trained; `trained` and `squares` `(parameters,)` say which are, and
    their squared norms.
    """

    flat: Tensor
    trained: Tensor
    squares: Tensor

    @staticmethod
    def of(supernet: Supernet, config: SharingConfig, rows: Tensor) -> Gradient:
        """The gradient on a batch `(batch, seq + 1)`, in float32. No `.grad` is touched, and no weight. Raises NotFinite."""
        params = list(supernet.parameters())
        loss = window_losses(supernet.subnet(config), rows, autocast=False).mean()
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        filled = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(params, grads, strict=True)]
        squares = torch.stack([torch.linalg.vector_norm(grad) for grad in filled]).cpu().double().square()
        if not squares.isfinite().all():
            raise NotFinite(f"the gradient of config {config.hash} is not finite, at a loss of {loss.item()}")
        trained = torch.tensor([grad is not None for grad in grads], dtype=torch.float64)
        return Gradient(torch.cat([grad.flatten() for grad in filled]), trained, squares)


def cosine_distances(gradients: Sequence[Gradient]) -> Tensor:
    """1 − cosine of each pair `(n, n)`, in float64, 0 to 2: how much two gradients disagree on what *both* train.

    Gradients are keyed by Parameter and a pair is compared on the Parameters that both have a gradient for. What one alone trains
    (an untied layer's own projections, say) is no conflict: the other never moves it, and zeros in its place would count it as
    one. With nothing in common, the distance is 0.
    """
    flat = torch.stack([g.flat for g in gradients])
    trained, squares = (torch.stack(rows) for rows in zip(*((g.trained, g.squares) for g in gradients), strict=True))
    seen = (squares @ trained.T).sqrt()  # [i, j]: the norm of i's gradient on what j trains
    norms = seen * seen.T
    cosines = torch.where(norms > 0, (flat @ flat.T).cpu().double() / norms.clamp(min=1e-300), 1.0)
    return (1 - cosines).clamp(0, 2).fill_diagonal_(0)


def conflicts(
    supernet: Supernet, space: LeafSpace, decisions: Mapping[str, Options], batches: Sequence[Tensor], rng: random.Random
) -> tuple[dict[str, Tensor], int]:
    """How much the options of each decision disagree: `(options, options)` mean distances, and the tokens that it took.

    For each batch `(batch, seq + 1)` one random config of the leaf fixes all decisions; then each decision in turn runs each of
    its options in it (2203.15207), without a step; every weight is left bitwise as it was. What is compared is in
    `cosine_distances`: a decision's own Parameters are those that only one of two options trains, and count for neither.

    A distance is the *expected* one over random settings of the other decisions, and two options that compute the same
    are at 0: so are all options of a decision that the setting leaves closed, and options that lead out of the leaf meet nobody.
    So a decision that is seldom asked weighs as little as it matters; drawing again until it is open would split off the
    few configs that ask it. And one setting serves all decisions: they are compared on equal terms, and most gradients are
    needed once only. Tokens are those of each gradient taken, times the tokens of its batch.
    """
    totals = {name: torch.zeros(len(options), len(options), dtype=torch.float64) for name, options in decisions.items()}
    tokens = 0
    for rows in batches:
        setting = _draw_setting(space, rng)
        base = _apply(space, setting)
        first = {base: Gradient.of(supernet, base, rows)}
        tokens += rows[:, 1:].numel()
        for name, options in decisions.items():
            configs = [_apply(space, setting | {name: option}) for option in options]
            here = [n for n, config in enumerate(configs) if space.holds(config)]
            fresh = [config for config in dict.fromkeys(configs[n] for n in here) if config != base]
            if fresh:
                gradients = first | {config: Gradient.of(supernet, config, rows) for config in fresh}
                tokens += len(fresh) * rows[:, 1:].numel()
                index = torch.tensor(here)
                totals[name][index[:, None], index] += _between([configs[n] for n in here], gradients)
    return {name: total / max(len(batches), 1) for name, total in totals.items()}, tokens


def _draw_setting(space: LeafSpace, rng: random.Random) -> Assignment:
    """An option for every decision, open or not, that make a config of the leaf."""
    for _ in range(10_000):
        setting = {name: rng.choice(options) for name, options in space.options.items()}
        if space.holds(_apply(space, setting)):
            return setting
    raise UserError(f"no config of sub-supernet {space.leaf} was found in 10,000 draws", remedy="loosen the limits")


def _apply(space: LeafSpace, setting: Assignment) -> SharingConfig:
    return space.walk(lambda name, options: setting[name])[0]


def _between(configs: Sequence[SharingConfig], gradients: Mapping[SharingConfig, Gradient]) -> Tensor:
    """The distances of configs, equal ones at exactly 0."""
    distinct = list(dict.fromkeys(configs))
    index = torch.tensor([distinct.index(config) for config in configs])
    return cosine_distances([gradients[config] for config in distinct])[index[:, None], index]


def best_partition(distances: Tensor) -> tuple[tuple[int, ...], float]:
    """Options `(n, n)` in two groups, with as much disagreement as can be between them: each one's group, 0 or 1, and the score.

    The rule. A group of m options has the scatter Σᵢⱼ dᵢⱼ / m, over its ordered pairs: with dᵢⱼ = 1 − cosine that is the sum
    of the squared distances of its unit gradients from their mean. The score is the scatter of all n options less that of the
    two groups, over n: the mean squared disagreement that a cut removes, at most 1. Where all options train the same weights,
    the best cut is the exact 2-means partition of their gradients' directions.

    The reason. The authors' code compares sums over the pairs a cut leaves inside its groups, but one against five leaves ten
    pairs and three against three leaves six, so it compares cuts of different kinds. Here, options that all disagree equally
    give every cut the same score. And the score compares decisions of few options with those of many by what a cut does for a
    random pair of training steps. All cuts are tried up to `MOST_TRIED` options; beyond, those reached from each
    one-against-the-rest by moving an option at a time while that helps.
    """
    n = len(distances)
    assert n > 1
    if n <= MOST_TRIED:
        cuts = torch.arange(1, 2 ** (n - 1))[:, None] >> torch.arange(n - 1) & 1
        sides = torch.cat([torch.zeros(len(cuts), 1), cuts], 1).double()
    else:
        sides = torch.stack([_descend(distances, start) for start in torch.eye(n, dtype=torch.float64)])
    scores = _removed(distances, sides)
    best = int(scores.argmax())
    side = (sides[best] - sides[best, 0]).abs()  # the first option's group is group 0
    return tuple(int(s) for s in side), float(scores[best])


def _removed(distances: Tensor, sides: Tensor) -> Tensor:
    """The scores `(cuts,)` of cuts `(cuts, n)` of zeros and ones."""

    def scatter(members: Tensor) -> Tensor:
        return ((members @ distances) * members).sum(1) / members.sum(1).clamp(min=1)

    return (distances.sum() / len(distances) - scatter(sides) - scatter(1 - sides)) / len(distances)


def _descend(distances: Tensor, side: Tensor) -> Tensor:
    while True:
        moved = (side - torch.eye(len(side), dtype=side.dtype)).abs()
        scores = _removed(distances, torch.cat([side[None], moved]))
        if scores.argmax() == 0:
            return side
        side = moved[int(scores.argmax()) - 1]


@dataclass(frozen=True)
class Material:
    """What a method may look at: the supernet of a leaf, the leaf's space, and batches `(batch, seq + 1)` of training text."""

    supernet: Supernet
    space: LeafSpace
    batches: Sequence[Tensor]


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`: `choose` finds one leaf's cut (None: it stays whole) and the tokens spent on it."""

    choose: Callable[[SplitSpec, Material, random.Random], tuple[Cut | None, int]]
    rounds: Callable[[SplitSpec], int]


def _never(spec: SplitSpec, material: Material, rng: random.Random) -> tuple[Cut | None, int]:
    return None, 0


def _exhaustive(spec: SplitSpec, material: Material, rng: random.Random) -> tuple[Cut | None, int]:
    """A leaf for each option of the given decision, or of `_usual_decision`."""
    spec.check(material.space)
    drawn = draw_assignments(material.space, rng, draws=1_000)
    in_use = options_in_use(material.space, drawn)
    decision = spec.decision or _usual_decision(in_use, drawn, 2**spec.splits)
    if decision is None:
        return None, 0
    if decision not in in_use:
        rule = f"fewer than two options of {decision} were in use among {len(drawn)} random configs"
        raise UserError(rule, where="split.decision", remedy=f"use {one_of(in_use)}")
    return Cut(decision, _with_rest(material.space.options[decision], [(option,) for option in in_use[decision]])), 0


def _usual_decision(in_use: Mapping[str, Options], drawn: Sequence[Assignment], leaves: int) -> str | None:
    """Of the decisions that every config is asked, the first whose options are nearest in number to the leaves wanted."""
    always = [name for name in in_use if all(name in decided for decided in drawn)]
    return min(always or in_use, key=lambda name: abs(len(in_use[name]) - leaves), default=None)


def _random(spec: SplitSpec, material: Material, rng: random.Random) -> tuple[Cut | None, int]:
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


def _gradient_matching(spec: SplitSpec, material: Material, rng: random.Random) -> tuple[Cut | None, int]:
    """The decision and division that remove most disagreement (2203.15207, with the score of `best_partition`)."""
    in_use = options_in_use(material.space, draw_assignments(material.space, rng))
    distances, tokens = conflicts(material.supernet, material.space, in_use, material.batches, rng)
    cuts = {name: best_partition(matrix) for name, matrix in distances.items()}
    scores = {name: score for name, (_, score) in cuts.items()}
    best = max(scores, key=lambda name: scores[name], default=None)
    if best is None or scores[best] <= 0:
        return None, tokens
    cut = _cut_in_two(material.space, best, in_use[best], cuts[best][0])
    rows = tuple(map(tuple, distances[best].tolist()))
    return replace(cut, options=in_use[best], distances=rows, scores=scores), tokens


def _cut_in_two(space: LeafSpace, decision: str, options: Options, side: Sequence[int]) -> Cut:
    groups = [tuple(option for option, s in zip(options, side, strict=True) if s == n) for n in (0, 1)]
    return Cut(decision, _with_rest(space.options[decision], groups))


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
        cut, spent = METHODS[spec.method].choose(spec, Material(supernets[leaf], space, batches), rng)
        tokens += spent
        if cut is not None:
            cuts[leaf] = cut
    return tree.grow(cuts), tokens


def ancestor(leaf: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The nearest of the known nodes at or above a leaf: whose weights, and optimiser, it inherits."""
    above = [name for name in known if f"{leaf}-".startswith(f"{name}-")]
    return max(above, key=len)


def inherit(tree: SplitTree, supernets: Mapping[str, Supernet], generator: torch.Generator | None = None) -> dict[str, Supernet]:
    """A supernet for each leaf of a tree, with a copy of the weights of its nearest ancestor among `supernets`.

    With a generator, every leaf starts from new weights instead: `SplitSpec.restart`.
    """
    parents = {leaf: supernets[ancestor(leaf, supernets)] for leaf in tree.leaves()}
    if generator is None:
        return {leaf: copy.deepcopy(parent) for leaf, parent in parents.items()}
    devices = {leaf: next(parent.parameters()).device for leaf, parent in parents.items()}
    return {leaf: Supernet(parent.shape, generator).to(devices[leaf]) for leaf, parent in parents.items()}
