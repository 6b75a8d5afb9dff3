"""Conversions of whole layers: they read another's KV, are dropped, merged into a neighbour, or run another's weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from ...errors import UserError
from ...model.decoder import Decoder
from ...presets.rows import use
from ...sharing.plan import BESIDE, MATRICES
from ...sharing.sharing_config import SharingConfig
from .calibration import Numbers, PretrainedModel, StateDict, last_cosine, mean_kv, similarities
from .initialise import corrections, start_from

LEAST_COSINE = 0.5
"""The least cosine with the dense model's last hidden state that KVSharer accepts (2410.18517)."""


# --- keys and values of dissimilar layers (2410.18517)


def choose_kvsharer(dense: PretrainedModel, numbers: Numbers) -> SharingConfig:
    """Pairs of layers by descending distance of their KV: the later reads the earlier, if the last hidden state's cosine stays
    above `LEAST_COSINE`, until as many layers read as wanted. Raises UserError if fewer can."""
    sources, readers = list(range(dense.shape.num_hidden_layers)), 0
    config = SharingConfig.make(dense.shape, use("kv", sources))
    for later, earlier in dissimilar_pairs(dense):
        if sources[later] != later:
            continue
        tried = [sources[earlier] if source == later else source for source in sources]
        found = SharingConfig.make(dense.shape, use("kv", tried))
        if last_cosine(dense.model, dense.subnet(found), dense.calibration) > LEAST_COSINE:
            config, sources, readers = found, tried, readers + 1
        if readers == numbers[0]:
            return config
    message = f"only {readers} layers can read another's KV and leave the last hidden state's cosine above {LEAST_COSINE}"
    raise UserError(message, where="kvsharer", hint=f"use {readers}" if readers else "use another method")


def dissimilar_pairs(dense: PretrainedModel) -> list[tuple[int, int]]:
    """`(later, earlier)` layers, the farthest apart in their mean keys and values first; of K and of V the mean distance a head
    and position."""
    kv = mean_kv(dense.model, dense.calibration)
    pairs = [(later, earlier) for later in range(len(kv)) for earlier in range(later)]

    def distance(pair: tuple[int, int]) -> float:
        return sum((a - b).norm(dim=-1).mean().item() for a, b in zip(kv[pair[0]], kv[pair[1]], strict=True))

    return sorted(pairs, key=distance, reverse=True)


# --- dropped layers (2403.03853, 2407.00928)


def choose_drop(dense: PretrainedModel, numbers: Numbers) -> SharingConfig:
    """The layers of least influence are not run."""
    return _without(dense, least_important(dense, numbers[0]))


def choose_foldgpt(dense: PretrainedModel, numbers: Numbers) -> SharingConfig:
    """The same, and those left are tied in pairs: the upper runs the lower's weights, with its own norms."""
    dropped = least_important(dense, numbers[0])
    left = [i for i in range(dense.shape.num_hidden_layers) if i not in dropped]
    tied = dict(zip(left[1::2], left[::2], strict=False))
    return _without(dense, dropped, {upper: {"tie": lower} for upper, lower in tied.items()})


def least_important(dense: PretrainedModel, count: int) -> list[int]:
    """As many layers as given, each of the least block influence in the model without those before it.

    A block's influence is 1 - the mean cosine of the residual stream before and after it (ShortGPT, 2403.03853).
    """
    dropped: list[int] = []
    while len(dropped) < count:
        model = dense.subnet(_without(dense, dropped))
        cosine = similarities(model, dense.calibration).diagonal(1)
        cosine[dropped] = -2.0
        dropped.append(int(cosine.argmax()))
    return dropped


def _without(dense: PretrainedModel, dropped: Sequence[int], others: dict[int, dict[str, Any]] | None = None) -> SharingConfig:
    layers = [{"drop": "both"} if i in dropped else (others or {}).get(i, {}) for i in range(dense.shape.num_hidden_layers)]
    return SharingConfig.make(dense.shape, layers)


# --- merged layers (2406.16330)


def choose_merge(dense: PretrainedModel, numbers: Numbers) -> SharingConfig:
    """The layers that are merged away are not run."""
    return _without(dense, merge(dense, numbers[0])[1])


def initialise_merge(dense: PretrainedModel, config: SharingConfig, start: str) -> StateDict:
    """The weights after the merges that the config is of."""
    gone = sum(not layer.has_attention for layer in config.resolve(dense.shape).layers)
    weights, dropped = merge(dense, gone)
    assert _without(dense, dropped) == config
    return weights


def merge(dense: PretrainedModel, count: int) -> tuple[StateDict, list[int]]:
    """The weights after so many merges, and the layers merged away.

    A merge takes the neighbours, of the layers left, whose outputs are most similar in the model after the merges before. With S
    their cosine, each matrix (and bias) of the lower becomes S times itself plus 1 - S times the upper's, which is dropped.
    """
    weights, dropped = dict(dense.weights), list[int]()
    while len(dropped) < count:
        model = dense.with_weights(weights).subnet(_without(dense, dropped))
        outputs = similarities(model, dense.calibration)[1:, 1:]
        left = [i for i in range(dense.shape.num_hidden_layers) if i not in dropped]
        lower, upper = max(pairwise(left), key=lambda pair: outputs[pair].item())
        for slot in (*MATRICES, *(name for name in BESIDE if f"layers.{lower}.{name}.weight" in weights)):
            mine, theirs = (f"layers.{i}.{slot}.weight" for i in (lower, upper))
            weights[mine] = torch.lerp(weights[theirs], weights[mine], outputs[lower, upper].clamp(0, 1).item())
        dropped.append(upper)
    plan = _without(dense, dropped).resolve(dense.shape)
    return {name: weights[name].clone() for name in Decoder(dense.shape, plan).state_dict()}, dropped


# --- layers that run another's weights (2104.06022, 2410.20672)


def initialise_relaxed(dense: PretrainedModel, config: SharingConfig, start: str) -> StateDict:
    """Shared matrices by the start, and the deltas that best correct them."""
    shared = start_from(dense, config, start)
    return shared | corrections(dense, config, shared)
