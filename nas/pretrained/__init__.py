"""Checkpoints of the Llama family, and conversions of a dense model to one that shares.

Owns the families (`FAMILIES`: what a `config.json` means and what weights are called), the reading of a folder as `transformers`
writes it, and what a plain decoder can compute. Nothing of a folder is run or unpickled, and `transformers` is not needed. A
folder that this project wrote of a model that shares is `nas.export`'s.
"""

from __future__ import annotations

from .checkpoint import (
    Checkpoint,
    family_of,
    materialise,
    materialised_shape,
    read_checkpoint,
    read_shape,
    require_plain,
    tensors_of,
)
from .families import FAMILIES, Family
from .files import FolderMetadata

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Family",
    "FolderMetadata",
    "family_of",
    "materialise",
    "materialised_shape",
    "read_checkpoint",
    "read_shape",
    "require_plain",
    "tensors_of",
]
