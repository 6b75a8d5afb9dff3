"""Conversions of a trained dense model to one that shares, each a row of `METHODS`, and a supernet initialised from such a model.

Owns how the trained weights and a calibration text choose what is shared, how the shared weights are initialised, and the
fine-tuning that follows ("healing", in pruning papers). It reads and writes no folder and measures no perplexity.
"""

from __future__ import annotations

from .calibration import PretrainedModel
from .initialise import init_from_pretrained
from .methods import METHODS, Conversion, align_heads, choose, convert, find, fine_tune, require_dense, spell

__all__ = [
    "METHODS",
    "Conversion",
    "PretrainedModel",
    "align_heads",
    "choose",
    "convert",
    "find",
    "fine_tune",
    "init_from_pretrained",
    "require_dense",
    "spell",
]
