"""Bytes in closed form: no tensor is made to count it.

Owns `Memory` and the formulas. `tests/test_memory.py` holds them to the bytes of the built model's tensors and filled cache.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache

from .errors import UserError, one_of
from .loading import Strict
from .model import LayerPlan, Plan, slot_shape, weight_shapes
from .shape import DTYPE_BYTES, ModelShape
from .sharing import SharingConfig

LIMITS = ("weight_bytes", "kv_cache_bytes", "memory_bytes")
"""What a limit may be set on."""


@dataclass(frozen=True)
class MemorySpec(Strict):
    """Where memory is measured: `context` tokens in the cache of each of `batch` sequences, all in `dtype`."""

    context: int = 1024
    batch: int = 1
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{getattr(self, name)} is not positive", where=name, remedy="use 1 or more")
        if self.dtype not in DTYPE_BYTES:
            remedy = f"use {one_of(DTYPE_BYTES)}"
            raise UserError(f"unknown dtype {self.dtype!r}", where="dtype", remedy=remedy)


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


@dataclass(frozen=True)
class LayerCost:
    """What one layer owns: weights, and numbers in the cache for each token."""

    params: int
    kv_numbers: int

    def __add__(self, other: LayerCost) -> LayerCost:
        return LayerCost(self.params + other.params, self.kv_numbers + other.kv_numbers)


def measure_plan(shape: ModelShape, plan: Plan, spec: MemorySpec) -> Memory:
    """The memory of a plan: unique weights; 2 · kv_heads · head_dim numbers a token for each layer that owns its KV."""
    size = DTYPE_BYTES[spec.dtype]
    cost = sum((layer_cost(shape, i, layer) for i, layer in enumerate(plan.layers)), LayerCost(0, 0))
    read = sum(kv_numbers(shape, layer) for layer in plan.layers)
    return Memory(
        unique_params=cost.params + _outside(shape),
        kv_bytes_per_token=cost.kv_numbers * size,
        kv_read_bytes_per_token=read * size * spec.context,
        **total_bytes(shape, spec, cost),
    )


def total_bytes(shape: ModelShape, spec: MemorySpec, cost: LayerCost) -> dict[str, int]:
    """The bytes of a model whose layers cost so much together, by the names in `LIMITS`."""
    size = DTYPE_BYTES[spec.dtype]
    weights, cache = (cost.params + _outside(shape)) * size, cost.kv_numbers * size * spec.context * spec.batch
    return {"weight_bytes": weights, "kv_cache_bytes": cache, "memory_bytes": weights + cache}


@lru_cache(maxsize=1 << 16)
def layer_cost(shape: ModelShape, i: int, layer: LayerPlan) -> LayerCost:
    """What layer i adds to a model's memory; layers add up."""
    params = sum(math.prod(slot_shape(shape, layer, slot)) for slot in layer.owns(i))
    return LayerCost(params, kv_numbers(shape, layer) if layer.kv == i else 0)


def kv_numbers(shape: ModelShape, layer: LayerPlan) -> int:
    """Numbers in a token's keys and values, as a layer reads them."""
    return 2 * layer.kv_heads * shape.head_dim


@lru_cache
def _outside(shape: ModelShape) -> int:
    """Parameters of no layer: embedding, last norm, output head."""
    return sum(math.prod(dims) for dims in weight_shapes(shape, Plan(())).values())
