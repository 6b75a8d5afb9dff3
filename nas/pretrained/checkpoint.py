"""Plain decoders: read from a folder of their family, and materialised from a model that shares.

Owns the names of weights in `transformers`, and which sharing a plain decoder can compute: shared weights are materialised, once
for each layer that uses them; what layers read of one another's activations cannot be. The `config.json` is the families'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, one_of, shown
from ..model.decoder import Decoder, is_norm
from ..sharing.plan import (
    FFN,
    FFN_NORM,
    HEAD_NORMS,
    K_PROJ,
    MATRICES,
    V_PROJ,
    EmbeddingPlan,
    LayerPlan,
    Plan,
    projection,
    weight_shapes,
)
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .families import FAMILIES, Family
from .files import FolderMetadata, read_json, read_metadata, read_weights, require_match

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BUFFERS = ("rotary_emb.inv_freq",)  # what old checkpoints hold beside weights; it follows from the config

WRITE_HF = "use the format hf, which writes any model"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder's model. weights: those of the `Decoder` of that shape and config, by its names and in the file's dtype. family:
    None for an export of this project. notes: what a user must be told, a sentence each."""

    shape: ModelShape
    config: SharingConfig
    weights: Mapping[str, Tensor]
    metadata: FolderMetadata
    family: Family | None = None
    notes: tuple[str, ...] = ()


def their_name(name: str) -> str:
    """The name of a dense decoder's weight in `transformers`."""
    return name if name == HEAD else f"model.{name}".replace("_bias.weight", "_proj.bias")


# --- reading


def find_family(data: Mapping[str, Any], name: str) -> Family:
    """The family that a `config.json` names. Raises UserError; `name` is the file's."""
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        code = ", with code of its own, which is not run" if data.get("auto_map") else ""
        hint = f"give a folder of {one_of(FAMILIES)}, or one that `nas export` wrote"
        raise UserError(f"model_type {shown(repr(kind))} is not one that is read here{code}", where=name, hint=hint)
    return FAMILIES[kind]


def read_shape(data: Mapping[str, Any], path: Path) -> tuple[ModelShape, SharingConfig, tuple[str, ...]]:
    """The shape in a `config.json`, the dense config, and notes. Raises UserError."""
    family = find_family(data, str(path))
    shape, notes = family.shape(data, str(path))
    if data.get("auto_map"):
        notes = (*notes, f"the folder's own code is not run: read as transformers' {family.architecture}")
    return shape, SharingConfig.dense(shape), notes


def read_checkpoint(directory: Path) -> Checkpoint:
    """The model in a folder of the Llama family. Raises UserError for a model that the decoder cannot compute, and for weights
    that are missing, pickled, quantised or not this model's."""
    path = directory / "config.json"
    data = read_json(path)
    family = find_family(data, str(path))
    shape, config, notes = read_shape(data, path)
    wanted = {name: (their_name(name), size) for name, size in weight_shapes(shape, config.resolve(shape)).items()}
    found = {}
    for name, weight in read_weights(directory).items():
        if not name.endswith(BUFFERS):  # a model saved without its head has no `model.` before its names
            found[name if name.startswith(("model.", "lm_head.")) else f"model.{name}"] = weight
    if shape.tie_word_embeddings:
        _drop_copied_head(found, directory)
    require_match(found, dict(wanted.values()), directory)
    norms = {name: found[theirs].float() + family.norm_offset for name, (theirs, _) in wanted.items() if is_norm(name)}
    dtype = found[EMBEDDING].dtype
    if not all(norm.to(dtype).float().equal(norm) for norm in norms.values() if family.norm_offset):
        notes += (f"norms are {family.norm_offset:g} + w, which {str(dtype).removeprefix('torch.')} rounds: read in float32",)
        dtype = torch.float32
    weights = {name: norms.get(name, found[theirs]).to(dtype) for name, (theirs, _) in wanted.items()}
    return Checkpoint(shape, config, weights, read_metadata(directory, family.token_ids(data)), family, notes)


def _drop_copied_head(weights: dict[str, Tensor], directory: Path) -> None:
    """Some folders hold a tied head as well. Raises UserError if it is not the embedding."""
    head, embedding = weights.pop(HEAD, None), weights.get(EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        message = f"{HEAD} is not the embedding, and config.json says that they are tied"
        hint = "set tie_word_embeddings to false in config.json if the head is right"
        raise UserError(message, where=str(directory), hint=hint)


# --- writing


def family_of(shape: ModelShape) -> Family:
    """The first family that has models of this shape. Raises UserError if none has."""
    for family in FAMILIES.values():
        if family.fits(shape):
            return family
    features = ("attention_bias", "qk_norm", "embedding_multiplier", "hidden_act")
    given = ", ".join(f"{name}={getattr(shape, name)}" for name in features)
    raise UserError(f"no plain decoder that is known here has layers of {given}", hint=WRITE_HF)


def tensors_of(family: Family, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A dense decoder's weights under the family's names, as it stores them."""
    found = {}
    for name, weight in weights.items():
        offset = family.norm_offset if is_norm(name) else 0.0
        found[their_name(name)] = (weight.float() - offset).to(weight.dtype) if offset else weight
    return found


MATERIALISED = {"owners", "k", "v", "k_heads", "v_heads", "width", "heads", "factors", "delta"} | {
    "tie_word_embeddings",
    "embedding_rank",
}
"""The fields of a `LayerPlan` and an `EmbeddingPlan` that `materialise` carries out; `k` and `v` only of the layer itself. Any
other field must have its default: what is new in a plan is refused until it is added here."""

INSTEAD = {
    "attn_map": "layers make softmax maps of their own",
    "kv": "layers attend to keys and values of their own",
    "k_from": "layers attend to keys of their own",
    "v_from": "layers attend to values of their own",
    "kv_input": "keys and values are made of the layer's own input",
    "value_residual": "values are the layer's alone",
    "window": "layers see all tokens",
    "experts": "FFN runs whole",
    "step_embedding": "layers are preceded by no vector of their own",
}
"""What a plain decoder does in place of a primitive."""


def require_plain(plan: Plan) -> None:
    """Raise UserError, naming the layer and the primitive, unless a plain decoder can compute what the plan does."""
    found = [("", name) for name in _beyond_default(plan.outside)]
    for i, layer in enumerate(plan.layers):
        names = {*_beyond_default(layer), *_others_kv(i, layer)}
        found += [(f"layer {i}: ", name) for name in sorted(names, key=lambda name: [*INSTEAD, name].index(name))]
    for where, name in found:
        message = f"a plain decoder's {INSTEAD[name]}" if name in INSTEAD else "a plain decoder has nothing like it"
        raise UserError(f"{where}{name}: {message}", hint=WRITE_HF)


def _beyond_default(plan: LayerPlan | EmbeddingPlan) -> list[str]:
    """The fields that are not materialised, and say something."""
    return [field.name for field in fields(plan) if field.name not in MATERIALISED and getattr(plan, field.name) != field.default]


def _others_kv(i: int, layer: LayerPlan) -> list[str]:
    """The primitive by which a layer attends to keys or values of another, if it does."""
    if layer.k == layer.v != i and layer.has_attention:
        return ["kv"]
    if layer.k not in (None, i):
        return ["k_from"]
    return ["v_from"] if layer.v not in (None, i) else []


@torch.no_grad()
def materialise(shape: ModelShape, plan: Plan, weights: Mapping[str, Tensor]) -> tuple[ModelShape, dict[str, Tensor]]:
    """The shape and weights, in the given ones' dtype, of the plain decoder that computes what a plan does.

    Shared weights are repeated for each layer that uses them, composed ones are multiplied out (in float32). Keys and values have
    the least common multiple of all layers' numbers of heads, each head repeated. FFNs are as wide as the widest, padded with
    zeros. A part that is dropped is zeros; a layer without either part is left out. Raises UserError if there is no such decoder.
    """
    require_plain(plan)
    model = Decoder(shape, plan)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    plain, layers = materialised_shape(shape, plan), _layers_in_use(plan)
    embedding = model.embed_tokens.weight
    if plan.outside.embedding_rank:
        embedding = embedding @ model.embed_projection.weight.T
    found = {"embed_tokens.weight": embedding, "norm.weight": model.norm.weight}
    found |= {} if plain.tie_word_embeddings else {HEAD: model.lm_head.weight}
    for name, size in weight_shapes(plain, SharingConfig.dense(plain).resolve(plain)).items():
        if name not in found:
            _, n, slot = name.removesuffix(".weight").split(".", 2)
            found[name] = _padded(_layer_weight(model, layers[int(n)], slot, plain), slot, size)
    dtype = next(iter(weights.values())).dtype
    return plain, {name: weight.to(dtype).contiguous() for name, weight in found.items()}


def materialised_shape(shape: ModelShape, plan: Plan) -> ModelShape:
    """The shape of the plain decoder that computes what a plan does."""
    return replace(
        shape,
        num_hidden_layers=len(_layers_in_use(plan)),
        num_key_value_heads=math.lcm(*(count for layer in plan.layers for count in (layer.k_heads, layer.v_heads) if count)),
        intermediate_size=max((layer.width for layer in plan.layers if layer.has_ffn), default=shape.intermediate_size),
        tie_word_embeddings=plan.outside.tie_word_embeddings,
    )


def _layers_in_use(plan: Plan) -> list[int]:
    """The layers that do something; one at least."""
    return [i for i, layer in enumerate(plan.layers) if layer.has_attention or layer.has_ffn] or [0]


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


def _padded(weight: Tensor | None, slot: str, size: tuple[int, ...]) -> Tensor:
    """A weight of the wanted size, padded with zeros; without a weight, one that has no effect."""
    if weight is None:
        return torch.ones(size) if is_norm(f"{slot}.weight") else torch.zeros(size)
    full = weight.new_zeros(size)
    full[tuple(map(slice, weight.shape))] = weight
    return full
