"""What all figures have in common: colours, a blank figure, styled axes, labels that cover nothing, and the files.

Owns every import of matplotlib's figures and of textalloc; pyplot's global state is not used. The hues are Paul Tol's "bright"
scheme, which stays distinguishable for the common kinds of colour blindness; no fact is told by colour alone.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout, suppress
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

with suppress(OSError):  # matplotlib's cache of fonts: not in the user's home, which may not be there
    _CACHE = Path(tempfile.gettempdir()) / f"nas-matplotlib-{os.getuid()}"
    _CACHE.mkdir(mode=0o700, exist_ok=True)
    if _CACHE.lstat().st_uid == os.getuid():
        os.environ.setdefault("MPLCONFIGDIR", str(_CACHE))

MIB = 2**20
INK, MUTED, FAINT, PAPER = "#1f2933", "#5f6c7b", "#d9dee4", "#ffffff"
OWNED = "#b4bfcb"
"""A part that only its own layer uses."""
BLUE, RED, GREEN, YELLOW, CYAN, PURPLE = "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"
LAYERS = (BLUE, RED, GREEN, YELLOW, PURPLE, CYAN)  # the colours of source layers, in turn

DPI = 100
LOG_RATIO = 5  # an objective has a logarithmic axis where the largest is this many times the smallest
BROKEN_RATIO = 10  # and perplexity, where the highest is this many times the lowest: more than models differ that work
PERPLEXITY = "perplexity per token"
PERPLEXITY_ERROR = f"{PERPLEXITY} ± standard error"


def layer_colours(sources: Iterable[int]) -> dict[int, str]:
    """A colour for each source layer. Neighbours differ; where colours repeat, the labels tell the layers apart."""
    return {layer: LAYERS[n % len(LAYERS)] for n, layer in enumerate(sorted(sources))}


def tint(colour: str, strength: float) -> str:
    """A colour mixed with white; 1 is the colour, 0 is white."""
    return "#" + "".join(f"{round(255 + (channel - 255) * strength):02x}" for channel in bytes.fromhex(colour[1:]))


def shades(values: Sequence[float]) -> list[str]:
    """Colours from dark to light, by how large values are."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    low, high = min(values, default=0.0), max(values, default=0.0)
    return [to_hex(colormaps["viridis"](0.95 * (value - low) / (high - low or 1.0))) for value in values]


def ink_on(colour: str) -> str:
    """Dark or white text, whichever has more contrast on a colour (relative luminance of WCAG 2)."""
    red, green, blue = ((c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in bytes.fromhex(colour[1:]))
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.22 else PAPER


def blank(size: tuple[float, float]) -> Figure:
    """An empty white figure of a size in pixels; a PNG of it has twice as many a side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The backend rounds down, so add a fraction of a pixel.
    figure = Figure(figsize=((size[0] + 0.1) / DPI, (size[1] + 0.1) / DPI), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, xlabel: str, ylabel: str) -> Axes:
    """Two spines, a faint grid, and text legible at a width of 900 pixels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(which="both", colors=MUTED, labelcolor=INK, labelsize=8.5, length=3)
    axes.grid(color=FAINT, lw=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, color=INK, fontsize=9)
    axes.set_ylabel(ylabel, color=INK, fontsize=9)
    return axes


def write_title(figure: Figure, title: str) -> None:
    """A bold title in the top left corner."""
    width, height = figure.get_size_inches() * DPI
    figure.text(16 / width, 1 - 22 / height, plain(title), fontsize=12, weight="bold", color=INK, va="center")


def write_legend(figure: Figure, axes: Axes, top: float) -> None:
    """The legend of some axes in one row, `top` pixels below the figure's upper edge."""
    width, height = figure.get_size_inches() * DPI
    handles, words = axes.get_legend_handles_labels()
    look = {"fontsize": 8.5, "labelcolor": INK, "frameon": False, "handletextpad": 0.5, "columnspacing": 1.4}
    corner = (10 / width, 1 - top / height)
    figure.legend(handles, words, loc="upper left", bbox_to_anchor=corner, ncols=max(len(words), 1), **look)


def scale_memory(axes: Axes, sizes: Sequence[float]) -> None:
    """Make the x axis, of memory or another objective, logarithmic with round ticks where the range of `sizes` asks for it."""
    if sizes and max(sizes) >= LOG_RATIO * min(sizes) > 0:
        _scale_log(axes, "x", sizes)


def scale_perplexity(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic where broken models would leave the others no room."""
    if values and max(values) >= BROKEN_RATIO * min(values) > 0:
        _scale_log(axes, "y", values)


def _scale_log(axes: Axes, name: Literal["x", "y"], values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    limits = (min(values) / 1.12, max(values) * 1.12)
    axes.set(**{f"{name}scale": "log", f"{name}lim": limits})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(log_ticks(*limits)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_tick(value)))


def short_tick(tick: float) -> str:
    """A tick's number in four characters where it can be: 30, 2000, 5e4."""
    return f"{tick:g}" if tick < 1e4 else re.sub(r"e\+0?", "e", f"{tick:.0e}")


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 3, 5, 7 and their decades between two numbers; only 1, 2, 5 or 1 where that is more than a dozen."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for firsts in ((1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [float(f"{first}e{decade}") for decade in decades for first in firsts]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 12:
            break
    return ticks


Points = Sequence[tuple[float, float]]


def write_labels(axes: Axes, points: Points, texts: Sequence[str], marks: Points, lines: Sequence[Points]) -> list[Text | None]:
    """Write a text beside each point, over no mark, line or other text, and join it to its point by a thin line.

    All in data coordinates; call it when limits and scales are final. Earlier texts have precedence; None stands for a text that
    found no room.
    """
    if not texts:
        return []
    from matplotlib.patheffects import withStroke
    from textalloc import allocate

    with redirect_stdout(StringIO()):  # textalloc prints where no text finds room
        _, _, written, _ = allocate(
            axes,
            *map(list, zip(*points, strict=True)),
            [plain(text) for text in texts],
            x_scatter=[x for x, _ in marks],
            y_scatter=[y for _, y in marks],
            x_lines=[[x for x, _ in line] for line in lines],
            y_lines=[[y for _, y in line] for line in lines],
            textsize=8,
            textcolor=INK,
            linecolor=MUTED,
            linewidth=0.6,
            margin=0.006,
            min_distance=0.01,
            max_distance=0.2,
            nbr_candidates=800,
            draw_all=False,
            va="center",
        )
    for text in written:
        if text is not None:
            text.set_path_effects([withStroke(linewidth=2, foreground=PAPER)])
    return written


def plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def check_format(path: Path) -> None:
    """Raise UserError for a file that is neither PNG nor SVG."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"cannot draw a {path.suffix or 'file without a suffix'}", where=str(path), hint="use .png or .svg")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as the `.png` or `.svg` that the path asks for; the same figure gives the same bytes."""
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render(figure, path.suffix[1:]))
    return path


def render(figure: Figure, kind: str, title: str = "") -> bytes:
    """A figure as `png` or `svg`. The text of an SVG stays text; `title` is what a screen reader says of it."""
    from matplotlib import rc_context

    undated: dict[str, str | None] = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    undated |= {"Title": title} if title else {}
    buffer = BytesIO()
    with rc_context({"svg.hashsalt": "nas", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=2 * DPI, metadata=undated, facecolor=PAPER)
    return buffer.getvalue()
