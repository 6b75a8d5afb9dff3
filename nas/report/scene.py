"""Pictures made of boxes, lines and words, drawn the same as SVG and as PNG.

Owns the few marks a diagram needs and their two renderings. Coordinates are pixels from the top left. Charts with axes are
`nas.report.canvas`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .style import INK, PAPER, blank, plain, save
from .style import check_format as refuse_format

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]
FONT = "'DejaVu Sans', Verdana, sans-serif"
SIDES: dict[str, Literal["left", "center", "right"]] = {"start": "left", "middle": "center", "end": "right"}
NO_DATA: Mapping[str, object] = {}


@dataclass(frozen=True)
class Box:
    """A rectangle; `data` become `data-*` attributes of the SVG, and `tip` what a pointer resting on it shows."""

    x: float
    y: float
    width: float
    height: float
    fill: str = PAPER
    stroke: str = "none"
    radius: float = 3.0
    dashed: bool = False
    tip: str = ""
    data: Mapping[str, object] = field(default_factory=lambda: NO_DATA)

    def svg(self) -> str:
        """The element."""
        dash = ' stroke-dasharray="3 3"' if self.dashed else ""
        data = "".join(f' data-{key}="{escape(str(value))}"' for key, value in self.data.items())
        place = f'x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="{self.radius:g}"'
        tip = f"<title>{escape(self.tip)}</title>" if self.tip else ""
        return f'<rect {place} fill="{self.fill}" stroke="{self.stroke}"{dash}{data}>{tip}</rect>'

    def plot(self, axes: Axes, points: float) -> None:
        """Draw on matplotlib axes; `points` is the size of a pixel."""
        from matplotlib.patches import FancyBboxPatch

        style = f"round,pad=0,rounding_size={min(self.radius, self.width / 2, self.height / 2)}"
        patch = FancyBboxPatch((self.x, self.y), self.width, self.height, style, fc=self.fill, ec=self.stroke, lw=points)
        patch.set_linestyle((0, (3, 3)) if self.dashed else "-")
        axes.add_patch(patch)


@dataclass(frozen=True)
class Line:
    """A path through points, with an arrow head at its end if it leads somewhere."""

    points: tuple[Point, ...]
    colour: str = INK
    width: float = 1.5
    arrow: bool = False

    def svg(self) -> str:
        """The element."""
        path = " ".join(f"{x:g},{y:g}" for x, y in self.points)
        line = f'<polyline points="{path}" fill="none" stroke="{self.colour}" stroke-width="{self.width:g}"/>'
        head = " ".join(f"{x:g},{y:g}" for x, y in self._head())
        return line + (f'<polygon points="{head}" fill="{self.colour}"/>' if self.arrow else "")

    def plot(self, axes: Axes, points: float) -> None:
        """Draw on matplotlib axes; `points` is the size of a pixel."""
        from matplotlib.patches import Polygon

        xs, ys = zip(*self.points, strict=True)
        axes.plot(xs, ys, color=self.colour, lw=self.width * points, solid_capstyle="butt", solid_joinstyle="miter")
        if self.arrow:
            axes.add_patch(Polygon(self._head(), fc=self.colour, ec="none"))

    def _head(self) -> list[Point]:
        """The triangle at the end of the last leg, which is level or upright."""
        (x0, y0), (x, y) = self.points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        base_x, base_y = x - 5 * dx, y - 5 * dy
        sides = [(base_x + 3.5 * side * dy, base_y + 3.5 * side * dx) for side in (-1, 1)]
        return [(x + 1.5 * dx, y + 1.5 * dy), *sides]


@dataclass(frozen=True)
class Words:
    """Text on a line whose middle is at `y`."""

    x: float
    y: float
    text: str
    colour: str = INK
    size: float = 12.0
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False

    def svg(self) -> str:
        """The element."""
        weight = ' font-weight="600"' if self.bold else ""
        place = f'x="{self.x:g}" y="{self.y:g}" font-size="{self.size:g}" text-anchor="{self.anchor}"'
        return f'<text {place} dominant-baseline="central" fill="{self.colour}"{weight}>{escape(self.text)}</text>'

    def plot(self, axes: Axes, points: float) -> None:
        """Draw on matplotlib axes; `points` is the size of a pixel."""
        axes.text(
            self.x,
            self.y,
            plain(self.text),
            color=self.colour,
            fontsize=self.size * points,
            ha=SIDES[self.anchor],
            va="center_baseline",
            weight="bold" if self.bold else "normal",
        )


@dataclass(frozen=True)
class Scene:
    """A picture of `width` × `height` pixels; later marks lie over earlier ones. `title` is read aloud by screen readers."""

    width: float
    height: float
    marks: tuple[Box | Line | Words, ...]
    title: str = ""

    def svg(self) -> str:
        """The picture as an SVG document that needs nothing else."""
        return "\n".join((*self._head(), *(mark.svg() for mark in self.marks), "</svg>\n"))

    def _head(self) -> Iterator[str]:
        size = f'width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}"'
        yield f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FONT}">'
        yield f"<title>{escape(self.title)}</title>"
        yield f'<rect width="100%" height="100%" fill="{PAPER}"/>'

    def write(self, path: Path) -> Path:
        """Write the picture as the `.svg` or `.png` that the path asks for; a PNG has twice as many pixels a side."""
        refuse_format(path)
        if path.suffix == ".svg":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.svg(), encoding="utf-8")
            return path
        figure = blank((self.width, self.height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        for mark in self.marks:
            mark.plot(axes, POINTS)
        return save(figure, path)


_CLASSES = {"ijlI'": 0.3, "J,. ·:;/|": 0.34, "frt-()!": 0.41, "cskvxyzLFTYP": 0.62, "=+%mwMW×→…±@": 0.98}
_WIDTHS = {sign: width for signs, width in _CLASSES.items() for sign in signs}


def words_width(text: str, size: float) -> float:
    """About how wide a text is in pixels, rather more than less, in the drawings' font."""
    return size * sum(_WIDTHS.get(sign, 0.66) for sign in text)


POINTS = 0.72
"""The size of a pixel in typographers' points, at the 100 pixels an inch of `nas.report.canvas`."""
