"""Leaving the project: the formats in which a model can be written, and `export`, which writes one.

Owns `FORMATS`. A row is a way to write a model, and what is promised of every export (whole or not at all, read back before it
is put in place) is `export`'s.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError, did_you_mean
from ..model.decoder import Decoder
from ..model.supernet import weights_of
from ..pretrained import FolderMetadata
from ..sharing.memory import MemorySpec
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .artifact import EXPORTED, Artifact, require_free, whole_folder
from .card import FIGURE, ModelCard
from .config_folder import read_config_folder, write_config
from .hugging_face import exported_shape, write_folder
from .load import load_export
from .plain_folder import write_plain, written_cost
from .torch_folder import write_torch


@dataclass(frozen=True)
class Format:
    """A way to write a model: `write(artifact, folder)` fills an empty folder, and asserts that it reads back; `cost` says what a
    model loses in it, where it does."""

    name: str
    meaning: str
    write: Callable[[Artifact, Path], None]
    cost: Callable[[ModelShape, SharingConfig, MemorySpec], str] = lambda shape, config, spec: ""


def _write_hf(artifact: Artifact, folder: Path) -> None:
    write_folder(artifact, folder)
    _require_read_back(artifact, folder)


def _write_torch(artifact: Artifact, folder: Path) -> None:
    write_torch(artifact, folder)
    _require_read_back(artifact, folder)


def _write_config(artifact: Artifact, folder: Path) -> None:
    write_config(artifact, folder)
    assert read_config_folder(folder) == (artifact.shape, artifact.config)


def _write_plain(artifact: Artifact, folder: Path) -> None:
    shape, weights = write_plain(artifact, folder)
    loaded = load_export(folder)
    assert loaded.shape == shape
    written = loaded.model.state_dict()
    assert all(
        torch.allclose(written[name], weight.to(written[name]), atol=0, rtol=NORM_BITS) for name, weight in weights.items()
    )


NORM_BITS = 2**-6
"""How far a norm may be from what it was, once one is taken from it and added again in bfloat16 (Gemma)."""


def _require_read_back(artifact: Artifact, folder: Path) -> None:
    loaded = load_export(folder)
    assert loaded.shape == exported_shape(artifact)
    assert loaded.model.plan == artifact.config.resolve(artifact.shape)
    written = loaded.model.state_dict()
    assert all(torch.equal(written[name], weight.cpu()) for name, weight in artifact.weights.items())


PLAIN = "a plain Hugging Face folder without code, what is shared written out: larger, and only where that is exact"
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("hf", "a Hugging Face folder, with the code that runs it; transformers loads and trains it", _write_hf),
        Format("torch", "one Python file and the weights; needs torch and safetensors alone", _write_torch),
        Format("llama", PLAIN, _write_plain, written_cost),
        Format("config", "model.yaml and sharing.yaml without weights, which nas.load builds", _write_config),
    )
}
"""Every format. A new one is a row here, and nothing elsewhere."""


def export(
    model: Decoder,
    config: SharingConfig,
    tokenizer_json: str,
    directory: Path,
    card: ModelCard,
    format: str = "hf",
    overwrite: bool = False,
    extras: FolderMetadata | None = None,
) -> Path:
    """Write a stand-alone model or a subnet, which is left as it was, to a folder; returns the folder.

    `extras` are carried on from the folder that the model comes from (`Loaded.extras`).
    The folder appears whole or not at all. An earlier export is replaced; files of other names in it stay. Raises UserError for
    an unknown format, or for a folder that holds anything else, unless `overwrite`.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", where="format", hint=did_you_mean(format, FORMATS))
    assert config.resolve(model.shape) == model.plan, "the config is not this model's"
    require_free(directory, overwrite)
    artifact = Artifact(model.shape, config, weights_of(model), tokenizer_json, card, extras or FolderMetadata())
    write(artifact, directory, format)
    return directory


def write(artifact: Artifact, directory: Path, format: str = "hf") -> None:
    """Put an artifact in a directory's place, files of other names in it staying."""
    with whole_folder(directory) as folder:
        FORMATS[format].write(artifact, folder)
        if artifact.card.provenance:
            artifact.card.provenance.save(folder)
        if artifact.card.figure:
            shutil.copyfile(artifact.card.figure, folder / FIGURE)
        assert {path.name for path in folder.iterdir()} <= EXPORTED
