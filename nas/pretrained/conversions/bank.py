"""A supernet that begins as a trained dense model: its own weights, and for every weight beyond them a start made of them.

Owns those starts, each the best that is known in closed form. Which configs read the bank, and how, is `nas.supernet`'s.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ...model.supernet import Supernet
from ...sharing.plan import DOWN_PROJ, FFN, GATE_PROJ, O_PROJ, Q_PROJ
from ...sharing.primitives import FACTORED
from .basis import shared_basis
from .observed import activities, second_moments
from .rows import PretrainedModel, Weights


@torch.no_grad()
def init_from_pretrained(net: Supernet, dense: PretrainedModel, narrow: bool = False) -> None:
    """Put a dense model's weights into a fresh supernet of its shape: the dense subnet then computes what the model does.

    Beyond them: a wider FFN's new neurons add nothing, and with `narrow` the neurons are put in order, so that a narrower one is
    of those that matter most. The atoms of a dictionary and a basis are the best of their size for all layers that may use them,
    the first few the best of so few; so are an embedding's columns. An output head of its own begins as the embedding, step
    vectors as zero. Deltas and routers stay as they are: a delta adds nothing (LoRA, 2106.09685), and no router makes the
    same of an FFN in parts.
    """
    bank = dict(net.bank.named_parameters())
    weights = _in_order(dense) if narrow else dense.weights
    for name, weight in weights.items():
        if name.endswith(f"{DOWN_PROJ}.weight"):
            bank[name].zero_()
        bank[name][tuple(map(slice, weight.shape))] = weight
    if "lm_head.weight" in bank.keys() - weights.keys():
        bank["lm_head.weight"].copy_(weights["embed_tokens.weight"])
    if "step_embedding.weight" in bank:
        bank["step_embedding.weight"].zero_()
    if FACTORED in bank:
        factored, projection = fewer_columns(weights["embed_tokens.weight"], bank[FACTORED].shape[1])
        bank[FACTORED].copy_(factored)
        bank["embed_projection.weight"].copy_(projection)
    _start_dictionaries(bank, weights)
    _start_bases(bank, weights, dense)


def _in_order(dense: PretrainedModel) -> Weights:
    """The dense weights with each FFN's neurons by descending effect: their mean absolute activity times the norm of what they
    add to the residual stream. It computes the same."""
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
    projection = torch.linalg.eigh(whole.T @ whole).eigenvectors.flip(1)[:, :rank]
    return (whole @ projection).to(embedding.dtype), projection.to(embedding.dtype)


def dictionary(matrices: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Atoms `(size, out, in)` and each matrix's coefficients `(matrices, size)`, of which the mixes are nearest the matrices: the
    truncated SVD of the flattened matrices. Atoms beyond their number are zero."""
    stack = torch.stack(matrices).flatten(1)
    gram = stack.double() @ stack.double().T
    mixes = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :size].to(stack.dtype)
    atoms, coefficients = stack.new_zeros(size, stack.shape[1]), stack.new_zeros(len(matrices), size)
    atoms[: mixes.shape[1]], coefficients[:, : mixes.shape[1]] = mixes.T @ stack, mixes
    return atoms.unflatten(1, matrices[0].shape), coefficients


def _start_dictionaries(bank: dict[str, torch.nn.Parameter], weights: Weights) -> None:
    """One dictionary a slot, wherever it is kept: a layer has one mix for all the places that it may take atoms from."""
    for slot, (places, users) in _composed(bank, "atoms", "mix").items():
        size = max(bank[place].shape[0] for place in places)
        atoms, mixes = dictionary([weights[f"layers.{i}.{slot}.weight"] for i in users], size)
        for place in places:
            kept = bank[place].shape[0]
            bank[place].zero_()
            bank[place][:, : atoms.shape[1], : atoms.shape[2]] = atoms[:kept]
        for i, mix in zip(users, mixes, strict=True):
            own = bank[f"layers.{i}.{slot.removesuffix('_proj')}_mix.weight"]
            own.copy_(mix[: len(own)])


def _start_bases(bank: dict[str, torch.nn.Parameter], weights: Weights, dense: PretrainedModel) -> None:
    """One basis a slot, wherever it is kept, as for dictionaries; by the inputs' second moment where that is known."""
    composed = _composed(bank, "basis", "coef")
    moments = second_moments(dense.model, dense.calibration) if composed else {}
    for slot, (places, users) in composed.items():
        matrices = [weights[f"layers.{i}.{slot}.weight"] for i in users]
        seen = GATE_PROJ if slot in FFN else Q_PROJ
        plain = torch.eye(matrices[0].shape[1], dtype=torch.float64)
        moment = plain if slot in (O_PROJ, DOWN_PROJ) else torch.stack([moments[i, seen] for i in users]).mean(0)
        coefficients, basis = shared_basis(matrices, moment, max(bank[place].shape[0] for place in places))
        for place in places:
            bank[place].copy_(basis[: bank[place].shape[0]])
        for i, coefficient in zip(users, coefficients, strict=True):
            own = bank[f"layers.{i}.{slot.removesuffix('_proj')}_coef.weight"]
            own.copy_(coefficient[:, : own.shape[1]])


def _composed(bank: dict[str, torch.nn.Parameter], shared: str, own: str) -> dict[str, tuple[list[str], list[int]]]:
    """By slot: the names of the shared parts kept for it, and the layers that have coefficients of their own."""
    places, users = defaultdict[str, list[str]](list), defaultdict[str, list[int]](list)
    for name in bank:
        parts = name.removesuffix(".weight").split(".", 2)
        stem, _, part = parts[-1].rpartition("_")
        if part == shared:
            places[f"{stem}_proj"].append(name)
        elif part == own:
            users[f"{stem}_proj"].append(int(parts[1]))
    return {slot: (names, users[slot]) for slot, names in places.items()}
