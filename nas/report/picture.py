"""What a sharing pattern looks like, as plain data: its layers, the bytes of every part, its costs beside the dense model's.

Owns `Picture`, bytes by part and the table of costs. A layer's words are `nas.report.rows`'; the drawings `nas.report.sharing`'s
and `nas.report.terminal`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..config import format_bytes, format_flops
from ..sharing.memory import Memory, MemorySpec, measure_plan
from ..sharing.plan import EmbeddingPlan, Plan, weight_shapes
from ..sharing.shape import DTYPE_BYTES, ModelShape
from ..sharing.sharing_config import SharingConfig
from .rows import Lent, Row, lent_parts, rows_of

CACHE = "KV cache"
PARTS = ("embedding", "attention", "FFN", "norms", "head", "other", CACHE)
"""The parts that bytes are counted by; `other` takes any tensor that belongs to none, so that the sum is always whole."""


COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("weights", "weight_bytes", format_bytes),
    ("KV cache", "kv_cache_bytes", format_bytes),
    ("memory", "memory_bytes", format_bytes),
    ("a token adds to the cache", "kv_bytes_per_token", format_bytes),
    ("a token reads of the cache", "kv_read_bytes_per_token", format_bytes),
    ("a token computes", "flops_per_token", format_flops),
)
"""What a config costs: in words, by the name in `Memory`, and how it is written."""


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
class Cost:
    """One figure of a config beside the dense model's, as a person reads it; `share` is None where the dense model has none."""

    words: str
    value: str
    dense: str
    share: float | None


@dataclass(frozen=True)
class Picture:
    """Everything the drawings show of a config in a model, and where it was measured. `lent` are the parts used by others too."""

    name: str
    shape: ModelShape
    spec: MemorySpec
    outside: EmbeddingPlan
    rows: tuple[Row, ...]
    lent: Lent
    parts: tuple[Part, ...]
    memory: Memory
    dense: Memory

    @property
    def total(self) -> Part:
        """All parts in one."""
        sums = (sum(getattr(part, name) for part in self.parts) for name in ("params", "bytes", "dense_bytes"))
        return Part("memory", *sums)

    @property
    def subtitle(self) -> str:
        """The model, and where its memory is measured, in words."""
        shape, spec = self.shape, self.spec
        tokens = f"{spec.context:,} tokens" + (f" × {spec.batch}" if spec.batch > 1 else "")
        return f"{shape.num_hidden_layers} layers of width {shape.hidden_size} · KV cache of {tokens} · {spec.dtype}"

    @property
    def headline(self) -> str:
        """Its memory beside the dense model's, in words."""
        return " · ".join(f"{cost.words} {cost.value}{_of_dense(cost.share)}" for cost in self.costs[:3])

    @property
    def costs(self) -> tuple[Cost, ...]:
        """The rows of `COSTS`."""
        return costs(self.memory, self.dense)

    @property
    def ends(self) -> tuple[str, str]:
        """What is before the first layer and after the last, in words."""
        shape, rank = self.shape, self.outside.embedding_rank
        size = f"{shape.vocab_size:,} × {rank} × {shape.hidden_size}" if rank else f"{shape.vocab_size:,} × {shape.hidden_size}"
        steps = " + a vector a layer" if self.outside.step_embedding else ""
        head = "head = embedding" if self.outside.tie_word_embeddings else f"head {shape.vocab_size:,} × {shape.hidden_size}"
        return f"embedding {size}{steps}", head


def costs(memory: Memory, dense: Memory) -> tuple[Cost, ...]:
    """The rows of `COSTS` for a config's memory and the dense model's."""
    pairs = ((words, getattr(memory, name), getattr(dense, name), form) for words, name, form in COSTS)
    return tuple(Cost(words, form(a), form(b), a / b if b else None) for words, a, b, form in pairs)


def _of_dense(share: float | None) -> str:
    return "" if share is None or share == 1 else f" ({share:.0%} of dense)"


def picture(shape: ModelShape, config: SharingConfig, spec: MemorySpec, name: str = "") -> Picture:
    """The picture of a config, called by `name` or its hash. Raises UserError for another model's config."""
    plan, dense = config.resolve(shape), SharingConfig.dense(shape).resolve(shape)
    return Picture(
        name=name or config.hash,
        shape=shape,
        spec=spec,
        outside=plan.outside,
        rows=rows_of(shape, plan, spec),
        lent=lent_parts(plan),
        parts=_parts(shape, plan, dense, spec),
        memory=measure_plan(shape, plan, spec),
        dense=measure_plan(shape, dense, spec),
    )


def bytes_by_part(shape: ModelShape, config: SharingConfig, spec: MemorySpec) -> list[dict[str, Any]]:
    """One row a part (`PARTS`): the parameters and bytes owned, and their share of the dense model's (None where that has none).

    Deltas and banks count with the matrix they are for, routers with the FFN, step vectors and the embedding's projection with
    the embedding. The rows' `params` sum to `Memory.unique_params`, their `bytes` to `Memory.memory_bytes`.
    """
    parts = picture(shape, config, spec).parts
    return [asdict(part) | {"share_of_dense": part.share_of_dense} for part in parts]


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
    signs = {"embed": "embedding", "lm_head": "head", "norm.weight": "norms", ".self_attn.": "attention", ".mlp.": "FFN"}
    return next((part for sign, part in signs.items() if sign in name), "other")
