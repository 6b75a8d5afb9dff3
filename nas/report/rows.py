"""A plan layer by layer for people: who owns each part, what it is made of, and the few words that say it.

Owns `Row` and `Segment`, and every word about a layer that the drawings and the terminal have in common. It draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from ..sharing.memory import MemorySpec, layer_cost
from ..sharing.plan import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    FFN_NORM,
    GATE_PROJ,
    MATRICES,
    Q_PROJ,
    ROUTER,
    SLOTS,
    Factor,
    LayerPlan,
    Plan,
    corrected,
)
from ..sharing.shape import DTYPE_BYTES, ModelShape

NORM_PARTS = ("attention norm", "FFN norm")
KEYS, VALUES = "K", "V"
_NORMS = dict(zip((ATTENTION_NORM, FFN_NORM), NORM_PARTS, strict=True))
_BANKS = {"dictionary": "mix", "basis": "basis"}

Lent = frozenset[tuple[str, int]]
"""The parts that other layers use too, each with the layer that keeps it."""


@dataclass(frozen=True)
class Segment:
    """A piece of a block: the `parts` it is for, the layer that keeps them (None: nobody), and the words inside, longest first.

    `how` is `own`, `tied` (another layer's weights, or its keys or values), `mixed` (own coefficients of another layer's bank),
    `map` (another layer's softmax map), `none` or `dropped`. `size` is its part of the block; `detail` says more than fits.
    """

    parts: tuple[str, ...]
    how: str
    owner: int | None
    texts: tuple[str, ...] = ()
    size: float = 1.0
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One layer: the segments of its blocks and of its cache, the owners of its norms, and the bytes that are its own.

    `cache` is keys and values in one where they are alike, else two segments, each as large as its share of all heads;
    `reads` says it in words. `also` holds what no box shows: windows, ranks and the like.
    """

    layer: int
    attention: tuple[Segment, ...]
    ffn: tuple[Segment, ...]
    norms: tuple[int | None, int | None]
    cache: tuple[Segment, ...]
    reads: str
    also: tuple[str, ...]
    weight_bytes: int
    kv_cache_bytes: int


def rows_of(shape: ModelShape, plan: Plan, spec: MemorySpec) -> tuple[Row, ...]:
    """A row for each layer of a plan."""
    lent = lent_parts(plan)
    return tuple(_row(shape, plan, i, lent, spec) for i in range(len(plan.layers)))


def lent_parts(plan: Plan) -> Lent:
    """The parts that another layer than their keeper uses. A softmax map is its layer's q and k, a bank the matrix it is for."""
    used = ((part, owner, i) for i in range(len(plan.layers)) for part, owner in _uses(plan, i))
    return frozenset((part, owner) for part, owner, i in used if owner is not None and owner != i)


def _uses(plan: Plan, i: int) -> Iterator[tuple[str, int | None]]:
    layer = plan.layers[i]
    for slot, owner in zip(SLOTS, layer.owners, strict=True):
        yield short(slot), owner
    for slot, factor in zip(MATRICES, layer.factors, strict=True):
        if factor is not None and layer.owner(slot) == i:
            yield short(slot), factor.at
    if layer.owner(Q_PROJ) == i:
        yield from ((short(slot), at) for at, _ in layer.heads for slot in ATTENTION)
    yield from (("q", layer.attn_map), ("k", layer.attn_map), (KEYS, layer.k), (VALUES, layer.v))


def short(slot: str) -> str:
    """`q` for `self_attn.q_proj`, `gate` for `mlp.gate_proj`, `router`, `FFN norm`."""
    return _NORMS.get(slot) or slot.rpartition(".")[2].removesuffix("_proj")


def _row(shape: ModelShape, plan: Plan, i: int, lent: Lent, spec: MemorySpec) -> Row:
    layer, size = plan.layers[i], DTYPE_BYTES[spec.dtype]
    cost = layer_cost(shape, i, layer, spec.context)
    said = _Words(shape, plan, i, lent)
    return Row(
        layer=i,
        attention=said.attention(),
        ffn=said.ffn(),
        norms=(layer.owner(ATTENTION_NORM), layer.owner(FFN_NORM)),
        cache=said.cache(),
        reads=said.reads(),
        also=tuple(said.also()),
        weight_bytes=cost.params * size,
        kv_cache_bytes=cost.cached * size * spec.batch,
    )


class _Words:
    """One layer, put into segments and words."""

    def __init__(self, shape: ModelShape, plan: Plan, i: int, lent: Lent) -> None:
        self.shape, self.plan, self.i, self.lent = shape, plan, i, lent
        self.layer: LayerPlan = plan.layers[i]

    def attention(self) -> tuple[Segment, ...]:
        """Neighbouring projections that come from the same place in the same way are one segment; tied heads are told apart."""
        names = tuple(map(short, ATTENTION))
        if not self.layer.has_attention:
            return (Segment(names, "dropped", None, ("dropped",), len(names)),)
        if self.layer.heads and self.layer.owner(Q_PROJ) == self.i:
            return tuple(self._heads(names))
        return tuple(self._pieces(ATTENTION))

    def ffn(self) -> tuple[Segment, ...]:
        """The FFN, and its router beside it where that is kept elsewhere."""
        names = tuple(map(short, FFN))
        if not self.layer.has_ffn:
            return (Segment(names, "dropped", None, ("dropped",), len(names)),)
        pieces = list(self._pieces(FFN))
        if not self.layer.experts:
            return tuple(pieces)
        router, owner = short(ROUTER), self.layer.owner(ROUTER)
        if len(pieces) == 1 and (pieces[0].how, pieces[0].owner) == (self._how(ROUTER), owner):
            whole = pieces[0]
            return (Segment((*whole.parts, router), whole.how, owner, whole.texts, whole.size),)
        texts = ("router", "r") if owner == self.i else (f"router = layer {owner}", f"= {owner}")
        return (*pieces, Segment((router,), self._how(ROUTER), owner, texts, 1.3))

    def _how(self, slot: str) -> str:
        return "own" if self.layer.owner(slot) == self.i else "tied"

    def _pieces(self, slots: tuple[str, ...]) -> Iterator[Segment]:
        found = [(source, tuple(map(short, group))) for source, group in groupby(slots, self._source)]
        for (how, owner, factor, _), names in found:
            texts = tuple(self._texts(names, how, owner, factor, whole=len(found) == 1))
            yield Segment(names, how, owner, texts, len(names), self._detail(how, factor))

    def _source(self, slot: str) -> tuple[str, int | None, Factor | None, bool]:
        """Where a projection comes from: how, from which layer, of which bank, and whether others use it too."""
        owner, factor = self.layer.owner(slot), self.layer.factors[MATRICES.index(slot)]
        if owner is None:
            j = self.layer.attn_map if slot in ATTENTION[:2] else None
            return ("none" if j is None else "map", j, None, False)
        if owner != self.i:
            return ("tied", owner, None, False)
        lent = (short(slot), self.i) in self.lent
        return ("own" if factor is None or factor.at == self.i else "mixed", factor.at if factor else owner, factor, lent)

    def _texts(self, names: tuple[str, ...], how: str, owner: int | None, factor: Factor | None, whole: bool) -> Iterator[str]:
        listed = " ".join(names)
        if how == "tied":
            plus = " + delta" if corrected(self.i, self.layer) else ""
            names_too = [] if whole else [f"{listed} = layer {owner}{plus}"]
            yield from (*names_too, f"= layer {owner}{plus}", f"= {owner}{plus[:2]}", f"= {owner}")
        elif how == "map":
            yield from (f"map = layer {owner}", f"map = {owner}", f"= {owner}")
        elif how == "mixed" and factor is not None:
            words = _BANKS[factor.kind]
            names_too = [] if whole else [f"{listed}: {words} of layer {owner}"]
            yield from (*names_too, f"{words} of layer {owner}", f"{words} of {owner}", f"of {owner}")
        elif how == "own" and factor is not None:
            words = f"{factor.size} atoms" if factor.kind == "dictionary" else f"basis {factor.size}"
            yield from (f"{listed}: {words}", words, listed)
        elif how == "own":
            yield self._own_ffn() if names == tuple(map(short, FFN)) else listed

    def _own_ffn(self) -> str:
        if self.layer.experts:
            return f"{self.layer.active_experts} of {self.layer.experts} experts"
        return "gate up down" if self._usual_width else f"width {self.layer.width:,}"

    @property
    def _usual_width(self) -> bool:
        return self.layer.width == self.shape.intermediate_size

    def _detail(self, how: str, factor: Factor | None) -> str:
        if factor is None:
            return f"corrected by a delta of rank {self.layer.delta}" if how == "tied" and self.layer.delta else ""
        if factor.kind == "basis":
            return f"C B, B of rank {factor.size} kept at layer {factor.at}"
        return f"a mix of atoms {_listed(factor.used)} of the {factor.size} kept at layer {factor.at}"

    def _heads(self, names: tuple[str, ...]) -> Iterator[Segment]:
        """Own heads first, then those of each other layer."""
        groups: dict[int, list[tuple[int, int]]] = {self.i: []}
        for here, (at, there) in enumerate(self.layer.heads):
            groups.setdefault(at, []).append((here, there))
        for at, heads in groups.items():
            words = f"{len(heads)} head" + "s" * (len(heads) > 1)
            own, mine = at == self.i, _listed(here for here, _ in heads)
            texts = (words, str(len(heads))) if own else (f"{words} = layer {at}", f"{len(heads)} = {at}", f"= {at}")
            detail = f"heads {mine}" if own else f"heads {mine} are its heads {_listed(there for _, there in heads)}"
            yield Segment(names, "own" if own else "tied", at, texts, len(names) * len(heads) / len(self.layer.heads), detail)

    def cache(self) -> tuple[Segment, ...]:
        """Whose keys and values are read, each as large as its share of the heads."""
        keys, values = self._side(KEYS, self.layer.k), self._side(VALUES, self.layer.v)
        if (keys.how, keys.owner, keys.size) == (values.how, values.owner, values.size):
            return (Segment((KEYS, VALUES), keys.how, keys.owner, size=keys.size),)
        return keys, values

    def _side(self, name: str, j: int | None) -> Segment:
        if j is None:
            return Segment((name,), "none", None)
        return Segment((name,), "own" if j == self.i else "tied", j, size=self._count(name) / self.shape.num_key_value_heads)

    def _count(self, name: str) -> int:
        j = self.layer.k if name == KEYS else self.layer.v
        layer = self.plan.layers[self.i if j is None else j]
        return layer.k_heads if name == KEYS else layer.v_heads

    def reads(self) -> str:
        """`12 heads`, `= layer 0`, `K = 0, V 12 heads`; `none` without attention."""
        k, v = self.layer.k, self.layer.v
        if v is None:
            return "none"
        if k == v != self.i:
            return f"= layer {v}"
        counts = [self._count(name) for name, j in ((KEYS, k), (VALUES, v)) if j == self.i]
        heads = f" head{'s' * (counts[-1] > 1)}" if counts else ""
        if len(counts) == 2:
            return f"{counts[0]}{heads}" if counts[0] == counts[1] else f"K {counts[0]}, V {counts[1]}{heads}"
        told = [(name, j) for name, j in ((KEYS, k), (VALUES, v)) if j is not None]
        return ", ".join(f"{name} {counts[0]}{heads}" if j == self.i else f"{name} = {j}" for name, j in told)

    def also(self) -> Iterator[str]:
        """What the boxes leave out, in few words each."""
        layer = self.layer
        if layer.window is not None and layer.attn_map is None:
            yield f"window {layer.window:,}"
        if layer.reads_later_layer(self.i):
            yield "earlier tokens"
        if layer.kv_input is not None:
            sides = " ".join(name for name, j in ((KEYS, layer.k), (VALUES, layer.v)) if j == self.i)
            yield f"{sides} from layer {layer.kv_input}'s output"
        if layer.value_residual:
            yield f"{100 * layer.value_residual:g}% of layer 0's V"
        yield from self._also_ffn()
        yield from self._also_atoms()
        if corrected(self.i, layer):
            yield f"delta of rank {layer.delta}"

    def _also_ffn(self) -> Iterator[str]:
        """Width and experts of an own FFN, as far as its box has other words."""
        layer = self.layer
        if layer.owner(GATE_PROJ) != self.i:
            return
        composed = any(layer.factors[len(ATTENTION) :])
        if layer.experts and composed:
            yield self._own_ffn()
        if not self._usual_width and (layer.experts or composed):
            yield f"width {layer.width:,}"

    def _also_atoms(self) -> Iterator[str]:
        """Which atoms of a dictionary are used, where not all are."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for slot, factor in zip(MATRICES, self.layer.factors, strict=True):
            if factor is not None and factor.kind == "dictionary" and self.layer.owner(slot) == self.i:
                groups.setdefault(factor.used if len(factor.used) < factor.size else (), []).append(short(slot))
        for used, names in groups.items():
            if used:
                yield (f"{' '.join(names)}: " if len(groups) > 1 else "") + f"atoms {_listed(used)}"


def _listed(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


def spaced(row: Row) -> str:
    """What a row has beside its boxes, in one line."""
    return " · ".join(row.also)
