"""What a sharing pattern looks like, as plain data: who owns each part of each layer, bytes by part, and the costs beside dense.

Owns `Picture` and every word about a layer that a drawing, the terminal and an export's README have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from ..config import format_bytes, format_flops
from .label import label
from .memory import Memory, MemorySpec, layer_cost, measure_plan
from .plan import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    FFN_NORM,
    GATE_PROJ,
    MATRICES,
    Q_PROJ,
    ROUTER,
    SLOTS,
    EmbeddingPlan,
    Factor,
    LayerPlan,
    Plan,
    corrected,
    weight_shapes,
)
from .shape import DTYPE_BYTES, ModelShape
from .sharing_config import SharingConfig

CACHE = "KV cache"
PARTS = ("embedding", "attention", "FFN", "norms", "head", "other", CACHE)
"""The parts that bytes are counted by; `other` takes any tensor that belongs to none, so that the sum is always whole."""

NORM_PARTS = ("attention norm", "FFN norm")

COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("weights", "weight_bytes", format_bytes),
    ("KV cache", "kv_cache_bytes", format_bytes),
    ("memory", "memory_bytes", format_bytes),
    ("a token adds to the cache", "kv_bytes_per_token", format_bytes),
    ("a token reads of the cache", "kv_read_bytes_per_token", format_bytes),
    ("a token computes", "flops_per_token", format_flops),
)
"""What a config costs: the heading, the field of `Memory`, and the format."""

Shared = frozenset[tuple[str, int]]  # the parts that other layers use too, each with its source layer


@dataclass(frozen=True)
class Segment:
    """A piece of a block: the `parts` it is for, the layer that owns them (None: no layer), and the words inside.

    `how` is `own`, `tied` (another layer's weights, or its keys or values), `mixed` (own coefficients of another layer's bank),
    `map` (another layer's softmax map), `none` or `dropped`. `size` is its share of the block; `detail` holds what needs more
    room.
    """

    parts: tuple[str, ...]
    how: str
    owner: int | None
    text: str = ""
    size: float = 1.0
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One layer: the segments of its blocks and of its cache, the owners of its norms, and the bytes that it owns.

    `cache` is one segment for keys and values where they are alike, else two, each as large as its share of all heads; `reads`
    says the same in words. `also` holds what no box shows: windows, ranks and the like.
    """

    layer: int
    attention: tuple[Segment, ...]
    ffn: tuple[Segment, ...]
    norms: tuple[int | None, int | None]
    cache: tuple[Segment, ...]
    reads: str
    also: str
    weight_bytes: int
    kv_cache_bytes: int

    def block_words(self, block: int) -> str:
        """Whose the parts and the norm of attention (0) or of the FFN (1) are: `q o, k v = layer 0`."""
        norm = [f"norm = layer {self.norms[block]}"] if self.norms[block] not in (self.layer, None) else []
        return ", ".join([*(segment.text for segment in (self.attention, self.ffn)[block] if segment.text), *norm])


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
    """One figure of a config beside the dense model's, formatted, and `amount`, not formatted; `share` is None where the
    dense model's is 0."""

    words: str
    value: str
    dense: str
    share: float | None
    amount: int


@dataclass(frozen=True)
class Picture:
    """All that is shown of a config in a model, and the context, batch and dtype at which its memory is measured."""

    name: str
    shape: ModelShape
    spec: MemorySpec
    outside: EmbeddingPlan
    rows: tuple[Row, ...]
    shared: Shared
    parts: tuple[Part, ...]
    memory: Memory
    dense: Memory

    @property
    def total(self) -> Part:
        sums = (sum(getattr(part, name) for part in self.parts) for name in ("params", "bytes", "dense_bytes"))
        return Part("memory", *sums)

    @property
    def subtitle(self) -> str:
        """The model, and where its memory is measured."""
        shape, spec = self.shape, self.spec
        tokens = f"{spec.context:,} tokens" + (f" × {spec.batch}" if spec.batch > 1 else "")
        return f"{shape.words} · KV cache of {tokens} · {spec.dtype}"

    @property
    def headline(self) -> str:
        """Weights, cache and memory beside the dense model's."""
        shares = ("" if cost.share in (None, 1) else f" ({cost.share:.0%} of dense)" for cost in self.costs[:3])
        return " · ".join(f"{cost.words} {cost.value}{of}" for cost, of in zip(self.costs, shares, strict=False))

    @property
    def costs(self) -> tuple[Cost, ...]:
        pairs = ((words, getattr(self.memory, name), getattr(self.dense, name), form) for words, name, form in COSTS)
        return tuple(
            Cost(words, form(mine), form(dense), mine / dense if dense else None, mine) for words, mine, dense, form in pairs
        )

    @property
    def ends(self) -> tuple[str, str]:
        """What is before the first layer and what is after the last."""
        shape, rank = self.shape, self.outside.embedding_rank
        size = f"{shape.vocab_size:,} × {rank} × {shape.hidden_size}" if rank else f"{shape.vocab_size:,} × {shape.hidden_size}"
        steps = " + a vector a layer" if self.outside.step_embedding else ""
        head = "head = embedding" if self.outside.tie_word_embeddings else f"head {shape.vocab_size:,} × {shape.hidden_size}"
        return f"embedding {size}{steps}", head


def picture(shape: ModelShape, config: SharingConfig, spec: MemorySpec, name: str = "") -> Picture:
    """The picture of a config, called by `name` or its label. Raises UserError for another model's config."""
    plan, dense = config.resolve(shape), SharingConfig.dense(shape).resolve(shape)
    shared = _shared(plan)
    return Picture(
        name=name or label(config),
        shape=shape,
        spec=spec,
        outside=plan.outside,
        rows=tuple(_row(shape, plan, i, shared, spec) for i in range(len(plan.layers))),
        shared=shared,
        parts=_parts(shape, plan, dense, spec),
        memory=measure_plan(shape, plan, spec),
        dense=measure_plan(shape, dense, spec),
    )


# Bytes by part.


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
    return (*(part for part in weights if part.bytes or part.dense_bytes), Part(CACHE, 0, cached, dense_cached))


def _params(shape: ModelShape, plan: Plan) -> dict[str, int]:
    """Parameters by part, told by the names in the state dict."""
    signs = {"embed": "embedding", "lm_head": "head", "norm.weight": "norms", ".self_attn.": "attention", ".mlp.": "FFN"}
    counts = dict.fromkeys(PARTS[:-1], 0)
    for name, dims in weight_shapes(shape, plan).items():
        counts[next((part for sign, part in signs.items() if sign in name), "other")] += math.prod(dims)
    return counts


# The layers.


def _shared(plan: Plan) -> Shared:
    """The parts that another layer than their owner uses. A softmax map is its layer's q and k, a bank the matrix it is for."""
    used = ((part, owner, i) for i in range(len(plan.layers)) for part, owner in _uses(plan, i))
    return frozenset((part, owner) for part, owner, i in used if owner is not None and owner != i)


def _uses(plan: Plan, i: int) -> Iterator[tuple[str, int | None]]:
    layer = plan.layers[i]
    for slot, owner in zip(SLOTS, layer.owners, strict=True):
        yield _short(slot), owner
    for slot, factor in zip(MATRICES, layer.factors, strict=True):
        if factor is not None and layer.owner(slot) == i:
            yield _short(slot), factor.at
    if layer.owner(Q_PROJ) == i:
        yield from ((_short(slot), at) for at, _ in layer.heads for slot in ATTENTION)
    yield from (("q", layer.attn_map), ("k", layer.attn_map), ("K", layer.k), ("V", layer.v))


def _short(slot: str) -> str:
    """`q` for `self_attn.q_proj`, `gate` for `mlp.gate_proj`, `router`, `FFN norm`."""
    norms = dict(zip((ATTENTION_NORM, FFN_NORM), NORM_PARTS, strict=True))
    return norms.get(slot) or slot.rpartition(".")[2].removesuffix("_proj")


def _row(shape: ModelShape, plan: Plan, i: int, shared: Shared, spec: MemorySpec) -> Row:
    layer, size = plan.layers[i], DTYPE_BYTES[spec.dtype]
    cost, words = layer_cost(shape, i, layer, spec.context), _LayerWords(shape, plan, i, shared)
    return Row(
        layer=i,
        attention=tuple(words.attention()),
        ffn=tuple(words.ffn()),
        norms=(layer.owner(ATTENTION_NORM), layer.owner(FFN_NORM)),
        cache=words.cache(),
        reads=words.reads(),
        also=" · ".join((*words.also_attention(), *words.also_ffn())),
        weight_bytes=cost.params * size,
        kv_cache_bytes=cost.cached * size * spec.batch,
    )


class _LayerWords:
    """Describes one layer in segments and words."""

    def __init__(self, shape: ModelShape, plan: Plan, i: int, shared: Shared) -> None:
        self.shape, self.plan, self.i, self.shared = shape, plan, i, shared
        self.layer: LayerPlan = plan.layers[i]

    def attention(self) -> Iterator[Segment]:
        """Neighbouring projections of one origin are one segment; where heads are tied, a segment for each origin of heads."""
        names = tuple(map(_short, ATTENTION))
        if not self.layer.has_attention:
            yield Segment(names, "dropped", None, "dropped")
        elif not self.layer.heads or self.layer.owner(Q_PROJ) != self.i:
            yield from self._projections(ATTENTION)
        else:
            groups: dict[int, list[tuple[int, int]]] = {self.i: []}
            for here, (at, there) in enumerate(self.layer.heads):
                groups.setdefault(at, []).append((here, there))
            for at, heads in groups.items():
                count = f"{len(heads)} head" + "s" * (len(heads) > 1)
                detail, size = f"heads {_listed(here for here, _ in heads)}", len(heads) / len(self.layer.heads)
                if at == self.i:
                    yield Segment(names, "own", at, count, size, detail)
                else:
                    detail += f" are its heads {_listed(there for _, there in heads)}"
                    yield Segment(names, "tied", at, f"{count} = layer {at}", size, detail)

    def ffn(self) -> Iterator[Segment]:
        """The FFN, and its router beside it where that has another owner."""
        if not self.layer.has_ffn:
            yield Segment(tuple(map(_short, FFN)), "dropped", None, "dropped")
            return
        pieces, owner = list(self._projections(FFN)), self.layer.owner(ROUTER)
        router_how = "own" if owner == self.i else "tied"
        if self.layer.experts and len(pieces) == 1 and (pieces[0].how, pieces[0].owner) == (router_how, owner):
            whole = pieces[0]
            yield Segment((*whole.parts, "router"), whole.how, owner, whole.text)
            return
        yield from pieces
        if self.layer.experts:
            yield Segment(("router",), router_how, owner, "router" if owner == self.i else f"router = layer {owner}", 1.3)

    def _projections(self, slots: tuple[str, ...]) -> Iterator[Segment]:
        found = [(source, tuple(map(_short, group))) for source, group in groupby(slots, self._source)]
        for (how, owner, factor, _), names in found:
            text, detail = self._words(names, how, owner, factor, whole=len(found) == 1)
            yield Segment(names, how, owner, text, len(names), detail)

    def _source(self, slot: str) -> tuple[str, int | None, Factor | None, bool]:
        """Where a projection comes from: how, from which layer, of which bank, and whether other layers use it."""
        owner, factor = self.layer.owner(slot), self.layer.factors[MATRICES.index(slot)]
        if owner is None:
            source = self.layer.attn_map if slot in ATTENTION[:2] else None
            return ("none" if source is None else "map", source, None, False)
        if owner != self.i:
            return ("tied", owner, None, False)
        shared = (_short(slot), self.i) in self.shared
        return ("own" if factor is None or factor.at == self.i else "mixed", factor.at if factor else owner, factor, shared)

    def _words(self, names: tuple[str, ...], how: str, owner: int | None, factor: Factor | None, whole: bool) -> tuple[str, str]:
        """A segment's text and detail; the projections are named where they are not the `whole` block."""
        listed = _listed(names)
        if how == "tied":
            delta = self.layer.delta if corrected(self.i, self.layer) else 0
            text = f"{'' if whole else f'{listed} '}= layer {owner}{' + delta' if delta else ''}"
            return text, f"corrected by a delta of rank {delta}" if delta else ""
        if how == "map":
            return f"map = layer {owner}", ""
        if factor is None:
            own_ffn = names == tuple(map(_short, FFN))
            return "" if how == "none" else self._own_ffn() if own_ffn else listed, ""
        if factor.kind == "basis":
            kind, size, detail = "basis", f"basis {factor.size}", f"C B, B of rank {factor.size} kept at layer {factor.at}"
        else:
            atoms = f"a mix of atoms {_listed(factor.used)} of the {factor.size}"
            kind, size, detail = "mix", f"{factor.size} atoms", f"{atoms} kept at layer {factor.at}"
        if how == "mixed":
            return f"{'' if whole else f'{listed}: '}{kind} of layer {owner}", detail
        return f"{listed}: {size}", detail

    def _own_ffn(self) -> str:
        if self.layer.experts:
            return f"{self.layer.active_experts} of {self.layer.experts} experts"
        return "gate up down" if self.layer.width == self.shape.intermediate_size else f"width {self.layer.width:,}"

    def cache(self) -> tuple[Segment, ...]:
        """Whose keys and values are read, each as large as its share of the heads."""
        k, v = ((j, self._heads(name, j) / self.shape.num_key_value_heads) for name, j in self._sides())
        if k == v:
            return (Segment(("K", "V"), self._cache_how(k[0]), k[0], size=k[1]),)
        sides = (("K", *k), ("V", *v))
        return tuple(Segment((name,), self._cache_how(j), j, "" if j is None else name, size) for name, j, size in sides)

    def _sides(self) -> tuple[tuple[str, int | None], tuple[str, int | None]]:
        return ("K", self.layer.k), ("V", self.layer.v)

    def _cache_how(self, source: int | None) -> str:
        return "none" if source is None else "own" if source == self.i else "tied"

    def _heads(self, name: str, source: int | None) -> int:
        """The heads of keys or values that a layer makes; of a side that is not read, the shape's."""
        if source is None:
            return self.shape.num_key_value_heads
        return self.plan.layers[source].k_heads if name == "K" else self.plan.layers[source].v_heads

    def reads(self) -> str:
        """`12 heads`, `= layer 0`, `K = 0, V 12 heads`; `none` without attention."""
        k, v = self.layer.k, self.layer.v
        if v is None:
            return "none"
        if k == v != self.i:
            return f"= layer {v}"
        counts = [self._heads(name, j) for name, j in self._sides() if j == self.i]
        heads = f" head{'s' * (counts[-1] > 1)}" if counts else ""
        if len(counts) == 2:
            return f"{counts[0]}{heads}" if counts[0] == counts[1] else f"K {counts[0]}, V {counts[1]}{heads}"
        read = [(name, j) for name, j in self._sides() if j is not None]
        return ", ".join(f"{name} {counts[0]}{heads}" if j == self.i else f"{name} = {j}" for name, j in read)

    def also_attention(self) -> Iterator[str]:
        """What the boxes of attention and cache leave out, in few words each."""
        layer = self.layer
        if layer.window is not None and layer.attn_map is None:
            yield f"window {layer.window:,}"
        if layer.reads_later_layer(self.i):
            yield "earlier tokens"
        if layer.kv_input is not None:
            sides = _listed(name for name, j in self._sides() if j == self.i)
            yield f"{sides} from layer {layer.kv_input}'s output"
        if layer.value_residual:
            yield f"{100 * layer.value_residual:g}% of layer 0's V"

    def also_ffn(self) -> Iterator[str]:
        """Width and experts of an own FFN as far as its box has other words, atoms where not all are used, deltas."""
        layer = self.layer
        composed = any(layer.factors[len(ATTENTION) :])
        if layer.owner(GATE_PROJ) == self.i:
            if layer.experts and composed:
                yield self._own_ffn()
            if layer.width != self.shape.intermediate_size and (layer.experts or composed):
                yield f"width {layer.width:,}"
        groups: dict[tuple[int, ...], list[str]] = {}
        for slot, factor in zip(MATRICES, layer.factors, strict=True):
            if factor is not None and factor.kind == "dictionary" and layer.owner(slot) == self.i:
                groups.setdefault(factor.used if len(factor.used) < factor.size else (), []).append(_short(slot))
        for used, names in groups.items():
            if used:
                yield (f"{_listed(names)}: " if len(groups) > 1 else "") + f"atoms {_listed(used)}"
        if corrected(self.i, layer):
            yield f"delta of rank {layer.delta}"


def _listed(items: Iterable[object]) -> str:
    return " ".join(map(str, items))
