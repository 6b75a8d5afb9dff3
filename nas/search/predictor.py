"""The predictor of losses: a linear model of a config's features, fitted to a few proxy trainings.

Owns the features of a config and the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..sharing.memory import MemorySpec, measure_plan
from ..sharing.plan import FFN, K_PROJ, MATRICES, O_PROJ, Q_PROJ, Plan
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig

Numbers = NDArray[np.float64]
RIDGE = 10.0  # the penalty of a feature's weight, as heavy as so many configs; features are standardised, and the first is free


def features(shape: ModelShape, configs: Sequence[SharingConfig], spec: MemorySpec) -> Numbers:
    """Features `(configs, features)`, each on a logarithmic scale.

    Bytes of weights, memory and cache, and operations; the numbers of distinct attentions, key projections, FFNs, attention maps
    and KV owners; and the number of KV heads in all.
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
