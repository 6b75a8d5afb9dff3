"""How well an estimate orders configs: the measures that every estimator, and the benchmark itself, is scored by.

Owns the measures, as functions of three arrays by config: memory, true loss, estimated loss (of which only the order counts). A
single rank correlation mostly tells broken configs from working ones, and large from small; so each measure is also taken among
configs of similar memory, in quartiles of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.pareto import hypervolume, reference_point
from nas.search.candidates import select_by_expected_hypervolume

from ..grid import Numbers


def tau(one: Numbers, other: Numbers) -> float:
    """Kendall's τ-b of two orders `(configs,)`; 0 where it is undefined, because one has no order."""
    from scipy.stats import kendalltau

    found = float(kendalltau(one, other).statistic)
    return 0.0 if math.isnan(found) else found


def quartiles(memory: Numbers) -> list[NDArray[np.int64]]:
    """Four groups of configs of similar memory, as equal in number as can be; ties go by position."""
    order = np.argsort(memory, kind="stable")
    return list(np.array_split(order, 4))


def tau_within(memory: Numbers, one: Numbers, other: Numbers) -> float:
    """Mean of τ over the quartiles of memory."""
    return float(np.mean([tau(one[group], other[group]) for group in quartiles(memory)]))


def overlap(losses: Numbers, estimate: Numbers, part: float = 0.1) -> float:
    """How much of the true best `part` of the configs is in the estimated best part, 0 to 1; chance is `part`."""
    count = max(round(part * len(losses)), 1)
    best = set(np.argsort(losses, kind="stable")[:count].tolist())
    return len(best & set(np.argsort(estimate, kind="stable")[:count].tolist())) / count


def regret(losses: Numbers, estimate: Numbers, count: int) -> float:
    """By how much the best of the first `count` is worse than the best of all, as a part of that one's perplexity."""
    picked = np.argsort(estimate, kind="stable")[:count]
    return float(np.expm1(losses[picked].min() - losses.min()))


def front_share(memory: Numbers, losses: Numbers, estimate: Numbers, count: int) -> float:
    """The hypervolume of `count` configs, picked by the estimate and trained, as a part of the true front's (by true perplexity).

    They are picked as a search picks (`select_by_expected_hypervolume`). So that only the order of an estimate counts, and byte
    counts may take part, it is read as losses that are normally distributed over `SPREAD`, each known to a quarter of that.
    """
    from scipy.stats import norm, rankdata

    points = list(zip(memory.tolist(), np.exp(losses).tolist(), strict=True))
    against = reference_point(points)
    read = norm.ppf((rankdata(estimate) - 0.5) / len(estimate)) * SPREAD
    picked = [points[i] for i in select_by_expected_hypervolume(memory[:, None], read, SPREAD / 4, count)]
    return hypervolume(picked, against) / hypervolume(points, against)


SPREAD = 0.06
"""Nats over which the losses of a space's configs are taken to spread."""


@dataclass(frozen=True)
class Agreement:
    """What an estimate is worth. The regrets are parts of perplexity; `_within` is a mean over the quartiles of memory."""

    tau: float
    tau_within: float
    top_overlap: float
    regret_1: float
    regret_10: float
    regret_1_within: float
    front_share: float


RETRAINED = 10
"""Configs that are picked and trained, where a front is judged."""


def agreement(memory: Numbers, losses: Numbers, estimate: Numbers) -> Agreement:
    """All measures of one estimate `(configs,)`; lower is better in all three arrays."""
    return Agreement(
        tau=tau(losses, estimate),
        tau_within=tau_within(memory, losses, estimate),
        top_overlap=overlap(losses, estimate),
        regret_1=regret(losses, estimate, 1),
        regret_10=regret(losses, estimate, 10),
        regret_1_within=float(np.mean([regret(losses[group], estimate[group], 1) for group in quartiles(memory)])),
        front_share=front_share(memory, losses, estimate, RETRAINED),
    )
