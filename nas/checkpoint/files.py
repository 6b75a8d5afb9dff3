"""The files of a model's folder: JSON and safetensors, whole or refused in one line.

Owns reading them. What is in them is the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The keys and values in a JSON file. Raises UserError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"is not JSON ({error})", where=str(path), remedy=remedy) from None
    if not isinstance(data, dict):
        raise UserError("holds no keys and values", where=str(path), remedy=remedy)
    return data


def weight_files(directory: Path, remedy: str) -> list[Path]:
    """The files that hold a folder's weights, one or several. Raises UserError if they are not all there."""
    index, names = directory / INDEX, [WEIGHTS]
    if index.is_file() and not (directory / WEIGHTS).is_file():
        listed = read_json(index, remedy).get("weight_map", {})
        names = sorted({Path(str(name)).name for name in listed.values()} if isinstance(listed, dict) else [])
        if not names:
            raise UserError("names no file", where=str(index), remedy=remedy)
    for name in names:
        if not (directory / name).is_file():
            raise _missing(directory, name, len(names) > 1, remedy)
    return [directory / name for name in names]


def read_weights(directory: Path, remedy: str) -> dict[str, Tensor]:
    """Every tensor in a folder's safetensors, by its name there. Raises UserError."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(directory, remedy):
        try:
            weights |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"is not a safetensors file ({error})", where=str(path), remedy=remedy) from None
    return weights


def _missing(directory: Path, wanted: str, shard: bool, remedy: str) -> UserError:
    pickled = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(suffix))
    if pickled:
        rule = f"has pickled weights only ({pickled[0]}), and to unpickle is to run what is in the file"
        return UserError(rule, where=str(directory), remedy="save it with `save_pretrained`, which writes safetensors")
    return UserError(f"has no {wanted}" + (f", which {INDEX} names" if shard else ""), where=str(directory), remedy=remedy)


def require_match(weights: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], directory: Path, remedy: str) -> None:
    """Raise UserError unless exactly the wanted weights are there, each of its shape, all of floating point."""
    where = str(directory)
    for names, what in ((wanted.keys() - weights.keys(), "lack"), (weights.keys() - wanted.keys(), "have, beyond the model's,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"the weights {what} {min(names)}{more}", where=where, remedy=remedy)
    for name, size in wanted.items():
        if tuple(weights[name].shape) != size:
            raise UserError(f"{name} is {tuple(weights[name].shape)}, not {size}", where=where, remedy=remedy)
    kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values() if not weight.is_floating_point()})
    if kinds:
        rule = f"the weights are {' and '.join(kinds)}"
        raise UserError(rule, where=where, remedy="save them all in one of float32, bfloat16 or float16")
