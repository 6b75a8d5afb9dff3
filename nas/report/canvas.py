"""Matplotlib, used without its global state: figures of a size in pixels, axes in the house's style, files.

Owns the importing of matplotlib's figures and the writing of PNG and SVG. What is drawn is the callers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .layout import is_log, log_ticks
from .palette import FAINT, INK, MUTED, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS = 100
RATIO = 2
FORMATS = (".png", ".svg")


def blank(size: tuple[float, float]) -> Figure:
    """An empty white figure of a size in pixels; a PNG of it has `RATIO` times as many a side, for sharp screens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A hair more than asked, because the backend cuts fractions of a pixel off.
    figure = Figure(figsize=((size[0] + 1e-3) / DOTS, (size[1] + 1e-3) / DOTS), dpi=DOTS, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, xlabel: str, ylabel: str) -> Axes:
    """Two spines, a faint grid, and words of a size to be read at 900 pixels' width."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(which="both", colors=MUTED, labelcolor=INK, labelsize=8.5, length=3)
    axes.grid(color=FAINT, lw=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, color=INK, fontsize=9)
    axes.set_ylabel(ylabel, color=INK, fontsize=9)
    return axes


def scale_memory(axes: Axes, sizes: Sequence[float]) -> None:
    """Make the axis of memory, in MiB, logarithmic where `sizes` ask for it, with ticks at round numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if is_log(sizes):
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 1.12, max(sizes) * 1.12)
        axes.xaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_xlim())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def refuse_format(path: Path) -> None:
    """Raise UserError for a file that is neither PNG nor SVG."""
    if path.suffix not in FORMATS:
        raise UserError(f"cannot draw a {path.suffix or 'file without a suffix'}", where=str(path), hint="use .png or .svg")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as the `.png` or `.svg` that the path asks for; the same figure gives the same bytes."""
    from matplotlib import rc_context

    refuse_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    nothing = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "nas"}):
        figure.savefig(path, dpi=DOTS * RATIO, metadata=nothing, facecolor=PAPER)
    return path
