"""Which configs are worth training, by what a search has seen of them.

Owns the two rules of selection, of which each evaluator uses one. The error of predicted losses is known and the same for all
configs, so that an expected gain can be computed. The error on a supernet's weights is not known, and grows with the difference
in size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from ..pareto import Point, reference_point
from ..sharing.memory import MemorySpec, measure
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..training.evaluation import Evaluation
from .predictor import Numbers

DRAWS = 256  # draws of the losses around what is predicted, over which a gain is expected


def select_by_expected_hypervolume(
    costs: Numbers, losses: Numbers, error: float, count: int, trained: Collection[int] = (), excluded: Collection[int] = ()
) -> list[int]:
    """Indices of `count` configs of costs `(configs, objectives)`, whose losses `(configs,)` are predicted in nats to within an
    error.

    The best predicted loss alone would select variants of one config again and again, and never a config that is likely a little
    worse but much smaller. Costs and perplexity are measured against `reference_point`, so that the config of most memory adds
    to it, too.
    """
    drawn = losses + np.random.default_rng(0).normal(size=(DRAWS, len(losses))) * error
    reference = reference_point([*zip(*costs.T.tolist(), np.exp(losses).tolist(), strict=True)])
    return greedy_hypervolume(costs, np.exp(drawn), reference, count, trained, excluded)


LEVELS = 24  # with several costs, a gain is expected on a grid of at most so many values of each


def greedy_hypervolume(
    costs: Numbers, drawn: Numbers, reference: Point, count: int, known: Iterable[int] = (), excluded: Collection[int] = ()
) -> list[int]:
    """Indices of `count` configs of costs `(configs, objectives)`, given draws `(draws, configs)` of what else is minimised.

    One after the other the config is selected that is expected to add most to the hypervolume, given those before it and the
    `known` ones (greedy expected improvement, Emmerich et al., 2006; of a batch as in 2006.05078). `excluded` ones are not
    selected.
    """
    levels = [np.sort(column) if costs.shape[1] == 1 else _levels(column) for column in costs.T]
    widths = [np.diff(level, append=end) for level, end in zip(levels, reference[:-1], strict=True)]
    cells, sides = (np.stack(np.meshgrid(*some, indexing="ij"), -1).reshape(-1, len(some)) for some in (levels, widths))
    sizes, beaten = sides.prod(1), np.asarray((costs[:, None] <= cells).all(2))
    best = np.full((len(drawn), len(cells)), reference[-1])  # in each cell, of those that are selected and cost no more

    def add(c: int) -> None:
        np.minimum(best, drawn[:, [c]], out=best, where=beaten[c])

    known = set(known)
    for config in known:
        add(config)
    left, found = [c for c in np.lexsort(costs.T[::-1]).tolist() if c not in {*known, *excluded}], list[int]()
    while left and len(found) < count:
        gains = [np.maximum(best[:, beaten[c]] - drawn[:, [c]], 0).mean(0) @ sizes[beaten[c]] for c in left]
        found.append(left.pop(int(np.argmax(gains))))
        add(found[-1])
    return found


def _levels(costs: Numbers) -> Numbers:
    """At most `LEVELS` of some costs `(configs,)`, spread over them."""
    return np.unique(np.quantile(costs, np.linspace(0, 1, LEVELS), method="lower"))


def select_best_of_bands(
    evaluations: Sequence[Evaluation],
    count: int,
    excluded: Collection[SharingConfig] = (),
    scale: Callable[[float], float] = math.log,
) -> list[SharingConfig]:
    """The best config in each of `count` bands of memory, which are equally wide on a scale (by default in ratio).

    A supernet compares configs of like size better than small with large ones (it starves the large ones), so that its own front
    may lie at one end of the range. Bands give every part of the range its candidate. The next best of the fullest band takes the
    place of a band without any. Instead of memory it may be another objective; with three, half of the bands are of the second.
    """
    chosen, names = list[Evaluation](), evaluations[0].objectives[:-1] if evaluations else ()
    for n, name in enumerate(names):
        eligible = [e for e in evaluations if e.config not in excluded and e not in chosen]
        sizes = {e: scale(max(e.value(name), 1e-3)) for e in evaluations}
        chosen += _best_of_bands(eligible, sizes, (count - len(chosen)) // (len(names) - n))
    return [e.config for e in sorted(chosen, key=lambda e: e.point)]


def _best_of_bands(eligible: Sequence[Evaluation], sizes: Mapping[Evaluation, float], count: int) -> list[Evaluation]:
    if not eligible or not count:
        return []
    least, most = min(sizes.values()), max(sizes.values())
    width = (most - least) / count or 1.0
    bands: dict[int, list[Evaluation]] = {}
    for e in sorted(eligible, key=lambda e: (e.losses.loss_nats_per_token, e.number)):
        bands.setdefault(min(int((sizes[e] - least) / width), count - 1), []).append(e)
    chosen = [band.pop(0) for band in bands.values()]
    while len(chosen) < min(count, len(eligible)):
        chosen.append(max(bands.values(), key=len).pop(0))
    return chosen


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
