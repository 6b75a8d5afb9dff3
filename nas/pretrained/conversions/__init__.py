"""From a trained model that shares nothing to one that shares: the published conversions, each a row of `METHODS`.

Owns how the trained weights and a calibration text choose what is shared, what the shared weights begin as, and the training that
heals. It reads and writes no folder, and measures no perplexity: what is made of a conversion is its caller's.
"""

from __future__ import annotations

from .bank import init_from_pretrained
from .fine_tune import align_heads, fine_tune
from .methods import METHODS, choose, convert, find, require_dense
from .rows import Method, PretrainedModel, spell

__all__ = [
    "METHODS",
    "Method",
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
