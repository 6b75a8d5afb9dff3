"""Leaving the project: a model becomes a folder that other software loads, trains and measures.

Owns the formats (`FORMATS`), the folder's files and code, reading it back, and training and measuring it. This is the one room
that imports `transformers`, and only to train; a folder is written and read without it.
"""

from __future__ import annotations

from .card import ModelCard
from .formats import FORMATS, export
from .load import Loaded, load_export, read_config
from .provenance import Provenance

__all__ = ["FORMATS", "Loaded", "ModelCard", "Provenance", "export", "load_export", "read_config"]
