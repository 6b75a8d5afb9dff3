"""Conversions of heads: single heads tied to the most similar one of an earlier layer; keys and values fused by similarity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import UserError
from ...model.decoder import Decoder
from ...presets.weights import most_heads
from ...sharing.plan import ATTENTION, BIASES, K_PROJ, O_PROJ, Q_PROJ, V_PROJ, Plan
from ...sharing.shape import ModelShape
from ...sharing.sharing_config import SharingConfig
from .calibration import Numbers, PretrainedModel, StateDict, root
from .initialise import start_from

# --- single heads (2402.11819)


def most_percent(shape: ModelShape) -> int:
    """`most_heads`. Raises UserError for a model whose heads cannot be tied one by one."""
    heads = shape.num_attention_heads
    if shape.num_key_value_heads != heads:
        message = f"num_key_value_heads={shape.num_key_value_heads} of num_attention_heads={heads}: single heads cannot be tied"
        raise UserError(message, where="headwise", hint="use a model with a key and a value head for each query head")
    return most_heads(shape)


def usual_percent(shape: ModelShape) -> Numbers:
    """The paper's 30 percent, or as many as there can be."""
    return (min(30, most_percent(shape)),)


@dataclass(frozen=True, order=True)
class Match:
    """A head, the most similar head of any earlier layer, and their cosine."""

    cosine: float
    layer: int
    head: int
    source: int
    source_head: int


def matches(dense: PretrainedModel) -> list[Match]:
    """The best match of every head above layer 0, by the cosine of the flattened [Wq; Wk], most similar first."""
    shape, found, below = dense.shape, [], torch.empty(0, device=dense.device)
    for i in range(shape.num_hidden_layers):
        both = [dense.matrix(i, slot).unflatten(0, (shape.num_attention_heads, -1)) for slot in (Q_PROJ, K_PROJ)]
        heads = F.normalize(torch.cat(both, 1).flatten(1).double(), dim=1)
        if i:
            cosines, nearest = (heads @ below.T).max(1)
            for head, (cosine, near) in enumerate(zip(cosines.tolist(), nearest.tolist(), strict=True)):
                found.append(Match(cosine, i, head, *divmod(near, shape.num_attention_heads)))
        below = torch.cat([below, heads]) if i else heads
    return sorted(found, reverse=True)


def choose_headwise(dense: PretrainedModel, numbers: Numbers) -> SharingConfig:
    """The most similar heads, over all layers, use the head that they match; each layer keeps at least one of its own."""
    shape = dense.shape
    wanted = max(1, numbers[0] * shape.num_hidden_layers * shape.num_attention_heads // 100)
    ties: list[list[str]] = [[] for _ in range(shape.num_hidden_layers)]
    for match in matches(dense):
        if wanted and len(ties[match.layer]) < shape.num_attention_heads - 1:
            ties[match.layer].append(f"{match.head}={match.source}.{match.source_head}")
            wanted -= 1
    return SharingConfig.make(shape, [{"heads": " ".join(tied)} if tied else {} for tied in ties])


def tied_heads(plan: Plan) -> Iterator[tuple[int, int, int, int]]:
    """`(layer, head, its root's layer, its root's head)` of every tied head."""
    for i, layer in enumerate(plan.layers):
        yield from ((i, head, *its) for head, its in enumerate(layer.heads) if its[0] != i)


def head_distance(model: Decoder, plan: Plan) -> Tensor:
    """PostShare's penalty on a dense model: the norms of the differences of q, k and v, averaged over the heads to be tied."""
    dim, total = model.shape.head_dim, []
    for i, head, source, same in tied_heads(plan):
        for slot in (Q_PROJ, K_PROJ, V_PROJ):
            mine, theirs = (_with_bias(model, at, slot) for at in (i, source))
            total.append((mine[head * dim :][:dim] - theirs[same * dim :][:dim]).norm())
    return torch.stack(total).sum() / (len(total) / 3)


def _with_bias(model: Decoder, i: int, slot: str) -> Tensor:
    """Layer i's matrix in a slot, its bias as one more column: it is tied with the head."""
    weight: Tensor = model.part(i, slot).weight
    return torch.cat([weight, model.bias(i, slot)[:, None]], 1) if model.shape.attention_bias else weight


# --- keys and values in groups of their own (2406.06567)

ROUNDING = 1e-9  # a part of a matrix's square norm too small to reorder heads for


def initialise_dha(dense: PretrainedModel, config: SharingConfig, start: str) -> StateDict:
    """The means of groups of neighbours, after each layer's heads are put in the order in which these lose least."""
    moments, orders = dense.moments, []
    for i, layer in enumerate(config.resolve(dense.shape).layers):
        k, v = (dense.matrix(i, slot).double() @ root(moments[i, Q_PROJ]) for slot in (K_PROJ, V_PROJ))
        orders.append(fusing_order([(k, layer.k_heads), (v, layer.v_heads)], dense.shape.num_key_value_heads))
    return start_from(dense.with_weights(reordered(dense.weights, dense.shape, orders)), config, "average")


def fusing_order(fused: list[tuple[Tensor, int]], count: int) -> list[int]:
    """The order of a layer's `count` KV heads in which fusing neighbours loses least.

    `fused` are a matrix `(count · dim, hidden)`, times the root of its inputs' second moment, and the number of heads it will
    have, for keys and for values. What a group loses is the square distance of its heads to their mean, as a part of the whole
    matrix; heads are swapped, from the order they have, while that helps.
    """
    products = []
    for matrix, heads in fused:
        flat = matrix.unflatten(0, (count, -1)).flatten(1)
        products.append((flat @ flat.T / flat.square().sum().clamp_min(1e-300), heads))

    def kept(order: list[int]) -> float:
        """The square norm of all groups' means, each as often as it is used."""
        groups = [(p[order][:, order].unflatten(0, (g, -1)).unflatten(2, (g, -1)), g) for p, g in products]
        return sum(g / count * torch.einsum("aiaj->", blocks).item() for blocks, g in groups)

    order = list(range(count))
    while True:
        pairs = [{a: order[b], b: order[a]} for a, b in combinations(range(count), 2)]
        best = max(([pair.get(n, head) for n, head in enumerate(order)] for pair in pairs), key=kept, default=order)
        if kept(best) <= kept(order) + ROUNDING:
            return order
        order = best


def reordered(weights: StateDict, shape: ModelShape, orders: list[list[int]]) -> StateDict:
    """A dense model's weights with each layer's KV heads, and their query heads, in another order: it computes the same."""
    found = dict(weights)
    for i, order in enumerate(orders):
        for slot in (*ATTENTION, *BIASES):
            name, dim = f"layers.{i}.{slot}.weight", int(slot == O_PROJ)
            if name not in weights:
                continue
            groups = weights[name].unflatten(dim, (shape.num_key_value_heads, -1))
            found[name] = groups.index_select(dim, torch.tensor(order, device=groups.device)).flatten(dim, dim + 1)
    return found
