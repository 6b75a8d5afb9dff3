"""The decoder: one forward for the dense model, every subnet, every stand-alone model and every export.

Owns `Plan` (which layer owns each weight and each KV cache, already resolved) and `Decoder`, which runs a plan. It imports
torch alone, so that an export can carry this file as it is. How a plan is chosen and made valid is `nas.sharing`'s.

A layer's projections are looked up by owner at each call (`plan.layers[i].owners`), and a layer's module holds the weights it
owns and no others. So the state dict has each weight once, under Llama's own names, and the dense plan's is a Llama's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .shape import ModelShape

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION_NORM, FFN_NORM = "input_layernorm", "post_attention_layernorm"
SLOTS = (*ATTENTION, *FFN, ATTENTION_NORM, FFN_NORM)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer computes with: `owners[n]` is the layer that owns the weight in slot `SLOTS[n]`, None where it uses none.

    `kv` is the layer whose keys and values it attends to, itself if it makes its own, and `kv_heads` how many heads those have.
    """

    owners: tuple[int | None, ...]
    kv: int
    kv_heads: int

    def owner(self, slot: str) -> int | None:
        """The layer that owns the weight this layer uses in a slot; None where it uses none."""
        return self.owners[SLOTS.index(slot)]

    def owns(self, layer: int) -> list[str]:
        """The slots whose weight `layer` owns, in the order of `SLOTS`."""
        return [slot for slot, owner in zip(SLOTS, self.owners, strict=True) if owner == layer]


@dataclass(frozen=True)
class Plan:
    """One `LayerPlan` a layer; every reference already points at the root that owns the thing."""

    layers: tuple[LayerPlan, ...]

    def to_data(self) -> list[dict[str, Any]]:
        """Plain data for a `config.json`."""
        return [{"owners": list(p.owners), "kv": p.kv, "kv_heads": p.kv_heads} for p in self.layers]

    @staticmethod
    def from_data(data: list[dict[str, Any]]) -> Plan:
        """The inverse of `to_data`."""
        return Plan(tuple(LayerPlan(tuple(layer["owners"]), layer["kv"], layer["kv_heads"]) for layer in data))

    @property
    def kv_owners(self) -> list[int]:
        """The layers that keep a KV cache, ascending."""
        return [i for i, p in enumerate(self.layers) if p.kv == i]


def slot_shape(shape: ModelShape, plan: LayerPlan, slot: str) -> tuple[int, ...]:
    """The weight's shape `(out, in)` (or `(hidden,)` for a norm) of a slot that this plan's layer owns."""
    hidden, queries = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    keys = plan.kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (shape.intermediate_size, hidden),
        "mlp.up_proj": (shape.intermediate_size, hidden),
        "mlp.down_proj": (hidden, shape.intermediate_size),
        ATTENTION_NORM: (hidden,),
        FFN_NORM: (hidden,),
    }[slot]


def weight_shapes(shape: ModelShape, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the state dict of `Decoder(shape, plan)`, each owned weight once."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (shape.vocab_size, shape.hidden_size)}
    for i, layer in enumerate(plan.layers):
        shapes |= {f"layers.{i}.{slot}.weight": slot_shape(shape, layer, slot) for slot in layer.owns(i)}
    shapes["norm.weight"] = (shape.hidden_size,)
    if not shape.tie_word_embeddings:
        shapes["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    return shapes


PLAIN_UP_TO = 256
"""Up to this many tokens, bfloat16 training on a CPU attends plainly: torch's fused kernel takes longer there, most of it
backwards (`reports/bench_attention.md`)."""


class Cache(Protocol):
    """What attention needs of a KV cache; `transformers`' caches have the same method."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keep `(batch, kv_heads, new, head_dim)` for a layer; return all it holds, `(batch, kv_heads, total, head_dim)`."""


@dataclass
class KVCache:
    """Keys and values of the layers that own them, and of no others."""

    tensors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See `Cache`."""
        if layer_idx in self.tensors:
            old_k, old_v = self.tensors[layer_idx]
            key_states, value_states = torch.cat([old_k, key_states], 2), torch.cat([old_v, value_states], 2)
        self.tensors[layer_idx] = key_states, value_states
        return key_states, value_states

    @property
    def length(self) -> int:
        """Tokens held."""
        return next((k.shape[2] for k, _ in self.tensors.values()), 0)

    @property
    def bytes(self) -> int:
        """Bytes held by the cached tensors."""
        return sum(t.numel() * t.element_size() for pair in self.tensors.values() for t in pair)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(batch, 1, seq, head_dim)` in float32, halves repeated as in Llama (RoFormer, 2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None, :, None].float() * (1.0 / theta**exponents)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys `(batch, heads, seq, head_dim)` to their positions."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Boolean `(queries, keys)`: the last query sees every key, each earlier one a key less."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class RMSNorm(nn.Module):
    """Root-mean-square norm (1910.07467), computed in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """`(…, hidden)` to the same."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


MakePart = Callable[[str, tuple[int, ...]], nn.Module]
"""Makes (or finds) the module that holds the weight of that name and shape."""


def fresh_part(shape: ModelShape) -> MakePart:
    """New modules for a stand-alone model, not initialised: `init_weights` does that."""

    def make(name: str, size: tuple[int, ...]) -> nn.Module:
        if name == "embed_tokens.weight":
            return nn.Embedding(size[0], size[1], _weight=torch.empty(size))
        if len(size) == 1:
            return RMSNorm(size[0], shape.rms_norm_eps)
        return nn.utils.skip_init(nn.Linear, size[1], size[0], bias=False)

    return make


class Decoder(nn.Module):
    """A Llama-style decoder that runs a `Plan`; its state dict holds each owned weight once.

    `part` supplies the modules: fresh ones by default, a supernet's own for a subnet.
    """

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: RMSNorm
    lm_head: nn.Linear

    def __init__(self, shape: ModelShape, plan: Plan, part: MakePart | None = None) -> None:
        super().__init__()
        assert len(plan.layers) == shape.num_hidden_layers
        self.shape, self.plan = shape, plan
        part = part or fresh_part(shape)
        for name, size in weight_shapes(shape, plan).items():
            if name.startswith("layers.") and not hasattr(self, "layers"):
                self.layers = nn.ModuleList(nn.ModuleDict() for _ in plan.layers)
            _place(self, name.removesuffix(".weight"), part(name, size))

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits `(batch, seq, vocab)` of tokens `(batch, seq)`; the arguments are those of `hidden`."""
        return self.logits(self.hidden(self.embed_tokens(tokens), positions, mask, cache))

    def hidden(
        self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Final hidden states `(batch, seq, hidden)` of embeddings of the same shape.

        `positions` `(batch, seq)` count from what a `KVCache` holds by default; `mask` is boolean, `(batch, 1, seq, keys)`, true
        where attended, causal by default; `cache` is filled by the layers that own their KV, and read.
        """
        if positions is None:
            start = cache.length if isinstance(cache, KVCache) else 0
            positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
        turn = rotary(positions, self.shape.head_dim, self.shape.rope_theta)
        kv: dict[int, tuple[Tensor, Tensor]] = {}
        for i in range(len(self.plan.layers)):
            x = self.block(i, x, turn, mask, kv, cache)
        return self.norm(x)

    def block(
        self,
        i: int,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
        kv: dict[int, tuple[Tensor, Tensor]],
        cache: Cache | None,
    ) -> Tensor:
        """Layer i on `(batch, seq, hidden)`; `kv` collects the keys and values of the layers that own theirs."""
        part = self.part
        normed = part(i, ATTENTION_NORM)(x)
        q = rotate(self._heads(part(i, "self_attn.q_proj")(normed)), *turn)
        if self.plan.layers[i].kv == i:
            k = rotate(self._heads(part(i, "self_attn.k_proj")(normed)), *turn)
            v = self._heads(part(i, "self_attn.v_proj")(normed))
            kv[i] = cache.update(k, v, i) if cache is not None else (k, v)
        x = x + part(i, "self_attn.o_proj")(attend(q, *kv[self.plan.layers[i].kv], mask))
        normed = part(i, FFN_NORM)(x)
        return x + part(i, "mlp.down_proj")(F.silu(part(i, "mlp.gate_proj")(normed)) * part(i, "mlp.up_proj")(normed))

    def part(self, i: int, slot: str) -> Any:
        """The module that layer i uses for a slot, whoever owns it. Looked up at each call, so that it can be replaced (LoRA)."""
        owner: Any = self.layers[self.plan.layers[i].owners[SLOTS.index(slot)]]  # type: ignore[index]
        group, _, name = slot.rpartition(".")
        return (owner[group] if group else owner)[name]

    def logits(self, hidden: Tensor) -> Tensor:
        """`(batch, seq, vocab)` from final hidden states."""
        return F.linear(hidden, self.embed_tokens.weight) if self.shape.tie_word_embeddings else self.lm_head(hidden)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries `(batch, heads, new, dim)` over keys and values of fewer heads; `(batch, new, heads · dim)`."""
    if mask is None and 1 < q.shape[2] != k.shape[2]:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    if mask is None and q.shape[2] <= PLAIN_UP_TO and q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend_plainly(q, k, v)
    causal = mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, causal, by two matrix products and a softmax, written out; takes `seq²` memory a head."""
    batch, heads, seq, dim = q.shape
    groups = k.shape[1]
    q, k, v = (x.reshape(batch * groups, -1, dim) for x in (q, k, v))
    hidden = torch.full((seq, seq), -torch.inf, dtype=q.dtype).triu(1).repeat(heads // groups, 1)
    scores = torch.baddbmm(hidden[None], q, k.transpose(1, 2), alpha=dim**-0.5)
    out = scores.softmax(-1) @ v
    return out.view(batch, heads, seq, dim).transpose(1, 2).flatten(2)


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path, with dictionaries on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if isinstance(root, nn.ModuleDict) and parent not in root:
            root[parent] = nn.ModuleDict()
        root = root.get_submodule(parent)
    root.add_module(name, module)


@torch.no_grad()
def init_weights(model: Decoder, generator: torch.Generator) -> Decoder:
    """All initialisation: normal of deviation 0.02, and the two projections into the residual stream scaled down by the square
    root of twice the *executed* depth (a looped layer adds as often as it runs; GPT-2's rule, and zoo pitfall 4). Norms are one.
    """
    residual = 0.02 / math.sqrt(2 * len(model.plan.layers))
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0)
        else:
            deviation = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            weight.normal_(0.0, deviation, generator=generator)
    return model
