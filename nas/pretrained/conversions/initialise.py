"""How shared weights are initialised from a dense model's: those of a converted model, and those of a supernet.

Owns `STARTS` (which dense matrices make a shared one), and low-rank corrections, shared bases and dictionaries, each the best in
closed form. Which layers share is the methods' choice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from ...model.supernet import Supernet, reader
from ...sharing.plan import (
    BESIDE,
    DOWN_PROJ,
    FFN,
    GATE_PROJ,
    K_PROJ,
    MATRICES,
    O_PROJ,
    Q_PROJ,
    V_PROJ,
    Plan,
    corrected,
    projection,
    short,
    weight_shapes,
)
from ...sharing.primitives import FACTORED
from ...sharing.sharing_config import SharingConfig
from .calibration import PretrainedModel, StateDict, activities, root

# --- matrices that several layers use


def users(plan: Plan, i: int, slot: str) -> list[int]:
    """The layers that use what layer i owns in a slot (or beside it): its matrix, or the keys or values that it makes with it."""
    slot = projection(slot)
    reads = {K_PROJ: "k", V_PROJ: "v"}.get(slot, "")
    return [j for j, layer in enumerate(plan.layers) if layer.owner(slot) == i or (reads and getattr(layer, reads) == i)]


Start = Callable[[PretrainedModel, Plan, int, str], Tensor]
"""The initial value `(dense, plan, i, slot)` of layer i's matrix in a slot, or a bias or norm beside it, at full size."""


def _stepwise(dense: PretrainedModel, plan: Plan, i: int, slot: str) -> Tensor:
    last, owners = len(plan.layers) - 1, [j for j in range(len(plan.layers)) if plan.layers[j].owner(projection(slot)) == j]
    return dense.matrix(round(owners.index(i) * last / max(len(owners) - 1, 1)), slot)


STARTS: dict[str, Start] = {
    "lower": lambda dense, plan, i, slot: dense.matrix(i, slot),
    "stepwise": _stepwise,
    "average": lambda dense, plan, i, slot: torch.stack([dense.matrix(j, slot) for j in users(plan, i, slot)]).mean(0),
}
"""The initialisations of Relaxed Recursive Transformers (2410.20672): of all layers that use the matrix, the lowest; layers at
even distances, the first and the last among them; or the mean of those that use it, with equal weights."""


def start_from(dense: PretrainedModel, config: SharingConfig, start: str) -> StateDict:
    """The weights that a config's model has in common with a dense one: matrices, and the biases and norms beside them, by a row
    of `STARTS`, in fewer heads by the mean of each group of neighbours or without the tied ones; all others are the dense model's
    own, and so are those that are the same. None is a copy."""
    plan, found = config.resolve(dense.shape), {}
    for name, size in weight_shapes(dense.shape, plan).items():
        parts = name.removesuffix(".weight").split(".", 2)
        slot = parts[-1]
        if slot in (*MATRICES, *BESIDE):
            i = int(parts[1])
            how = start if plan.layers[i].owner(projection(slot)) == i else "lower"  # its own, beside what it corrects
            full = STARTS[how](dense, plan, i, slot)
            found[name] = full if tuple(full.shape) == size else reader(dense.shape, plan, name, size)(full)
        elif name in dense.weights:
            found[name] = dense.weights[name]
    return found


def corrections(dense: PretrainedModel, config: SharingConfig, shared: StateDict) -> StateDict:
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


# --- Basis Sharing (2410.03765)


def initialise_basis(dense: PretrainedModel, config: SharingConfig, start: str) -> StateDict:
    """Whole matrices as they are, and for each basis the coefficients of the layers that use it."""
    plan, groups = config.resolve(dense.shape), defaultdict[tuple[int, str, int], list[int]](list)
    for i, layer in enumerate(plan.layers):
        for slot, factor in zip(MATRICES, layer.factors, strict=True):
            if factor is not None and layer.owner(slot) == i:
                groups[factor.at, slot, factor.size].append(i)
    found = start_from(dense, config, "lower")
    for (at, slot, size), layers in groups.items():
        coefficients, basis = shared_basis([dense.matrix(i, slot) for i in layers], _moment(dense, slot, layers), size)
        found[f"layers.{at}.{short(slot)}_basis.weight"] = basis
        for i, coefficient in zip(layers, coefficients, strict=True):
            found[f"layers.{i}.{short(slot)}_coef.weight"] = coefficient
    return found


def _moment(dense: PretrainedModel, slot: str, layers: list[int]) -> Tensor:
    """The mean second moment of some layers' inputs in a slot, `(in, in)`; the identity for o and down, whose is not measured."""
    if slot in (O_PROJ, DOWN_PROJ):
        return torch.eye(dense.matrix(0, slot).shape[1], dtype=torch.float64, device=dense.device)
    return torch.stack([dense.moments[i, GATE_PROJ if slot in FFN else Q_PROJ] for i in layers]).mean(0)


def shared_basis(matrices: list[Tensor], moment: Tensor, rank: int) -> tuple[list[Tensor], Tensor]:
    """C_i `(out, rank)` and B `(rank, in)` for which the outputs of all C_i B are nearest those of W_i, on inputs of that second
    moment `(in, in)`: with S Sᵀ the moment, W_i S = C_i (B S) by the truncated SVD of all W_i S."""
    s_root = root(moment)
    u, s, vh = torch.linalg.svd(torch.cat(matrices).double() @ s_root, full_matrices=False)
    basis = torch.linalg.solve_triangular(s_root, s[:rank, None] * vh[:rank], upper=False, left=False)
    dtype = matrices[0].dtype
    return [part.to(dtype) for part in u[:, :rank].split([len(m) for m in matrices])], basis.to(dtype)


# --- a supernet


@torch.no_grad()
def init_from_pretrained(net: Supernet, dense: PretrainedModel, narrow: bool = False) -> None:
    """Initialise a supernet of a dense model's shape from it: its dense subnet then computes what the model does.

    New neurons of a wider FFN add nothing; with `narrow` the neurons are sorted, so that a narrower FFN has those of greatest
    effect. A dictionary's atoms and a basis are the best of their size for all layers that may use them, the first n the best of
    n; so are the columns of a factorised embedding. An output head of its own starts as the embedding, step vectors as zero.
    Deltas and routers are not changed: a delta adds nothing (LoRA, 2106.09685), and no router makes an FFN in parts compute what
    the whole does.
    """
    params = dict(net.bank.named_parameters())
    weights = _by_effect(dense) if narrow else dense.weights
    for name, weight in weights.items():
        if name.endswith(f"{DOWN_PROJ}.weight"):
            params[name].zero_()
        params[name][tuple(map(slice, weight.shape))] = weight
    if "lm_head.weight" in params.keys() - weights.keys():
        params["lm_head.weight"].copy_(weights["embed_tokens.weight"])
    if "step_embedding.weight" in params:
        params["step_embedding.weight"].zero_()
    if FACTORED in params:
        factored, projected = fewer_columns(weights["embed_tokens.weight"], params[FACTORED].shape[1])
        params[FACTORED].copy_(factored)
        params["embed_projection.weight"].copy_(projected)
    _start_dictionaries(params, weights)
    _start_bases(params, weights, dense)


def _by_effect(dense: PretrainedModel) -> StateDict:
    """The dense weights with each FFN's neurons by descending effect: their mean absolute activity times the norm of what they
    add to the residual stream. The model computes the same."""
    found = dict(dense.weights)
    for i, activity in activities(dense.model, dense.calibration).items():
        order = (activity * dense.matrix(i, DOWN_PROJ).norm(dim=0)).argsort(descending=True, stable=True)
        for slot in FFN:
            name = f"layers.{i}.{slot}.weight"
            found[name] = found[name].index_select(int(slot == DOWN_PROJ), order)
    return found


def fewer_columns(embedding: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """F `(vocab, rank)` and P `(hidden, rank)` for which F Pᵀ is nearest an embedding `(vocab, hidden)`, its greatest directions
    first: the truncated SVD, by the eigenvectors of the small side."""
    whole = embedding.double()
    projected = torch.linalg.eigh(whole.T @ whole).eigenvectors.flip(1)[:, :rank]
    return (whole @ projected).to(embedding.dtype), projected.to(embedding.dtype)


def dictionary(matrices: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Atoms `(size, out, in)` and each matrix's coefficients `(matrices, size)`, of which the mixes are nearest the matrices: the
    truncated SVD of the flattened matrices. Atoms beyond their number are zero."""
    stack = torch.stack(matrices).flatten(1)
    gram = stack.double() @ stack.double().T
    mixes = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :size].to(stack.dtype)
    atoms, coefficients = stack.new_zeros(size, stack.shape[1]), stack.new_zeros(len(matrices), size)
    atoms[: mixes.shape[1]], coefficients[:, : mixes.shape[1]] = mixes.T @ stack, mixes
    return atoms.unflatten(1, matrices[0].shape), coefficients


def _start_dictionaries(params: dict[str, torch.nn.Parameter], weights: StateDict) -> None:
    """One dictionary a slot, at all places that have one: a layer has one mix for all of them."""
    for slot, (places, layers) in _composed(params, "atoms", "mix").items():
        size = max(params[place].shape[0] for place in places)
        atoms, mixes = dictionary([weights[f"layers.{i}.{slot}.weight"] for i in layers], size)
        for place in places:
            kept = params[place].shape[0]
            params[place].zero_()
            params[place][:, : atoms.shape[1], : atoms.shape[2]] = atoms[:kept]
        for i, mix in zip(layers, mixes, strict=True):
            own = params[f"layers.{i}.{short(slot)}_mix.weight"]
            own.copy_(mix[: len(own)])


def _start_bases(params: dict[str, torch.nn.Parameter], weights: StateDict, dense: PretrainedModel) -> None:
    """One basis a slot, as for dictionaries."""
    for slot, (places, layers) in _composed(params, "basis", "coef").items():
        matrices, rank = [weights[f"layers.{i}.{slot}.weight"] for i in layers], max(params[place].shape[0] for place in places)
        coefficients, basis = shared_basis(matrices, _moment(dense, slot, layers), rank)
        for place in places:
            params[place].copy_(basis[: params[place].shape[0]])
        for i, coefficient in zip(layers, coefficients, strict=True):
            own = params[f"layers.{i}.{short(slot)}_coef.weight"]
            own.copy_(coefficient[:, : own.shape[1]])


def _composed(params: dict[str, torch.nn.Parameter], shared: str, own: str) -> dict[str, tuple[list[str], list[int]]]:
    """By slot: the names of its shared parts, and the layers that have coefficients of their own."""
    places, layers = defaultdict[str, list[str]](list), defaultdict[str, list[int]](list)
    for name in params:
        parts = name.removesuffix(".weight").split(".", 2)
        stem, _, part = parts[-1].rpartition("_")
        if part == shared:
            places[f"{stem}_proj"].append(name)
        elif part == own:
            layers[f"{stem}_proj"].append(int(parts[1]))
    return {slot: (names, layers[slot]) for slot, names in places.items()}
