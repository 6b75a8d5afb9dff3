"""A checkpoint of the Llama family, read: its shape and the dense decoder's weights.

Owns what of a folder is a weight of ours, and what it is called there. `config.json` is the families'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, one_of
from ..model.decoder import is_norm
from ..model.supernet import dense_config
from ..sharing.plan import weight_shapes
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .families import FAMILIES, Family
from .files import read_json, read_weights, require_match
from .metadata import FolderMetadata, read_extras

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BUFFERS = ("rotary_emb.inv_freq",)
"""What old checkpoints hold beside weights; it follows from the config."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder's model: `weights` of the dense `Decoder` of that shape, by its names and in the file's dtype; `family` is
    None for an export of this project; `notes` are what a user must be told, a sentence each."""

    shape: ModelShape
    config: SharingConfig
    weights: Mapping[str, Tensor]
    extras: FolderMetadata
    family: Family | None = None
    notes: tuple[str, ...] = ()


def their_name(name: str) -> str:
    """What `transformers` calls a dense decoder's weight."""
    return name if name == HEAD else f"model.{name}".replace("_bias.weight", "_proj.bias")


def find_family(data: Mapping[str, Any], name: str) -> Family:
    """The family that a `config.json` says it is of. Raises UserError; `name` is the file's."""
    kind = data.get("model_type")
    if kind not in FAMILIES:
        code = ", with code of its own, which is not run" if data.get("auto_map") else ""
        hint = f"give a folder of {one_of(FAMILIES)}, or one that `nas export` wrote"
        raise UserError(f"model_type {kind!r} is not one that is read here{code}", where=name, hint=hint)
    return FAMILIES[str(kind)]


def read_shape(data: Mapping[str, Any], path: Path) -> tuple[ModelShape, SharingConfig, tuple[str, ...]]:
    """The shape in a `config.json`, the config that shares nothing, and notes. Raises UserError."""
    family = find_family(data, str(path))
    shape, notes = family.shape(data, str(path))
    if data.get("auto_map"):
        notes = (*notes, f"the folder's own code is not run: read as transformers' {family.architecture}")
    return shape, dense_config(shape), notes


def read_checkpoint(directory: Path) -> Checkpoint:
    """The model in a folder of the Llama family.

    Raises UserError in one line for a model that the decoder cannot be, and for weights that are missing, pickled, quantised or
    not this model's.
    """
    path = directory / "config.json"
    data = read_json(path)
    family = find_family(data, str(path))
    shape, config, notes = read_shape(data, path)
    wanted = {name: (their_name(name), size) for name, size in weight_shapes(shape, config.resolve(shape)).items()}
    found = {_prefixed(name): weight for name, weight in read_weights(directory).items() if not name.endswith(BUFFERS)}
    if shape.tie_word_embeddings:
        _drop_copied_head(found, directory)
    require_match(found, dict(wanted.values()), directory)
    norms = {name: found[theirs].float() + family.norm_offset for name, (theirs, _) in wanted.items() if is_norm(name)}
    dtype = found[EMBEDDING].dtype
    if not all(norm.to(dtype).float().equal(norm) for norm in norms.values() if family.norm_offset):
        notes += (f"norms are {family.norm_offset:g} + w, which {str(dtype).removeprefix('torch.')} rounds: read in float32",)
        dtype = torch.float32
    weights = {name: norms.get(name, found[theirs]).to(dtype) for name, (theirs, _) in wanted.items()}
    return Checkpoint(shape, config, weights, read_extras(directory, family.token_ids(data)), family, notes)


def _prefixed(name: str) -> str:
    """A model saved without its head has no `model.` before its names."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _drop_copied_head(weights: dict[str, Tensor], directory: Path) -> None:
    """Some folders hold a tied head as well. Raises UserError if it is not the embedding."""
    head, embedding = weights.pop(HEAD, None), weights.get(EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        message = f"{HEAD} is not the embedding, and config.json says that they are tied"
        raise UserError(
            message, where=str(directory), hint="set tie_word_embeddings to false in config.json if the head is right"
        )
