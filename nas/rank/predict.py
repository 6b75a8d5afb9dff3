"""A predictor: a few configs trained alone for a while, and a line through what they share, for all others.

Owns the features of a config and the fit. It is the only estimator that learns from losses, so it is scored on the configs that
it has not seen, and on no others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..memory import MemorySpec, measure_plan
from ..plan import FFN, K_PROJ, MATRICES, O_PROJ, Q_PROJ, Plan
from ..shape import ModelShape
from ..sharing import SharingConfig
from .agreement import Numbers

RIDGE = (1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Penalties tried; the one of least leave-one-out error is taken."""


def features(shape: ModelShape, configs: list[SharingConfig], spec: MemorySpec) -> Numbers:
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


def fit_predict(known: Numbers, losses: Numbers, asked: Numbers) -> Numbers:
    """Ridge regression on standardised features: the predicted losses of the `asked`, from those of the `known`."""
    mean, scale = known.mean(0), known.std(0) + 1e-9
    x, y = (known - mean) / scale, losses - losses.mean()
    errors = [_leave_one_out(x, y, penalty * len(x)) for penalty in RIDGE]
    weights = _ridge(x, y, RIDGE[int(np.argmin(errors))] * len(x))
    return (asked - mean) / scale @ weights + losses.mean()


def _ridge(x: Numbers, y: Numbers, penalty: float) -> Numbers:
    return np.asarray(np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y), dtype=np.float64)


def _leave_one_out(x: Numbers, y: Numbers, penalty: float) -> float:
    """Mean squared error of each point from a fit to the others, in closed form (the PRESS statistic)."""
    hat = x @ np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T)
    return float((((y - hat @ y) / (1 - hat.diagonal() - 1 / len(x))) ** 2).mean())


def spread(memory: Numbers, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` configs to learn from, one at random of each of as many bands of memory."""
    return np.array([rng.choice(band) for band in np.array_split(np.argsort(memory, kind="stable"), count)])
