"""From a dense model's weights to those of a model that shares: what a matrix that several layers use begins as.

Owns `STARTS` (which dense matrices make a shared one) and the low-rank corrections. Which layers share is the methods' choice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...model.supernet import mean_heads, some_heads
from ...sharing.plan import (
    ATTENTION,
    BESIDE,
    HEAD_NORMS,
    K_PROJ,
    MATRICES,
    O_PROJ,
    V_PROJ,
    LayerPlan,
    Plan,
    corrected,
    projection,
    short,
    weight_shapes,
)
from ...sharing.shape import ModelShape
from ...sharing.sharing_config import SharingConfig
from .rows import PretrainedModel, Weights


def users(plan: Plan, i: int, slot: str) -> list[int]:
    """The layers that use what layer i owns in a slot (or beside it): its matrix, or the keys or values that it makes with it."""
    slot = projection(slot)
    reads = {K_PROJ: "k", V_PROJ: "v"}.get(slot, "")
    return [j for j, layer in enumerate(plan.layers) if layer.owner(slot) == i or (reads and getattr(layer, reads) == i)]


Start = Callable[[PretrainedModel, Plan, int, str], Tensor]
"""What layer i's matrix in a slot, or a bias or norm beside it, begins as, at full size, `(dense, plan, i, slot)`."""


def _lower(dense: PretrainedModel, plan: Plan, i: int, slot: str) -> Tensor:
    return dense.matrix(i, slot)


def _average(dense: PretrainedModel, plan: Plan, i: int, slot: str) -> Tensor:
    return torch.stack([dense.matrix(j, slot) for j in users(plan, i, slot)]).mean(0)


def _stepwise(dense: PretrainedModel, plan: Plan, i: int, slot: str) -> Tensor:
    last, owners = len(plan.layers) - 1, [j for j in range(len(plan.layers)) if plan.layers[j].owner(projection(slot)) == j]
    return dense.matrix(round(owners.index(i) * last / max(len(owners) - 1, 1)), slot)


STARTS: dict[str, Start] = {"lower": _lower, "stepwise": _stepwise, "average": _average}
"""Relaxed Recursive Transformers' starts (2410.20672): of all layers that use the matrix, the lowest; layers spread evenly over
the depth, the first and the last among them; or the mean of those that use it, all counting alike (a running pairwise mean would
favour the later ones)."""


def start_from(dense: PretrainedModel, config: SharingConfig, start: str) -> Weights:
    """The weights of a config's model that a dense one has too: matrices, and what travels with them, by a start, in fewer heads
    by the mean of each group of adjacent ones or without the tied ones; all others (norms among them) as they are."""
    plan, found = config.resolve(dense.shape), {}
    for name in weight_shapes(dense.shape, plan):
        parts = name.removesuffix(".weight").split(".", 2)
        slot = parts[-1]
        if slot in (*MATRICES, *BESIDE):
            i = int(parts[1])
            how = start if plan.layers[i].owner(projection(slot)) == i else "lower"  # its own, beside what it corrects
            found[name] = _in_heads(dense.shape, plan.layers[i], i, slot, STARTS[how](dense, plan, i, slot))
        elif name in dense.weights:
            found[name] = dense.weights[name].clone()
    return found


def _in_heads(shape: ModelShape, layer: LayerPlan, i: int, slot: str, full: Tensor) -> Tensor:
    """Of a matrix or a bias at full size, what layer i keeps of it."""
    of = projection(slot)
    if slot in HEAD_NORMS:  # of one head's size, whatever the number of heads
        return full.clone()
    if layer.heads and of in ATTENTION:
        return some_heads(full, layer.own_heads(i), shape.head_dim, int(slot == O_PROJ))
    if of in (K_PROJ, V_PROJ):
        return mean_heads(full, layer.k_heads if of == K_PROJ else layer.v_heads, shape.head_dim)
    return full.clone()


def corrections(dense: PretrainedModel, config: SharingConfig, shared: Weights) -> Weights:
    """The deltas that best take the shared matrices back to each layer's own: the truncated SVD of the difference."""
    found = {}
    for i, layer in enumerate(config.resolve(dense.shape).layers):
        for slot in corrected(i, layer):
            difference = dense.matrix(i, slot) - shared[f"layers.{layer.owner(slot)}.{slot}.weight"]
            b, a = low_rank(difference, layer.delta)
            found[f"layers.{i}.{short(slot)}_delta_a.weight"] = a
            found[f"layers.{i}.{short(slot)}_delta_b.weight"] = b
    return found


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B `(out, rank)` and A `(rank, in)` whose product is the nearest of that rank, B = UΣ and A = Vᵀ; zeros beyond full rank."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    b, a = matrix.new_zeros(matrix.shape[0], rank), matrix.new_zeros(rank, matrix.shape[1])
    b[:, : len(s)], a[: len(s)] = (u * s)[:, :rank].to(b.dtype), vh[:rank].to(a.dtype)
    return b, a
