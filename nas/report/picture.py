"""What a sharing pattern looks like, as plain data: who owns each part of each layer, and the bytes of every part.

Owns the reading of a resolved plan for people. It draws nothing; `nas.report.sharing` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..loading import format_bytes
from ..memory import MemorySpec, measure_plan
from ..plan import ATTENTION, ATTENTION_NORM, FFN, FFN_NORM, LayerPlan, Plan, slot_shape, weight_shapes
from ..shape import DTYPE_BYTES, ModelShape
from ..sharing import SharingConfig

CACHE, NORM_PARTS = "KV cache", ("attention norm", "FFN norm")
PARTS = ("embedding", "attention", "FFN", "norms", "head", "other", CACHE)
"""The parts that bytes are counted by; `other` takes any tensor that belongs to none, so that the sum is always whole."""


@dataclass(frozen=True)
class Segment:
    """Neighbouring projections of a block that have one owner; None where the layer has no such projection."""

    slots: tuple[str, ...]
    owner: int | None


@dataclass(frozen=True)
class Row:
    """One layer: the segments of its blocks, the owners of their norms, whose KV it reads, and the bytes that are its own."""

    layer: int
    attention: tuple[Segment, ...]
    ffn: tuple[Segment, ...]
    norms: tuple[int | None, int | None]
    kv: int
    kv_heads: int
    weight_bytes: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class Part:
    """The parameters and bytes of one part of the model, and the dense model's."""

    part: str
    params: int
    bytes: int
    dense_bytes: int

    @property
    def share_of_dense(self) -> float | None:
        """Its bytes over the dense model's; None where the dense model has none."""
        return self.bytes / self.dense_bytes if self.dense_bytes else None


@dataclass(frozen=True)
class Picture:
    """Everything the drawings show of a config in a model: its layers, its bytes by part, and where they were measured."""

    name: str
    shape: ModelShape
    spec: MemorySpec
    rows: tuple[Row, ...]
    parts: tuple[Part, ...]

    @property
    def total(self) -> Part:
        """All parts in one."""
        sums = (sum(getattr(part, name) for part in self.parts) for name in ("params", "bytes", "dense_bytes"))
        return Part("memory", *sums)

    @property
    def lent(self) -> frozenset[tuple[str, int]]:
        """The parts that another layer uses, each with its owner."""
        return frozenset((what, owner) for row in self.rows for what, owner in uses(row) if owner != row.layer)

    @property
    def subtitle(self) -> str:
        """The model, and where its memory is measured, in words."""
        shape, spec = self.shape, self.spec
        tokens = f"{spec.context:,} tokens" + (f" × {spec.batch}" if spec.batch > 1 else "")
        return f"{shape.num_hidden_layers} layers of width {shape.hidden_size} · KV cache of {tokens} · {spec.dtype}"

    @property
    def headline(self) -> str:
        """Its memory beside the dense model's, in words."""
        weights = Part("weights", 0, *(sum(getattr(p, n) for p in self.parts[:-1]) for n in ("bytes", "dense_bytes")))
        pairs = (("weights", weights), ("KV cache", self.parts[-1]), ("memory", self.total))
        return " · ".join(f"{name} {format_bytes(part.bytes)}{_of_dense(part)}" for name, part in pairs)


def _of_dense(part: Part) -> str:
    share = part.share_of_dense
    return "" if share is None or share == 1 else f" ({share:.0%} of dense)"


def uses(row: Row) -> Iterator[tuple[str, int]]:
    """Every part that a layer computes with, by its name in the drawings, and the layer that owns it."""
    for segment in (*row.attention, *row.ffn):
        yield from ((slot, segment.owner) for slot in segment.slots if segment.owner is not None)
    yield from ((name, owner) for name, owner in zip(NORM_PARTS, row.norms, strict=True) if owner is not None)
    yield CACHE, row.kv


def short(slot: str) -> str:
    """`q` for `self_attn.q_proj`, `gate` for `mlp.gate_proj`."""
    return slot.rpartition(".")[2].removesuffix("_proj")


def picture(shape: ModelShape, config: SharingConfig, spec: MemorySpec, name: str = "") -> Picture:
    """The picture of a config, called by `name` or its hash. Raises UserError for another model's config."""
    plan = config.resolve(shape)
    rows = tuple(_row(shape, plan.layers[i], i, spec) for i in range(len(plan.layers)))
    dense = SharingConfig.make(shape, [{}] * shape.num_hidden_layers).resolve(shape)
    return Picture(name or config.hash, shape, spec, rows, _parts(shape, plan, dense, spec))


def bytes_by_part(shape: ModelShape, config: SharingConfig, spec: MemorySpec) -> list[dict[str, Any]]:
    """One row a part (`PARTS`): the parameters and bytes owned, and their share of the dense model's (None where that has none).

    The rows' `params` sum to `Memory.unique_params`, their `bytes` to `Memory.memory_bytes`.
    """
    parts = picture(shape, config, spec).parts
    return [asdict(part) | {"share_of_dense": part.share_of_dense} for part in parts]


def _row(shape: ModelShape, layer: LayerPlan, i: int, spec: MemorySpec) -> Row:
    size = DTYPE_BYTES[spec.dtype]
    params = sum(math.prod(slot_shape(shape, layer, slot)) for slot in layer.owns(i))
    cached = 2 * layer.kv_heads * shape.head_dim * spec.context * spec.batch if layer.kv == i else 0
    norms = layer.owner(ATTENTION_NORM), layer.owner(FFN_NORM)
    blocks = _segments(layer, ATTENTION), _segments(layer, FFN)
    return Row(i, *blocks, norms, layer.kv, layer.kv_heads, params * size, cached * size)


def _segments(layer: LayerPlan, slots: tuple[str, ...]) -> tuple[Segment, ...]:
    found: list[Segment] = []
    for slot in slots:
        owner = layer.owner(slot)
        if found and found[-1].owner == owner:
            found[-1] = Segment((*found[-1].slots, short(slot)), owner)
        else:
            found.append(Segment((short(slot),), owner))
    return tuple(found)


def _parts(shape: ModelShape, plan: Plan, dense: Plan, spec: MemorySpec) -> tuple[Part, ...]:
    size = DTYPE_BYTES[spec.dtype]
    mine, theirs = (_params(shape, p) for p in (plan, dense))
    cached, dense_cached = (measure_plan(shape, p, spec).kv_cache_bytes for p in (plan, dense))
    weights = [Part(name, mine[name], mine[name] * size, theirs[name] * size) for name in PARTS[:-1]]
    present = (part for part in weights if part.bytes or part.dense_bytes)
    return (*present, Part(PARTS[-1], 0, cached, dense_cached))


def _params(shape: ModelShape, plan: Plan) -> dict[str, int]:
    counts = dict.fromkeys(PARTS[:-1], 0)
    for name, dims in weight_shapes(shape, plan).items():
        counts[_part_of(name)] += math.prod(dims)
    return counts


def _part_of(name: str) -> str:
    """The part that a tensor of the state dict belongs to."""
    signs = {"embed_tokens": "embedding", "lm_head": "head", "norm.weight": "norms", ".self_attn.": "attention", ".mlp.": "FFN"}
    return next((part for sign, part in signs.items() if sign in name), "other")
