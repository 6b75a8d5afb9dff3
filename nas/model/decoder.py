"""The decoder: one forward for the dense model, every subnet, every stand-alone model and every export.

Owns `Decoder`, which runs a `Plan`, and its initialisation. It imports torch, the plan and `attention` alone, so that an export
can carry these three files unchanged.

A layer's projections are looked up by owner at each call (`plan.layers[i].owners`), and a layer's module holds only the weights
that it owns. So the state dict has each weight once, under Llama's names, and that of the dense plan is a Llama's.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..sharing.plan import (
    ATTENTION,
    ATTENTION_NORM,
    BIASED,
    FFN,
    FFN_NORM,
    K_PROJ,
    MATRICES,
    NORMED,
    O_PROJ,
    Q_PROJ,
    ROUTER,
    SLOTS,
    V_PROJ,
    LayerPlan,
    Plan,
    beside,
    short,
    weight_shapes,
)
from .attention import Cache, KVCache, apply_attention_map, attend, crop_mask, rotary, rotate, sliding_mask, softmax_map

if TYPE_CHECKING:
    from ..sharing.shape import ModelShape

WARM_PASSES, GRAD_PASSES = 7, 2
"""Fixed-point passes over layers that read a later layer, without and with gradient (LCKV, 2405.10637: m = 7, b = 2)."""

SPARSE_FROM = 512  # experts narrower than this all state, times a gate that is mostly zero: gathering each one's tokens is slower


class RMSNorm(nn.Module):
    """Root-mean-square norm (1910.07467), computed in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """`(…, hidden)` to the same."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class RawParameter(nn.Module):
    """A weight that is no linear map by itself: the atoms or coefficients of a factorised matrix."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))


def weight_of(module: Any) -> Tensor:
    """A module's weight with the effect of an adapter around it (LoRA, of `peft`).

    Raises ValueError for an adapter on what is neither a linear map nor an embedding, which would have no effect.
    """
    inner = module
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    if inner is module:
        return module.weight
    weight: Tensor = inner.weight
    if isinstance(inner, nn.Embedding):
        return module(torch.arange(len(weight), device=weight.device))
    if isinstance(inner, nn.Linear):
        return module(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)).T
    raise ValueError(
        f"an adapter cannot be put on a {type(inner).__name__}, a part of a matrix; leave it out of target_parameters"
    )


ModuleFactory = Callable[[str, tuple[int, ...]], nn.Module]  # makes (or finds) the module for a weight of this name and shape


def is_norm(name: str) -> bool:
    """Whether a weight of this name is a norm's."""
    return name.endswith("norm.weight")


def new_module(shape: ModelShape) -> ModuleFactory:
    """A factory of new modules, for a stand-alone model. They are not initialised: `init_weights` does that."""

    def make(name: str, size: tuple[int, ...]) -> nn.Module:
        if name in ("embed_tokens.weight", "step_embedding.weight"):
            return nn.Embedding(size[0], size[1], _weight=torch.empty(size))
        if is_norm(name):
            return RMSNorm(size[0], shape.rms_norm_eps)
        if len(size) != 2:
            return RawParameter(*size)
        return nn.utils.skip_init(nn.Linear, size[1], size[0], bias=False)

    return make


@dataclass
class ForwardState:
    """The state of one forward, by which layers read one another.

    rotation: cosines and sines of the positions.
    mask: as in `Decoder.hidden`.
    keys, values, maps, outputs: by layer; keys and values are `(batch, heads, seq, head_dim)`.
    later: keys and values of the pass before, for layers that read a later layer.
    first_values: the first layer's values of the new tokens.
    masks: the masks made so far.
    repeated: whether this pass will be repeated, so that nothing is written to the cache.
    """

    rotation: tuple[Tensor, Tensor]
    mask: Tensor | None
    cache: Cache | None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    later: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    first_values: Tensor | None = None
    masks: dict[tuple[int, int, bool], Tensor] = field(default_factory=dict)
    repeated: bool = False


class Decoder(nn.Module):
    """A Llama-style decoder that runs a `Plan`; its state dict has each owned weight once.

    `module_factory` supplies the modules: new ones by default, the supernet's own for a subnet.
    """

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: RMSNorm
    lm_head: nn.Linear
    embed_projection: nn.Linear
    step_embedding: nn.Embedding

    def __init__(self, shape: ModelShape, plan: Plan, module_factory: ModuleFactory | None = None) -> None:
        super().__init__()
        assert len(plan.layers) == shape.num_hidden_layers
        self.shape, self.plan = shape, plan
        self._kv_input_sources = {layer.kv_input for layer in plan.layers}
        self._map_sources = {layer.attn_map for layer in plan.layers}
        module_factory = module_factory or new_module(shape)
        for name, size in weight_shapes(shape, plan).items():
            if name == "norm.weight":
                self.layers = nn.ModuleList(nn.ModuleDict() for _ in plan.layers)
            set_submodule(self, name.removesuffix(".weight"), module_factory(name, size))

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits `(batch, seq, vocab)` of tokens `(batch, seq)`; the arguments are those of `hidden`."""
        return self.logits(self.hidden(self.embed(tokens), positions, mask, cache))

    def embed(self, tokens: Tensor) -> Tensor:
        """`(batch, seq, hidden)` of tokens `(batch, seq)`."""
        return self.widen(self.embed_tokens(tokens))

    def widen(self, x: Tensor) -> Tensor:
        """`(batch, seq, hidden)` of the output of `embed_tokens`, which is narrower where the embedding is factorised."""
        if self.plan.outside.embedding_rank:
            x = self.embed_projection(x)
        scale = self.shape.embedding_multiplier
        return x if scale == 1 else x * torch.tensor(scale, dtype=x.dtype, device=x.device)  # rounded as Gemma rounds it

    def hidden(
        self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Final hidden states `(batch, seq, hidden)` of embeddings of the same shape.

        positions: `(batch, seq)`, by default from the length of a `KVCache` on.
        mask: boolean `(batch, 1, seq, keys)`, true where attended, its last column the last token's; causal by default.
        cache: read, and written by the layers that own keys or values.
        """
        if positions is None:
            start = cache.length if isinstance(cache, KVCache) else 0
            positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
        state = ForwardState(rotary(positions, self.shape), mask, cache)
        repeated = self.plan.fixed_point_layers
        for i in range(repeated.start):
            x = self.block(i, x, state)
        if repeated:
            x = self._fixed_point(repeated, x, state)
        for i in range(repeated.stop, len(self.plan.layers)):
            x = self.block(i, x, state)
        if isinstance(cache, KVCache):
            cache.length += x.shape[1]
        return self.norm(x)

    def _fixed_point(self, layers: range, x: Tensor, state: ForwardState) -> Tensor:
        """Repeat the layers that read a later layer: in training as often as LCKV (2405.10637), else until the keys and values
        that are read no longer change, which takes no more passes than there are tokens."""
        sources = {layer.v for i, layer in enumerate(self.plan.layers) if layer.reads_later_layer(i)}
        training = torch.is_grad_enabled()
        passes, n = WARM_PASSES + GRAD_PASSES if training else x.shape[1], 0
        while n < passes - 1:
            state.repeated = True
            with torch.set_grad_enabled(training and n >= WARM_PASSES):
                self._pass(layers, x, state)
            before, state.later = state.later, {j: (state.keys[j], state.values[j]) for j in sources if j is not None}
            n = passes if not training and _converged(before, state.later) else n + 1
        state.repeated = False
        return self._pass(layers, x, state)

    def _pass(self, layers: range, x: Tensor, state: ForwardState) -> Tensor:
        for i in layers:
            x = self.block(i, x, state)
        return x

    def block(self, i: int, x: Tensor, state: ForwardState) -> Tensor:
        """Layer i on `(batch, seq, hidden)`; what other layers read of it is put into the state."""
        layer = self.plan.layers[i]
        if self.plan.outside.step_embedding:
            x = x + weight_of(self.step_embedding)[i].to(x.dtype)
        if layer.has_attention:
            x = x + self._project(i, O_PROJ, self._attention(i, x, state))
        if layer.has_ffn:
            normed = self.part(i, FFN_NORM)(x)
            x = x + (self._experts(i, normed) if layer.experts else self._ffn(i, normed))
        if i in self._kv_input_sources:
            state.outputs[i] = x
        return x

    def _attention(self, i: int, x: Tensor, state: ForwardState) -> Tensor:
        """The heads' outputs `(batch, seq, heads · dim)` of layer i, before its o projection."""
        layer, norm = self.plan.layers[i], self.part(i, ATTENTION_NORM)
        normed = norm(x)
        if i in (layer.k, layer.v):
            self._make_kv(i, normed if layer.kv_input is None else norm(state.outputs[layer.kv_input]), state)
        assert layer.v is not None
        if layer.attn_map is not None:
            return apply_attention_map(state.maps[layer.attn_map], state.values[layer.v])
        assert layer.k is not None
        q = rotate(self._heads(i, Q_PROJ, normed), *state.rotation)
        if layer.reads_later_layer(i):
            return self._attend_later(layer, q, state)
        k, v = state.keys[layer.k], state.values[layer.v]
        k, v = k[:, :, -v.shape[2] :], v[:, :, -k.shape[2] :]
        mask = None if layer.window is None or layer.window >= k.shape[2] else self._mask(q, k, layer.window, False, state)
        mask = crop_mask(state.mask, k) if mask is None else mask
        if i not in self._map_sources:
            return attend(q, k, v, mask)
        state.maps[i] = softmax_map(q, k, mask)
        return apply_attention_map(state.maps[i], v)

    def _make_kv(self, i: int, source: Tensor, state: ForwardState) -> None:
        """Make the keys and values that layer i owns from `(batch, seq, hidden)`, and put them into the state and the cache."""
        layer = self.plan.layers[i]
        k = v = source.new_empty(source.shape[0], 0, source.shape[1], self.shape.head_dim)
        if layer.k == i:
            k = rotate(self._heads(i, K_PROJ, source), *state.rotation)
        if layer.v == i:
            v = self._heads(i, V_PROJ, source)
            if i == 0:
                state.first_values = v
            if layer.value_residual:
                assert state.first_values is not None
                v = torch.lerp(v, state.first_values.to(v.dtype), layer.value_residual)
        if state.repeated:
            past = state.cache.past(i) if state.cache is not None else None
            k, v = (torch.cat([old.to(new.dtype), new], 2) for old, new in zip(past, (k, v), strict=True)) if past else (k, v)
        elif state.cache is not None:
            k, v = state.cache.update(k, v, i)
        state.keys[i], state.values[i] = k, v

    def _attend_later(self, layer: LayerPlan, q: Tensor, state: ForwardState) -> Tensor:
        """Attention to a later layer's keys and values of strictly earlier tokens; zero where there are none."""
        assert layer.v is not None
        found = state.later.get(layer.v)
        if found is None:
            found = state.cache.past(layer.v) if state.cache is not None else None
            if found is None:
                return q.new_zeros(q.shape).transpose(1, 2).flatten(2)
            blanks = [q.new_zeros(q.shape[0], past.shape[1], q.shape[2], q.shape[3]) for past in found]
            found = torch.cat([found[0].to(q.dtype), blanks[0]], 2), torch.cat([found[1].to(q.dtype), blanks[1]], 2)
        k, v = found
        mask = self._mask(q, k, k.shape[2], True, state)
        seen = mask.any(-1, keepdim=True)
        out = attend(q, k, v, mask | ~seen)
        return out * seen[:, 0].to(out.dtype)

    def _mask(self, q: Tensor, k: Tensor, window: int, strict: bool, state: ForwardState) -> Tensor:
        """Boolean `(batch or 1, 1, new, keys)`: the `window` latest keys, without the token's own if `strict`."""
        key = (k.shape[2], window, strict)
        if key not in state.masks:
            mask = sliding_mask(q.shape[2], k.shape[2], window, strict, q.device)
            given = crop_mask(state.mask, k)
            state.masks[key] = mask if given is None else mask & given
        return state.masks[key]

    def _ffn(self, i: int, x: Tensor) -> Tensor:
        gate, up = self._project(i, FFN[0], x), self._project(i, FFN[1], x)
        return self._project(i, FFN[2], self._act(gate) * up)

    def _act(self, x: Tensor) -> Tensor:
        act = self.shape.hidden_act
        return F.silu(x) if act == "silu" else F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")

    def _experts(self, i: int, x: Tensor) -> Tensor:
        """The `active_experts` best of the FFN's equal parts, each times the sigmoid of its score (σ-MoE, 2310.10837)."""
        layer = self.plan.layers[i]
        scores, chosen = self._project(i, ROUTER, x).sigmoid().topk(layer.active_experts, -1)
        gates = torch.zeros(*x.shape[:-1], layer.experts, dtype=scores.dtype, device=x.device).scatter(-1, chosen, scores)
        width = layer.width // layer.experts
        if width < SPARSE_FROM:
            gate, up = self._project(i, FFN[0], x), self._project(i, FFN[1], x)
            return self._project(i, FFN[2], self._act(gate) * up * gates.repeat_interleave(width, -1).to(up.dtype))
        gate, up, down = (self.matrix(i, slot) for slot in FFN)
        out = torch.zeros_like(x)
        for e in range(layer.experts):
            rows = slice(e * width, (e + 1) * width)
            where = (gates[..., e] > 0).nonzero(as_tuple=True)
            y = x[where]
            y = F.linear(self._act(F.linear(y, gate[rows])) * F.linear(y, up[rows]), down[:, rows])
            out = out.index_put(where, (y * gates[..., e][where][:, None]).to(out.dtype), accumulate=True)
        return out

    def _project(self, i: int, slot: str, x: Tensor) -> Tensor:
        """The output `(batch, seq, out)` of layer i's matrix in a slot for `(batch, seq, in)`."""
        layer, n = self.plan.layers[i], SLOTS.index(slot)
        factor = layer.factors[n] if n < len(MATRICES) else None
        if factor is not None and factor.kind == "basis":
            y = self._piece(layer.owners[n], slot, "coef")(self._piece(factor.at, slot, "basis")(x))
        elif factor is not None or (layer.heads and slot in ATTENTION):
            return F.linear(x, self.matrix(i, slot))
        else:
            y = self.part(i, slot)(x)
        if layer.delta and layer.owners[n] != i and slot in MATRICES:
            y = y + self._piece(i, slot, "delta_b")(self._piece(i, slot, "delta_a")(x))
        return y

    def _heads(self, i: int, slot: str, x: Tensor) -> Tensor:
        """Layer i's queries, keys or values `(batch, heads, seq, head_dim)` of `(batch, seq, hidden)`, not rotated."""
        y = self._project(i, slot, x)
        if self.shape.attention_bias and slot in BIASED:
            y = y + self.bias(i, slot).to(y.dtype)
        y = y.unflatten(-1, (-1, self.shape.head_dim))
        if self.shape.qk_norm and slot in NORMED:
            y = self.head_norm(i, slot)(y)
        return y.transpose(1, 2)

    def bias(self, i: int, slot: str) -> Tensor:
        """The bias `(out,)` of layer i's projection, composed where some of its heads are another layer's."""
        layer, name = self.plan.layers[i], f"{short(slot)}_bias"
        owner = beside(i, layer, slot)
        if layer.heads and owner == layer.owner(slot):
            return torch.cat([self._head(at, name, head) for at, head in layer.heads])
        bias: Tensor = self._module(owner, name).weight
        return bias

    def head_norm(self, i: int, slot: str) -> Any:
        """The norm over the head dimension of layer i's queries or keys."""
        return self._piece(beside(i, self.plan.layers[i], slot), slot, "norm")

    def matrix(self, i: int, slot: str) -> Tensor:
        """Layer i's matrix `(out, in)` in a slot, composed of its parts and with its delta."""
        layer, n = self.plan.layers[i], SLOTS.index(slot)
        factor, owner = layer.factors[n], layer.owners[n]
        weight: Tensor
        if factor is not None and factor.kind == "basis":
            weight = weight_of(self._piece(owner, slot, "coef")) @ weight_of(self._piece(factor.at, slot, "basis"))
        elif factor is not None:
            atoms = weight_of(self._piece(factor.at, slot, "atoms"))
            atoms = atoms if len(factor.used) == factor.size else atoms[list(factor.used)]
            weight = torch.einsum("s,soi->oi", weight_of(self._piece(owner, slot, "mix")), atoms)
        elif layer.heads and slot in ATTENTION:
            weight = torch.cat([self._head(at, slot, head) for at, head in layer.heads], 1 if slot == O_PROJ else 0)
        else:
            weight = weight_of(self.part(i, slot))
        if layer.delta and owner != i:
            weight = weight + weight_of(self._piece(i, slot, "delta_b")) @ weight_of(self._piece(i, slot, "delta_a"))
        return weight

    def _head(self, at: int, slot: str, head: int) -> Tensor:
        """A head's rows of layer `at`'s matrix or bias (columns of its o projection)."""
        weight, dim = weight_of(self._module(at, slot)), self.shape.head_dim
        owned = self.plan.layers[at].own_heads(at)
        first = (owned.index(head) if owned else head) * dim
        return weight[:, first : first + dim] if slot == O_PROJ else weight[first : first + dim]

    def part(self, i: int, slot: str) -> Any:
        """The module that layer i uses for a slot. It is looked up at each call, so that it can be replaced (LoRA)."""
        return self._module(self.plan.layers[i].owners[SLOTS.index(slot)], slot)

    def _piece(self, owner: int | None, slot: str, name: str) -> Any:
        """The module that holds a part of a composed matrix."""
        return self._module(owner, f"{short(slot)}_{name}")

    def _module(self, owner: int | None, name: str) -> Any:
        found: Any = self.layers[owner]  # type: ignore[index]
        group, _, last = name.rpartition(".")
        return (found[group] if group else found)[last]

    def logits(self, hidden: Tensor) -> Tensor:
        """`(batch, seq, vocab)` from final hidden states."""
        if not self.plan.outside.tie_word_embeddings:
            return self.lm_head(hidden)
        return F.linear(self.narrow(hidden), self.embed_tokens.weight)

    def narrow(self, hidden: Tensor) -> Tensor:
        """The input of a tied head: `(batch, seq, rank)` where the embedding is factorised, else the hidden states."""
        if not self.plan.outside.embedding_rank:
            return hidden
        return hidden @ weight_of(self.embed_projection).to(hidden.dtype)


def _converged(before: dict[int, tuple[Tensor, Tensor]], after: dict[int, tuple[Tensor, Tensor]]) -> bool:
    """Whether a pass has changed none of the keys and values that are read."""
    return bool(before) and all(torch.equal(a, b) for j in after for a, b in zip(before[j], after[j], strict=True))


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path; missing parents are made."""
    *parents, name = path.split(".")
    for parent in parents:
        if isinstance(root, nn.ModuleDict) and parent not in root:
            root[parent] = nn.ModuleDict()
        root = root.get_submodule(parent)
    root.add_module(name, module)


@torch.no_grad()
def init_weights(model: Decoder, generator: torch.Generator) -> Decoder:
    """Initialise all weights by `init_parameter`. A weight of one name and shape has the same initial value in every model of one
    seed, so that models that are compared differ by as little as possible beside what they share.
    """
    seed = int(torch.randint(1 << 31, (), generator=generator, device=generator.device))
    deviation = initial_deviation(model.shape.hidden_size)
    for name, weight in model.named_parameters():
        own = torch.Generator(generator.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # a seed has 32 bits
        init_parameter(name.removesuffix(".weight"), weight, deviation, len(model.plan.layers), own)
    return model


def initial_deviation(hidden_size: int) -> float:
    """The standard deviation of initial weights: the square root of 2 / (5 · width) (SmallInit, 1910.05895, 2.1), GPT-2's 0.02 at
    a width of 1,000. A narrow model that is initialised with 0.02 stays on its first plateau for long
    (`reports/bench_beginnings.md`)."""
    return math.sqrt(2 / (5 * hidden_size))


def init_parameter(name: str, weight: Tensor, deviation: float, layers: int, generator: torch.Generator | None) -> None:
    """Initialise the weight of a name in place: normal with standard deviation `deviation`, divided in the projections into the
    residual stream by the square root of twice the *executed* depth (GPT-2's rule; a looped layer adds as often as it runs).
    Norms are one, a delta adds nothing (LoRA, 2106.09685), biases are zero, and a composed matrix has a plain one's deviation.
    """
    if is_norm(f"{name}.weight"):
        weight.fill_(1.0)
    elif name.endswith(("_delta_b", "_bias")):
        weight.zero_()
    elif name.endswith("_basis"):
        weight.normal_(0.0, weight.shape[0] ** -0.5, generator=generator)
    elif name.endswith(("_mix", "_delta_a", "embed_projection")):
        weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    else:
        into_residual = ".o_" in name or ".down_" in name
        weight.normal_(0.0, deviation / math.sqrt(2 * layers) if into_residual else deviation, generator=generator)
