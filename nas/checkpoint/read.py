"""A Hugging Face folder of a plain decoder, read.

Owns `read_checkpoint`. What a family's config.json means is `families`'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..model import is_norm
from ..plan import weight_shapes
from ..shape import ModelShape
from ..supernet import dense_plan
from .families import Family, family_of, theirs
from .files import read_json, read_weights, require_match

OWN = "take the checkpoint's own files again"
CARRIED = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files that go with a model wherever it goes."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A plain decoder: `weights` have the names and shapes of the dense `Decoder`'s, in the files' dtype, or one that holds them.

    `carried` are the texts of other files that its users want, `token_ids` the special tokens of its config.json; `notes` say how
    it was read, where that is not to the letter.
    """

    shape: ModelShape
    weights: Mapping[str, Tensor]
    carried: Mapping[str, str]
    token_ids: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_checkpoint(directory: Path) -> Checkpoint:
    """The model in a folder. Raises UserError in one line: of another family, or not to be expressed here; files missing, torn or
    pickled; weights too many, too few or of other shapes."""
    shape, config, family = read_shape(directory)
    found = {_with_prefix(name): weight for name, weight in read_weights(directory, OWN).items() if not name.endswith("inv_freq")}
    wanted = {theirs(name): size for name, size in weight_shapes(shape, dense_plan(shape)).items()}
    if shape.tie_word_embeddings and "lm_head.weight" in found:
        _require_tied(found, directory)
    require_match(found, wanted, directory, OWN)
    dtype = reduce(torch.promote_types, (weight.dtype for weight in found.values()))
    if family.norm_offset:
        dtype = torch.float32  # a norm's weight and the one that is added to it are too far apart for fewer bits
    weights = {name: _ours(family, name, found[theirs(name)].to(dtype)) for name in weight_shapes(shape, dense_plan(shape))}
    texts = {name: (directory / name).read_text(encoding="utf-8") for name in CARRIED if (directory / name).is_file()}
    tokens = {name: config[name] for name in TOKENS if config.get(name) is not None}
    return Checkpoint(shape, weights, texts, tokens, tuple(family.notes(config)))


def read_shape(directory: Path) -> tuple[ModelShape, dict[str, Any], Family]:
    """The shape, the config.json and the family of a folder's model. Raises UserError with the file and the key."""
    path = directory / "config.json"
    config = read_json(path, OWN)
    try:
        family = family_of(config.get("model_type"))
        return family.read(config), config, family
    except UserError as error:
        raise error.at(str(path)) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"says no model ({error})", where=str(path), remedy=OWN) from None


def _with_prefix(name: str) -> str:
    """A decoder saved without its head has no `model.` before its names."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _require_tied(found: dict[str, Tensor], directory: Path) -> None:
    """Drop a head that is the embedding again; another one is not this model's."""
    if not torch.equal(found.pop("lm_head.weight"), found.get("model.embed_tokens.weight", torch.empty(0))):
        rule = "lm_head.weight is not the embedding, though tie_word_embeddings says so"
        raise UserError(rule, where=str(directory), remedy="set tie_word_embeddings to false in its config.json")


def _ours(family: Family, name: str, weight: Tensor) -> Tensor:
    """A weight as the decoder keeps it: a norm scales by all of its weight."""
    return weight + family.norm_offset if family.norm_offset and is_norm(name) else weight
