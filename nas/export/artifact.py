"""What leaves the project, whatever the format: a model without its supernet, its tokenizer and what is said of it.

Owns `Artifact` and how a folder is put in place: whole or not at all. What is in the folder is the format's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..pretrained.metadata import TEXTS, FolderMetadata
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .card import FIGURE, ModelCard
from .provenance import PROVENANCE

CONFIG_JSON, MODEL_YAML = MARKERS = "config.json", "model.yaml"
"""A folder with a `sharing.yaml` and one of these is an export; they are the last to appear, and the first to go."""

CARRIED = ("plan.py", "attention.py", "model.py", "modeling_nas.py", "configuration_nas.py")
"""Code."""

EXPORTED = frozenset(
    {
        *MARKERS,
        *CARRIED,
        "README.md",
        "sharing.yaml",
        FIGURE,
        PROVENANCE,
        "model.safetensors",
        "tokenizer.json",
        *TEXTS,
    }
)
"""Every file that a format writes: of these, an export leaves none behind that an earlier one wrote."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """A model to write: `weights` has the names and values of `Decoder(shape, config.resolve(shape))`'s state dict; `extras` are
    what the folder it comes from says besides."""

    shape: ModelShape
    config: SharingConfig
    weights: Mapping[str, Tensor]
    tokenizer_json: str
    card: ModelCard
    extras: FolderMetadata = field(default_factory=FolderMetadata)


def is_export(directory: Path) -> bool:
    """Whether a directory is an export, of any format."""
    return (directory / "sharing.yaml").is_file() and any((directory / marker).is_file() for marker in MARKERS)


def exported_files(directory: Path) -> dict[str, int]:
    """Name and bytes of an export's own files, whatever else is in the folder."""
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name in EXPORTED}


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write text files into a folder."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` into a folder that has a `sharing.yaml`, with the rights of it."""
    path = folder / "model.safetensors"
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, path, {"format": "pt"})
    # safetensors makes a file that nobody else may read.
    path.chmod((folder / "sharing.yaml").stat().st_mode)


def require_free(directory: Path, overwrite: bool, ours: frozenset[str] = frozenset()) -> None:
    """Raise UserError if the directory holds what may not be written over.

    That is anything but an earlier export and entries named in `ours`.
    """
    if directory.is_file():
        raise UserError("is a file, not a folder", where=str(directory), hint="give another folder")
    held = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if held - ours and not overwrite and not is_export(directory):
        hint = "give an empty or a new folder, or --overwrite"
        raise UserError("the folder is not empty and is no earlier export", where=str(directory), hint=hint)


@contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """A folder to write into, whose files move to the directory when all are written, and vanish if they are not.

    A new directory appears at once. In one that is there (and may be where the user stands) files are replaced one by one, the
    marker last: without it, what a power cut left half done is no model. What an earlier export left is gone then, files of other
    names stay.
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
    left = {path.name for path in directory.iterdir()} & EXPORTED if is_export(directory) else set()
    for stale in (*MARKERS, "model.safetensors.index.json", "model-*-of-*.safetensors"):
        for path in directory.glob(stale):
            path.unlink()
    made = sorted(new.iterdir(), key=lambda path: path.name in MARKERS)
    for name in left - {*MARKERS, *(path.name for path in made)}:
        (directory / name).unlink()
    for path in made:
        path.replace(directory / path.name)
