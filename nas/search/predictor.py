"""A predictor: a few configs trained alone for a while, and a line through what they share, for all others.

Owns the features of a config, the fit, and which configs are worth training by what it tells. It is the only estimator that
learns from losses, so it is scored on the configs that it has not seen, and on no others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..sharing.memory import MemorySpec, measure_plan
from ..sharing.plan import FFN, K_PROJ, MATRICES, O_PROJ, Q_PROJ, Plan
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig

Numbers = NDArray[np.float64]
RIDGE = 10.0
"""The penalty of a feature's weight, as heavy as so many configs; features are standardised, and the first is free."""


def features(shape: ModelShape, configs: Sequence[SharingConfig], spec: MemorySpec) -> Numbers:
    """`(configs, features)`: what a config has of each part of a model, each on a scale where the next one more counts less.

    Weights, memory, cache and operations; how many attentions, projections of keys, FFNs, maps and KV owners are different ones;
    and how many KV heads are kept in all.
    """
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
    """A line through standardised features along which no loss rises: a model that keeps more of anything is never worse for it.

    The first feature, the bytes of the weights, tells most by itself, and is not penalised: of few trainings little more is
    learnt than its slope. Without these rules a dozen features follow the noise of a dozen trainings. `error` is how far a loss
    is from what the others predict of it: the root of the mean square over those it was fitted to, in nats a token.
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
    """Ridge regression whose weights are none above zero (Lawson & Hanson's NNLS, on rows stacked on the penalties')."""
    from scipy.optimize import nnls

    mean, scale = rows.mean(0), rows.std(0) + 1e-9
    penalties = RIDGE**0.5 * np.eye(rows.shape[1])
    penalties[0] = 0
    stacked = np.concatenate([(mean - rows) / scale, penalties])
    weights, _ = nnls(stacked, np.concatenate([losses - losses.mean(), np.zeros(rows.shape[1])]))
    return Predictor(mean, scale, -weights, float(losses.mean()), float("nan"))


OWN = 0.25
"""Of what a config's own short training is off its prediction, how much is believed. On the ground truth's two texts, what a
quarter of a training is off tells 0.24 and 0.32 of what another seed is off at its end (`reports/ranking`)."""


def shrink_to_observed(predicted: Numbers, own: Numbers) -> Numbers:
    """Predicted losses `(configs,)`, leaning to those that configs had themselves in trainings of the predictor's length; NaN for
    none."""
    return np.where(np.isnan(own), predicted, predicted + OWN * (own - predicted))


DRAWS = 256
"""Draws of the losses around what is predicted, over which a gain is expected."""


def select_by_expected_hypervolume(
    memory: Numbers, losses: Numbers, error: float, count: int, there: Collection[int] = (), out: Collection[int] = ()
) -> list[int]:
    """`count` configs to train, of those whose losses `(configs,)` are predicted in nats to within an error: one after the other
    the one that is expected to add most to the hypervolume of memory and perplexity, given those before it (greedy expected
    improvement, Emmerich et al., 2006; of a batch as in 2006.05078). `there` are trained anyway; `out` are not to be picked.

    The best in sight would be picked again and again in variants if it alone counted, and a config that is likely a little worse
    never, however much memory it would save. The corner is the most memory and the highest loss in sight.
    """
    drawn = losses + np.random.default_rng(0).normal(size=(DRAWS, len(losses))) * error
    order = np.argsort(memory, kind="stable")
    perplexity, widths = np.exp(drawn[:, order]), np.diff(memory[order], append=memory.max())
    best = np.full_like(perplexity, np.exp(losses.max()))  # at each memory, of those that are picked and need no more
    place = {int(config): n for n, config in enumerate(order)}
    for config in there:
        _reach(best, perplexity, place[config])
    left, found = [c for c in place if c not in {*there, *out}], list[int]()
    while left and len(found) < count:
        gains = [np.maximum(best[:, (n := place[c]) :] - perplexity[:, [n]], 0).mean(0) @ widths[n:] for c in left]
        found.append(left.pop(int(np.argmax(gains))))
        _reach(best, perplexity, place[found[-1]])
    return found


def _reach(best: Numbers, perplexity: Numbers, n: int) -> None:
    np.minimum(best[:, n:], perplexity[:, [n]], out=best[:, n:])
