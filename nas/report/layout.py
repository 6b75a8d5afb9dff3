"""What the figure of the front and its page have in common: the scale of memory, its ticks, and where the labels go.

Owns no drawing. The search for free places is `nas.report.labels`'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config import format_bytes
from .labels import Rectangle, place
from .measured import MeasuredConfig, Panel

MIB = 2**20
LOG_FROM = 5
"""Memory is drawn on a logarithmic axis where the largest is this many times the smallest."""

AIR = 2
"""Pixels around a label's words on all sides together."""

PERPLEXITY = "perplexity per token ± standard error"

ToPixel = Callable[[float, float], tuple[float, float]]
"""From `(MiB, perplexity)` to pixels."""


def is_log(memory: Sequence[float]) -> bool:
    """Whether memory of this range is drawn on a logarithmic axis."""
    return bool(memory) and max(memory) >= LOG_FROM * min(memory)


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 3, 5, 7 and their decades between two numbers; only 1, 2, 5 or 1 where that is more than a dozen."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for firsts in ((1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [float(f"{first}e{decade}") for decade in decades for first in firsts]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 12:
            break
    return ticks


def memory_title(where: str) -> str:
    """The words beside the axis of memory."""
    return f"memory, MiB ({where})" if where else "memory, MiB"


def extent(measured: MeasuredConfig) -> tuple[float, float]:
    """The lowest and highest perplexity that a mark shows: its standard error and its seeds."""
    error = measured.standard_error if math.isfinite(measured.standard_error) else 0.0
    low, high = measured.perplexity - error, measured.perplexity + error
    return min(low, *measured.perplexities), max(high, *measured.perplexities)


@dataclass(frozen=True)
class Callout:
    """A label: its words, the point it belongs to, and its place, in pixels."""

    text: str
    anchor: tuple[float, float]
    place: Rectangle
    is_knee: bool

    @property
    def middle(self) -> tuple[float, float]:
        """The middle of its place."""
        left, low, right, high = self.place
        return (left + right) / 2, (low + high) / 2


def callouts(panel: Panel, pixel: ToPixel, size: Callable[[str], tuple[float, float]], frame: Rectangle) -> list[Callout]:
    """Names beside the presets and figures beside the knee, over no other; `size(text)` is a label's, in pixels.

    Where there is no room for all, those off the front go without.
    """
    marks = [(m, m.label) for m in sorted(panel.presets, key=lambda m: _rank(m, panel)) if m is not panel.knee]
    if panel.knee:
        words = " = ".join(("knee", *panel.knee.names))
        marks.insert(0, (panel.knee, f"{words}: {format_bytes(panel.knee.memory_bytes)}, {panel.knee.perplexity:.4g}"))
    anchors = [pixel(m.memory_bytes / MIB, m.perplexity) for m, _ in marks]
    places = place(anchors, [size(text) for _, text in marks], _obstacles(panel, pixel), frame)
    found: list[Callout] = []
    for (m, text), anchor, where in zip(marks, anchors, places, strict=True):
        if not any(_overlap(where, other.place) for other in found):
            found.append(Callout(text, anchor, where, m is panel.knee))
    return found


def _rank(m: MeasuredConfig, panel: Panel) -> int:
    """0 on the front, 1 on the presets' own, 2 the dense model, 3 the others."""
    kinds: tuple[Sequence[MeasuredConfig | None], ...] = (panel.front, panel.preset_front, [panel.dense])
    return next((n for n, kind in enumerate(kinds) if any(m is other for other in kind)), len(kinds))


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    """Whether words lie over words: their places have some air around them, which may overlap."""
    return a[0] + AIR < b[2] and b[0] + AIR < a[2] and a[1] + AIR < b[3] and b[1] + AIR < a[3]


def _obstacles(panel: Panel, pixel: ToPixel) -> list[Rectangle]:
    """What no label may cover: marks, their error bars, and the steps of the fronts."""
    found: list[Rectangle] = []
    for m in (*panel.presets, *panel.front):
        x, y = pixel(m.memory_bytes / MIB, m.perplexity)
        reach = 9 if m is panel.knee else 5
        found.append((x - reach, y - reach, x + reach, y + reach))
        ends = sorted(pixel(m.memory_bytes / MIB, end)[1] for end in extent(m))
        found.append((x - 2, ends[0], x + 2, ends[1]))
    for line in (panel.front, panel.preset_front):
        for left, right in itertools.pairwise(line):
            (x0, y0), (x1, y1) = (pixel(m.memory_bytes / MIB, m.perplexity) for m in (left, right))
            found += [(x0, y0 - 2, x1, y0 + 2), (x1 - 2, min(y0, y1), x1 + 2, max(y0, y1))]
    return found
