"""A model's folder, read with this project's own code: an export, or a checkpoint of the Llama family.

Owns the checks on an export's contents; those on a checkpoint's are `nas.pretrained`'s. Weights come from safetensors alone:
nothing is unpickled, and no code of the folder is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..config import AGAIN, Document, build, read_text, read_yaml, reading
from ..data.tokenizer import vocabulary_size
from ..errors import UserError, one_of, shown
from ..model.decoder import Decoder, init_weights
from ..pretrained import FAMILIES, Checkpoint, Family, FolderMetadata, read_checkpoint, read_shape
from ..pretrained.files import (
    other_model,
    own_files,
    read_json,
    read_metadata,
    read_weights,
    require_contents,
    require_match,
    weight_files,
)
from ..sharing.plan import Plan, weight_shapes
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .card import CONFIG_JSON, MODEL_YAML
from .hugging_face import MODEL_TYPE, hf_name

EXPORT_IT = f"give a folder that `nas export` wrote, or a Hugging Face folder of {one_of(FAMILIES)}"


@dataclass(frozen=True, eq=False)
class Loaded:
    """A folder's stand-alone model in the file's dtype, its config, shape, tokenizer and metadata.

    `format` names the format that writes such a folder. `family` is a checkpoint's. `notes` are sentences that a user must be
    told about how the folder was read.
    """

    model: Decoder
    config: SharingConfig
    shape: ModelShape
    tokenizer: Tokenizer
    metadata: FolderMetadata = field(default_factory=FolderMetadata)
    format: str = "hf"
    family: Family | None = None
    notes: tuple[str, ...] = ()

    def notes_for(self, seq: int) -> tuple[str, ...]:
        """The notes, and one more if sequences of `seq` tokens are longer than the model is made for."""
        longest = self.shape.max_position_embeddings
        if seq <= longest:
            return self.notes
        return (*self.notes, f"sequences of {seq:,} tokens are longer than the {longest:,} that the model is made for")


def check_folder(directory: Path) -> tuple[ModelShape, SharingConfig, Tokenizer]:
    """The shape, sharing and tokenizer of a folder that has all that `load_export` needs. Raises UserError; reads no weights."""
    if _is_config(directory):
        message, hint = "is a configuration without weights", "export it with `--format hf`, or begin to train with `nas.load`"
        raise UserError(message, where=str(directory), hint=hint)
    shape, config = read_config(directory)
    weight_files(directory)
    return shape, config, read_tokenizer(directory, shape.vocab_size)


def load_export(directory: Path) -> Loaded:
    """The model in a folder: an export, what `save_pretrained` made of one, or a checkpoint of a family in `FAMILIES`.

    Raises UserError in one line for a folder that is missing, is of another kind, has no weights, only pickled ones, or weights
    that are not this model's.
    """
    shape, config, tokenizer = check_folder(directory)
    data = read_json(directory / CONFIG_JSON)
    if data.get("model_type") == MODEL_TYPE:
        weights = _read_own(directory, weight_shapes(shape, config.resolve(shape)))
        found, format = Checkpoint(shape, config, weights, read_metadata(directory, data)), str(data.get("format", "hf"))
    else:
        found, format = read_checkpoint(directory), "dense"
    model = Decoder(shape, config.resolve(shape))
    model.load_state_dict(found.weights, assign=True)
    return Loaded(model, config, shape, tokenizer, found.metadata, format, found.family, found.notes)


def _read_own(directory: Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The weights of an export, stored under the decoder's names (`torch`) or those of `transformers`."""
    found = read_weights(directory)
    names = {name: name if "embed_tokens.weight" in found else hf_name(name) for name in wanted}
    require_match(found, {names[name]: size for name, size in wanted.items()}, directory)
    return {name: found[theirs] for name, theirs in names.items()}


def load_model(directory: Path, seed: int) -> Decoder:
    """The model in a folder: the trained one, or a newly initialised one if the folder has no weights. Raises UserError."""
    if not _is_config(directory):
        return load_export(directory).model
    shape, config = read_config(directory)
    return init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(seed))


def _is_config(directory: Path) -> bool:
    return (directory / MODEL_YAML).is_file() and not (directory / CONFIG_JSON).is_file()


def read_config(directory: Path) -> tuple[ModelShape, SharingConfig]:
    """The shape and the sharing of a folder's model, from its `config.json` or `model.yaml`. Raises UserError."""
    if not directory.is_dir():
        hint = EXPORT_IT if not directory.exists() else f"it is a file; {EXPORT_IT}"
        raise UserError("no such folder", where=str(directory), hint=hint)
    if _is_config(directory):
        shape = build(ModelShape, read_yaml(directory / MODEL_YAML))
        return shape, SharingConfig.load(shape, directory / "sharing.yaml")
    path = directory / CONFIG_JSON
    if not path.is_file():
        raise other_model(directory) or UserError("is no export: it has no config.json", where=str(directory), hint=EXPORT_IT)
    data = read_json(path)
    with reading(path):
        if data.get("model_type") == MODEL_TYPE:
            names = [field.name for field in fields(ModelShape)]
            shape = build(ModelShape, Document({name: data[name] for name in names if name in data}, str(path)))
            config = _read_plan(shape, data.get("plan"), path)
        else:
            shape, config, _ = read_shape(data, path)
    _require_agreement(shape, config, directory)
    return shape, config


def _read_plan(shape: ModelShape, data: Any, path: Path) -> SharingConfig:
    """The config that resolves to a plan. Raises UserError if there is none."""
    try:
        plan = Plan.from_data(data)
        config = SharingConfig.of_plan(shape, plan)
        if plan.outside.tie_word_embeddings != shape.tie_word_embeddings:
            message = f"tie_word_embeddings is {shape.tie_word_embeddings}, which is not what plan says"
        elif len(plan.layers) == shape.num_hidden_layers and config.resolve(shape) == plan:
            return config
        else:
            message = f"plan is not one of {shape.num_hidden_layers} layers that share as a configuration can say"
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError, UserError) as error:
        message = f"plan says of no layer whose weights it uses ({type(error).__name__}: {shown(error)})"
    raise UserError(message, where=str(path), hint=AGAIN)


def _require_agreement(shape: ModelShape, config: SharingConfig, directory: Path) -> None:
    """Raise UserError if `sharing.yaml`, which is for people, was edited: it would say what the model does not do."""
    path = directory / "sharing.yaml"
    if path.exists() and SharingConfig.load(shape, path) != config:
        hint = "delete it, or export that configuration"
        raise UserError("is not what config.json says the model shares", where=str(path), hint=hint)


def read_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in a folder, for a model of so many tokens. Raises UserError."""
    path = directory / "tokenizer.json"
    require_contents(path)
    if not own_files(directory, [path.name]):
        raise UserError("has no tokenizer.json", where=str(directory), hint=_tokenizer_hint(directory))
    text = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises this very class
        reason = " ".join(str(error).split())
        raise UserError(f"is no tokenizer ({reason})", where=str(path), hint=AGAIN) from None
    if (size := vocabulary_size(tokenizer)) > vocab_size:
        message = f"{size:,} tokens are more than the model's {vocab_size:,} rows of embedding"
        hint = "in transformers call model.resize_token_embeddings(len(tokenizer)), and save both in one folder"
        raise UserError(message, where=str(path), hint=hint)
    return tokenizer


def _tokenizer_hint(directory: Path) -> str:
    """How to get a tokenizer.json: by conversion, if the folder has an older kind of vocabulary."""
    older = next((name for name in ("tokenizer.model", "vocab.json") if (directory / name).is_file()), None)
    if older is None:
        return "copy it from the folder the model comes from"
    folder = str(directory.resolve())
    code = f"from transformers import AutoTokenizer as T; T.from_pretrained({folder!r}).save_pretrained({folder!r})"
    return f'make it of {older}: python -c "{code}"'
