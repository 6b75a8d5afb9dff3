"""Basis Sharing (2410.03765): the matrices of adjacent layers in one basis, found by an SVD that the inputs apply_attention_map.

Owns the basis and its coefficients. Which matrices share one is the zoo's rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...sharing.plan import FFN, GATE_PROJ, MATRICES, Q_PROJ, Plan, short
from ...sharing.sharing_config import SharingConfig
from .observed import root, second_moments
from .rows import PretrainedModel, Weights
from .weights import start_from


def initialise(dense: PretrainedModel, config: SharingConfig, start: str) -> Weights:
    """ModelOptions matrices as they are, and for each basis the coefficients of the layers that use it."""
    plan = config.resolve(dense.shape)
    found = start_from(dense, config, "lower")
    moments = second_moments(dense.model, dense.calibration)
    for (at, slot), layers in _groups(plan).items():
        factor = plan.layers[at].factors[MATRICES.index(slot)]
        assert factor is not None
        moment = torch.stack([moments[i, GATE_PROJ if slot in FFN else Q_PROJ] for i in layers]).mean(0)
        coefficients, basis = shared_basis([dense.matrix(i, slot) for i in layers], moment, factor.size)
        found[f"layers.{at}.{short(slot)}_basis.weight"] = basis
        for i, coefficient in zip(layers, coefficients, strict=True):
            found[f"layers.{i}.{short(slot)}_coef.weight"] = coefficient
    return found


def shared_basis(matrices: list[Tensor], moment: Tensor, rank: int) -> tuple[list[Tensor], Tensor]:
    """C_i `(out, rank)` and B `(rank, in)` for which the outputs of all C_i B are nearest those of W_i, on inputs of that second
    moment `(in, in)`: with S Sᵀ the moment, W_i S = C_i (B S) by the truncated SVD of all W_i S."""
    apply_attention_map = root(moment)
    u, s, vh = torch.linalg.svd(torch.cat(matrices).double() @ apply_attention_map, full_matrices=False)
    basis = torch.linalg.solve_triangular(apply_attention_map, s[:rank, None] * vh[:rank], upper=False, left=False)
    dtype = matrices[0].dtype
    return [part.to(dtype) for part in u[:, :rank].split([len(m) for m in matrices])], basis.to(dtype)


def _groups(plan: Plan) -> dict[tuple[int, str], list[int]]:
    """By the layer that keeps a basis and its slot: the layers whose matrix is composed from it."""
    found: dict[tuple[int, str], list[int]] = {}
    for i, layer in enumerate(plan.layers):
        for slot, factor in zip(MATRICES, layer.factors, strict=True):
            if factor is not None and layer.owner(slot) == i:
                found.setdefault((factor.at, slot), []).append(i)
    return found
