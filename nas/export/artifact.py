"""What leaves the project, whatever the format: a model without its supernet, its tokenizer and what is said of it.

Owns `Artifact` and how a folder is put in place: whole or not at all. What is in the folder is the format's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..shape import ModelShape
from ..sharing import SharingConfig
from .card import Card


@dataclass(frozen=True, eq=False)
class Artifact:
    """A model to write: `weights` has the names and values of `Decoder(shape, config.resolve(shape))`'s state dict."""

    shape: ModelShape
    config: SharingConfig
    weights: Mapping[str, Tensor]
    tokenizer_json: str
    card: Card


def require_free(directory: Path, overwrite: bool, ours: frozenset[str] = frozenset()) -> None:
    """Raise UserError if the directory holds what may not be written over.

    That is anything but an earlier export (which has a `sharing.yaml` and a `config.json`) and entries named in `ours`.
    """
    if directory.is_file():
        raise UserError("is a file, not a folder", where=str(directory), remedy="give another folder")
    held = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if held - ours and not overwrite and not {"sharing.yaml", "config.json"} <= held:
        remedy = "give an empty or a new folder, or --overwrite"
        raise UserError("the folder is not empty and is no earlier export", where=str(directory), remedy=remedy)


@contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """A folder to write into, whose files move to the directory when all are written, and vanish if they are not.

    A new directory appears at once. In one that is there (and may be where the user stands) files are replaced one by one,
    `config.json` last: without it, what a power cut left half done is no model. Files of other names stay.
    """
    there = directory.is_dir()
    place = directory if there else directory.resolve().parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=place) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        if there:
            _replace(directory, new)
        else:
            new.rename(directory.resolve())


def _replace(directory: Path, new: Path) -> None:
    for stale in ("config.json", "model.safetensors.index.json", "model-*-of-*.safetensors"):
        for path in directory.glob(stale):
            path.unlink()
    for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(directory / path.name)
