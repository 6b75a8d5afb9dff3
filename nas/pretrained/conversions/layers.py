"""Conversions of whole layers: they read another's KV, are dropped, merged into a neighbour, or run another's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from ...errors import UserError
from ...presets.rows import use
from ...sharing.plan import BESIDE, MATRICES, weight_shapes
from ...sharing.sharing_config import SharingConfig
from .calibration import Numbers, Pass, PretrainedModel, StateDict, cosines, last_hidden, mean_kv, passes
from .initialise import corrections, start_from

LEAST_COSINE = 0.5  # the least cosine with the dense model's last hidden state that KVSharer accepts (2410.18517)

TRIES = 32
"""Pairs of layers that KVSharer tries at most; each takes a pass over the calibration text, and 30 layers have 435 pairs."""


# --- keys and values of dissimilar layers (2410.18517)


def choose_kvsharer(dense: PretrainedModel, numbers: Numbers) -> SharingConfig:
    """Pairs of layers by descending distance of their KV: the later reads the earlier, if the last hidden state's cosine stays
    above `LEAST_COSINE`, until as many layers read as wanted. Raises UserError if fewer can, of the first `TRIES` pairs."""
    found = dense.first(numbers[0], kv_readers)
    if len(found) == numbers[0]:
        return SharingConfig.make(dense.shape, use("kv", found[-1]))
    depth, readers = dense.shape.num_hidden_layers, len(found)
    message = f"only {readers} layers can read another's KV and leave the last hidden state's cosine above {LEAST_COSINE}"
    tried = f" ({TRIES} of {pairs} pairs were tried)" if (pairs := depth * (depth - 1) // 2) > TRIES else ""
    raise UserError(message + tried, where="kvsharer", hint=f"use {readers}" if readers else "use another method")


def kv_readers(dense: PretrainedModel) -> Iterator[list[int]]:
    """Whose KV each layer reads, after each pair that is accepted."""
    sources, made, tries = list(range(dense.shape.num_hidden_layers)), passes(dense.model, dense.calibration), 0
    wanted = last_hidden(dense.model, made)
    for later, earlier in dissimilar_pairs(dense):
        if sources[later] != later:
            continue
        if tries == TRIES:
            return
        tries += 1
        tried = [sources[earlier] if source == later else source for source in sources]
        model = dense.subnet(SharingConfig.make(dense.shape, use("kv", tried)))
        found = passes(model, dense.calibration, made, later)
        if F.cosine_similarity(wanted, last_hidden(model, found)).mean().item() > LEAST_COSINE:
            sources, made = tried, found
            yield sources


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
    return _without(dense, dense.first(numbers[0], least_important))


def choose_foldgpt(dense: PretrainedModel, numbers: Numbers) -> SharingConfig:
    """The same, and those left are tied in pairs: the upper runs the lower's weights, with its own norms."""
    dropped = dense.first(numbers[0], least_important)
    left = [i for i in range(dense.shape.num_hidden_layers) if i not in dropped]
    tied = dict(zip(left[1::2], left[::2], strict=False))
    return _without(dense, dropped, {upper: {"tie": lower} for upper, lower in tied.items()})


def least_important(dense: PretrainedModel) -> Iterator[int]:
    """Layers, each of the least block influence in the model without those before it. A block's influence is 1 - the mean
    cosine of the residual stream before and after it (ShortGPT, 2403.03853)."""
    dropped: list[int] = []
    made: list[Pass] = []
    while len(dropped) < dense.shape.num_hidden_layers:
        model = dense.subnet(_without(dense, dropped))
        made = passes(model, dense.calibration, made, dropped[-1] if dropped else 0)
        cosine = cosines(made).diagonal(1)
        cosine[dropped] = -2.0
        dropped.append(int(cosine.argmax()))
        yield dropped[-1]


def _without(dense: PretrainedModel, dropped: Sequence[int], others: dict[int, dict[str, Any]] | None = None) -> SharingConfig:
    layers = [{"drop": "both"} if i in dropped else (others or {}).get(i, {}) for i in range(dense.shape.num_hidden_layers)]
    return SharingConfig.make(dense.shape, layers)


# --- merged layers (2406.16330)


def choose_merge(dense: PretrainedModel, numbers: Numbers) -> SharingConfig:
    """The layers that are merged away are not run."""
    return _without(dense, [upper for _, upper, _ in dense.first(numbers[0], merges)])


def initialise_merge(dense: PretrainedModel, config: SharingConfig, start: str) -> StateDict:
    """The weights after the merges that the config is of."""
    plan, weights = config.resolve(dense.shape), dict(dense.weights)
    made = dense.first(sum(not layer.has_attention for layer in plan.layers), merges)
    assert _without(dense, [upper for _, upper, _ in made]) == config
    for one in made:
        weights |= merged(weights, one)
    return {name: weights[name] for name in weight_shapes(dense.shape, plan)}


Merge = tuple[int, int, float]
"""A layer, the one above it that is merged into it and dropped, and the cosine of their outputs, from 0 to 1."""


def merges(dense: PretrainedModel) -> Iterator[Merge]:
    """Merges, each of the neighbours, of the layers left, whose outputs are most similar in the model after those before it."""
    weights, dropped, found, lower = dict(dense.weights), list[int](), list[Pass](), 0
    while len(dropped) < dense.shape.num_hidden_layers - 1:
        model = dense.with_weights(weights).subnet(_without(dense, dropped))
        found = passes(model, dense.calibration, found, lower)
        outputs = cosines(found)[1:, 1:]
        left = [i for i in range(dense.shape.num_hidden_layers) if i not in dropped]
        lower, upper = max(pairwise(left), key=lambda pair: outputs[pair].item())
        made = lower, upper, outputs[lower, upper].clamp(0, 1).item()
        weights |= merged(weights, made)
        dropped.append(upper)
        yield made


def merged(weights: StateDict, merge: Merge) -> StateDict:
    """The lower layer's matrices and biases after a merge: with S the cosine, S times itself plus 1 - S times the upper's."""
    lower, upper, cosine = merge
    slots = (*MATRICES, *(name for name in BESIDE if f"layers.{lower}.{name}.weight" in weights))
    return {
        (mine := f"layers.{lower}.{slot}.weight"): torch.lerp(weights[f"layers.{upper}.{slot}.weight"], weights[mine], cosine)
        for slot in slots
    }


# --- layers that run another's weights (2104.06022, 2410.20672)


def initialise_relaxed(dense: PretrainedModel, config: SharingConfig, start: str) -> StateDict:
    """Shared matrices by the start, and the deltas that best correct them."""
    shared = start_from(dense, config, start)
    return shared | corrections(dense, config, shared)
