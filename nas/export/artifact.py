"""What every export writes, whatever its format: the model, its tokenizer, its README, and plain files.

Owns `Artifact` and the files that all formats have in common. A format's own files are the format's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..pretrained import Family, FolderMetadata
from ..pretrained.files import CARD, LICENCES
from ..sharing.plan import Plan
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .card import ModelCard, readme

CONFIG_JSON, MODEL_YAML = MARKERS = "config.json", "model.yaml"
"""A folder with a `sharing.yaml` and one of these is an export. They are the last to be written and the first to be removed."""

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Artifact:
    """A model to export.

    `weights` has the names and values of `Decoder(shape, plan)`'s state dict; a format without weights has none. `metadata` is
    carried on from the folder that the model comes from. `family` is the family of checkpoints in whose layout a dense model is
    written.
    """

    shape: ModelShape
    config: SharingConfig
    weights: Mapping[str, Tensor]
    tokenizer_json: str
    card: ModelCard
    metadata: FolderMetadata = field(default_factory=FolderMetadata)
    family: Family | None = None

    @cached_property
    def plan(self) -> Plan:
        """What the config makes of the shape."""
        return self.config.resolve(self.shape)

    @property
    def head_shape(self) -> ModelShape:
        """The shape with the plan's output head: a config may tie or untie it, whatever the shape says."""
        return replace(self.shape, tie_word_embeddings=self.plan.outside.tie_word_embeddings)

    @property
    def dtype(self) -> str:
        """The weights' dtype, by torch's name."""
        return str(next(iter(self.weights.values())).dtype).removeprefix("torch.")


def common_texts(artifact: Artifact, usage: str, library: str = "") -> dict[str, str]:
    """Name and text of the files that every format has.

    `usage` is the README's section on use, in which `DTYPE` becomes the card's; `library` loads the folder by itself.
    """
    card = replace(artifact.card, licence=artifact.metadata.licence)
    text = readme(artifact.head_shape, artifact.config, card, usage, library, bool(artifact.weights))
    licences = {name: text for name, text in artifact.metadata.texts.items() if name in LICENCES}
    return licences | {CARD: text, "sharing.yaml": artifact.config.to_yaml(), "tokenizer.json": artifact.tokenizer_json}


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write text files into a folder."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` into a folder that has a `sharing.yaml`, with the same permissions."""
    path = folder / WEIGHTS
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, path, {"format": "pt"})
    # safetensors creates the file without read permission for others.
    path.chmod((folder / "sharing.yaml").stat().st_mode)
