"""Primitives that say whose weights are used: the whole model's norms, embeddings and head; layers, attention, projections and
FFNs that are tied, and parts that are dropped.

`window` comes before those that read another layer's keys, so that they can be checked against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...errors import one_of
from ..builder import PlanBuilder
from ..plan import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    FFN_NORM,
    K_PROJ,
    O_PROJ,
    Q_PROJ,
    ROUTER,
    V_PROJ,
    LayerPlan,
    Shapes,
    outside_shapes,
)
from ..shape import ModelShape
from .row import ATTENTION_ENTRIES, FFN_ENTRIES, OWN, Primitive, owner_of, refuse, source_layer, whole_number

# --- the whole model

NORMS = ("private", "tied")


def _apply_norms(builder: PlanBuilder, value: Any) -> None:
    if value not in NORMS:
        raise refuse("norms", f"{value!r} is not a way to treat norms", f"use {one_of(NORMS)}")
    builder.model_options = replace(builder.model_options, norms=value)


def _apply_embedding_rank(builder: PlanBuilder, r: Any) -> None:
    if whole_number("embedding_rank", r, 0) >= builder.shape.hidden_size:
        message = f"{r} is not less than hidden_size={builder.shape.hidden_size}"
        raise refuse("embedding_rank", message, "leave it out: tokens are embedded at full width")
    builder.model_options = replace(builder.model_options, outside=replace(builder.model_options.outside, embedding_rank=r))


def _outside_flag(name: str) -> Callable[[PlanBuilder, Any], None]:
    def apply(builder: PlanBuilder, value: Any) -> None:
        if not isinstance(value, bool):
            raise refuse(name, f"{value!r} is neither true nor false", "use true or false")
        builder.model_options = replace(builder.model_options, outside=replace(builder.model_options.outside, **{name: value}))

    return apply


def _outside_parameters(name: str) -> Callable[[ModelShape, int, Any], Shapes]:
    """The weights outside the layers for one value; a factorised embedding is kept beside the full one."""

    def bank(shape: ModelShape, i: int, value: Any) -> Shapes:
        outside = replace(PlanBuilder(shape).model_options.outside, **{name: value})
        for weight, size in outside_shapes(shape, outside).items():
            yield (FACTORED if weight == "embed_tokens.weight" and outside.embedding_rank else weight), size

    return bank


FACTORED = "embed_factored.weight"  # the supernet's name for the embedding of fewer columns


# --- layers


def _apply_window(builder: PlanBuilder, w: Any) -> None:
    longest = builder.shape.max_position_embeddings
    if whole_number("window", w, 1) >= longest:
        raise refuse("window", f"{w} is not shorter than max_position_embeddings={longest}", "leave it out: attention is full")
    if w != builder.current.window:
        builder.change(window=w)


def _apply_attn(builder: PlanBuilder, j: Any, name: str = "attn") -> None:
    j = source_layer(builder, name, j)
    theirs, own = builder.plan_of(j), builder.index
    if own in (theirs.k, theirs.v) and j != own:
        message = f"layer {j} reads the keys and values of layer {own}, which would read itself"
        raise refuse(name, message, f"let layer {own} own its attention")
    if builder.current.window is not None and (
        theirs.attn_map is not None or theirs.reads_later_layer(j) or not theirs.has_attention
    ):
        raise refuse(name, f"layer {j} has no softmax map of its own to put a window on", "leave the window out")
    builder.copy_from(j, ATTENTION)
    builder.change(
        k=theirs.k if theirs.k != j else own,
        v=theirs.v if theirs.v != j else own,
        k_heads=theirs.k_heads,
        v_heads=theirs.v_heads,
        attn_map=theirs.attn_map,
        heads=theirs.heads,
        window=builder.current.window if theirs.attn_map is None else theirs.window,
    )
    builder.set_owners((ATTENTION_NORM,), own if theirs.has_attention else None)
    builder.check_reading(name)


def _apply_ffn(builder: PlanBuilder, j: Any, name: str = "ffn") -> None:
    j = source_layer(builder, name, j)
    theirs = builder.plan_of(j)
    builder.copy_from(j, FFN)
    builder.change(width=theirs.width, experts=theirs.experts, active_experts=theirs.active_experts)
    builder.set_owners((ROUTER,), builder.index if theirs.experts else None)
    builder.set_owners((FFN_NORM,), builder.index if theirs.has_ffn else None)


def _apply_tie(builder: PlanBuilder, j: Any) -> None:
    _apply_attn(builder, j, "tie")
    _apply_ffn(builder, j, "tie")


def _one_matrix(name: str, slot: str, heads: str) -> Callable[[PlanBuilder, Any], None]:
    """`apply` of `q`, `k`, `v` or `o`; `heads` is the field of the plan that comes with the projection."""

    def apply(builder: PlanBuilder, j: Any) -> None:
        theirs, mine = builder.plan_of(source_layer(builder, name, j)), builder.current
        if theirs.owner(slot) == mine.owner(slot) is not None:
            return
        for layer, plan in ((j, theirs), (builder.index, mine)):
            if plan.owner(slot) is None:
                raise refuse(name, f"layer {layer} uses no {name} projection", "leave it out")
            if plan.heads:
                raise refuse(name, f"layer {layer} ties single heads", f"tie the whole attention, attn: {j}")
        builder.copy_from(j, (slot,))
        if heads:
            builder.change(**{heads: getattr(theirs, heads)})

    return apply


DROPS = {"attn": (True, False), "ffn": (False, True), "both": (True, True)}


def _apply_drop(builder: PlanBuilder, part: Any) -> None:
    if not isinstance(part, str) or part not in DROPS:
        raise refuse("drop", f"{part!r} is not a part of a layer", f"use {one_of(DROPS)}")
    attn, ffn = DROPS[part]
    if attn and builder.current.has_attention:
        if builder.current.window is not None:
            raise refuse("drop", "a layer without attention has no window", "leave the window out")
        builder.set_owners((*ATTENTION, ATTENTION_NORM), None)
        builder.change(k=None, v=None, k_heads=0, v_heads=0, attn_map=None, window=None, heads=())
    if ffn and builder.current.has_ffn:
        builder.set_owners((*FFN, FFN_NORM, ROUTER), None)
        builder.change(width=0, experts=0, active_experts=0)


def _read_drop(layer: LayerPlan, builder: PlanBuilder) -> str | None:
    return next((part for part, lost in DROPS.items() if lost == (not layer.has_attention, not layer.has_ffn)), None)


def _read_tie(layer: LayerPlan, builder: PlanBuilder) -> int | None:
    attn = layer.source_of(ATTENTION)
    return attn if attn == layer.source_of(FFN) else None


# fmt: off
ROWS: tuple[Primitive, ...] = (
    Primitive("norms",
              "whether a layer whose whole attention, or FFN, is another's keeps its own norm there (private) or not (tied)",
              "1909.11942", _apply_norms, options=lambda shape: list(NORMS), per_model=True,
              from_options=lambda whole: whole.norms, short="{}norms"),
    Primitive("embedding_rank", "tokens are embedded in r numbers and projected to the hidden size; 0 embeds them whole",
              "1909.11942", _apply_embedding_rank, options=lambda shape: [0, shape.hidden_size // 2, shape.hidden_size // 4],
              per_model=True, from_options=lambda whole: whole.outside.embedding_rank,
              supernet_parameters=_outside_parameters("embedding_rank"), short="emb{}"),
    Primitive("tie_word_embeddings", "whether the output head is the embedding", "1608.05859",
              _outside_flag("tie_word_embeddings"),
              options=lambda shape: [shape.tie_word_embeddings, not shape.tie_word_embeddings], per_model=True,
              from_options=lambda whole: whole.outside.tie_word_embeddings,
              supernet_parameters=_outside_parameters("tie_word_embeddings"), short="tiedhead"),
    Primitive("step_embedding", "a learned vector is added before each layer, which tells a looped block its iteration",
              "1807.03819", _outside_flag("step_embedding"), options=lambda shape: [False, True], per_model=True,
              from_options=lambda whole: whole.outside.step_embedding, supernet_parameters=_outside_parameters("step_embedding"),
              short="steps"),
    Primitive("window", "attends to the w latest tokens", "2004.05150", _apply_window,
              lambda layer, builder: layer.window if layer.attn_map is None else None,
              options=lambda shape: [
                  OWN, *(shape.max_position_embeddings // n for n in (4, 8) if shape.max_position_embeddings >= n),
              ],
              writes="window", short="win{}"),
    Primitive("tie", "attention and FFN are layer j's parameters; head counts and a KV source come with them", "1909.11942",
              _apply_tie, _read_tie, sources=True, writes=f"{ATTENTION_ENTRIES} {FFN_ENTRIES}"),
    Primitive("attn", "the q, k, v and o projections are layer j's", "1909.11942", _apply_attn,
              lambda layer, builder: layer.source_of(ATTENTION),
              lambda builder: builder.owns(*ATTENTION), sources=True, writes=ATTENTION_ENTRIES),
    *(
        Primitive(name, f"the {name} projection is layer j's", "", _one_matrix(name, slot, heads), owner_of(slot),
                  lambda builder, slot=slot: builder.owns(slot),  # type: ignore[misc]
                  writes=f"{name} {heads} factors", sources=True)
        for name, slot, heads in (("q", Q_PROJ, ""), ("k", K_PROJ, "k_heads"), ("v", V_PROJ, "v_heads"), ("o", O_PROJ, ""))
    ),
    Primitive("ffn", "the FFN is layer j's; if it has experts, the router stays the layer's own", "2402.16840", _apply_ffn,
              lambda layer, builder: layer.source_of(FFN), lambda builder: builder.owns(*FFN), sources=True,
              writes=FFN_ENTRIES),
    Primitive("drop", "attention, FFN or both are not run", "2407.00928", _apply_drop, _read_drop,
              lambda builder: builder.owns(*ATTENTION) and builder.owns(*FFN), options=lambda shape: [OWN, *DROPS],
              writes=" -".join(("factors", *ATTENTION_ENTRIES.split()[:-1], *FFN_ENTRIES.split()[:-1]))),
)
