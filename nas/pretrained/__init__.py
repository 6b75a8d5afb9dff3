"""Checkpoints of the Llama family: a folder as `transformers` has it, read into the decoder and written from it.

Owns the families (`FAMILIES`): what each one's `config.json` means and what it calls its weights. Nothing of a folder is run or
unpickled, and `transformers` is not needed. A folder that this project wrote of a model that shares is `nas.export`'s.
"""

from __future__ import annotations

from .families import FAMILIES, Family
from .metadata import FolderMetadata
from .read import Checkpoint, read_checkpoint, read_shape
from .write import family_of, tensors_of, written_out

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Family",
    "FolderMetadata",
    "family_of",
    "read_checkpoint",
    "read_shape",
    "tensors_of",
    "written_out",
]
