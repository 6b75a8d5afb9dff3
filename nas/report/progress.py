"""How a search got on: hypervolume over evaluations.

Owns the curve. What is a front's hypervolume, and against which corner, is `nas.pareto`'s and the search's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .canvas import blank, plain, save, style
from .palette import LAYERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_progress(curves: Mapping[str, Sequence[float]], path: Path, size: tuple[int, int] = (900, 380)) -> Path:
    """Draw the hypervolume after each evaluation, a curve for each search, as the `.png` or `.svg` that the path asks for.

    The largest is 1, so that only ratios are shown. Each curve has its name at its end. `size` is in pixels.
    """
    figure = blank(size)
    right = 18 + 6.5 * max((len(name) for name in curves), default=0)
    left, low = 62 / size[0], 50 / size[1]
    place = (left, low, 1 - left - right / size[0], 1 - low - 18 / size[1])
    axes = style(figure.add_axes(place), "evaluations", "hypervolume (largest = 1)")
    largest = max((max(values) for values in curves.values() if len(values)), default=1.0) or 1.0
    ends = []
    for n, (name, values) in enumerate(curves.items()):
        colour, shown = LAYERS[n % len(LAYERS)], [value / largest for value in values]
        axes.plot(range(1, len(shown) + 1), shown, drawstyle="steps-post", color=colour, lw=1.8)
        ends += [(shown[-1], len(shown), name, colour)] if shown else []
    _name(axes, sorted(ends, reverse=True), 16 / (size[1] * place[3]))
    return save(figure, path)


def _name(axes: Axes, ends: Sequence[tuple[float, int, str, str]], least: float) -> None:
    """Names at the curves' ends, from the highest down, `least` of the axis' height apart."""
    bottom, top = axes.get_ylim()
    last = math.inf
    for height, x, name, colour in ends:
        last = min(height, last - least * (top - bottom))
        words = axes.annotate(plain(name), (x, last), (8, 0), textcoords="offset points", annotation_clip=False)
        words.set(color=colour, fontsize=9, va="center")
