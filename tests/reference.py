"""A decoder written plainly from the definitions of the primitives: token by token, copies of weights, loops, 64-bit numbers.

It shares no code with `nas.model` or `nas.sharing`; a new primitive must be written here too, from its paper. A bank is a full
state dict by the model's names; a smaller weight is its leading part, and fewer key or value heads are means of neighbours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nas.sharing.shape import ModelShape

Q, K, V, O = (f"self_attn.{letter}_proj" for letter in "qkvo")  # noqa: E741
GATE, UP, DOWN, ROUTER = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.router"
ATTENTION, FFN = [Q, K, V, O], [GATE, UP, DOWN]
BIAS, HEAD_NORM = {Q: "q_bias", K: "k_bias", V: "v_bias"}, {Q: "q_norm", K: "k_norm"}
ATTENTION_NORM, FFN_NORM = "input_layernorm", "post_attention_layernorm"
SHORT = {"q": Q, "k": K, "v": V, "o": O, "gate": GATE, "up": UP, "down": DOWN}
WIDE = ["tie", "attn", "q", "k", "v", "o", "ffn", "drop", "kv", "k_from", "v_from", "attn_map", "kv_input"]
NARROW = ["kv_heads", "k_heads", "v_heads", "heads", "intermediate", "experts", "active_experts", "router"]
ORDER = [*WIDE, *NARROW, "window", "value_residual", "factor", "delta"]


@dataclass
class Layer:
    """One layer. `takes` is the layer whose weight a slot uses (its own number: its own weight), None where it uses none.

    `k_from`, `v_from` and `attn_map` are the layers whose tensors it reads, None where it makes its own.
    """

    index: int
    takes: dict[str, int | None]
    k_heads: int
    v_heads: int
    width: int
    experts: int = 0
    active: int = 0
    k_from: int | None = None
    v_from: int | None = None
    attn_map: int | None = None
    kv_input: int | None = None
    window: int | None = None
    value_residual: float = 0.0
    heads: dict[int, tuple[int, int]] = field(default_factory=dict)
    factors: dict[str, tuple[str, int, int, list[int]]] = field(default_factory=dict)
    delta: int = 0
    shared: dict[str, Tensor] = field(default_factory=dict)  # what others that take from this layer get
    weights: dict[str, Tensor] = field(default_factory=dict)  # what it computes with: that, and its own correction


def owning(shape: ModelShape, i: int) -> Layer:
    heads = shape.num_key_value_heads
    takes: dict[str, int | None] = dict.fromkeys([*ATTENTION, *FFN, ROUTER, ATTENTION_NORM, FFN_NORM], i)
    return Layer(i, takes, heads, heads, shape.intermediate_size)


# --- what the choices say


def build(
    shape: ModelShape, choices: Sequence[Mapping[str, Any]], whole: Mapping[str, Any], bank: Mapping[str, Tensor]
) -> list[Layer]:
    """The layers that these choices make of a full bank of weights."""
    layers: list[Layer] = []
    for i, choice in enumerate(choices):
        layer = owning(shape, i)
        for name in sorted(choice, key=ORDER.index):
            value = choice[name]
            if name in ("tie", "attn"):
                take_attention(layer, layers[value] if value < i else owning(shape, i))
            if name in ("tie", "ffn"):
                take_ffn(layer, layers[value] if value < i else owning(shape, i))
            if name in ("q", "k", "v", "o"):
                take_projection(layer, name, layers[value] if value < i else owning(shape, i))
            read(layer, name, value, layers)
            resize(layer, name, value)
            if name == "heads":
                tie_heads(layer, value, layers)
            if name == "factor":
                factorise(layer, value)
            if name == "delta":
                layer.delta = value
        if whole.get("norms") == "tied":
            tie_norms(layer, layers)
        fill(shape, layer, layers, bank)
        layers.append(layer)
    return layers


def take(layer: Layer, source: Layer, slots: list[str]) -> None:
    for slot in slots:
        layer.takes[slot] = None if source.takes[slot] is None else source.index


def take_attention(layer: Layer, source: Layer) -> None:
    take(layer, source, ATTENTION)
    layer.k_heads, layer.v_heads = source.k_heads, source.v_heads
    layer.k_from, layer.v_from, layer.attn_map = source.k_from, source.v_from, source.attn_map


def take_ffn(layer: Layer, source: Layer) -> None:
    take(layer, source, FFN)
    layer.width, layer.experts, layer.active = source.width, source.experts, source.active


def take_projection(layer: Layer, letter: str, source: Layer) -> None:
    take(layer, source, [SHORT[letter]])
    if letter == "k":
        layer.k_heads, layer.k_from = source.k_heads, None
    if letter == "v":
        layer.v_heads, layer.v_from = source.v_heads, None


def read(layer: Layer, name: str, value: Any, layers: list[Layer]) -> None:
    """The choices about what is run, and what tensors are read."""
    if name == "drop":
        parts = {"attn": ATTENTION, "ffn": FFN, "both": ATTENTION + FFN}[value]
        layer.takes |= dict.fromkeys(parts, None)
    if name in ("kv", "k_from") and value != layer.index:
        layer.k_from, layer.takes[K] = value, None
    if name in ("kv", "v_from") and value != layer.index:
        layer.v_from, layer.takes[V] = value, None
    if name == "attn_map" and value != layer.index:
        source = layers[value]
        layer.attn_map = source.index if source.attn_map is None else source.attn_map
        layer.takes[Q] = layer.takes[K] = layer.k_from = None
    if name == "kv_input":
        layer.kv_input = value if value < layer.index - 1 else None
    if name == "window":
        layer.window = value
    if name == "value_residual":
        layer.value_residual = value


def resize(layer: Layer, name: str, value: Any) -> None:
    """The choices about the sizes of what the layer owns; what it takes has its owner's."""
    if name in ("kv_heads", "k_heads") and layer.takes[K] == layer.index:
        layer.k_heads = value
    if name in ("kv_heads", "v_heads") and layer.takes[V] == layer.index:
        layer.v_heads = value
    if name == "intermediate" and layer.takes[GATE] == layer.index:
        layer.width = value
    if name == "experts" and layer.takes[GATE] == layer.index:
        layer.experts, layer.active = value, min(2, value)
    if name == "active_experts" and layer.takes[GATE] == layer.index:
        layer.active = value
    if name == "router":
        layer.takes[ROUTER] = value


def tie_heads(layer: Layer, text: str, layers: list[Layer]) -> None:
    """Such as `0=1.3 2=0.1`: the heads named first are layer 1's head 3 and layer 0's head 1, in the order of these."""
    wanted = {}
    for word in text.split():
        head, _, source = word.partition("=")
        j, _, its = source.partition(".")
        wanted[int(head)] = head_root(int(j), int(its), layers)
    layer.heads = dict(zip(sorted(wanted), sorted(wanted.values()), strict=True))


def head_root(j: int, head: int, layers: list[Layer]) -> tuple[int, int]:
    source = layers[j].takes[Q]
    assert source is not None
    return layers[j].heads.get(head, (j, head)) if source == j else head_root(source, head, layers)


def factorise(layer: Layer, text: str) -> None:
    """Such as `dictionary 4 at 0 for q k using 0 1; basis 16 at 2 for gate`."""
    for part in text.split(";"):
        kind, size, at, layer_at, for_, *rest = part.split()
        assert (at, for_) == ("at", "for")
        letters = rest[: rest.index("using")] if "using" in rest else rest
        used = {int(atom) for atom in rest[rest.index("using") + 1 :]} if "using" in rest else range(int(size))
        for letter in letters:
            layer.factors[SHORT[letter]] = kind, int(size), int(layer_at), sorted(used)


def tie_norms(layer: Layer, layers: list[Layer]) -> None:
    """Where all weights of a part are one layer's, so is the norm before it."""
    for norm, slots in ((ATTENTION_NORM, ATTENTION), (FFN_NORM, FFN)):
        roots = {root(layer, slot, layers) for slot in slots if layer.takes[slot] is not None}
        if len(roots) == 1:
            layer.takes[norm] = roots.pop()


def root(layer: Layer, slot: str, layers: list[Layer]) -> int:
    """The layer whose own weight is used in a slot."""
    source = layer.takes[slot]
    assert source is not None
    return source if source == layer.index else root(layers[source], slot, layers)


# --- the weights they make of a bank


def fill(shape: ModelShape, layer: Layer, layers: list[Layer], bank: Mapping[str, Tensor]) -> None:
    if not layer.experts or layer.takes[GATE] is None:
        layer.takes[ROUTER] = None
    for slot, source in layer.takes.items():
        if source is not None:
            layer.shared[slot] = own(shape, layer, slot, bank) if source == layer.index else layers[source].shared[slot].clone()
            if shape.attention_bias and slot in BIAS:
                layer.shared[BIAS[slot]] = beside(shape, layer, slot, BIAS[slot], layers, bank)
            if shape.qk_norm and slot in HEAD_NORM:
                layer.shared[HEAD_NORM[slot]] = beside(shape, layer, slot, HEAD_NORM[slot], layers, bank)
    for head, (j, its) in layer.heads.items():
        mine, theirs = (slice(h * shape.head_dim, (h + 1) * shape.head_dim) for h in (head, its))
        for slot in (Q, K, V, *(BIAS.values() if shape.attention_bias else ())):
            layer.shared[slot][mine] = layers[j].shared[slot][theirs]
        layer.shared[O][:, mine] = layers[j].shared[O][:, theirs]
    layer.weights = {slot: weight.clone() for slot, weight in layer.shared.items()}
    for slot in SHORT.values():
        if layer.delta and layer.takes[slot] not in (None, layer.index):
            out, into = layer.shared[slot].shape
            name = f"layers.{layer.index}.{slot.removesuffix('_proj')}_delta"
            a, b = leading(bank, f"{name}_a", layer.delta, into), leading(bank, f"{name}_b", out, layer.delta)
            layer.weights[slot] += b @ a


def beside(shape: ModelShape, layer: Layer, slot: str, name: str, layers: list[Layer], bank: Mapping[str, Tensor]) -> Tensor:
    """The bias or the norm that goes with a projection, whosever that is; a layer that corrects it by a delta has its own."""
    source = layer.takes[slot]
    assert source is not None
    if source != layer.index and not layer.delta:
        return layers[source].shared[name].clone()
    full = bank[f"layers.{layer.index}.self_attn.{name}.weight"].double().clone()
    if name in HEAD_NORM.values() or slot == Q:
        return full
    return mean_of_groups(full, layer.k_heads if slot == K else layer.v_heads, shape.head_dim)


def leading(bank: Mapping[str, Tensor], name: str, *size: int) -> Tensor:
    weight = bank[f"{name}.weight"].double()
    assert all(n <= full for n, full in zip(size, weight.shape, strict=True)), (name, size, weight.shape)
    return weight[tuple(slice(n) for n in size)].clone()


def own(shape: ModelShape, layer: Layer, slot: str, bank: Mapping[str, Tensor]) -> Tensor:
    hidden, dim, name = shape.hidden_size, shape.head_dim, f"layers.{layer.index}.{slot}"
    queries = shape.num_attention_heads * dim
    size: list[int] = {
        **{Q: [queries, hidden], K: [layer.k_heads * dim, hidden], V: [layer.v_heads * dim, hidden], O: [hidden, queries]},
        **{GATE: [layer.width, hidden], UP: [layer.width, hidden], DOWN: [hidden, layer.width]},
        **{ROUTER: [layer.experts, hidden], ATTENTION_NORM: [hidden], FFN_NORM: [hidden]},
    }[slot]
    if slot in layer.factors:
        return product(layer, slot, size, bank)
    if slot in (K, V):
        return mean_of_groups(leading(bank, name, shape.num_key_value_heads * dim, hidden), size[0] // dim, dim)
    return leading(bank, name, *size)


def product(layer: Layer, slot: str, size: list[int], bank: Mapping[str, Tensor]) -> Tensor:
    kind, count, at, used = layer.factors[slot]
    kept, mine = (f"layers.{i}.{slot.removesuffix('_proj')}" for i in (at, layer.index))
    if kind == "basis":
        return leading(bank, f"{mine}_coef", size[0], count) @ leading(bank, f"{kept}_basis", count, size[1])
    atoms, mix = leading(bank, f"{kept}_atoms", count, *size), leading(bank, f"{mine}_mix", len(used))
    return sum((c * atoms[atom] for c, atom in zip(mix, used, strict=True)), torch.zeros(size, dtype=torch.float64))


def mean_of_groups(weight: Tensor, groups: int, dim: int) -> Tensor:
    heads = [weight[h * dim : (h + 1) * dim] for h in range(weight.shape[0] // dim)]
    size = len(heads) // groups
    return torch.cat([sum(heads[g * size : (g + 1) * size], torch.zeros_like(heads[0])) / size for g in range(groups)])


# --- what they compute


def logits(
    shape: ModelShape,
    choices: Sequence[Mapping[str, Any]],
    whole: Mapping[str, Any],
    bank: Mapping[str, Tensor],
    rows: Tensor,
) -> Tensor:
    """Logits `(batch, seq, vocab)`; `whole` are the model-level keys."""
    layers = build(shape, choices, whole, bank)
    return torch.stack([_logits(shape, layers, whole, bank, row) for row in rows])


def _logits(shape: ModelShape, layers: list[Layer], whole: Mapping[str, Any], bank: Mapping[str, Tensor], row: Tensor) -> Tensor:
    embed, head = embedding_and_head(shape, whole, bank)
    embed = embed * shape.embedding_multiplier
    steps = bank["step_embedding.weight"].double() if whole.get("step_embedding") else torch.zeros(len(layers), shape.hidden_size)
    run, out = Run(shape, layers), []
    for token in row:
        x = run.token(embed[token], steps)
        out.append(head @ norm(x, bank["norm.weight"].double(), shape.rms_norm_eps))
    return torch.stack(out)


def embedding_and_head(shape: ModelShape, whole: Mapping[str, Any], bank: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Each token's vector on its way in, and on its way out."""
    embed, rank = bank["embed_tokens.weight"].double(), whole.get("embedding_rank", 0)
    if rank:
        factored = leading(bank, "embed_factored", shape.vocab_size, rank)
        embed = factored @ leading(bank, "embed_projection", shape.hidden_size, rank).T
    tied = whole.get("tie_word_embeddings", shape.tie_word_embeddings)
    return embed, embed if tied else bank["lm_head.weight"].double()


class Run:
    """A sequence, token after token: every layer's keys, values and softmax maps so far."""

    def __init__(self, shape: ModelShape, layers: list[Layer]) -> None:
        self.shape, self.layers = shape, layers
        self.keys: list[list[list[Tensor]]] = [[] for _ in layers]  # of a layer, of a token, of a head
        self.values: list[list[list[Tensor]]] = [[] for _ in layers]
        self.maps: list[list[dict[int, Tensor]]] = [[] for _ in layers]  # of a layer, of a head now: each seen token's weight
        self.t = 0

    def token(self, x: Tensor, steps: Tensor) -> Tensor:
        """The next token's vector through every layer."""
        outputs: list[Tensor] = []
        for layer in self.layers:
            x = x + steps[layer.index]
            if layer.takes[O] is not None:
                x = x + self.attention(layer, x, outputs)
            if layer.takes[DOWN] is not None:
                x = x + ffn(self.shape, layer, norm(x, layer.weights[FFN_NORM], self.shape.rms_norm_eps))
            outputs.append(x)
        self.t += 1
        return x

    def attention(self, layer: Layer, x: Tensor, outputs: list[Tensor]) -> Tensor:
        i, w, eps = layer.index, layer.weights, self.shape.rms_norm_eps
        y = norm(x, w[ATTENTION_NORM], eps)
        source = y if layer.kv_input is None else norm(outputs[layer.kv_input], w[ATTENTION_NORM], eps)
        if K in w:
            self.keys[i].append([self.turn(key) for key in self.made(layer, K, source)])
        if V in w:
            self.values[i].append(self.mixed(layer, self.made(layer, V, source)))
        if layer.attn_map is None:
            keys = self.keys[i if layer.k_from is None else layer.k_from]
            self.maps[i] = [self.look(layer, h, self.turn(q), keys) for h, q in enumerate(self.made(layer, Q, y))]
        maps = self.maps[i if layer.attn_map is None else layer.attn_map]
        values = self.values[i if layer.v_from is None else layer.v_from]
        return w[O] @ torch.cat([self.gathered(h, seen, values) for h, seen in enumerate(maps)])

    def made(self, layer: Layer, slot: str, x: Tensor) -> list[Tensor]:
        """A layer's queries, keys or values, head by head, with their bias; queries and keys of norm one, but for a weight."""
        w, dim = layer.weights, self.shape.head_dim
        found = heads_of(x, w[slot], dim)
        if self.shape.attention_bias:
            found = [head + w[BIAS[slot]][h * dim : (h + 1) * dim] for h, head in enumerate(found)]
        if self.shape.qk_norm and slot in HEAD_NORM:
            found = [norm(head, w[HEAD_NORM[slot]], self.shape.rms_norm_eps) for head in found]
        return found

    def mixed(self, layer: Layer, values: list[Tensor]) -> list[Tensor]:
        if not layer.value_residual:
            return values
        lam, first = layer.value_residual, self.values[0][self.t]
        return [(1 - lam) * mine + lam * theirs for mine, theirs in zip(values, first, strict=True)]

    def look(self, layer: Layer, h: int, query: Tensor, keys: list[list[Tensor]]) -> dict[int, Tensor]:
        """The weight a query head gives each token whose key is there: of a layer above, those are the earlier tokens'."""
        scores: dict[int, Tensor] = {}
        for s, heads in enumerate(keys):
            if layer.window is None or s > self.t - layer.window:
                key = heads[h // (self.shape.num_attention_heads // len(heads))]
                scores[s] = (query @ key / self.shape.head_dim**0.5).exp()
        return {s: score / sum(scores.values()) for s, score in scores.items()}

    def gathered(self, h: int, seen: dict[int, Tensor], values: list[list[Tensor]]) -> Tensor:
        out = torch.zeros(self.shape.head_dim, dtype=torch.float64)
        for s, weight in seen.items():
            out = out + weight * values[s][h // (self.shape.num_attention_heads // len(values[s]))]
        return out

    def turn(self, head: Tensor) -> Tensor:
        """A head's vector at the present position: pairs `(n, n + half)` turn as complex numbers."""
        half = len(head) // 2
        speeds = [scaled_rope(self.shape, self.shape.rope_theta ** (-n / half)) for n in range(half)]
        angles = torch.tensor([self.t * speed for speed in speeds], dtype=torch.float64)
        pairs = torch.complex(head[:half], head[half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag])


def scaled_rope(shape: ModelShape, speed: float) -> float:
    """Radians a token, scaled_rope down for a longer context: all alike, or long waves only, with a way between (Llama 3.1)."""
    said = shape.rotary_scaling
    if said is None:
        return speed
    wave, before = 2 * math.pi / speed, said.original_max_position_embeddings
    if said.rope_type == "linear" or wave > before / said.low_freq_factor:
        return speed / said.factor
    if wave < before / said.high_freq_factor:
        return speed
    smooth = (before / wave - said.low_freq_factor) / (said.high_freq_factor - said.low_freq_factor)
    return (1 - smooth) * speed / said.factor + smooth * speed


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def heads_of(x: Tensor, weight: Tensor, dim: int) -> list[Tensor]:
    return [weight[h * dim : (h + 1) * dim] @ x for h in range(weight.shape[0] // dim)]


def act(shape: ModelShape, x: Tensor) -> Tensor:
    """SiLU, or GELU (1606.08415), exactly or by its tanh approximation."""
    if shape.hidden_act == "silu":
        return x * x.sigmoid()
    if shape.hidden_act == "gelu":
        return x * (1 + torch.erf(x / 2**0.5)) / 2
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def ffn(shape: ModelShape, layer: Layer, y: Tensor) -> Tensor:
    """The whole FFN, or the sum of the most wanted experts, each times how much it is wanted (sigma-MoE, as in 2405.16039)."""
    w, size = layer.weights, layer.width // max(layer.experts, 1)
    wanted = torch.sigmoid(w[ROUTER] @ y) if layer.experts else torch.ones(1)
    out = torch.zeros_like(y)
    for e in sorted(range(len(wanted)), key=lambda e: -wanted[e].item())[: layer.active or 1]:
        rows = slice(e * size, (e + 1) * size)
        gate, up = w[GATE][rows] @ y, w[UP][rows] @ y
        out = out + wanted[e] * (w[DOWN][:, rows] @ (act(shape, gate) * up))
    return out
