"""Hugging Face folders of plain decoders: Llama and its relatives, read into this project's decoder, and written from it.

Owns the families (`FAMILIES`), what may be in such a folder, and writing out what a model shares. No code of a folder's is run,
nothing is unpickled, and `transformers` is not needed.
"""

from __future__ import annotations

from .families import FAMILIES
from .read import Checkpoint, read_checkpoint

__all__ = ["FAMILIES", "Checkpoint", "read_checkpoint"]
