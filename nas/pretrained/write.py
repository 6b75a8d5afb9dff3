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
from ..model.decoder import Decoder, is_norm
from ..model.supernet import dense_plan
from ..sharing.plan import FFN, FFN_NORM, HEAD_NORMS, K_PROJ, MATRICES, V_PROJ, LayerPlan, Plan, projection, weight_shapes
from ..sharing.shape import ModelShape
from .families import FAMILIES, Family
from .read import HEAD, their_name

WRITE_HF = "use the format hf, which writes any model"


def family_of(shape: ModelShape) -> Family:
    """The first family that has models of this shape. Raises UserError if none has."""
    for family in FAMILIES.values():
        if family.fits(shape):
            return family
    features = ("attention_bias", "qk_norm", "embedding_multiplier", "hidden_act")
    said = ", ".join(f"{name}={getattr(shape, name)}" for name in features)
    raise UserError(f"no plain decoder that is known here has layers of {said}", hint=WRITE_HF)


def tensors_of(family: Family, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A dense decoder's weights by the family's names, and as it stores them."""
    return {their_name(name): _as_stored(family, name, weight) for name, weight in weights.items()}


def _as_stored(family: Family, name: str, weight: Tensor) -> Tensor:
    offset = family.norm_offset if is_norm(name) else 0.0
    return (weight.float() - offset).to(weight.dtype) if offset else weight


def require_plain(plan: Plan) -> None:
    """Raise UserError, naming the layer and the primitive, unless a plain decoder can compute what the plan does."""
    if plan.outside.step_embedding:
        raise UserError("step_embedding: a plain decoder adds no vector before each layer", hint=WRITE_HF)
    for i, layer in enumerate(plan.layers):
        for primitive, message in _beyond(i, layer):
            raise UserError(f"layer {i}: {primitive}: a plain decoder's {message}", hint=WRITE_HF)


def _beyond(i: int, layer: LayerPlan) -> Iterator[tuple[str, str]]:
    """What of a layer cannot be written out: the primitive, and what a plain decoder's layer does instead."""
    if layer.attn_map is not None:
        yield "attn_map", "layers make softmax maps of their own"
    if layer.k == layer.v != i and layer.has_attention:
        yield "kv", "layers attend to keys and values of their own"
    elif layer.k not in (None, i):
        yield "k_from", "layers attend to keys of their own"
    elif layer.v not in (None, i):
        yield "v_from", "layers attend to values of their own"
    if layer.kv_input is not None:
        yield "kv_input", "keys and values are made of the layer's own input"
    if layer.value_residual:
        yield "value_residual", "values are the layer's alone"
    if layer.window is not None:
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
    require_plain(plan)
    model = Decoder(shape, plan)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    plain, layers = written_shape(shape, plan), _kept(plan)
    found = {"embed_tokens.weight": _embedding(model), "norm.weight": model.norm.weight}
    found |= {} if plain.tie_word_embeddings else {HEAD: model.lm_head.weight}
    for name, size in weight_shapes(plain, dense_plan(plain)).items():
        if name not in found:
            _, n, slot = name.removesuffix(".weight").split(".", 2)
            found[name] = _filled(_layer_weight(model, layers[int(n)], slot, plain), slot, size)
    dtype = next(iter(weights.values())).dtype
    return plain, {name: weight.to(dtype).contiguous() for name, weight in found.items()}


def written_shape(shape: ModelShape, plan: Plan) -> ModelShape:
    """The shape of the plain decoder that computes what a plan does."""
    return replace(
        shape,
        num_hidden_layers=len(_kept(plan)),
        num_key_value_heads=math.lcm(*(count for layer in plan.layers for count in (layer.k_heads, layer.v_heads) if count)),
        intermediate_size=max((layer.width for layer in plan.layers if layer.has_ffn), default=shape.intermediate_size),
        tie_word_embeddings=plan.outside.tie_word_embeddings,
    )


def _kept(plan: Plan) -> list[int]:
    """The layers that do something; one at least."""
    return [i for i, layer in enumerate(plan.layers) if layer.has_attention or layer.has_ffn] or [0]


def _embedding(model: Decoder) -> Tensor:
    embedding = model.embed_tokens.weight
    return embedding @ model.embed_projection.weight.T if model.plan.outside.embedding_rank else embedding


def _layer_weight(model: Decoder, i: int, name: str, plain: ModelShape) -> Tensor | None:
    """Layer i's weight of that name in a plain decoder, its heads repeated; None where the layer has no such part."""
    layer, slot = model.plan.layers[i], projection(name)
    if not (layer.has_ffn if slot in (*FFN, FFN_NORM) else layer.has_attention):
        return None
    if name in HEAD_NORMS:
        return model.head_norm(i, slot).weight
    if slot not in MATRICES:
        return model.part(i, slot).weight
    weight = model.matrix(i, slot) if name == slot else model.bias(i, slot)
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
