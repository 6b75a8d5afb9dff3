"""How much the options of a decision disagree about the weights they share, and the best partition of the options in two.

Owns the gradients, their distances (`DISTANCES`) and the criteria of a partition (`CRITERIA`). No weight is changed.
Of gradients, which are as large as the supernet, only inner products are kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..model.supernet import Supernet
from ..sharing.label import label
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import Assignment
from ..training.evaluation import NotFinite, sequence_losses
from .tree import CONFIGS, LeafSpace, Options

HELD_BYTES = 8 * 2**30
"""The most bytes of gradients that are held to be compared with later ones, beside the setting's own and the one just made; at
least one is. Where a decision has more options, gradients are made again: the same figures for more time."""

Gradient = list[Tensor | None]
"""The gradient of each of the supernet's Parameters, in their order; None where a subnet does not train it."""


def gradient_of(supernet: Supernet, config: SharingConfig, rows: Tensor) -> Gradient:
    """A config's gradient on a batch `(batch, seq + 1)`, in float32; `.grad` is not touched."""
    loss = sequence_losses(supernet.subnet(config), rows, autocast=False).mean()
    return list(torch.autograd.grad(loss, list(supernet.parameters()), allow_unused=True))


@dataclass(frozen=True)
class Products:
    """What is kept of n gradients: `dots` `(n, n, parameters)`, the inner product of each pair by Parameter, and `trained`
    `(n, parameters)`, whether a gradient has it; both in float64."""

    dots: Tensor
    trained: Tensor

    @staticmethod
    def of(make: Callable[[int], Gradient], count: int, held: int) -> Products:
        """The products of the gradients that `make` makes by number, with at most `held` of them in memory besides the newest.
        With `held >= count - 1` each is made once. Later gradients pass by the ones held, block by block."""
        dots, trained = dict[tuple[int, int], Tensor](), dict[int, list[bool]]()
        for first in range(0, max(count - 1, 1), held):
            kept: dict[int, Gradient] = {}
            for n in range(first, count):
                new = make(n)
                trained[n], dots[n, n] = [part is not None for part in new], inner_products(new, new)
                dots |= {(m, n): inner_products(old, new) for m, old in kept.items()}
                if n < first + held:
                    kept[n] = new
                del new  # before the next is made
        found = torch.stack([dots[min(m, n), max(m, n)] for m in range(count) for n in range(count)]).cpu().double()
        masks = torch.tensor([trained[n] for n in range(count)], dtype=torch.float64)
        return Products(found.unflatten(0, (count, count)), masks)


def inner_products(one: Gradient, other: Gradient) -> Tensor:
    """The inner product by Parameter `(parameters,)`, 0 where one has none; on the gradients' device."""
    zero = next(part for part in one if part is not None).new_zeros(())

    def dot(a: Tensor | None, b: Tensor | None) -> Tensor:
        return zero if a is None or b is None else torch.dot(a.flatten(), b.flatten())

    return torch.stack([dot(a, b) for a, b in zip(one, other, strict=True)])


def cosine_distances(products: Products) -> Tensor:
    """1 − cosine of each pair `(n, n)`, in float64, 0 to 2: how much two gradients disagree on what *both* train.

    A pair is compared on the Parameters for which both have a gradient. What one alone trains (an untied layer's own projections,
    say) is no conflict: the other never moves it, and zeros in its place would count it as one. With nothing in common, the
    distance is 0.
    """
    squares = torch.einsum("nnp->np", products.dots)
    seen = (squares @ products.trained.T).sqrt()  # [i, j]: the norm of i's gradient on what j trains
    norms = seen * seen.T
    cosines = torch.where(norms > 0, products.dots.sum(-1) / norms.clamp(min=1e-300), 1.0)
    return (1 - cosines).clamp(0, 2).fill_diagonal_(0)


def per_tensor_distances(products: Products) -> Tensor:
    """1 − the mean cosine over the Parameters that both of a pair train `(n, n)`, in float64, 0 to 2.

    Every Parameter has the same weight; a global cosine is that of the few whose gradients are largest (the embedding's, mostly).
    With nothing in common, the distance is 0.
    """
    norms = torch.einsum("nnp->np", products.dots).sqrt()
    both = norms[:, None] * norms
    cosines = torch.where(both > 0, products.dots / both.clamp(min=1e-300), 0.0)
    common = (both > 0).sum(-1)
    return (1 - torch.where(common > 0, cosines.sum(-1) / common.clamp(min=1), 1.0)).clamp(0, 2).fill_diagonal_(0)


DISTANCES: dict[str, Callable[[Products], Tensor]] = {"global": cosine_distances, "per_tensor": per_tensor_distances}
"""Distances of gradients by `SplitSpec.similarity`: one cosine of all Parameters that two train, or the mean over them."""


@dataclass(frozen=True)
class Comparison:
    """One batch's part in comparing the options of a leaf's decisions: everything else is fixed by `setting`, an option for every
    decision, open or not. It can be done in any process that has the leaf's supernet."""

    space: LeafSpace
    decisions: Mapping[str, Options]
    setting: Assignment
    rows: Tensor
    similarity: str = "global"

    @property
    def base(self) -> SharingConfig:
        """The config of the setting."""
        return self.space.config_of(self.setting)

    def configs(self, name: str) -> tuple[dict[int, SharingConfig], list[SharingConfig]]:
        """The configs that a decision's options make in the leaf, by the option's number; and each of them once."""
        found = [self.space.config_of(self.setting | {name: option}) for option in self.decisions[name]]
        here = {n: config for n, config in enumerate(found) if self.space.contains(config)}
        return here, list(dict.fromkeys(here.values()))

    def no_distances(self) -> dict[str, Tensor]:
        """Distances of zero, for each decision."""
        return {name: torch.zeros(len(some), len(some), dtype=torch.float64) for name, some in self.decisions.items()}

    def uncompared(self) -> Compared:
        """What `compare` says of the tokens, without a gradient; the distances are zero."""
        base = {self.base}
        runs = 1 + sum(len({*self.configs(name)[1]} - base) for name in self.decisions)
        return self.no_distances(), runs * self.rows[:, 1:].numel()


Compared = tuple[dict[str, Tensor], int]
"""The distances `(options, options)` between the options of each decision, and the tokens used."""

Compare = Callable[[Sequence[Comparison]], Sequence[Compared]]  # does comparisons, wherever; the results are in their order


def compare(supernet: Supernet, given: Comparison, held_bytes: int = HELD_BYTES) -> Compared:
    """Do a comparison on the leaf's supernet, without a step. Raises NotFinite.

    Options that compute the same have distance 0, as have all options of a decision that the setting leaves closed; options that
    lead out of the leaf are not compared. Tokens count each config's batch once.
    """
    found, base, rows = given.no_distances(), given.base, given.rows.to(next(supernet.parameters()).device)
    held = max(held_bytes // (4 * sum(weight.numel() for weight in supernet.parameters())), 1)
    first, runs = gradient_of(supernet, base, rows), 1
    for name in given.decisions:
        here, distinct = given.configs(name)
        if not {*distinct} - {base}:
            continue

        def make(n: int, distinct: Sequence[SharingConfig] = distinct) -> Gradient:
            return first if distinct[n] == base else gradient_of(supernet, distinct[n], rows)

        products = Products.of(make, len(distinct), held)
        if not products.dots.isfinite().all():
            raise NotFinite(f"a gradient of an option of {name} is not finite, in config {label(base)}")
        runs += len({*distinct} - {base})
        index, which = torch.tensor(list(here)), torch.tensor([distinct.index(config) for config in here.values()])
        found[name][index[:, None], index] = DISTANCES[given.similarity](products)[which[:, None], which]
    return found, runs * rows[:, 1:].numel()


def conflicts(
    compare_all: Compare,
    space: LeafSpace,
    decisions: Mapping[str, Options],
    batches: Sequence[Tensor],
    rng: random.Random,
    similarity: str = "global",
    configs: str = "uniform",
) -> Compared:
    """The mean distances over batches `(batch, seq + 1)`, and the tokens used.

    For each batch one random config of the leaf (`configs` is a row of `CONFIGS`) fixes all decisions; then each decision in turn
    runs each of its options in it (2203.15207).

    A distance is the *expected* one over random settings of the other decisions. So a decision that is seldom asked weighs as
    little as it matters. One setting serves all decisions, which are then compared on equal terms and share one gradient.
    """
    given = [Comparison(space, decisions, _draw_setting(space, rng, configs), rows, similarity) for rows in batches]
    found = compare_all(given)
    zeros = {name: torch.zeros(len(options), len(options), dtype=torch.float64) for name, options in decisions.items()}
    totals = {name: sum((distances[name] for distances, _ in found), zero) for name, zero in zeros.items()}
    return {name: total / max(len(batches), 1) for name, total in totals.items()}, sum(tokens for _, tokens in found)


def _draw_setting(space: LeafSpace, rng: random.Random, configs: str = "uniform") -> Assignment:
    """An option for every decision, open or not, that make a config of the leaf."""
    if configs != "uniform":  # closed decisions share least
        return space.least_sharing() | (space.whole.encode(CONFIGS[configs](space, rng)) or {})
    for _ in range(10_000):
        setting = {name: rng.choice(options) for name, options in space.options.items()}
        if space.contains(space.config_of(setting)):
            return setting
    raise UserError(f"no config of sub-supernet {space.leaf} was found in 10,000 draws", hint="loosen the limits")


MOST_TRIED = 16  # the most options of which every partition is tried (32,767 of them)

Criterion = Callable[[Tensor, Tensor], Tensor]
"""The values `(partitions,)` of partitions `(partitions, n)` of zeros and ones, given distances `(n, n)`."""


def _variance_reduction(distances: Tensor, sides: Tensor) -> Tensor:

    def scatter(members: Tensor) -> Tensor:
        return ((members @ distances) * members).sum(1) / members.sum(1).clamp(min=1)

    return (distances.sum() / len(distances) - scatter(sides) - scatter(1 - sides)) / len(distances)


def _sum_between(distances: Tensor, sides: Tensor) -> Tensor:
    return ((sides @ distances) * (1 - sides)).sum(1)


def _mean_between(distances: Tensor, sides: Tensor) -> Tensor:
    ones = sides.sum(1)
    return _sum_between(distances, sides) / (ones * (len(distances) - ones)).clamp(min=1)


CRITERIA: dict[str, Criterion] = {"variance_reduction": _variance_reduction, "mean": _mean_between, "sum": _sum_between}
"""What is maximised over partitions and decisions.

`variance_reduction`: a group of m options has the scatter Σᵢⱼ dᵢⱼ / m over its ordered pairs, which with dᵢⱼ = 1 − cosine is the
sum of the squared distances of its unit gradients from their mean. The value is the scatter of all n options less that of the two
groups, over n: the mean squared disagreement that a split removes, at most 1. Where all options train the same weights, the best
partition is the exact 2-means partition of their gradients' directions. `mean`: the mean distance between the groups. `sum`: its
sum over pairs, the authors' criterion (2203.15207). It favours halves (one against five leaves ten pairs inside the groups, three
against three six), and decisions of many options.
"""


def best_partition(distances: Tensor, criterion: str = "variance_reduction") -> tuple[tuple[int, ...], float]:
    """The partition of options with distances `(n, n)` in two groups that has the highest criterion (a row of `CRITERIA`): each
    option's group, 0 or 1, and the criterion's value.

    All partitions are tried up to `MOST_TRIED` options; beyond, those reached from each one-against-the-rest by moving one option
    at a time while that helps.
    """
    n, value = len(distances), CRITERIA[criterion]
    assert n > 1
    if n <= MOST_TRIED:
        bits = torch.arange(1, 2 ** (n - 1))[:, None] >> torch.arange(n - 1) & 1
        sides = torch.cat([torch.zeros(len(bits), 1), bits], 1).double()
    else:
        sides = torch.stack([_ascend(distances, start, value) for start in torch.eye(n, dtype=torch.float64)])
    values = value(distances, sides)
    best = int(values.argmax())
    side = (sides[best] - sides[best, 0]).abs()  # the first option's group is group 0
    return tuple(int(s) for s in side), float(values[best])


def _ascend(distances: Tensor, side: Tensor, value: Criterion) -> Tensor:
    while True:
        moved = (side - torch.eye(len(side), dtype=side.dtype)).abs()
        values = value(distances, torch.cat([side[None], moved]))
        if values.argmax() == 0:
            return side
        side = moved[int(values.argmax()) - 1]
