"""Bytes in closed form: no tensor is made to count it.

Owns `Memory` and the formulas. `tests/test_memory.py` holds them to the bytes of the built model's tensors and filled cache.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from .errors import UserError, one_of
from .loading import Strict
from .model import Plan, weight_shapes
from .shape import DTYPE_BYTES, ModelShape
from .sharing import SharingConfig


@dataclass(frozen=True)
class MemorySpec(Strict):
    """Where memory is measured: `context` tokens in the cache of each of `batch` sequences, all in `dtype`."""

    context: int = 1024
    batch: int = 1
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{getattr(self, name)} is not positive", where=f"memory.{name}", remedy="use 1 or more")
        if self.dtype not in DTYPE_BYTES:
            remedy = f"use {one_of(DTYPE_BYTES)}"
            raise UserError(f"unknown dtype {self.dtype!r}", where="memory.dtype", remedy=remedy)


@dataclass(frozen=True)
class Memory:
    """What a config costs, in bytes, at a `MemorySpec`.

    `kv_bytes_per_token` is what one token of one sequence adds to the cache; `kv_read_bytes_per_token` what decoding one token of
    one sequence reads of a full cache (a reader reads its owner's again, so sharing KV does not cut it; fewer heads do).
    """

    unique_params: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    kv_read_bytes_per_token: int
    memory_bytes: int

    def to_data(self) -> dict[str, int]:
        """Plain data under the same names."""
        return asdict(self)


def measure(shape: ModelShape, config: SharingConfig, spec: MemorySpec) -> Memory:
    """The memory of a config in a model of this shape."""
    return measure_plan(shape, config.resolve(shape), spec)


def measure_plan(shape: ModelShape, plan: Plan, spec: MemorySpec) -> Memory:
    """The memory of a plan: unique weights; 2 · kv_heads · head_dim numbers a token for each layer that owns its KV."""
    size = DTYPE_BYTES[spec.dtype]
    params = sum(math.prod(dims) for dims in weight_shapes(shape, plan).values())
    per_head = 2 * shape.head_dim * size
    owned = per_head * sum(plan.layers[i].kv_heads for i in plan.kv_owners)
    read = per_head * sum(layer.kv_heads for layer in plan.layers)
    cache = owned * spec.context * spec.batch
    return Memory(params, params * size, owned, cache, read * spec.context, params * size + cache)
