"""What configs that were trained to the end tell of others that share alike.

Owns how far apart two configs are, and the prediction that takes it into account.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .plan import FFN, K_PROJ, O_PROJ, Q_PROJ, ROUTER, V_PROJ, Plan
from .predict import Numbers
from .shape import ModelShape
from .sharing import SharingConfig

NEAR, DOUBT = 0.2, 0.5
"""How far `apart` a training to the end tells 1/e of what it is off, and its noise, as a part of the variance that sharing makes.
On the ground truth's two texts half and twice as far do as well."""


def refined(predicted: Numbers, known: Sequence[int], losses: Numbers, apart: Numbers) -> Numbers:
    """Predicted losses `(configs,)` in the light of the `losses` `(known,)` of those that were trained to the end.

    A training to the end is the prediction, a shift that all have alike, and something that configs which share alike have in
    common: a Gaussian process over what sets them `apart` `(configs, known)`, as between the fidelities of a simulation
    (Kennedy & O'Hagan, 2000, with ρ = 1).
    """
    off = losses - predicted[list(known)]
    near = np.exp(-apart / NEAR)
    told = np.linalg.solve(near[list(known)] + DOUBT * np.eye(len(known)), off - off.mean())
    return np.asarray(predicted + off.mean() + near @ told, dtype=np.float64)


def apart(shape: ModelShape, configs: Sequence[SharingConfig], others: Sequence[SharingConfig]) -> Numbers:
    """`(configs, others)`: how much of what layers use (attention, FFN, keys, values, map, how they are kept) is not the same."""
    one, other = ([_used(config.resolve(shape)) for config in some] for some in (configs, others))
    return np.array([[np.mean([x != y for x, y in zip(a, b, strict=True)]) for b in other] for a in one]).reshape(
        len(one), len(other)
    )


def _used(plan: Plan) -> list[Any]:
    """What each layer uses, and whose; two plans' lists are as long."""
    found: list[Any] = []
    for i, layer in enumerate(plan.layers):
        attention, ffn = ([layer.owner(slot) for slot in slots] for slots in ((Q_PROJ, O_PROJ), (*FFN, ROUTER)))
        keys, values = (
            (at, at is not None and plan.layers[at].owner(slot)) for at, slot in ((layer.k, K_PROJ), (layer.v, V_PROJ))
        )
        attn_map = i if layer.attn_map is None else layer.attn_map
        kept = (layer.k_heads, layer.v_heads, layer.window, layer.kv_input)
        made = (layer.heads, layer.factors, layer.delta, layer.value_residual)
        found += [(attention, made), (ffn, layer.width, layer.active_experts), keys, values, attn_map, kept]
    return found
