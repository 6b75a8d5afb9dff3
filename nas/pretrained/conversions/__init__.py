"""From a trained model that shares nothing to one that shares: the published conversions, each a row of `METHODS`.

Owns how the trained weights and a calibration text choose what is shared, what the shared weights begin as, and the training that
heals. It reads and writes no folder, and measures no perplexity: what is made of a conversion is its caller's.
"""

from __future__ import annotations

from .bank import start_bank
from .heal import draw_together, heal
from .methods import METHODS, choose, convert, find, require_dense
from .rows import Dense, Method, spell

__all__ = [
    "METHODS",
    "Dense",
    "Method",
    "choose",
    "convert",
    "draw_together",
    "find",
    "heal",
    "require_dense",
    "spell",
    "start_bank",
]
