"""Primitives that are decided once for the whole model: norms, embeddings, the output head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...errors import one_of
from ..builder import PlanBuilder
from ..plan import Shapes, outside_shapes
from ..shape import ModelShape
from .row import Primitive, refuse, whole_number

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
)
