"""The front as a figure: memory against perplexity, with its knee, its uncertainty and the presets beside it.

Owns the figure. Which points are a front is `nas.report.measured`'s; the page with the same data is `nas.report.page`'s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluate import Evaluation
from ..loading import format_bytes
from .canvas import DOTS, blank, plain, save, style
from .labels import Rectangle, nearest, place
from .measured import Measured, Panel, budget, measured_at, panels
from .palette import BLUE, INK, MUTED, PAPER, RED, tint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
LOG_FROM = 5
"""Memory is drawn on a logarithmic axis where the largest is this many times the smallest."""


def draw_front(
    evaluations: Sequence[Evaluation],
    presets: Sequence[Evaluation],
    path: Path,
    title: str = "",
    size: tuple[int, int] | None = None,
) -> Path:
    """Draw what was searched and the presets as the `.png` or `.svg` that the path asks for.

    `size` is in pixels (900 × 560 by default, 900 × 800 with two panels); a PNG has twice as many a side. Retrained and inherited
    weights get a panel each. Raises UserError for another format.
    """
    found = panels(evaluations, presets)
    figure = front_figure(found, title, size or (900, 800 if len(found) > 1 else 560))
    return save(figure, path)


def front_figure(found: Sequence[Panel], title: str, size: tuple[int, int]) -> Figure:
    """The figure, not yet written."""
    figure = blank(size)
    rows = len(found) or 1
    grid = figure.add_gridspec(rows, 1, height_ratios=(5, 3)[:rows], hspace=0.22)
    head = 34 if title else 8
    grid.update(left=64 / size[0], right=1 - 22 / size[0], top=1 - (head + 52) / size[1], bottom=56 / size[1])
    figure.text(16 / size[0], 1 - 22 / size[1], plain(title), fontsize=12, weight="bold", color=INK, va="center")
    shared: Axes | None = None
    for n, panel in enumerate(found):
        axes = figure.add_subplot(grid[n, 0], sharex=shared)
        shared = shared or axes
        _draw_panel(axes, panel, bottom=n == rows - 1)
    if shared is None:
        figure.text(0.5, 0.5, "nothing has been evaluated", color=MUTED, ha="center")
        return figure
    _scale(shared, [m.memory_bytes / MIB for panel in found for m in (*panel.searched, *panel.presets)])
    _legend(figure, shared, (10 / size[0], 1 - head / size[1]))
    for axes, panel in zip(figure.axes, found, strict=True):
        _label(axes, panel)
    return figure


def _legend(figure: Figure, axes: Axes, place: tuple[float, float]) -> None:
    handles, words = axes.get_legend_handles_labels()
    spaced = {"handletextpad": 0.5, "columnspacing": 1.4, "frameon": False, "ncols": len(words) or 1}
    figure.legend(handles, words, loc="upper left", bbox_to_anchor=place, fontsize=8.5, labelcolor=INK, **spaced)


def _draw_panel(axes: Axes, panel: Panel, bottom: bool) -> None:
    everything = [*panel.searched, *panel.presets]
    where = measured_at(everything)
    memory = f"memory, MiB ({where})" if where else "memory, MiB"
    style(axes, memory if bottom else "", "perplexity per token ± standard error")
    whiskers = "; whiskers: the range over seeds" if any(len(m.evaluations) > 1 for m in everything) else ""
    axes.set_title(f"{panel.weights} weights, {budget(everything)}{whiskers}", loc="left", fontsize=9, color=MUTED)
    off = [m for m in panel.searched if m not in panel.front]
    _dots(axes, off, tint(BLUE, 0.35), "searched")
    _steps(axes, panel.preset_front, MUTED, 1.0, "--", "")
    _errors(axes, panel.presets, MUTED)
    axes.plot(*_xy(panel.presets), "D", ms=5, mfc=PAPER, mec=MUTED, mew=1.3, label="preset" if panel.presets else "", zorder=4)
    _steps(axes, panel.front, BLUE, 1.8, "-", "")
    _errors(axes, panel.front, BLUE)
    axes.plot(*_xy(panel.front), "o-", lw=0, ms=5.5, color=BLUE, label="front of the search" if panel.front else "", zorder=5)
    if panel.knee:
        axes.plot(*_xy([panel.knee]), "o", ms=12, mfc="none", mec=RED, mew=1.8, label="knee", zorder=6)


def _dots(axes: Axes, measured: Sequence[Measured], colour: str, label: str) -> None:
    if measured:
        axes.plot(*_xy(measured), "o", ms=4 if len(measured) < 300 else 2.5, mew=0, color=colour, label=label, zorder=2)


def _steps(axes: Axes, members: Sequence[Measured], colour: str, width: float, dashes: str, label: str) -> None:
    """Between two members of a front the best that fits is the smaller one's: level, then down."""
    if members:
        axes.step(*_xy(members), where="post", color=colour, lw=width, ls=dashes, label=label, zorder=3)


def _errors(axes: Axes, measured: Sequence[Measured], colour: str) -> None:
    """A thick bar of one standard error over windows, a thin one from the lowest to the highest seed."""
    for m in measured:
        x = m.memory_bytes / MIB
        if math.isfinite(m.standard_error):
            low, high = m.perplexity - m.standard_error, m.perplexity + m.standard_error
            axes.plot([x, x], [low, high], color=colour, lw=2.6, alpha=0.35, solid_capstyle="butt", zorder=3)
        if len(m.evaluations) > 1:
            axes.plot([x, x], [min(m.perplexities), max(m.perplexities)], "_-", color=colour, lw=1, ms=5, zorder=3)


def _xy(measured: Sequence[Measured]) -> tuple[list[float], list[float]]:
    return [m.memory_bytes / MIB for m in measured], [m.perplexity for m in measured]


def is_log(memory: Sequence[float]) -> bool:
    """Whether memory of this range is drawn on a logarithmic axis."""
    return bool(memory) and max(memory) >= LOG_FROM * min(memory)


def _scale(axes: Axes, memory: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if not is_log(memory):
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7), numticks=99))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _label(axes: Axes, panel: Panel) -> None:
    """Names beside the presets, the bytes beside the knee; a thin line leads to a label that had to go far."""
    marks = [(m, m.label) for m in panel.presets]
    if panel.knee:
        marks.append((panel.knee, f"knee: {format_bytes(panel.knee.memory_bytes)}, {panel.knee.perplexity:.4g}"))
    anchors = [_pixel(axes, m) for m, _ in marks]
    sizes = [_extent(axes, text) for _, text in marks]
    rectangles = place(anchors, sizes, _obstacles(axes, panel), _frame(axes))
    for (m, text), anchor, rectangle in zip(marks, anchors, rectangles, strict=True):
        colour = RED if m is panel.knee and text.startswith("knee") else INK
        _write(axes, text, colour, anchor, rectangle)


def _write(axes: Axes, text: str, colour: str, anchor: tuple[float, float], rectangle: Rectangle) -> None:
    """In inches, because the file may have more pixels than the figure was laid out with."""
    from matplotlib.lines import Line2D

    figure = axes.figure
    inches, edge = figure.dpi_scale_trans, nearest(rectangle, anchor)
    if math.dist(edge, anchor) > 12:
        start = 6 / math.dist(edge, anchor)  # at the edge of the mark, not in its middle
        xs, ys = ([(a + (b - a) * start) / DOTS, b / DOTS] for a, b in zip(anchor, edge, strict=True))
        figure.add_artist(Line2D(xs, ys, color=MUTED, lw=0.6, transform=inches))
    x, y = (rectangle[0] + rectangle[2]) / 2 / DOTS, (rectangle[1] + rectangle[3]) / 2 / DOTS
    figure.text(x, y, plain(text), color=colour, fontsize=8, ha="center", va="center", transform=inches)


def _pixel(axes: Axes, measured: Measured) -> tuple[float, float]:
    x, y = axes.transData.transform((measured.memory_bytes / MIB, measured.perplexity))
    return float(x), float(y)


def _extent(axes: Axes, text: str) -> tuple[float, float]:
    """The size of a label in pixels, with a little air."""
    probe = axes.text(0, 0, text, fontsize=8)
    box = probe.get_window_extent()
    probe.remove()
    return box.width + 4, box.height + 2


def _frame(axes: Axes) -> Rectangle:
    box = axes.get_window_extent()
    return box.x0 + 2, box.y0 + 2, box.x1, box.y1


def _obstacles(axes: Axes, panel: Panel) -> list[Rectangle]:
    """What no label may cover: marks, their error bars, and the front's steps."""
    found: list[Rectangle] = []
    for m in (*panel.presets, *panel.front):
        x, y = _pixel(axes, m)
        reach = 9 if m is panel.knee else 5
        found.append((x - reach, y - reach, x + reach, y + reach))
        error = m.standard_error if math.isfinite(m.standard_error) else 0.0
        low, high = min((*m.perplexities, m.perplexity - error)), max((*m.perplexities, m.perplexity + error))
        (_, bottom), (_, top) = axes.transData.transform([(1, low), (1, high)])
        found.append((x - 2, bottom, x + 2, top))
    for line in (panel.front, panel.preset_front):
        for left, right in itertools.pairwise(line):
            (x0, y0), (x1, y1) = _pixel(axes, left), _pixel(axes, right)
            found += [(x0, y0 - 2, x1, y0 + 2), (x1 - 2, y1, x1 + 2, y0)]
    return found
