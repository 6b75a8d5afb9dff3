"""Bytes and floating-point operations of a config, in closed form.

Owns `Memory` and its formulas, which `tests/test_model.py` compares with the tensors of built models and filled caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated

from ..config import OneOf, PositiveInt, Strict
from .plan import FFN, MATRICES, ROUTER, EmbeddingPlan, LayerPlan, Plan, corrected, layer_shapes, outside_shapes, slot_shape
from .shape import DTYPE_BYTES, ModelShape
from .sharing_config import SharingConfig

LIMITS = ("weight_bytes", "kv_cache_bytes", "memory_bytes")
"""The figures of which the least and the most that a space can reach are known."""


@dataclass(frozen=True)
class MemorySpec(Strict):
    """How memory is measured: `context` cached tokens of each of `batch` sequences, weights and cache in `dtype`."""

    context: PositiveInt = 1024
    batch: PositiveInt = 1
    dtype: Annotated[str, OneOf(DTYPE_BYTES)] = "bfloat16"

    @property
    def name(self) -> str:
        """Such as `32768x8`, which stands in names of objectives and files."""
        return f"{self.context}x{self.batch}"

    @property
    def words(self) -> str:
        """The same for a person."""
        return f"{self.context:,} tokens × {self.batch}"


@dataclass(frozen=True)
class Memory:
    """Bytes of a config at a `MemorySpec`, and the cost of decoding one token of one sequence with a full cache.

    `kv_bytes_per_token` is what one token adds to the cache until windows are full. `kv_read_bytes_per_token` is what decoding
    one token reads of the cache; sharing KV does not reduce it, windows and fewer heads do. `flops_per_token` counts two
    operations for each multiply-add; sharing weights does not reduce it.
    """

    unique_params: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    kv_read_bytes_per_token: int
    flops_per_token: int
    memory_bytes: int

    def to_data(self) -> dict[str, int]:
        return asdict(self)


def measure(shape: ModelShape, config: SharingConfig, spec: MemorySpec) -> Memory:
    """The memory of a config in a model of this shape."""
    return measure_plan(shape, config.resolve(shape), spec)


@dataclass(frozen=True)
class LayerCost:
    """Numbers (not bytes) that a layer adds: weights, cache entries a token and of a whole sequence, and operations a token."""

    params: int
    kv_numbers: int = 0
    cached: int = 0
    flops: int = 0

    def __add__(self, other: LayerCost) -> LayerCost:
        kv_numbers, cached = self.kv_numbers + other.kv_numbers, self.cached + other.cached
        return LayerCost(self.params + other.params, kv_numbers, cached, self.flops + other.flops)


def measure_plan(shape: ModelShape, plan: Plan, spec: MemorySpec) -> Memory:
    """The memory of a plan: unique weights, and the cache.

    A layer caches `k_heads · head_dim` numbers a token if it owns its keys and `v_heads · head_dim` if it owns its values, for at
    most `window` tokens.
    """
    size, cost = DTYPE_BYTES[spec.dtype], plan_cost(shape, plan, spec)
    return Memory(
        unique_params=cost.params,
        kv_bytes_per_token=cost.kv_numbers * size,
        kv_read_bytes_per_token=sum(kv_read(shape, plan, layer, spec.context) for layer in plan.layers) * size,
        flops_per_token=cost.flops,
        **total_bytes(spec, cost),
    )


def plan_cost(shape: ModelShape, plan: Plan, spec: MemorySpec) -> LayerCost:
    """What a plan's layers and the weights outside them cost in all."""
    cost = _layer_costs(shape, spec.context)
    each = [outside_cost(shape, plan.outside), *(cost(i, layer) for i, layer in enumerate(plan.layers))]
    return LayerCost(*map(sum, zip(*((one.params, one.kv_numbers, one.cached, one.flops) for one in each), strict=True)))


def total_bytes(spec: MemorySpec, cost: LayerCost) -> dict[str, int]:
    """The bytes of a total cost, by the names in `LIMITS`."""
    size = DTYPE_BYTES[spec.dtype]
    weights, cache = cost.params * size, cost.cached * size * spec.batch
    return {"weight_bytes": weights, "kv_cache_bytes": cache, "memory_bytes": weights + cache}


def layer_cost(shape: ModelShape, i: int, layer: LayerPlan, context: int) -> LayerCost:
    """The cost of layer i; a model's cost is the sum over its layers and `outside_cost`."""
    return _layer_costs(shape, context)(i, layer)


@lru_cache
def _layer_costs(shape: ModelShape, context: int) -> Callable[[int, LayerPlan], LayerCost]:
    """`layer_cost` of a shape, whose hash takes as long as a layer's."""

    @lru_cache(maxsize=1 << 16)
    def cost(i: int, layer: LayerPlan) -> LayerCost:
        numbers = (layer.k_heads + layer.v_heads) * shape.head_dim
        params = sum(math.prod(size) for _, size in layer_shapes(shape, i, layer))
        return LayerCost(params, numbers, numbers * tokens_seen(layer, context), _layer_flops(shape, i, layer, context))

    return cost


@lru_cache
def outside_cost(shape: ModelShape, outside: EmbeddingPlan) -> LayerCost:
    """The cost of the weights outside the layers, and the operations of embedding a token and of the output head."""
    params = sum(math.prod(size) for size in outside_shapes(shape, outside).values())
    head = shape.hidden_size if not outside.tie_word_embeddings else outside.embedding_rank or shape.hidden_size
    projected = shape.hidden_size * outside.embedding_rank * (1 + outside.tie_word_embeddings)
    return LayerCost(params, flops=2 * (shape.vocab_size * head + projected))


def tokens_seen(layer: LayerPlan, context: int) -> int:
    """The number of tokens that a layer attends to."""
    return min(context, layer.window or context)


def kv_read(shape: ModelShape, plan: Plan, layer: LayerPlan, context: int) -> int:
    """Numbers of keys and values that a layer reads to decode one token."""
    keys = 0 if layer.k is None else plan.layers[layer.k].k_heads
    values = 0 if layer.v is None else plan.layers[layer.v].v_heads
    return (keys + values) * shape.head_dim * tokens_seen(layer, context)


def _layer_flops(shape: ModelShape, i: int, layer: LayerPlan, context: int) -> int:
    """A layer's products with its matrices, as it runs them, and of its queries, keys and values: two operations for each
    multiply-add; norms are not counted."""
    multiplied = sum(_products(shape, layer, slot) for slot in (*MATRICES, ROUTER))
    corrections = (layer.delta * sum(slot_shape(shape, layer, slot)) for slot in corrected(i, layer))
    looks = (layer.k is not None) + (layer.v is not None)
    attention = looks * shape.num_attention_heads * shape.head_dim * tokens_seen(layer, context)
    return 2 * (multiplied + sum(corrections) + attention)


def _products(shape: ModelShape, layer: LayerPlan, slot: str) -> int:
    """Multiply-adds of a layer's matrix for one token, counting active experts only, and both products of a basis."""
    if layer.owner(slot) is None:
        return 0
    rows, columns = slot_shape(shape, layer, slot)
    factor = layer.factors[MATRICES.index(slot)] if slot in MATRICES else None
    count = factor.size * (rows + columns) if factor is not None and factor.kind == "basis" else rows * columns
    return count * layer.active_experts // layer.experts if layer.experts and slot in FFN else count
