"""The primitives of sharing, and the configuration made of them.

Owns `PRIMITIVES`, the one table in which a primitive is defined (its rule, its inverse, where it may be chosen), and
`SharingConfig`, which is frozen, canonical and hashed. A config resolves to a `Plan`, and the plan compresses back to the one
canonical config: configs that compute the same thing are one config.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import UserError, did_you_mean, one_of
from .loading import Document, Strict, build, dump_yaml, parse_yaml, read_yaml
from .model import ATTENTION, ATTENTION_NORM, FFN, FFN_NORM, SLOTS, LayerPlan, Plan
from .shape import ModelShape, divisors

KV_SLOTS = ("self_attn.k_proj", "self_attn.v_proj")
NORMS = ("private", "tied")


@dataclass
class Draft:
    """A plan in the making: the layers below are finished, `current` is the one being decided."""

    shape: ModelShape
    norms: str = "private"
    layers: list[LayerPlan] = field(default_factory=list)
    current: LayerPlan = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    @property
    def index(self) -> int:
        """The layer being decided."""
        return len(self.layers)

    @staticmethod
    def after(shape: ModelShape, norms: str, layers: Sequence[LayerPlan]) -> Draft:
        """A draft whose first layers are finished."""
        return Draft(shape, norms, list(layers))

    def start(self) -> None:
        """Begin the next layer, as one that owns everything."""
        self.current = self.owning()

    def owning(self) -> LayerPlan:
        """The current layer's plan if it owns everything."""
        return LayerPlan((self.index,) * len(SLOTS), self.index, self.shape.num_key_value_heads)

    def finish(self) -> None:
        """Put the current layer down and begin the next."""
        self.layers.append(self.current)
        self.start()

    def copy(self) -> Draft:
        """An independent draft; the finished layers are frozen and shared."""
        other = Draft(self.shape, self.norms, list(self.layers))
        other.current = self.current
        return other

    def own_attention(self) -> bool:
        """Whether the current layer owns the projections of its attention."""
        return self.current.owner(ATTENTION[0]) == self.index

    def own_kv(self) -> bool:
        """Whether the current layer keeps its own keys and values."""
        return self.current.kv == self.index


@dataclass(frozen=True)
class Primitive:
    """One row of the zoo: how a choice at a layer is read, applied, recognised and searched.

    `apply(draft, value)` changes `draft.current` or raises UserError; `state(plan, i, shape)` is the value a finished plan has at
    layer i, None where it is what the rows above and the default already say; `is_open(draft)` says whether a search may ask for
    it at the draft's layer. `sources` tells a choice between layers from a choice between `options(shape)`.
    """

    name: str
    meaning: str
    paper: str
    apply: Callable[[Draft, Any], None]
    state: Callable[[Plan, int, ModelShape], Any]
    is_open: Callable[[Draft], bool]
    sources: bool
    options: Callable[[ModelShape], list[Any]] = lambda shape: []


def _earlier(draft: Draft, name: str, j: Any) -> None:
    if isinstance(j, bool) or not isinstance(j, int):
        raise UserError(f"{j!r} is not a layer", where=name, remedy="give the number of an earlier layer")
    if not 0 <= j <= draft.index:
        earlier = ("leave it out: layer 0 owns its parts", "use layer 0")
        remedy = earlier[draft.index] if draft.index < 2 else f"use an earlier layer, 0 to {draft.index - 1}"
        raise UserError(f"layer {draft.index} cannot use layer {j}", where=name, remedy=remedy)


def _take(draft: Draft, j: int, slots: Sequence[str]) -> None:
    """The slots of layer j's plan, as resolved there, for the current layer; of its own, if it is j."""
    theirs, mine = draft.layers[j] if j < draft.index else draft.owning(), draft.current
    pairs = zip(SLOTS, mine.owners, theirs.owners, strict=True)
    owners = tuple([their if slot in slots else own for slot, own, their in pairs])
    kv, kv_heads = mine.kv, mine.kv_heads
    if ATTENTION[0] in slots:
        kv, kv_heads = (theirs.kv if theirs.kv != j else draft.index), theirs.kv_heads
    draft.current = LayerPlan(owners, kv, kv_heads)


def _with_norm(draft: Draft, slots: Sequence[str], norm: str) -> tuple[str, ...]:
    return (*slots, norm) if draft.norms == "tied" else tuple(slots)


def _apply_attn(draft: Draft, j: Any) -> None:
    _earlier(draft, "attn", j)
    _take(draft, j, _with_norm(draft, ATTENTION, ATTENTION_NORM))


def _apply_ffn(draft: Draft, j: Any) -> None:
    _earlier(draft, "ffn", j)
    _take(draft, j, _with_norm(draft, FFN, FFN_NORM))


def _apply_tie(draft: Draft, j: Any) -> None:
    _earlier(draft, "tie", j)
    _apply_attn(draft, j)
    _apply_ffn(draft, j)


def _apply_kv(draft: Draft, j: Any) -> None:
    _earlier(draft, "kv", j)
    if j == draft.index:
        if draft.current.owner(KV_SLOTS[0]) is None:
            raise UserError(
                f"layer {j} is tied to a layer that has no k and v projections, so it cannot make its own KV",
                where="kv",
                remedy=f"leave kv out (it reads layer {draft.current.kv}'s) or tie to a layer that owns its KV",
            )
        return
    owner = draft.layers[j].kv
    if owner != j:
        raise UserError(f"layer {j} reads layer {owner}'s KV and owns none", where="kv", remedy=f"use {owner}")
    owners = [None if slot in KV_SLOTS else layer for slot, layer in zip(SLOTS, draft.current.owners, strict=True)]
    draft.current = LayerPlan(tuple(owners), j, draft.layers[j].kv_heads)


def _apply_kv_heads(draft: Draft, g: Any) -> None:
    full, name = draft.shape.num_key_value_heads, "kv_heads"
    if isinstance(g, bool) or not isinstance(g, int) or g < 1 or full % g:
        whole = f"num_attention_heads={draft.shape.num_attention_heads}"
        rule = f"{g} does not divide " + (whole if whole.endswith(f"={full}") else f"num_key_value_heads={full}")
        raise UserError(rule, where=name, remedy=f"use {one_of(divisors(full))}")
    if g == draft.current.kv_heads:
        return
    if not draft.own_kv() or not draft.own_attention():
        source = "KV" if not draft.own_kv() else "attention"
        raise UserError(
            f"layer {draft.index} uses another layer's {source}, which has {draft.current.kv_heads} KV heads",
            where=name,
            remedy="set kv_heads at the layer that owns it",
        )
    draft.current = LayerPlan(draft.current.owners, draft.current.kv, g)


def _root(plan: Plan, i: int, slot: str) -> int:
    owner = plan.layers[i].owner(slot)
    assert owner is not None, f"layer {i} has no {slot}"
    return owner


def _state_tie(plan: Plan, i: int, shape: ModelShape) -> int | None:
    attn, ffn = _root(plan, i, ATTENTION[0]), _root(plan, i, FFN[0])
    return attn if attn == ffn != i else None


def _state_attn(plan: Plan, i: int, shape: ModelShape) -> int | None:
    attn = _root(plan, i, ATTENTION[0])
    return attn if attn != i and _state_tie(plan, i, shape) is None else None


def _state_ffn(plan: Plan, i: int, shape: ModelShape) -> int | None:
    ffn = _root(plan, i, FFN[0])
    return ffn if ffn != i and _state_tie(plan, i, shape) is None else None


def _state_kv(plan: Plan, i: int, shape: ModelShape) -> int | None:
    attn, kv = _root(plan, i, ATTENTION[0]), plan.layers[i].kv
    inherited = plan.layers[attn].kv if attn != i and plan.layers[attn].kv != attn else i
    return kv if kv != inherited else None


def _state_kv_heads(plan: Plan, i: int, shape: ModelShape) -> int | None:
    layer = plan.layers[i]
    owned = layer.kv == i and layer.owner(ATTENTION[0]) == i
    return layer.kv_heads if owned and layer.kv_heads != shape.num_key_value_heads else None


PRIMITIVES: dict[str, Primitive] = {
    row.name: row
    for row in (
        Primitive(
            "tie",
            "attention and FFN are layer j's parameters; head counts and a KV source come with them",
            "1909.11942",
            _apply_tie,
            _state_tie,
            lambda draft: draft.index > 0,
            sources=True,
        ),
        Primitive(
            "attn",
            "the q, k, v and o projections are layer j's",
            "1909.11942",
            _apply_attn,
            _state_attn,
            lambda draft: draft.index > 0 and draft.own_attention(),
            sources=True,
        ),
        Primitive(
            "ffn",
            "the FFN is layer j's",
            "2402.16840",
            _apply_ffn,
            _state_ffn,
            lambda draft: draft.index > 0 and draft.current.owner(FFN[0]) == draft.index,
            sources=True,
        ),
        Primitive(
            "kv",
            "reads layer j's rotated keys and its values; owns no k, v projection and no cache",
            "2405.12981",
            _apply_kv,
            _state_kv,
            lambda draft: draft.index > 0,
            sources=True,
        ),
        Primitive(
            "kv_heads",
            "g key/value heads, each read by an equal group of query heads",
            "2305.13245",
            _apply_kv_heads,
            _state_kv_heads,
            lambda draft: draft.own_attention() and draft.own_kv(),
            sources=False,
            options=lambda shape: divisors(shape.num_key_value_heads)[::-1],
        ),
    )
}
"""Every primitive, in the order in which a layer's are applied. A new one is a row here, and nothing elsewhere."""


def ties_norms(layers: Sequence[LayerPlan]) -> bool:
    """Whether any layer uses another's norm: the one thing that `norms: tied` changes."""
    return any(layer.owner(norm) != i for i, layer in enumerate(layers) for norm in (ATTENTION_NORM, FFN_NORM))


def apply_layer(draft: Draft, choices: Mapping[str, Any]) -> None:
    """Decide the draft's current layer by `{primitive: value}` and finish it. Raises UserError naming the primitive."""
    for name in choices:
        if name not in PRIMITIVES:
            raise UserError("unknown primitive", where=str(name), remedy=did_you_mean(name, PRIMITIVES))
    for row in PRIMITIVES.values():
        if row.name in choices:
            row.apply(draft, choices[row.name])
    draft.finish()


@dataclass(frozen=True)
class SharingConfig:
    """What each layer shares, in canonical form: equal configs compute the same function of the same weights.

    Make one with `SharingConfig.make` (or `load`), which validates and canonicalises; the constructor trusts its arguments.
    `layers[i]` holds the primitives at layer i that say something; `norms` is `tied` only where that changes something.
    """

    layers: tuple[tuple[tuple[str, Any], ...], ...]
    norms: str = "private"

    @staticmethod
    def make(shape: ModelShape, layers: Sequence[Mapping[str, Any]], norms: str = "private") -> SharingConfig:
        """The canonical config of one `{primitive: value}` a layer, for a model of this shape. Raises UserError."""
        return SharingConfig.of_plan(shape, _resolve(shape, layers, norms))

    @staticmethod
    def of_plan(shape: ModelShape, plan: Plan) -> SharingConfig:
        """The canonical config that resolves to a plan."""
        layers = []
        for i in range(len(plan.layers)):
            states = ((row.name, row.state(plan, i, shape)) for row in PRIMITIVES.values())
            layers.append(tuple((name, value) for name, value in states if value is not None))
        return SharingConfig(tuple(layers), "tied" if ties_norms(plan.layers) else "private")

    def resolve(self, shape: ModelShape) -> Plan:
        """The plan that a `Decoder` of this shape runs. Raises UserError if the config is for another shape."""
        return _resolve(shape, [dict(layer) for layer in self.layers], self.norms)

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits of the canonical form's SHA-256: the config's name everywhere."""
        return hashlib.sha256(json.dumps(self.to_data(), sort_keys=True).encode()).hexdigest()[:12]

    def to_data(self) -> dict[str, Any]:
        """Plain data, the same that `to_yaml` writes: only layers that share something are named."""
        layers = {i: dict(layer) for i, layer in enumerate(self.layers) if layer}
        return {"num_hidden_layers": len(self.layers), "norms": self.norms, "layers": layers}

    def to_yaml(self) -> str:
        """The text of a `sharing.yaml`."""
        return dump_yaml(self.to_data())

    @staticmethod
    def from_data(shape: ModelShape, data: Mapping[str, Any], document: Document | None = None) -> SharingConfig:
        """The inverse of `to_data`; validates and canonicalises. Raises UserError with the line if it has a document."""
        raw = build(_SharingFile, document or Document(dict(data), "sharing"))
        document = document or Document(data, "sharing")
        if raw.num_hidden_layers != shape.num_hidden_layers:
            rule = f"{raw.num_hidden_layers} is not the model's {shape.num_hidden_layers}"
            raise UserError(rule, where=document.where(("num_hidden_layers",)), remedy="describe every layer of the model")
        for i in raw.layers:
            if not 0 <= i < raw.num_hidden_layers:
                remedy = f"use 0 to {raw.num_hidden_layers - 1}"
                raise UserError(f"there is no layer {i}", where=document.where(("layers", str(i))), remedy=remedy)
        layers = [raw.layers.get(i, {}) for i in range(raw.num_hidden_layers)]
        return SharingConfig.of_plan(shape, _resolve(shape, layers, raw.norms, document))

    @staticmethod
    def from_yaml(shape: ModelShape, text: str, name: str = "sharing.yaml") -> SharingConfig:
        """The config in YAML text."""
        document = parse_yaml(text, name)
        return SharingConfig.from_data(shape, document.data, document)

    @staticmethod
    def load(shape: ModelShape, path: Path) -> SharingConfig:
        """The config in a `sharing.yaml`."""
        document = read_yaml(path)
        return SharingConfig.from_data(shape, document.data, document)


@dataclass(frozen=True)
class _SharingFile(Strict):
    num_hidden_layers: int
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)
    norms: str = "private"


def _resolve(shape: ModelShape, layers: Sequence[Mapping[str, Any]], norms: str, document: Document | None = None) -> Plan:
    if norms not in NORMS:
        where = document.where(("norms",)) if document else "norms"
        raise UserError(f"{norms!r} is not a way to treat norms", where=where, remedy=f"use {one_of(NORMS)}")
    if len(layers) != shape.num_hidden_layers:
        rule = f"{len(layers)} layers for a model of num_hidden_layers={shape.num_hidden_layers}"
        raise UserError(rule, where="layers", remedy="describe every layer of the model")
    draft = Draft(shape, norms)
    for i, choices in enumerate(layers):
        try:
            apply_layer(draft, choices)
        except UserError as error:
            where = document.where(("layers", str(i), error.where)) if document else f"layers.{i}.{error.where}"
            raise UserError(error.rule, where=where, remedy=error.remedy) from None
    return Plan(tuple(draft.layers))
