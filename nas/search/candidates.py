"""Which configs are worth training, by what a search has seen of them, and the predictor of losses.

Owns the predictor, a linear model of a config's features that is fitted to a few proxy trainings, and the two rules of selection,
of which each evaluator uses one. The error of predicted losses is known and the same for all configs, so that an expected gain
can be computed. The error on a supernet's weights is not known, and grows with the difference in size.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from ..pareto import Point, reference_point
from ..sharing.memory import MemorySpec, measure, measure_plan
from ..sharing.plan import FFN, K_PROJ, MATRICES, O_PROJ, Q_PROJ, Plan
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..training.evaluation import Evaluation

Numbers = NDArray[np.float64]
RIDGE = 10.0  # the penalty of a feature's weight, as heavy as so many configs; features are standardised, and the first is free


def features(shape: ModelShape, configs: Sequence[SharingConfig], spec: MemorySpec) -> Numbers:
    """Features `(configs, features)`, each on a logarithmic scale. Bytes of weights, memory and cache, and operations; the
    numbers of distinct attentions, key projections, FFNs, attention maps and KV owners; and the number of KV heads in all."""
    return np.array([_features(shape, config.resolve(shape), spec) for config in configs], dtype=np.float64)


def _features(shape: ModelShape, plan: Plan, spec: MemorySpec) -> list[float]:
    memory, layers = measure_plan(shape, plan, spec), plan.layers
    slots = [{layer.owner(slot) for layer in layers} - {None} for slot in (Q_PROJ, K_PROJ, O_PROJ, FFN[0])]
    sets = sum(len({layer.owner(slot) for layer in layers} - {None}) for slot in MATRICES)
    maps = len({i if layer.attn_map is None else layer.attn_map for i, layer in enumerate(layers)})
    heads = sum(layer.k_heads + layer.v_heads for layer in layers)
    counts = [*map(len, slots), sets, maps, len(plan.kv_owners), heads]
    sizes = [memory.weight_bytes, memory.memory_bytes, memory.kv_cache_bytes + 1, memory.flops_per_token]
    return [*np.log(sizes), *np.log1p(counts)]


@dataclass(frozen=True, eq=False)
class Predictor:
    """A linear model of standardised features, no weight above zero: a config that keeps more is never predicted to be worse.

    The first feature, the bytes of the weights, explains most by itself, and is not penalised: few trainings determine little
    more than its slope. Without these constraints a dozen features follow the noise of a dozen trainings. `error` is the
    leave-one-out root mean square error over the losses it was fitted to, in nats a token.
    """

    mean: Numbers
    scale: Numbers
    weights: Numbers
    offset: float
    error: float

    @staticmethod
    def fit(rows: Numbers, losses: Numbers) -> Predictor:
        """The predictor for `rows` `(configs, features)` and their losses `(configs,)`."""
        fitted = _fit(rows, losses)
        everyone = np.arange(len(rows))
        others = ((n, np.delete(everyone, n)) for n in everyone)
        off = [losses[n] - _fit(rows[rest], losses[rest])(rows[[n]])[0] for n, rest in others]
        return replace(fitted, error=float(np.mean(np.square(off)) ** 0.5))

    def __call__(self, rows: Numbers) -> Numbers:
        """The losses `(configs,)` of rows `(configs, features)`."""
        return np.asarray((rows - self.mean) / self.scale @ self.weights + self.offset, dtype=np.float64)


def _fit(rows: Numbers, losses: Numbers) -> Predictor:
    """Ridge regression with weights of zero or less (Lawson & Hanson's NNLS, on rows stacked on the penalties')."""
    from scipy.optimize import nnls

    mean, scale = rows.mean(0), rows.std(0) + 1e-9
    penalties = RIDGE**0.5 * np.eye(rows.shape[1])
    penalties[0] = 0
    stacked = np.concatenate([(mean - rows) / scale, penalties])
    weights, _ = nnls(stacked, np.concatenate([losses - losses.mean(), np.zeros(rows.shape[1])]))
    return Predictor(mean, scale, -weights, float(losses.mean()), float("nan"))


OWN = 0.25
"""The weight of a config's own proxy training against its prediction. On the benchmark's two texts the residual of a quarter of a
training explains 0.24 and 0.32 of another seed's residual at its end (`reports/ranking`)."""


def shrink_to_observed(predicted: Numbers, own: Numbers) -> Numbers:
    """Predicted losses `(configs,)`, shrunk towards those of configs' own proxy trainings; NaN where there was none."""
    return np.where(np.isnan(own), predicted, predicted + OWN * (own - predicted))


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
    selected. What a config adds only falls as others are selected, so that it is computed anew only for those that lead
    (Minoux, 1978).
    """
    levels = [np.sort(costs[:, 0])]
    if costs.shape[1] > 1:
        levels = [np.unique(np.quantile(column, np.linspace(0, 1, LEVELS), method="lower")) for column in costs.T]
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
    most = [(-math.inf, n, -1) for n in range(len(left))]  # a bound of what each adds, and for how many selected it was computed
    while most and len(found) < count:
        _, n, when = heapq.heappop(most)
        c = left[n]
        if when == len(found):
            found.append(c)
            add(c)
        else:
            gain = np.maximum(best[:, beaten[c]] - drawn[:, [c]], 0).mean(0) @ sizes[beaten[c]]
            heapq.heappush(most, (-float(gain), n, len(found)))
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


def by_bins(
    space: SearchSpace,
    spec: MemorySpec,
    configs: Iterable[SharingConfig],
    bins: int,
    scale: Callable[[float], float] = math.log,
) -> list[SharingConfig]:
    """Configs in such an order that any first part is spread over the memory as the whole is: from `bins` bins, equally wide on
    a scale (by default in ratio), in turns, least memory first."""
    sizes = {config: scale(measure(space.shape, config, spec).memory_bytes) for config in configs}
    low, width = min(sizes.values()), (max(sizes.values()) - min(sizes.values())) / bins or 1.0
    binned: dict[int, list[SharingConfig]] = {}
    for config, size in sizes.items():
        binned.setdefault(min(int((size - low) / width), bins - 1), []).append(config)
    return in_turns(*(binned[n] for n in sorted(binned)))


def in_turns(*kinds: Iterable[SharingConfig]) -> list[SharingConfig]:
    """One of each kind after the other, each config once."""
    return list(dict.fromkeys(config for turn in zip_longest(*kinds) for config in turn if config is not None))
