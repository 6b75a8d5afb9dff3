"""A predictor: a few configs trained alone for a while, and a line through what they share, for all others.

Owns the features of a config and the fit. It is the only estimator that learns from losses, so it is scored on the configs that
it has not seen, and on no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .memory import MemorySpec, measure_plan
from .plan import FFN, K_PROJ, MATRICES, O_PROJ, Q_PROJ, Plan
from .shape import ModelShape
from .sharing import SharingConfig

Numbers = NDArray[np.float64]
RIDGE = (1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Penalties tried; the one of least leave-one-out error is taken."""


def features(shape: ModelShape, configs: Sequence[SharingConfig], spec: MemorySpec) -> Numbers:
    """`(configs, features)`: what a config has of each part of a model, each on a scale where the next one more counts less.

    Memory, weights, cache and operations; how many attentions, projections of keys, FFNs, maps and KV owners are different ones;
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
    sizes = [memory.memory_bytes, memory.weight_bytes, memory.kv_cache_bytes + 1, memory.flops_per_token]
    return [*np.log(sizes), *np.log1p(counts)]


@dataclass(frozen=True, eq=False)
class Predictor:
    """A line through standardised features, by ridge regression. `error` is how far a loss is from what the others predict of it:
    the root of the mean square over those it was fitted to, in nats a token."""

    mean: Numbers
    scale: Numbers
    weights: Numbers
    offset: float
    error: float

    @staticmethod
    def fit(rows: Numbers, losses: Numbers) -> Predictor:
        """The predictor of least leave-one-out error for `rows` `(configs, features)` and their losses `(configs,)`."""
        mean, scale = rows.mean(0), rows.std(0) + 1e-9
        x, y = (rows - mean) / scale, losses - losses.mean()
        errors = [_leave_one_out(x, y, penalty * len(x)) for penalty in RIDGE]
        best = int(np.argmin(errors))
        return Predictor(mean, scale, _ridge(x, y, RIDGE[best] * len(x)), float(losses.mean()), float(errors[best] ** 0.5))

    def __call__(self, rows: Numbers) -> Numbers:
        """The losses `(configs,)` of rows `(configs, features)`."""
        return np.asarray((rows - self.mean) / self.scale @ self.weights + self.offset, dtype=np.float64)


def _ridge(x: Numbers, y: Numbers, penalty: float) -> Numbers:
    return np.asarray(np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y), dtype=np.float64)


def _leave_one_out(x: Numbers, y: Numbers, penalty: float) -> float:
    """Mean squared error of each point from a fit to the others, in closed form (the PRESS statistic)."""
    hat = x @ np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T)
    return float((((y - hat @ y) / (1 - hat.diagonal() - 1 / len(x))) ** 2).mean())


def spread(memory: Numbers, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` configs to learn from, one at random of each of as many bands of memory."""
    return np.array([rng.choice(band) for band in np.array_split(np.argsort(memory, kind="stable"), count)])
