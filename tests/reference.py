"""A decoder written plainly from the definitions of the primitives: copies of weights, loops, 64-bit numbers, no cleverness.

It shares no code with `nas.model` or `nas.sharing`. A new primitive must be written here too, from its paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nas.shape import ModelShape

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
FFN = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@dataclass
class Layer:
    """One layer's weights, all its own copies; `reads` is the layer whose KV it attends to, None for its own."""

    weights: dict[str, Tensor]
    reads: int | None = None


def copied(layer: Layer, slots: list[str]) -> dict[str, Tensor]:
    return {slot: layer.weights[slot].clone() for slot in slots}


def build(shape: ModelShape, choices: Sequence[Mapping[str, Any]], norms: str, bank: Mapping[str, Tensor]) -> list[Layer]:
    """The layers that these choices make of a full bank of weights (a dense model's state dict)."""
    layers: list[Layer] = []
    for i, choice in enumerate(choices):
        own = {slot: bank[f"layers.{i}.{slot}.weight"].double() for slot in ATTENTION + FFN}
        own |= {norm: bank[f"layers.{i}.{norm}.weight"].double() for norm in ("input_layernorm", "post_attention_layernorm")}
        layer = Layer(dict(own))
        for name in sorted(choice, key=["tie", "attn", "ffn", "kv", "kv_heads"].index):
            value = choice[name]
            source = Layer(own) if value == i else layers[value] if name != "kv_heads" else layer
            if name in ("tie", "attn"):
                layer.weights |= copied(source, ATTENTION + (["input_layernorm"] if norms == "tied" else []))
                layer.reads = source.reads
            if name in ("tie", "ffn"):
                layer.weights |= copied(source, FFN + (["post_attention_layernorm"] if norms == "tied" else []))
            if name == "kv":
                layer.reads = None if value == i else value
            if name == "kv_heads" and layer.reads is None:
                for slot in ATTENTION[1:3]:
                    layer.weights[slot] = mean_of_groups(layer.weights[slot], value, shape.head_dim)
        layers.append(layer)
    return layers


def mean_of_groups(weight: Tensor, groups: int, dim: int) -> Tensor:
    heads = [weight[h * dim : (h + 1) * dim] for h in range(weight.shape[0] // dim)]
    size = len(heads) // groups
    return torch.cat([sum(heads[g * size : (g + 1) * size], torch.zeros_like(heads[0])) / size for g in range(groups)])


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(head: Tensor, theta: float) -> Tensor:
    """A head's vectors `(seq, dim)` at their positions: pairs `(n, n + half)` turn as complex numbers."""
    half = head.shape[1] // 2
    angles = torch.tensor([[t * theta ** (-n / half) for n in range(half)] for t in range(len(head))], dtype=torch.float64)
    pairs = torch.complex(head[:, :half], head[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], 1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head's outputs `(seq, dim)`: each query looks at the keys up to its own."""
    out = []
    for t in range(len(q)):
        scores = k[: t + 1] @ q[t] / q.shape[1] ** 0.5
        out.append(scores.softmax(0) @ v[: t + 1])
    return torch.stack(out)


def heads_of(x: Tensor, weight: Tensor, dim: int) -> list[Tensor]:
    return [x @ weight[h * dim : (h + 1) * dim].T for h in range(weight.shape[0] // dim)]


def logits(
    shape: ModelShape, choices: Sequence[Mapping[str, Any]], norms: str, bank: Mapping[str, Tensor], rows: Tensor
) -> Tensor:
    """Logits `(batch, seq, vocab)`."""
    layers = build(shape, choices, norms, bank)
    return torch.stack([_logits(shape, layers, bank, row) for row in rows])


def _logits(shape: ModelShape, layers: list[Layer], bank: Mapping[str, Tensor], row: Tensor) -> Tensor:
    dim, eps, embedding = shape.head_dim, shape.rms_norm_eps, bank["embed_tokens.weight"].double()
    x, kept = embedding[row], []
    for layer in layers:
        w = layer.weights
        y = norm(x, w["input_layernorm"], eps)
        queries = [turn(q, shape.rope_theta) for q in heads_of(y, w["self_attn.q_proj"], dim)]
        keys = [turn(k, shape.rope_theta) for k in heads_of(y, w["self_attn.k_proj"], dim)]
        kept.append((keys, heads_of(y, w["self_attn.v_proj"], dim)))
        keys, values = kept[-1] if layer.reads is None else kept[layer.reads]
        share = len(queries) // len(keys)
        outs = [attention(q, keys[h // share], values[h // share]) for h, q in enumerate(queries)]
        x = x + torch.cat(outs, 1) @ w["self_attn.o_proj"].T
        y = norm(x, w["post_attention_layernorm"], eps)
        gate, up = y @ w["mlp.gate_proj"].T, y @ w["mlp.up_proj"].T
        x = x + (gate * gate.sigmoid() * up) @ w["mlp.down_proj"].T
    head = embedding if shape.tie_word_embeddings else bank["lm_head.weight"].double()
    return norm(x, bank["norm.weight"].double(), eps) @ head.T
