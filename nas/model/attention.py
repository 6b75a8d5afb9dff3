"""Attention of queries over given keys and values, rotary positions, masks, and the KV cache.

Which layer's keys and values a layer reads is decided by the plan. An export carries this file unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..sharing.plan import Plan

if TYPE_CHECKING:
    from ..sharing.shape import ModelShape

PLAIN_UP_TO = 256
"""Up to this many tokens, bfloat16 training on a CPU uses `attend_plainly`: torch's fused kernel is slower there, mostly in the
backward pass (`reports/bench_attention.md`)."""


class Cache(Protocol):
    """The interface of a KV cache. A layer that caches only keys, or only values, passes the other with no heads."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append `(batch, kv_heads, new, head_dim)` to a layer; return its content, `(batch, kv_heads, total, head_dim)`."""

    def past(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """The content of a layer; None while it is empty."""


@dataclass
class KVCache:
    """Keys and values of the layers that own them, of no more tokens than the layer's window."""

    tensors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    windows: dict[int, int] = field(default_factory=dict)
    length: int = 0  # tokens seen

    @staticmethod
    def of(plan: Plan) -> KVCache:
        return KVCache(windows={i: layer.window for i, layer in enumerate(plan.layers) if layer.window})

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See `Cache`. All tokens of one call are returned, even where the window is narrower."""
        past, new = self.past(layer_idx), (key_states, value_states)
        k, v = (torch.cat([old, more], 2) for old, more in zip(past, new, strict=True)) if past else new
        window = self.windows.get(layer_idx, k.shape[2])
        self.tensors[layer_idx] = k[:, :, -window:], v[:, :, -window:]
        return k, v

    def past(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        return self.tensors.get(layer_idx)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.tensors.values() for t in pair)


def rotary(positions: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(batch, 1, seq, head_dim)` in float32, halves repeated as in Llama (RoFormer, 2104.09864)."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=positions.device) / shape.head_dim
    angles = positions[:, None, :, None].float() * scaled_rope(1.0 / shape.rope_theta**exponents, shape.rotary_scaling)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def scaled_rope(frequencies: Tensor, scaling: Any) -> Tensor:
    """Rotary frequencies `(head_dim / 2,)` for a longer context, by a `RotaryScaling` or a dictionary of its fields; unchanged
    without one."""
    if scaling is None:
        return frequencies
    given = scaling if isinstance(scaling, dict) else vars(scaling)
    lowered = frequencies / given["factor"]
    if given["rope_type"] == "linear":
        return lowered
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = given["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * lowered + kept * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys `(batch, heads, seq, head_dim)` by their positions."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


def sliding_mask(queries: int, keys: int, window: int, strict: bool, device: torch.device) -> Tensor:
    """Boolean `(1, 1, queries, keys)`: each query sees its own key and those before it, `window` in all; without its own if
    `strict`. The last query's own key is the last one."""
    past = keys - queries
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(past - strict)
    return (mask & mask.new_ones(queries, keys).triu(past - window + 1))[None, None]


def crop_mask(mask: Tensor | None, k: Tensor) -> Tensor | None:
    """The columns of a mask for the given keys: the cache of a windowed layer has the latest only."""
    return mask if mask is None or mask.shape[-1] == k.shape[2] else mask[..., -k.shape[2] :]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries `(batch, heads, new, dim)` over keys and values of fewer heads; `(batch, new, heads · dim)`."""
    if k.shape[1] != v.shape[1]:
        heads = math.lcm(k.shape[1], v.shape[1])
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    if mask is None and 1 < q.shape[2] != k.shape[2]:
        mask = sliding_mask(q.shape[2], k.shape[2], k.shape[2], False, q.device)
    one_mask = mask is None or len(mask) == 1
    if one_mask and q.shape[2] <= PLAIN_UP_TO and q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend_plainly(q, k, v, mask)
    causal = mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attend` by two matrix products and a softmax, causal or by a mask `(1, 1, new, keys)`; takes `seq²` memory a head."""
    batch, heads, seq, dim = q.shape
    groups = k.shape[1]
    if mask is None:
        mask = sliding_mask(seq, k.shape[2], k.shape[2], False, q.device)
    q, k, v = (x.reshape(batch * groups, -1, dim) for x in (q, k, v))
    least = torch.finfo(q.dtype).min  # not -inf, which makes NaN of a row that sees nothing (padding)
    hidden = torch.zeros(mask.shape[2:], dtype=q.dtype, device=q.device).masked_fill(~mask[0, 0], least)
    scores = torch.baddbmm(hidden.repeat(heads // groups, 1)[None], q, k.transpose(1, 2), alpha=dim**-0.5)
    out = scores.softmax(-1) @ v
    return out.view(batch, heads, seq, dim).transpose(1, 2).flatten(2)


def softmax_map(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The attention map `(batch, heads, new, keys)` of queries over keys of fewer heads, for layers that reuse it."""
    if mask is None:
        mask = sliding_mask(q.shape[2], k.shape[2], k.shape[2], False, q.device)
    k = k.to(q.dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)


def apply_attention_map(weights: Tensor, v: Tensor) -> Tensor:
    """Values `(batch, fewer heads, keys, dim)` by an attention map `(batch, heads, new, keys)`; `(batch, new, heads · dim)`, over
    the latest keys that both have."""
    keys = min(weights.shape[3], v.shape[2])
    weights = weights[..., -keys:]
    v = v[:, :, -keys:].to(weights.dtype).repeat_interleave(weights.shape[1] // v.shape[1], 1)
    return (weights @ v).transpose(1, 2).flatten(2)
