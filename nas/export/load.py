"""An exported folder, read back with this project's own code.

Owns the checks on what a folder holds. Weights come from safetensors alone: nothing is unpickled, and none of the folder's code
is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import UserError
from ..loading import Document, build, parse_yaml
from ..model import Decoder, init_weights
from ..plan import Plan, weight_shapes
from ..shape import ModelShape
from ..sharing import SharingConfig
from .artifact import CONFIG_JSON, MODEL_YAML
from .config_folder import read_config_folder
from .hugging_face import MODEL_TYPE, hf_name

EXPORT_IT = "give a folder that `nas export` wrote"


@dataclass(frozen=True, eq=False)
class Loaded:
    """An exported folder: the stand-alone model in the file's dtype, what it is, and its tokenizer."""

    model: Decoder
    config: SharingConfig
    shape: ModelShape
    tokenizer: Tokenizer


def load_export(directory: Path) -> Loaded:
    """The model in an exported folder, or in one that `save_pretrained` made of it.

    Raises UserError in one line for a folder that is missing, is no export, has no weights, only pickled ones, or weights that
    are not this model's.
    """
    shape, config = read_config(directory)
    weights = _read_weights(directory)
    plan = config.resolve(shape)
    own = "embed_tokens.weight" in weights  # the decoder's own names, as the `torch` format has them
    names = {name: name if own else hf_name(name) for name in weight_shapes(shape, plan)}
    _require_match(weights, {names[name]: size for name, size in weight_shapes(shape, plan).items()}, directory)
    model = Decoder(shape, plan).to(next(iter(weights.values())).dtype)
    model.load_state_dict({name: weights[names[name]] for name in names})
    return Loaded(model, config, shape, _read_tokenizer(directory))


def load_model(directory: Path, seed: int) -> Decoder:
    """The model in an exported folder: the trained one, or from a folder without weights a new one. Raises UserError."""
    if not _is_config(directory):
        return load_export(directory).model
    shape, config = read_config(directory)
    return init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(seed))


def _is_config(directory: Path) -> bool:
    return (directory / MODEL_YAML).is_file() and not (directory / CONFIG_JSON).is_file()


def read_config(directory: Path) -> tuple[ModelShape, SharingConfig]:
    """The shape and the sharing of an exported folder's model, from its `config.json` or `model.yaml`. Raises UserError."""
    if not directory.is_dir():
        remedy = EXPORT_IT if not directory.exists() else f"it is a file; {EXPORT_IT}"
        raise UserError("no such folder", where=str(directory), remedy=remedy)
    if _is_config(directory):
        return read_config_folder(directory)
    path = directory / CONFIG_JSON
    if not path.is_file():
        raise UserError("is no export: it has no config.json", where=str(directory), remedy=EXPORT_IT)
    data = _read_json(path)
    if data.get("model_type") != MODEL_TYPE:
        rule = f"model_type is {data.get('model_type')!r}, not {MODEL_TYPE!r}: this is another kind of model"
        raise UserError(rule, where=str(path), remedy=EXPORT_IT)
    names = [field.name for field in fields(ModelShape)]
    shape = build(ModelShape, Document({name: data[name] for name in names if name in data}, str(path)))
    config = _read_plan(shape, data.get("plan"), path)
    _require_agreement(shape, config, directory)
    return shape, config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"is not JSON ({error})", where=str(path), remedy="export the model again") from None
    if not isinstance(data, dict):
        raise UserError("holds no keys and values", where=str(path), remedy="export the model again")
    return data


def _read_plan(shape: ModelShape, data: Any, path: Path) -> SharingConfig:
    """The config of a plan that is one: it resolves to the plan again."""
    try:
        plan = Plan.from_data(data)
        config = SharingConfig.of_plan(shape, plan)
        if plan.outside.tie_word_embeddings != shape.tie_word_embeddings:
            rule = f"tie_word_embeddings is {shape.tie_word_embeddings}, which is not what plan says"
        elif len(plan.layers) == shape.num_hidden_layers and config.resolve(shape) == plan:
            return config
        else:
            rule = f"plan is not one of {shape.num_hidden_layers} layers that share as a configuration can say"
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError, UserError) as error:
        rule = f"plan says of no layer whose weights it uses ({type(error).__name__}: {error})"
    raise UserError(rule, where=str(path), remedy="export the model again")


def _require_agreement(shape: ModelShape, config: SharingConfig, directory: Path) -> None:
    """`sharing.yaml` is for people: one that was edited would say something that the model does not do."""
    path = directory / "sharing.yaml"
    if path.is_file():
        document = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        if SharingConfig.from_data(shape, document.data, document) != config:
            remedy = "delete it, or export that configuration"
            raise UserError("is not what config.json says the model shares", where=str(path), remedy=remedy)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the folder's weights, one or several. Raises UserError if they are not there."""
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (directory / names[0]).is_file():
        names = sorted({Path(str(name)).name for name in _read_json(index).get("weight_map", {}).values()})
    for name in names:
        if not (directory / name).is_file():
            raise _no_weights(directory, name)
    return [directory / name for name in names]


def _read_weights(directory: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in weight_files(directory):
        try:
            weights |= load_file(path)
        except SafetensorError as error:
            raise UserError(f"is not a safetensors file ({error})", where=str(path), remedy="export the model again") from None
    return weights


def _no_weights(directory: Path, wanted: str) -> UserError:
    if _is_config(directory):
        rule = "is a configuration without weights"
        return UserError(rule, where=str(directory), remedy="export it with `--format hf`, or begin to train with `nas.load`")
    pickled = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(suffix))
    if pickled:
        rule = f"has pickled weights only ({pickled[0]}), and to unpickle is to run what is in the file"
        return UserError(rule, where=str(directory), remedy="save it with `save_pretrained`, which writes safetensors")
    return UserError(f"has no {wanted}", where=str(directory), remedy="export the model again")


def _require_match(weights: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], directory: Path) -> None:
    """Raise UserError unless exactly the wanted weights are there, in their shapes and in one dtype."""
    where, remedy = str(directory), "export the model again"
    for names, what in ((wanted.keys() - weights.keys(), "lack"), (weights.keys() - wanted.keys(), "have, beyond the model's,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"the weights {what} {min(names)}{more}", where=where, remedy=remedy)
    for name, size in wanted.items():
        if tuple(weights[name].shape) != size:
            raise UserError(f"{name} is {tuple(weights[name].shape)}, not {size}", where=where, remedy=remedy)
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(f"the weights are {kinds}", where=where, remedy="save them all in one of float32, bfloat16 or float16")


def _read_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError("has no tokenizer.json", where=str(directory), remedy="copy it from the folder the model comes from")
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises this very class
        reason = " ".join(str(error).split())
        raise UserError(f"is no tokenizer ({reason})", where=str(path), remedy="export the model again") from None
