"""How queries look up keys and values: the attention of any layer, given what it attends to.

Owns rotary positions, softmax attention and its maps, masks, and the KV cache. Whose keys and values a layer reads is the plan's;
`model` asks for what it says. Like `model`, an export carries this file as it is.
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
"""Up to this many tokens, bfloat16 training on a CPU attends plainly: torch's fused kernel takes longer there, most of it
backwards (`reports/bench_attention.md`)."""


class Cache(Protocol):
    """What attention needs of a KV cache. A layer that keeps only keys, or only values, gives the other with no heads."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keep `(batch, kv_heads, new, head_dim)` for a layer; return all it holds, `(batch, kv_heads, total, head_dim)`."""

    def past(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """What a layer holds; None while it holds nothing."""


@dataclass
class KVCache:
    """Keys and values of the layers that own them, and of no others; of no more tokens than the layer's window."""

    tensors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    windows: dict[int, int] = field(default_factory=dict)
    length: int = 0
    """Tokens seen."""

    @staticmethod
    def of(plan: Plan) -> KVCache:
        """An empty cache for a plan."""
        return KVCache(windows={i: layer.window for i, layer in enumerate(plan.layers) if layer.window})

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See `Cache`. The tokens of one call are all returned, even where the window is narrower."""
        held = self.past(layer_idx)
        new = key_states, value_states
        k, v = (torch.cat([old, more], 2) for old, more in zip(held, new, strict=True)) if held else new
        kept = self.windows.get(layer_idx, k.shape[2])
        self.tensors[layer_idx] = k[:, :, -kept:], v[:, :, -kept:]
        return k, v

    def past(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """See `Cache`."""
        return self.tensors.get(layer_idx)

    @property
    def bytes(self) -> int:
        """Bytes held by the cached tensors."""
        return sum(t.numel() * t.element_size() for pair in self.tensors.values() for t in pair)


def rotary(positions: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(batch, 1, seq, head_dim)` in float32, halves repeated as in Llama (RoFormer, 2104.09864)."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=positions.device) / shape.head_dim
    angles = positions[:, None, :, None].float() * scaled_rope(1.0 / shape.rope_theta**exponents, shape.rotary_scaling)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def scaled_rope(frequencies: Tensor, scaling: Any) -> Tensor:
    """Rotary frequencies `(head_dim / 2,)` for a longer context: see `RotaryScaling`, or a dictionary of its fields; None for as
    they are."""
    if scaling is None:
        return frequencies
    said = scaling if isinstance(scaling, dict) else vars(scaling)
    lowered = frequencies / said["factor"]
    if said["rope_type"] == "linear":
        return lowered
    low, high = said["low_freq_factor"], said["high_freq_factor"]
    turns = said["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * lowered + kept * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys `(batch, heads, seq, head_dim)` to their positions."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


def sliding_mask(queries: int, keys: int, window: int, strict: bool, device: torch.device) -> Tensor:
    """Boolean `(1, 1, queries, keys)`: the last query sees the last `window` keys, each earlier one a key less far; without its
    own if `strict`."""
    past = keys - queries
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(past - strict)
    return (mask & mask.new_ones(queries, keys).triu(past - window + 1))[None, None]


def crop_mask(mask: Tensor | None, k: Tensor) -> Tensor | None:
    """The columns of a mask for the keys at hand: a windowed layer holds the latest only."""
    return mask if mask is None or mask.shape[-1] == k.shape[2] else mask[..., -k.shape[2] :]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries `(batch, heads, new, dim)` over keys and values of fewer heads; `(batch, new, heads · dim)`."""
    if k.shape[1] != v.shape[1]:
        k, v = alike(k, v)
    if mask is None and 1 < q.shape[2] != k.shape[2]:
        mask = sliding_mask(q.shape[2], k.shape[2], k.shape[2], False, q.device)
    alike_rows = mask is None or len(mask) == 1
    if alike_rows and q.shape[2] <= PLAIN_UP_TO and q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend_plainly(q, k, v, mask)
    causal = mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)


def alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of different numbers of heads, each repeated up to their least common multiple."""
    heads = math.lcm(k.shape[1], v.shape[1])
    return k.repeat_interleave(heads // k.shape[1], 1), v.repeat_interleave(heads // v.shape[1], 1)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same, causal or by a mask `(1, 1, new, keys)`, by two matrix products and a softmax, written out; takes `seq²` memory a
    head."""
    batch, heads, seq, dim = q.shape
    groups = k.shape[1]
    if mask is None:
        mask = sliding_mask(seq, k.shape[2], k.shape[2], False, q.device)
    q, k, v = (x.reshape(batch * groups, -1, dim) for x in (q, k, v))
    least = torch.finfo(q.dtype).min  # not -inf, which makes a row that sees nothing, padding, into no numbers
    hidden = torch.zeros(mask.shape[2:], dtype=q.dtype).masked_fill(~mask[0, 0], least)
    scores = torch.baddbmm(hidden.repeat(heads // groups, 1)[None], q, k.transpose(1, 2), alpha=dim**-0.5)
    out = scores.softmax(-1) @ v
    return out.view(batch, heads, seq, dim).transpose(1, 2).flatten(2)


def softmax_map(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The map `(batch, heads, new, keys)` of queries over keys of fewer heads, for layers that reuse it."""
    if mask is None:
        mask = sliding_mask(q.shape[2], k.shape[2], k.shape[2], False, q.device)
    k = k.to(q.dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)


def apply_attention_map(weights: Tensor, v: Tensor) -> Tensor:
    """Values `(batch, fewer heads, keys, dim)` by a map `(batch, heads, new, keys)`; `(batch, new, heads · dim)`. Of either, the
    latest keys that both have: a window hides the rest."""
    keys = min(weights.shape[3], v.shape[2])
    weights = weights[..., -keys:]
    v = v[:, :, -keys:].to(weights.dtype).repeat_interleave(weights.shape[1] // v.shape[1], 1)
    return (weights @ v).transpose(1, 2).flatten(2)
