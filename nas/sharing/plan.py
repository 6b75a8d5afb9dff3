"""`Plan`: the owner of each weight, and the layer whose keys, values and softmax map each layer reads, all resolved.

Owns the name and shape of every weight of a plan. This file imports nothing of the package, so that exports can contain a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .shape import ModelShape

ATTENTION = Q_PROJ, K_PROJ, V_PROJ, O_PROJ = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"
FFN = GATE_PROJ, UP_PROJ, DOWN_PROJ = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
MATRICES = (*ATTENTION, *FFN)
ROUTER, ATTENTION_NORM, FFN_NORM = "mlp.router", "input_layernorm", "post_attention_layernorm"
SLOTS = (*MATRICES, ROUTER, ATTENTION_NORM, FFN_NORM)
BIASED, NORMED = (Q_PROJ, K_PROJ, V_PROJ), (Q_PROJ, K_PROJ)
"""What has a bias in a shape with `attention_bias`, and a norm over the head dimension in one with `qk_norm`."""


@dataclass(frozen=True)
class Factor:
    """A matrix composed from a bank that several layers share, kept at layer `at`, and the layer's own coefficients.

    `dictionary`: W = Σ c_s D_s over the atoms `used` of `size` (MASA, 2508.04581). `basis`: W = C B, B of rank `size` (Basis
    Sharing, 2410.03765); `used` is empty.
    """

    kind: str
    at: int
    size: int
    used: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerPlan:
    """One layer: `owners[n]` is the layer that owns the weight in slot `SLOTS[n]`, None if the slot is not used.

    `k` and `v` are the layers whose keys and values it attends to: itself if it makes its own (then of `k_heads` and `v_heads`
    heads, else 0), None if it needs none. `attn_map` is the layer whose softmax map it uses, `kv_input` the one whose output its
    keys and values are projected from; None means its own. `heads` gives `(layer, head)` of each query head if some are another
    layer's. `factors` are in the order of `MATRICES`. `experts` is 0 for a plain FFN.
    """

    owners: tuple[int | None, ...]
    k: int | None
    v: int | None
    k_heads: int
    v_heads: int
    width: int
    attn_map: int | None = None
    kv_input: int | None = None
    window: int | None = None
    value_residual: float = 0.0
    experts: int = 0
    active_experts: int = 0
    heads: tuple[tuple[int, int], ...] = ()
    factors: tuple[Factor | None, ...] = (None,) * len(MATRICES)
    delta: int = 0

    def owner(self, slot: str) -> int | None:
        """The layer that owns the weight this layer uses in a slot; None where it uses none."""
        return self.owners[SLOTS.index(slot)]

    def owns(self, layer: int) -> list[str]:
        """The slots whose weight (or coefficients) `layer` owns, in the order of `SLOTS`."""
        return [slot for slot, owner in zip(SLOTS, self.owners, strict=True) if owner == layer]

    def source_of(self, slots: tuple[str, ...]) -> int | None:
        """The single layer that owns the weights in all used ones of some slots; None if there are several, or none."""
        owners = {self.owner(slot) for slot in slots} - {None}
        return owners.pop() if len(owners) == 1 else None

    def own_heads(self, layer: int) -> list[int]:
        """The query heads that `layer` owns itself if it ties some: those that its matrices contain."""
        return [head for at, head in self.heads if at == layer]

    @property
    def has_attention(self) -> bool:
        return self.v is not None

    @property
    def has_ffn(self) -> bool:
        return self.owner(GATE_PROJ) is not None

    def reads_later_layer(self, layer: int) -> bool:
        """Whether `layer` with this plan reads the keys and values of a later layer."""
        return self.v is not None and self.v > layer


@lru_cache(maxsize=1 << 12)
def without_number(layer: int, plan: LayerPlan) -> LayerPlan:
    """A layer's plan with -1 where it stands for itself, so that layers that do the same are equal."""

    def other(j: int | None) -> int | None:
        return -1 if j == layer else j

    factors = tuple(replace(factor, at=-1) if factor and factor.at == layer else factor for factor in plan.factors)
    heads = tuple((-1 if at == layer else at, head) for at, head in plan.heads)
    owners = tuple(map(other, plan.owners))
    return replace(plan, owners=owners, k=other(plan.k), v=other(plan.v), factors=factors, heads=heads)


@dataclass(frozen=True)
class EmbeddingPlan:
    """The weights outside the layers; `embedding_rank` is 0 for an embedding of full width."""

    tie_word_embeddings: bool
    embedding_rank: int = 0
    step_embedding: bool = False


@dataclass(frozen=True)
class Plan:
    """One `LayerPlan` a layer, and the embeddings; every reference points at the layer that owns the tensor."""

    layers: tuple[LayerPlan, ...]
    outside: EmbeddingPlan

    def to_data(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_data(data: dict[str, Any]) -> Plan:
        """The inverse of `to_data`, after JSON has made lists of tuples."""
        return Plan(tuple(map(_layer_of, data["layers"])), EmbeddingPlan(**data["outside"]))

    @property
    def kv_owners(self) -> list[int]:
        """The layers that keep keys or values, ascending."""
        return [i for i, p in enumerate(self.layers) if i in (p.k, p.v)]

    @property
    def fixed_point_layers(self) -> range:
        """The layers that fixed-point passes repeat: from the lowest that reads a later layer to the highest that is so read."""
        readers = [i for i, p in enumerate(self.layers) if p.reads_later_layer(i)]
        ends = [p.v + 1 for p in self.layers if p.v is not None]
        return range(min(readers), max(ends)) if readers else range(0)


def _layer_of(data: dict[str, Any]) -> LayerPlan:
    factors = tuple(Factor(**(f | {"used": tuple(f["used"])})) if f else None for f in data["factors"])
    heads = tuple((layer, head) for layer, head in data["heads"])
    return LayerPlan(**(data | {"owners": tuple(data["owners"]), "heads": heads, "factors": factors}))


def short(slot: str) -> str:
    """`self_attn.q` of `self_attn.q_proj`: the stem of the names of a factor's and a delta's weights."""
    return slot.removesuffix("_proj")


BIASES = tuple(f"{short(slot)}_bias" for slot in BIASED)
HEAD_NORMS = tuple(f"{short(slot)}_norm" for slot in NORMED)
BESIDE = (*BIASES, *HEAD_NORMS)  # names in `layer_shapes` of the weights that belong to a projection


def projection(name: str) -> str:
    """The slot of the projection to which a name in `BESIDE` belongs; any other name is returned as it is."""
    return f"{name.rpartition('_')[0]}_proj" if name in BESIDE else name


def slot_shape(shape: ModelShape, plan: LayerPlan, slot: str) -> tuple[int, int]:
    """`(out, in)` of the matrix that a layer of this plan applies in a slot it owns."""
    hidden, dim = shape.hidden_size, shape.head_dim
    heads = shape.num_attention_heads
    return {
        Q_PROJ: (heads * dim, hidden),
        K_PROJ: (plan.k_heads * dim, hidden),
        V_PROJ: (plan.v_heads * dim, hidden),
        O_PROJ: (hidden, heads * dim),
        GATE_PROJ: (plan.width, hidden),
        UP_PROJ: (plan.width, hidden),
        DOWN_PROJ: (hidden, plan.width),
        ROUTER: (plan.experts, hidden),
    }[slot]


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def layer_shapes(shape: ModelShape, i: int, layer: LayerPlan) -> Shapes:
    """Name and shape of every weight that layer i owns."""
    for slot in layer.owns(i):
        name = f"layers.{i}.{slot}.weight"
        if slot in (ATTENTION_NORM, FFN_NORM):
            yield name, (shape.hidden_size,)
        elif slot in MATRICES and layer.factors[SLOTS.index(slot)]:
            yield from _factor_shapes(i, slot, layer.factors[SLOTS.index(slot)], slot_shape(shape, layer, slot))
        elif slot in ATTENTION and layer.heads:
            rows, columns = slot_shape(shape, layer, slot)
            part = len(layer.own_heads(i)) * shape.head_dim
            yield name, (rows, part) if slot == O_PROJ else (part, columns)
        else:
            yield name, slot_shape(shape, layer, slot)
        yield from _beside(shape, i, layer, slot)
    for slot in corrected(i, layer):
        yield from _beside(shape, i, layer, slot)
    yield from _delta_shapes(shape, i, layer)


def _beside(shape: ModelShape, i: int, layer: LayerPlan, slot: str) -> Shapes:
    """Bias and head norm of a projection. A layer that uses another's projection uses these too, unless it corrects the
    projection by a delta; then it has its own.

    A layer that ties some of its heads has a bias for its own heads, and a norm for all.
    """
    if shape.attention_bias and slot in BIASED:
        some = layer.heads and layer.owner(slot) == i
        heads = len(layer.own_heads(i)) if some else slot_shape(shape, layer, slot)[0] // shape.head_dim
        yield f"layers.{i}.{short(slot)}_bias.weight", (heads * shape.head_dim,)
    if shape.qk_norm and slot in NORMED:
        yield f"layers.{i}.{short(slot)}_norm.weight", (shape.head_dim,)


def _factor_shapes(i: int, slot: str, factor: Factor | None, size: tuple[int, int]) -> Shapes:
    assert factor is not None
    stem = f"layers.{i}.{short(slot)}"
    if factor.kind == "dictionary":
        if factor.at == i:
            yield f"{stem}_atoms.weight", (factor.size, *size)
        yield f"{stem}_mix.weight", (len(factor.used),)
    else:
        if factor.at == i:
            yield f"{stem}_basis.weight", (factor.size, size[1])
        yield f"{stem}_coef.weight", (size[0], factor.size)


def corrected(i: int, layer: LayerPlan) -> list[str]:
    """The slots in which layer i corrects another layer's matrix by a delta of its own."""
    return [slot for slot in MATRICES if layer.delta and layer.owner(slot) not in (None, i)]


def beside(i: int, layer: LayerPlan, slot: str) -> int | None:
    """The layer whose bias and norm layer i uses in a slot."""
    return i if slot in corrected(i, layer) else layer.owner(slot)


def _delta_shapes(shape: ModelShape, i: int, layer: LayerPlan) -> Shapes:
    for slot in corrected(i, layer):
        rows, columns = slot_shape(shape, layer, slot)
        yield f"layers.{i}.{short(slot)}_delta_a.weight", (layer.delta, columns)
        yield f"layers.{i}.{short(slot)}_delta_b.weight", (rows, layer.delta)


def outside_shapes(shape: ModelShape, outside: EmbeddingPlan) -> dict[str, tuple[int, ...]]:
    """Name and shape of the weights outside the layers: embeddings, last norm, output head."""
    width = outside.embedding_rank or shape.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (shape.vocab_size, width)}
    if outside.embedding_rank:
        shapes["embed_projection.weight"] = (shape.hidden_size, width)
    if outside.step_embedding:
        shapes["step_embedding.weight"] = (shape.num_hidden_layers, shape.hidden_size)
    shapes["norm.weight"] = (shape.hidden_size,)
    if not outside.tie_word_embeddings:
        shapes["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    return shapes


def weight_shapes(shape: ModelShape, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the state dict of `Decoder(shape, plan)`, each owned weight once."""
    shapes = outside_shapes(shape, plan.outside)
    for i, layer in enumerate(plan.layers):
        shapes |= dict(layer_shapes(shape, i, layer))
    return shapes
