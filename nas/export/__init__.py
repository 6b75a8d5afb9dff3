"""Exported folders: a model as a folder that other software loads and trains; and loading, training and evaluating it.

Owns the formats (`FORMATS`), a folder's files and the code that is copied into it. This is the one room that imports
`transformers`, and only to train: a folder is written and read without it.
"""

from __future__ import annotations

from .card import ModelCard, Provenance
from .formats import FORMATS, export
from .load import Loaded, load_export, read_config
from .trainers import TRAINERS, Start

__all__ = ["FORMATS", "TRAINERS", "Loaded", "ModelCard", "Provenance", "Start", "export", "load_export", "read_config"]
