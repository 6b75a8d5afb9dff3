"""Which configs are worth training, by what a search has seen of them.

Owns the two rules of selection, of which each evaluator uses one. The error of predicted losses is known and the same for all
configs, so that an expected gain can be computed. The error on a supernet's weights is not known, and grows with the difference
in size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import zip_longest

import numpy as np

from ..pareto import Point, reference_point
from ..sharing.memory import MemorySpec, measure
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..training.evaluation import Evaluation
from .predictor import Numbers

DRAWS = 256
"""Draws of the losses around what is predicted, over which a gain is expected."""


def select_by_expected_hypervolume(
    memory: Numbers, losses: Numbers, error: float, count: int, trained: Collection[int] = (), excluded: Collection[int] = ()
) -> list[int]:
    """Indices of `count` configs whose losses `(configs,)` are predicted in nats to within an error.

    The best predicted loss alone would select variants of one config again and again, and never a config that is likely a little
    worse but much smaller. Memory and perplexity are measured against `reference_point`, so that the config of most memory adds
    to it, too.
    """
    drawn = losses + np.random.default_rng(0).normal(size=(DRAWS, len(losses))) * error
    reference = reference_point(list(zip(memory.tolist(), np.exp(losses).tolist(), strict=True)))
    return greedy_hypervolume(memory, np.exp(drawn), reference, count, trained, excluded)


def greedy_hypervolume(
    memory: Numbers, drawn: Numbers, reference: Point, count: int, known: Iterable[int] = (), excluded: Collection[int] = ()
) -> list[int]:
    """Indices of `count` configs, given draws `(draws, configs)` of what else is minimised.

    One after the other the config is selected that is expected to add most to the hypervolume, given those before it and the
    `known` ones (greedy expected improvement, Emmerich et al., 2006; of a batch as in 2006.05078). `excluded` ones are not
    selected.
    """
    order = np.argsort(memory, kind="stable")
    values, widths = drawn[:, order], np.diff(memory[order], append=reference[0])
    best = np.full_like(values, reference[1])  # at each memory, of those that are selected and need no more
    place = {int(config): n for n, config in enumerate(order)}

    def add(n: int) -> None:
        np.minimum(best[:, n:], values[:, [n]], out=best[:, n:])

    known = set(known)
    for config in known:
        add(place[config])
    left, found = [c for c in place if c not in {*known, *excluded}], list[int]()
    while left and len(found) < count:
        gains = [np.maximum(best[:, (n := place[c]) :] - values[:, [n]], 0).mean(0) @ widths[n:] for c in left]
        found.append(left.pop(int(np.argmax(gains))))
        add(place[found[-1]])
    return found


def select_best_of_bands(
    evaluations: Sequence[Evaluation],
    count: int,
    excluded: Collection[SharingConfig] = (),
    scale: Callable[[float], float] = math.log,
) -> list[SharingConfig]:
    """The best config in each of `count` bands of memory, which are equally wide on a scale (by default in ratio).

    A supernet compares configs of like size better than small with large ones (it starves the large ones), so that its own front
    may lie at one end of the range. Bands give every part of the range its candidate. The next best of the fullest band takes the
    place of a band without any.
    """
    eligible = [e for e in evaluations if e.config not in excluded]
    if not eligible:
        return []
    sizes = [scale(e.memory.memory_bytes) for e in evaluations]
    width = (max(sizes) - min(sizes)) / count or 1.0
    bands: dict[int, list[Evaluation]] = {}
    for e in sorted(eligible, key=lambda e: (e.losses.loss_nats_per_token, e.number)):
        bands.setdefault(min(int((scale(e.memory.memory_bytes) - min(sizes)) / width), count - 1), []).append(e)
    chosen = [band.pop(0) for band in bands.values()]
    while len(chosen) < min(count, len(eligible)):
        chosen.append(max(bands.values(), key=len).pop(0))
    return [e.config for e in sorted(chosen, key=lambda e: e.point)]


def best_seen(evaluations: Iterable[Evaluation]) -> dict[SharingConfig, Evaluation]:
    """Each config with its lowest loss, on inherited weights or converted by a method.

    The two kinds are comparable where candidates are selected: the windows are the same, and either loss is what the config costs
    before a training that starts with these very weights. They never share a front that is reported.
    """
    found: dict[SharingConfig, Evaluation] = {}
    for e in evaluations:
        known = found.get(e.config)
        if known is None or e.losses.loss_nats_per_token < known.losses.loss_nats_per_token:
            found[e.config] = e
    return found


def by_bins(space: SearchSpace, spec: MemorySpec, configs: Iterable[SharingConfig], bins: int) -> list[SharingConfig]:
    """Configs in such an order that any first part is spread over the memory as the whole is: from `bins` bins, equal in ratio,
    in turns, least memory first."""
    sizes = {config: math.log(measure(space.shape, config, spec).memory_bytes) for config in configs}
    low, width = min(sizes.values()), (max(sizes.values()) - min(sizes.values())) / bins or 1.0
    binned: dict[int, list[SharingConfig]] = {}
    for config, size in sizes.items():
        binned.setdefault(min(int((size - low) / width), bins - 1), []).append(config)
    return in_turns(*(binned[n] for n in sorted(binned)))


def in_turns(*kinds: Iterable[SharingConfig]) -> list[SharingConfig]:
    """One of each kind after the other, each config once."""
    return list(dict.fromkeys(config for turn in zip_longest(*kinds) for config in turn if config is not None))
