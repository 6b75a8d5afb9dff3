"""How much the options of a decision disagree about the weights they share, and the best partition of the options in two.

Owns the gradients, their distances (`DISTANCES`) and the criteria of a partition (`CRITERIA`). No weight is changed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..model.supernet import Supernet
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import Assignment
from ..training.evaluation import NotFinite, sequence_losses
from .tree import LeafSpace, Options


@dataclass(frozen=True)
class Gradient:
    """One config's gradient of the supernet's Parameters, in their order.

    flat: `(numbers,)`, zeros where a Parameter is not trained.
    trained, squares: `(parameters,)`, which are trained, and their squared norms.
    sizes: the number of entries of each Parameter.
    """

    flat: Tensor
    trained: Tensor
    squares: Tensor
    sizes: tuple[int, ...]

    @staticmethod
    def of(supernet: Supernet, config: SharingConfig, rows: Tensor) -> Gradient:
        """The gradient on a batch `(batch, seq + 1)`, in float32; `.grad` is not touched. Raises NotFinite."""
        params = list(supernet.parameters())
        loss = sequence_losses(supernet.subnet(config), rows, autocast=False).mean()
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        filled = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(params, grads, strict=True)]
        squares = torch.stack([torch.linalg.vector_norm(grad) for grad in filled]).cpu().double().square()
        if not squares.isfinite().all():
            raise NotFinite(f"the gradient of config {config.hash} is not finite, at a loss of {loss.item()}")
        trained = torch.tensor([grad is not None for grad in grads], dtype=torch.float64)
        return Gradient(torch.cat([grad.flatten() for grad in filled]), trained, squares, tuple(p.numel() for p in params))


def cosine_distances(gradients: Sequence[Gradient]) -> Tensor:
    """1 − cosine of each pair `(n, n)`, in float64, 0 to 2: how much two gradients disagree on what *both* train.

    A pair is compared on the Parameters for which both have a gradient. What one alone trains (an untied layer's own projections,
    say) is no conflict: the other never moves it, and zeros in its place would count it as one. With nothing in common, the
    distance is 0.
    """
    flat = torch.stack([g.flat for g in gradients])
    trained, squares = (torch.stack(rows) for rows in zip(*((g.trained, g.squares) for g in gradients), strict=True))
    seen = (squares @ trained.T).sqrt()  # [i, j]: the norm of i's gradient on what j trains
    norms = seen * seen.T
    cosines = torch.where(norms > 0, (flat @ flat.T).cpu().double() / norms.clamp(min=1e-300), 1.0)
    return (1 - cosines).clamp(0, 2).fill_diagonal_(0)


def per_tensor_distances(gradients: Sequence[Gradient]) -> Tensor:
    """1 − the mean cosine over the Parameters that both of a pair train `(n, n)`, in float64, 0 to 2.

    Every Parameter has the same weight; a global cosine is that of the few whose gradients are largest (the embedding's, mostly).
    With nothing in common, the distance is 0.
    """
    trained, squares = (torch.stack(rows) for rows in zip(*((g.trained, g.squares) for g in gradients), strict=True))
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for n, parts in enumerate(zip(*(g.flat.split(g.sizes) for g in gradients), strict=True)):
        flat, norms = torch.stack(parts), squares[:, n].sqrt()
        both = norms[:, None] * norms
        total += torch.where(both > 0, (flat @ flat.T).cpu().double() / both.clamp(min=1e-300), 0.0)
    alive = (trained * (squares > 0)).double()
    common = alive @ alive.T
    return (1 - torch.where(common > 0, total / common.clamp(min=1), 1.0)).clamp(0, 2).fill_diagonal_(0)


DISTANCES: dict[str, Callable[[Sequence[Gradient]], Tensor]] = {
    "global": cosine_distances,
    "per_tensor": per_tensor_distances,
}
"""Distances of gradients by `SplitSpec.similarity`: one cosine of all Parameters that two train, or the mean over them."""


def conflicts(
    supernet: Supernet,
    space: LeafSpace,
    decisions: Mapping[str, Options],
    batches: Sequence[Tensor],
    rng: random.Random,
    similarity: str = "global",
) -> tuple[dict[str, Tensor], int]:
    """The mean distances `(options, options)` between the options of each decision, and the tokens used.

    For each batch `(batch, seq + 1)` one random config of the leaf fixes all decisions; then each decision in turn runs each of
    its options in it (2203.15207), without a step.

    A distance is the *expected* one over random settings of the other decisions. Options that compute the same have distance 0,
    as have all options of a decision that the setting leaves closed; options that lead out of the leaf are not compared. So a
    decision that is seldom asked weighs as little as it matters. One setting serves all decisions, which are then compared on
    equal terms and share most gradients. Tokens count each gradient's batch once.
    """
    totals = {name: torch.zeros(len(options), len(options), dtype=torch.float64) for name, options in decisions.items()}
    tokens = 0
    for rows in batches:
        setting = _draw_setting(space, rng)
        base = space.config_of(setting)
        first = {base: Gradient.of(supernet, base, rows)}
        tokens += rows[:, 1:].numel()
        for name, options in decisions.items():
            configs = [space.config_of(setting | {name: option}) for option in options]
            here = [n for n, config in enumerate(configs) if space.contains(config)]
            others = [config for config in dict.fromkeys(configs[n] for n in here) if config != base]
            if others:
                gradients = first | {config: Gradient.of(supernet, config, rows) for config in others}
                tokens += len(others) * rows[:, 1:].numel()
                index = torch.tensor(here)
                totals[name][index[:, None], index] += _between([configs[n] for n in here], gradients, similarity)
    return {name: total / max(len(batches), 1) for name, total in totals.items()}, tokens


def _draw_setting(space: LeafSpace, rng: random.Random) -> Assignment:
    """An option for every decision, open or not, that make a config of the leaf."""
    for _ in range(10_000):
        setting = {name: rng.choice(options) for name, options in space.options.items()}
        if space.contains(space.config_of(setting)):
            return setting
    raise UserError(f"no config of sub-supernet {space.leaf} was found in 10,000 draws", hint="loosen the limits")


def _between(configs: Sequence[SharingConfig], gradients: Mapping[SharingConfig, Gradient], similarity: str) -> Tensor:
    """The distances of configs, equal ones at exactly 0."""
    distinct = list(dict.fromkeys(configs))
    index = torch.tensor([distinct.index(config) for config in configs])
    return DISTANCES[similarity]([gradients[config] for config in distinct])[index[:, None], index]


MOST_TRIED = 16
"""The most options of which every partition is tried (32,767 of them)."""

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
