"""The best division of options in two, given how much each pair disagrees. Owns the scores; knows nothing but the distances."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MOST_TRIED = 16
"""Options of which every division is tried (32,767 of them)."""


def best_partition(distances: Tensor, criterion: str = "variance_reduction") -> tuple[tuple[int, ...], float]:
    """Options `(n, n)` in two groups, the split of highest criterion (one of `CRITERIA`): each one's group, 0 or 1, and the
    criterion's value.

    What `variance_reduction` is. A group of m options has the scatter Σᵢⱼ dᵢⱼ / m, over its ordered pairs: with dᵢⱼ = 1 −
    cosine that is the sum of the squared distances of its unit gradients from their mean. The value is the scatter of all n
    options less that of the two groups, over n: the mean squared disagreement that a cut removes, at most 1. Where all options
    train the same weights, the best cut is the exact 2-means partition of their gradients' directions.

    The reason. The authors' code compares sums over the pairs a cut leaves inside its groups, but one against five leaves ten
    pairs and three against three leaves six, so it compares cuts of different kinds. Here, options that all disagree equally
    give every split the same value. And the value compares decisions of few options with those of many by what a cut does for a
    random pair of training steps. All cuts are tried up to `MOST_TRIED` options; beyond, those reached from each
    one-against-the-rest by moving an option at a time while that helps.
    """
    n, judge = len(distances), CRITERIA[criterion]
    assert n > 1
    if n <= MOST_TRIED:
        cuts = torch.arange(1, 2 ** (n - 1))[:, None] >> torch.arange(n - 1) & 1
        sides = torch.cat([torch.zeros(len(cuts), 1), cuts], 1).double()
    else:
        sides = torch.stack([_descend(distances, start, judge) for start in torch.eye(n, dtype=torch.float64)])
    scores = judge(distances, sides)
    best = int(scores.argmax())
    side = (sides[best] - sides[best, 0]).abs()  # the first option's group is group 0
    return tuple(int(s) for s in side), float(scores[best])


Criterion = Callable[[Tensor, Tensor], Tensor]
"""The scores `(cuts,)` of cuts `(cuts, n)` of zeros and ones, given distances `(n, n)`."""


def _scatter_removed(distances: Tensor, sides: Tensor) -> Tensor:

    def scatter(members: Tensor) -> Tensor:
        return ((members @ distances) * members).sum(1) / members.sum(1).clamp(min=1)

    return (distances.sum() / len(distances) - scatter(sides) - scatter(1 - sides)) / len(distances)


def _sum_between(distances: Tensor, sides: Tensor) -> Tensor:
    return ((sides @ distances) * (1 - sides)).sum(1)


def _mean_between(distances: Tensor, sides: Tensor) -> Tensor:
    ones = sides.sum(1)
    return _sum_between(distances, sides) / (ones * (len(distances) - ones)).clamp(min=1)


CRITERIA: dict[str, Criterion] = {"variance_reduction": _scatter_removed, "mean": _mean_between, "sum": _sum_between}
"""What makes a cut, and a decision to cut, good. `variance_reduction`: see `best_partition`. `mean`: the mean distance between
the groups. `sum`: its sum over pairs, which is the authors' criterion (2203.15207) and favours halves, and decisions of many
options."""


def _descend(distances: Tensor, side: Tensor, judge: Criterion) -> Tensor:
    while True:
        moved = (side - torch.eye(len(side), dtype=side.dtype)).abs()
        scores = judge(distances, torch.cat([side[None], moved]))
        if scores.argmax() == 0:
            return side
        side = moved[int(scores.argmax()) - 1]
