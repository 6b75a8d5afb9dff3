"""A model that shares, written out as the plain decoder that computes the same, and named as its family names it.

Owns which sharing can be written out: weights can, once for each layer that uses them; what layers read of one another's
activations cannot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import UserError
from ..model import Decoder, is_norm
from ..plan import FFN, FFN_NORM, K_PROJ, MATRICES, V_PROJ, LayerPlan, Plan, weight_shapes
from ..shape import ModelShape
from ..supernet import dense_plan
from .families import FAMILIES, Family
from .read import HEAD, shifted, their_name

WRITE_HF = "use the format hf, which writes any model"


def family_of(shape: ModelShape) -> Family:
    """The first family that has models of this shape. Raises UserError if none has."""
    for family in FAMILIES.values():
        if family.fits(shape):
            return family
    said = [
        name for name, off in (("attention_bias", False), ("qk_norm", False), ("embedding_multiplier", 1.0))
        if getattr(shape, name) != off
    ]  # fmt: skip
    values = " and ".join(f"{name}={getattr(shape, name):g}" for name in said)
    raise UserError(f"no family that is written has layers of {values}", remedy=WRITE_HF)


def tensors_of(family: Family, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A dense decoder's weights by the family's names, and as it stores them."""
    return {their_name(name): shifted(name, weight, -family.norm_offset) for name, weight in weights.items()}


def require_plain(shape: ModelShape, plan: Plan) -> None:
    """Raise UserError, naming the layer and the primitive, unless a plain decoder can compute what the plan does."""
    if plan.outside.step_embedding:
        raise UserError("step_embedding: a plain decoder adds no vector before each layer", remedy=WRITE_HF)
    for i, layer in enumerate(plan.layers):
        for primitive, rule in _beyond(shape, i, layer):
            raise UserError(f"layer {i}: {primitive}: a plain decoder's {rule}", remedy=WRITE_HF)


def _beyond(shape: ModelShape, i: int, layer: LayerPlan) -> Iterator[tuple[str, str]]:
    """What of a layer cannot be written out: the primitive, and what a plain decoder's layer does instead."""
    if layer.attn_map is not None:
        yield "attn_map", "layers make softmax maps of their own"
    if layer.k == layer.v != i and layer.attends:
        yield "kv", "layers attend to keys and values of their own"
    elif layer.k not in (None, i):
        yield "k_from", "layers attend to keys of their own"
    elif layer.v not in (None, i):
        yield "v_from", "layers attend to values of their own"
    if layer.kv_input is not None:
        yield "kv_input", "keys and values are made of the layer's own input"
    if layer.value_residual:
        yield "value_residual", "values are the layer's alone"
    if layer.window is not None and layer.window < shape.max_position_embeddings:
        yield "window", "layers see all tokens"
    if layer.experts:
        yield "experts", "FFN runs whole"


@torch.no_grad()
def written_out(shape: ModelShape, plan: Plan, weights: Mapping[str, Tensor]) -> tuple[ModelShape, dict[str, Tensor]]:
    """The plain decoder that computes what a plan does: its shape, and its weights in the dtype that those given have.

    Shared weights are there once for each layer that uses them, composed ones multiplied out (in float32). Keys and values have
    as many heads as the heads of all layers divide, each repeated; FFNs are as wide as the widest, filled up with zeros, and a
    part that is dropped is zeros; a layer without either is left out. Raises UserError if there is no such decoder.
    """
    require_plain(shape, plan)
    model = Decoder(shape, plan)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    layers = [i for i, layer in enumerate(plan.layers) if layer.attends or layer.feeds] or [0]
    plain = replace(
        shape,
        num_hidden_layers=len(layers),
        num_key_value_heads=math.lcm(*(count for layer in plan.layers for count in (layer.k_heads, layer.v_heads) if count)),
        intermediate_size=max((layer.width for layer in plan.layers if layer.feeds), default=shape.intermediate_size),
        tie_word_embeddings=plan.outside.tie_word_embeddings,
    )
    found = {"embed_tokens.weight": _embedding(model), "norm.weight": model.norm.weight}
    found |= {} if plain.tie_word_embeddings else {HEAD: model.lm_head.weight}
    for name, size in weight_shapes(plain, dense_plan(plain)).items():
        if name not in found:
            _, n, slot = name.removesuffix(".weight").split(".", 2)
            found[name] = _filled(_layer_weight(model, layers[int(n)], slot, plain), slot, size)
    dtype = next(iter(weights.values())).dtype
    return plain, {name: weight.to(dtype).contiguous() for name, weight in found.items()}


def _embedding(model: Decoder) -> Tensor:
    embedding = model.embed_tokens.weight
    return embedding @ model.embed_projection.weight.T if model.plan.outside.embedding_rank else embedding


def _layer_weight(model: Decoder, i: int, slot: str, plain: ModelShape) -> Tensor | None:
    """What layer i multiplies with in a slot, its heads repeated; None where it has no such part."""
    layer = model.plan.layers[i]
    if not (layer.feeds if slot in (*FFN, FFN_NORM) else layer.attends):
        return None
    if slot not in MATRICES:
        return model.part(i, slot).weight
    weight = model._matrix(i, slot)
    if slot not in (K_PROJ, V_PROJ):
        return weight
    heads = weight.unflatten(0, (-1, plain.head_dim))
    return heads.repeat_interleave(plain.num_key_value_heads // len(heads), 0).flatten(0, 1)


def _filled(weight: Tensor | None, slot: str, size: tuple[int, ...]) -> Tensor:
    """A weight of the wanted size: the one given and zeros beyond it, or what is as good as no part at all."""
    if weight is None:
        return torch.ones(size) if is_norm(f"{slot}.weight") else torch.zeros(size)
    full = weight.new_zeros(size)
    full[tuple(map(slice, weight.shape))] = weight
    return full
