"""The front as a figure: memory against perplexity, with its knee, its uncertainty and the presets beside it.

Owns the figure. Which points are a front is `nas.report.measured`'s; the page with the same data is `nas.report.page`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.evaluation import Evaluation
from .canvas import DOTS, blank, plain, refuse_format, save, scale_memory, style
from .labels import nearest
from .layout import MIB, PERPLEXITY, Callout, callouts, memory_title
from .measured import MeasuredConfig, Panel, budget, measured_at, panels
from .palette import BLUE, INK, MUTED, PAPER, RED, tint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def draw_front(evaluations: Sequence[Evaluation], path: Path, title: str = "", size: tuple[int, int] | None = None) -> Path:
    """Draw evaluations, presets (those with a name) and searched alike, as the `.png` or `.svg` that the path asks for.

    `size` is in pixels (900 × 560 by default, and 240 more for each panel beyond the first); a PNG has twice as many a side. Each
    origin of weights gets a panel. Raises UserError for another format.
    """
    refuse_format(path)
    found = panels(evaluations)
    figure = front_figure(found, title, size or (900, 560 + 240 * max(len(found) - 1, 0)))
    return save(figure, path)


def front_figure(found: Sequence[Panel], title: str, size: tuple[int, int]) -> Figure:
    """The figure, not yet written."""
    figure = blank(size)
    rows = len(found) or 1
    grid = figure.add_gridspec(rows, 1, height_ratios=(5, *[3] * (rows - 1)), hspace=0.22)
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
    scale_memory(shared, [m.memory_bytes / MIB for panel in found for m in panel.all])
    _legend(figure, shared, (10 / size[0], 1 - head / size[1]))
    for axes, panel in zip(figure.axes, found, strict=True):
        _label(axes, panel)
    return figure


def _legend(figure: Figure, axes: Axes, place: tuple[float, float]) -> None:
    handles, words = axes.get_legend_handles_labels()
    spaced = {"handletextpad": 0.5, "columnspacing": 1.4, "frameon": False, "ncols": len(words) or 1}
    figure.legend(handles, words, loc="upper left", bbox_to_anchor=place, fontsize=8.5, labelcolor=INK, **spaced)


def _draw_panel(axes: Axes, panel: Panel, bottom: bool) -> None:
    style(axes, memory_title(measured_at(panel.all)) if bottom else "", PERPLEXITY)
    whiskers = "; whiskers: the range over seeds" if any(len(m.evaluations) > 1 for m in panel.all) else ""
    axes.set_title(f"{panel.title}, {budget(panel.all)}{whiskers}", loc="left", fontsize=9, color=MUTED)
    _dots(
        axes, panel.searched, "o", "searched", ms=4 if len(panel.searched) < 300 else 2.5, mew=0, color=tint(BLUE, 0.35), zorder=2
    )
    _steps(axes, panel.preset_front, color=MUTED, lw=1.0, ls="--", label="presets alone")
    _errors(axes, panel.presets, MUTED)
    _dots(axes, panel.presets, "D", "preset", ms=5, mfc=PAPER, mec=MUTED, mew=1.3)
    _steps(axes, panel.front, color=BLUE, lw=1.8)
    _errors(axes, panel.front, BLUE)
    _dots(axes, [m for m in panel.front if not m.names], "o", "front", ms=5.5, color=BLUE)
    _dots(axes, [m for m in panel.front if m.names], "D", "front, a preset", ms=5.5, color=BLUE)
    _dots(axes, [panel.knee] if panel.knee else [], "o", "knee", ms=12, mfc="none", mec=RED, mew=1.8)


def _dots(axes: Axes, measured: Sequence[MeasuredConfig], sign: str, label: str, **look: Any) -> None:
    if measured:
        axes.plot(*_xy(measured), sign, lw=0, label=label, **{"zorder": 4, **look})


def _steps(axes: Axes, members: Sequence[MeasuredConfig], **look: Any) -> None:
    """Between two members of a front the best that fits is the smaller one's: level, then down."""
    if members:
        axes.step(*_xy(members), where="post", zorder=3, **look)


def _errors(axes: Axes, measured: Sequence[MeasuredConfig], colour: str) -> None:
    """A thick bar of one standard error over windows, a thin one from the lowest to the highest seed."""
    for m in measured:
        x = m.memory_bytes / MIB
        if math.isfinite(m.standard_error):
            low, high = m.perplexity - m.standard_error, m.perplexity + m.standard_error
            axes.plot([x, x], [low, high], color=colour, lw=2.6, alpha=0.35, solid_capstyle="butt", zorder=3)
        if len(m.evaluations) > 1:
            axes.plot([x, x], [min(m.perplexities), max(m.perplexities)], "_-", color=colour, lw=1, ms=5, zorder=3)


def _xy(measured: Sequence[MeasuredConfig]) -> tuple[list[float], list[float]]:
    return [m.memory_bytes / MIB for m in measured], [m.perplexity for m in measured]


def _label(axes: Axes, panel: Panel) -> None:
    """Labels, each joined to its point by a thin line where it had to go far."""
    axes.autoscale_view()  # matplotlib puts it off until it draws, and `transData` does not ask for it

    def pixel(memory: float, perplexity: float) -> tuple[float, float]:
        x, y = axes.transData.transform((memory, perplexity))
        return float(x), float(y)

    def size(text: str) -> tuple[float, float]:
        probe = axes.text(0, 0, plain(text), fontsize=8)
        box = probe.get_window_extent()
        probe.remove()
        return box.width + 4, box.height + 2

    box = axes.get_window_extent()
    for callout in callouts(panel, pixel, size, (box.x0 + 2, box.y0 + 2, box.x1, box.y1)):
        write_callout(axes.figure, callout)


def write_callout(figure: Figure | SubFigure, callout: Callout) -> None:
    """A label and its line. In inches, because the file may have more pixels than the figure was laid out with."""
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    inches, anchor, edge = figure.dpi_scale_trans, callout.anchor, nearest(callout.place, callout.anchor)
    if math.dist(edge, anchor) > 12:
        start = 6 / math.dist(edge, anchor)  # at the edge of the mark, not in its middle
        xs, ys = ([(a + (b - a) * start) / DOTS, b / DOTS] for a, b in zip(anchor, edge, strict=True))
        figure.add_artist(Line2D(xs, ys, color=MUTED, lw=0.6, transform=inches))
    x, y = (side / DOTS for side in callout.middle)
    colour = RED if callout.is_knee else INK
    words = figure.text(x, y, plain(callout.text), color=colour, fontsize=8, ha="center", va="center", transform=inches)
    words.set_path_effects([withStroke(linewidth=2, foreground=PAPER)])
