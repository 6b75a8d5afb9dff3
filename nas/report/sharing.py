"""The picture of who shares what: layers as rows, the first on top, and bytes by part beside them.

Owns the drawing of a `Picture` as PNG and SVG. Grey is a part that only its own layer uses. A part that other layers use too has
its layer's colour; where it is used, a pale box in that colour names the source layer, and an arrow leads to it. Arrows go down,
but for keys and values that are read from a later layer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import format_bytes
from ..sharing.memory import MemorySpec
from ..sharing.picture import CACHE, NORM_PARTS, Picture, Row, Segment, picture
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .style import DPI, FAINT, INK, MUTED, OWNED, PAPER, blank, check_format, ink_on, layer_colours, plain, render, tint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN, HEAD, STRIP, ARROW = 24, 100, 9, 12
"""In pixels: the margin, the height of the title and the headings, the width of a norm's box, the least length of an arrow."""
COLUMNS = {"attention": 150, "FFN": 132, CACHE: 76}  # the columns of boxes and their least widths in pixels
FONT_SIZE = 8  # in points, of 100 / 72 pixels

_TIPS = {
    "own": "its own {parts}",
    "tied": "{parts} of layer {owner}",
    "mixed": "its own {parts} of what layer {owner} keeps",
    "map": "the softmax map of layer {owner}",
    "none": "no {parts}",
    "dropped": "no {parts}: not run",
}


def draw_sharing(shape: ModelShape, config: SharingConfig, path: Path, spec: MemorySpec | None = None, name: str = "") -> Path:
    """Draw a config in a model as the `.svg` or `.png` that the path asks for. Raises UserError for another format."""
    return draw_side_by_side([picture(shape, config, spec or MemorySpec(), name)], path)


def draw_side_by_side(contents: Sequence[Picture], path: Path) -> Path:
    """Draw pictures beside each other, as `draw_sharing` draws one."""
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_svg(*contents).encode() if path.suffix == ".svg" else render(_drawn(contents), "png"))
    return path


def _drawn(contents: Sequence[Picture]) -> Figure:
    figure = blank((100, 100))
    drawings, left = [SharingDrawing(content, figure) for content in contents], 0
    height = max(drawing.size[1] for drawing in drawings)
    for drawing in drawings:
        drawing.place(left, height)
        left += drawing.size[0]
    figure.set_size_inches((left + 0.1) / DPI, (height + 0.1) / DPI)
    return figure


def sharing_svg(shape: ModelShape, config: SharingConfig, spec: MemorySpec | None = None, name: str = "") -> str:
    """The same picture as an `<svg>` element."""
    svg = _svg(picture(shape, config, spec or MemorySpec(), name))
    return svg[svg.index("<svg") :]


def _svg(*contents: Picture) -> str:
    """The SVG document, in which the ids of boxes have become what a pointer that rests on them shows."""
    title = "; ".join(f"Who shares what in {content.name}: {content.headline}" for content in contents)
    svg = render(_drawn(contents), "svg", title).decode()
    return re.sub(r'<g id="(layer \d+: [^"]*)">', r"<g><title>\1</title>", svg)


@dataclass(frozen=True)
class _Link:
    """An arrow from a source layer to others in one column, `lane` places to the left of the boxes."""

    source: int
    layers: tuple[int, ...]
    lane: int

    @property
    def ends(self) -> tuple[int, int]:
        return min(self.source, *self.layers), max(self.source, *self.layers)


class SharingDrawing:
    """Draws one picture, column by column, on a figure of its own or one that holds others. Coordinates are pixels from the
    picture's top left corner. The ids (`gid`) of boxes say what they show: `layer 3: q k of layer 0`."""

    def __init__(self, content: Picture, figure: Figure | None = None) -> None:
        from matplotlib.transforms import Affine2D

        self.content, self.figure, self._scale = content, figure or blank((100, 100)), Affine2D()
        self.transform = self._scale + self.figure.dpi_scale_trans
        self.colours = layer_colours({source for _, source in content.shared})
        depth = len(content.rows)
        self.pitch = 34 if depth <= 8 else 28 if depth <= 16 else 21
        self.height = self.pitch - (8 if self.pitch > 24 else 5)
        self.layers = [self._y(row.layer + 1) for row in content.rows]
        self.places = [self._y(0), *self.layers, self._y(depth + 1)]
        self.size = self._draw()
        self.place(0, self.size[1])
        self.figure.set_size_inches((self.size[0] + 0.1) / DPI, (self.size[1] + 0.1) / DPI)

    def place(self, left: float, height: float) -> None:
        """Put the picture's left edge at `left` pixels, in a figure of a height in pixels."""
        self._scale.clear().scale(1 / DPI, -1 / DPI).translate(left / DPI, height / DPI)

    def _y(self, place: int) -> float:
        """The middle of a row: 0 is the embedding, layer i is i + 1."""
        return HEAD + self.pitch * (place + 0.5)

    def _draw(self) -> tuple[int, int]:
        content, rows = self.content, self.content.rows
        titles = [
            self._text(MARGIN, 26, content.name, fontsize=12.2, weight="bold"),
            self._text(MARGIN, 49, content.headline, fontsize=8.7),
            self._text(MARGIN, 67, content.subtitle, color=MUTED),
        ]
        self._column(MARGIN, "layer", ["in", *(str(row.layer) for row in rows), "out"], self.places, bold=self.layers)
        lefts, x = [], MARGIN + 38.0
        for column in COLUMNS:
            left, x = self._boxes(column, x)
            lefts.append((left, x))
        self._ends(lefts[0][0], lefts[1][1])
        x = self._column(x + 8, "", [row.reads for row in rows], self.layers) + 14
        if any(row.also for row in rows):
            x = self._column(x, "also", [row.also for row in rows], self.layers, color=MUTED) + 10
        outside = {part.part: part.bytes for part in content.parts}
        weights = [outside["embedding"], *(row.weight_bytes for row in rows), outside.get("head", 0)]
        x = self._column(x, "own weights", [_size(n) for n in weights], self.places, right=True) + 14
        x = self._column(x, "own cache", [_size(row.kv_cache_bytes) for row in rows], self.layers, right=True)
        right, panel_bottom = self._bytes_by_part(x + 34)
        bottom = max(self._y(len(rows) + 1) + self.pitch, panel_bottom + 26)
        legend_right = self._legend(bottom + 10)
        return round(max(right, legend_right, *titles)) + MARGIN, round(bottom) + 40

    # Text.

    def _text(self, x: float, y: float, text: str, **look: Any) -> float:
        """Write a line whose middle is at `y`; returns its right edge, if `x` is its left."""
        look = {"fontsize": FONT_SIZE, "color": INK, "va": "center_baseline", **look}
        self.figure.text(x, y, plain(text), transform=self.transform, **look)
        return x + text_width(text, look["fontsize"], look.get("weight", "normal"))

    def _column(
        self,
        x: float,
        head: str,
        texts: Sequence[str],
        ys: Sequence[float],
        right: bool = False,
        bold: Collection[float] = (),
        **look: Any,
    ) -> float:
        """Write texts below each other and a heading above; the lines at heights in `bold` are bold. Returns the right edge."""
        weights = ["bold" if y in bold else "normal" for y in ys]
        edge = x + max(text_width(head), *(text_width(t, weight=w) for t, w in zip(texts, weights, strict=True)))
        place, align = (edge, "right") if right else (x, "left")
        self._text(place, HEAD - 9, head, color=MUTED, ha=align)
        for text, y, weight in zip(texts, ys, weights, strict=True):
            dim = {"color": MUTED} if text in ("–", "none", "in", "out") else {}
            self._text(place, y, text, ha=align, weight=weight, **{**look, **dim})
        return edge

    # Boxes.

    def _box(self, left: float, middle: float, width: float, height: float, **look: Any) -> None:
        from matplotlib.patches import FancyBboxPatch

        shape = f"round,pad=0,rounding_size={min(3, width / 2, height / 2)}"
        look = {"lw": 0.72, "transform": self.transform, **look}
        self.figure.add_artist(FancyBboxPatch((left, middle - height / 2), width, height, shape, **look))

    def _line(self, points: Sequence[tuple[float, float]], **look: Any) -> None:
        from matplotlib.lines import Line2D

        self.figure.add_artist(Line2D(*zip(*points, strict=True), solid_joinstyle="miter", transform=self.transform, **look))

    def _part(self, row: Row, segment: Segment, left: float, width: float) -> None:
        """A segment's box with its words: solid if the layer owns it, pale if another layer does, dashed if there is none."""
        parts, owner, y = " ".join(segment.parts), segment.owner, self.layers[row.layer]
        tip = f"layer {row.layer}: {_TIPS[segment.how].format(parts=parts, owner=owner)}"
        look: dict[str, Any] = {"gid": f"{tip}, {segment.detail}" if segment.detail else tip}
        ink = MUTED if segment.how == "dropped" else INK
        if owner is None:
            look |= {"fc": PAPER, "ec": FAINT, "ls": (0, (3, 3))}
        else:
            fill = self.colours[owner] if any((part, owner) in self.content.shared for part in segment.parts) else OWNED
            own = segment.how == "own"
            look |= {"fc": fill, "ec": "none"} if own else {"fc": tint(fill, 0.22), "ec": fill}
            ink = ink_on(fill) if own else ink
        self._box(left, y, width, self.height, **look)
        if segment.text and text_width(segment.text) <= width:
            self._text(left + width / 2, y, segment.text, color=ink, ha="center")

    def _boxes(self, column: str, x: float) -> tuple[float, float]:
        """A column of boxes and the arrows to its left, from `x` on; returns its left and its right edge."""
        rows = self.content.rows
        segments = [{"attention": row.attention, "FFN": row.ffn, CACHE: row.cache}[column] for row in rows]
        strip = 0 if column == CACHE else STRIP
        links = _links(segments)
        lanes = 1 + max((link.lane for link in links), default=-1)
        edge = x + ARROW + lanes * (7 if lanes <= 4 else 4.5)
        left, needed = edge + strip, [[text_width(s.text) + 14 for s in of_row] for of_row in segments]
        width = max(COLUMNS[column], *map(sum, needed))
        self._text(left, HEAD - 9, column, weight="bold")
        for link in links:
            self._link(link, lanes, edge - 1)
        for row, of_row, least in zip(rows, segments, needed, strict=True):
            if column == CACHE:
                self._cache(row, left, width)
                continue
            norm = row.norms[0 if column == "attention" else 1]
            if norm is not None:
                how = "own" if norm == row.layer else "tied"
                self._part(row, Segment((NORM_PARTS[column != "attention"],), how, norm), edge, STRIP - 3)
            start, spare = left, (width - sum(least)) / sum(s.size for s in of_row)
            for segment, need in zip(of_row, least, strict=True):
                room = need + spare * segment.size
                self._part(row, segment, start, room - (1.5 if len(of_row) > 1 else 0))
                start += room
        return left, left + width

    def _cache(self, row: Row, left: float, width: float) -> None:
        """The KV cache: as wide as it has heads, in a frame for all heads; keys and values in halves where they differ."""
        room = width if len(row.cache) == 1 else width / 2 - 1
        for n, segment in enumerate(row.cache):
            x, y = left + n * (room + 2), self.layers[row.layer]
            if segment.owner is not None and segment.size < 1:
                self._box(x, y, room, self.height, fc=PAPER, ec=FAINT)
            self._part(row, segment, x, max(room * segment.size, 4))

    def _link(self, link: _Link, lanes: int, edge: float) -> None:
        """A bracket with an arrow head at each layer that reads; every lane has its own height at the boxes."""
        shift = (link.lane - (lanes - 1) / 2) * min(7, (self.height - 4) / lanes)
        x, colour = edge - ARROW + 3 - link.lane * (7 if lanes <= 4 else 4.5), self.colours[link.source]
        ends = [self.layers[layer] + shift for layer in link.layers]
        start = self.layers[link.source] + shift
        teeth = [point for y in ends for point in ((x, y), (edge - 3, y), (x, y))]
        self._line([(edge, start), (x, start), *teeth], color=colour, lw=1.1)
        self._line([(edge - 2.5, y) for y in ends], ls="", marker=">", color=colour, ms=4, mew=0, gid=f"from layer {link.source}")

    def _ends(self, left: float, right: float) -> None:
        """The embedding above the layers and the head below them."""
        tied = self.content.outside.tie_word_embeddings
        looks = (
            ({"fc": MUTED, "ec": "none"}, {"fc": tint(MUTED, 0.15), "ec": MUTED}) if tied else ({"fc": OWNED, "ec": "none"},) * 2
        )
        for y, text, look in zip((self.places[0], self.places[-1]), self.content.ends, looks, strict=True):
            self._box(left, y, right - left, self.height, **look)
            self._text((left + right) / 2, y, text, color=ink_on(look["fc"]), ha="center")

    # Bytes and legend.

    def _bytes_by_part(self, left: float) -> tuple[float, float]:
        """A bar for each part in front of the dense model's, and the costs of decoding a token; returns right and bottom edge."""
        parts, costs = self.content.parts, self.content.costs
        ys = [HEAD + 17.0 + 26 * n for n in range(len(parts))]
        total, title, read, flops = (ys[-1] + step for step in (32, 66, 92, 118))
        names = [*(part.part for part in parts), "memory", "cache read", "operations"]
        values = [*(format_bytes(part.bytes) for part in parts), costs[2].value, costs[4].value, costs[5].value]
        shares = [*(part.share_of_dense for part in parts), costs[2].share, costs[4].share, costs[5].share]
        ys, bold = [*ys, total, read, flops], (total,)
        x = self._column(left, "", names, ys, bold=bold) + 8
        self._text(left, HEAD - 9, "bytes by part", weight="bold")
        self._text(left, title, "to decode a token", weight="bold")
        scale = 76 / max(max(part.bytes, part.dense_bytes) for part in parts)
        for part, y in zip(parts, ys, strict=False):
            for count, colour in ((part.dense_bytes, FAINT), (part.bytes, MUTED)):
                if count:
                    self._box(x, y, max(count * scale, 1), 12, fc=colour, ec="none")
        x = self._column(x + 90, "", values, ys, right=True, bold=bold)
        right = self._column(x + 12, "of dense", ["" if s is None else f"{s:.0%}" for s in shares], ys, right=True, bold=bold)
        self._line([(left, total - 15), (right, total - 15)], color=FAINT, lw=0.72)
        return right, flops

    def _legend(self, y: float) -> float:
        """What the boxes mean, as far as they occur; returns the right edge."""
        rows = self.content.rows
        hows = {segment.how for row in rows for segment in (*row.attention, *row.ffn)}
        entries: list[tuple[str, float, dict[str, Any]]] = [("own", 16, {"fc": OWNED, "ec": "none"})]
        if self.colours:
            colour = self.colours[min(self.colours)]
            pale = {"fc": tint(colour, 0.22), "ec": colour}
            entries.append(("own, used by other layers too", 16, {"fc": colour, "ec": "none"}))
            entries.append(("another layer's: stored once", 16, pale))
            if "mixed" in hows:
                entries.append(("mix or basis: own coefficients of another layer's bank", 16, pale))
        if "none" in hows:
            entries.append(("none: another layer's K or V is read", 16, {"fc": PAPER, "ec": MUTED, "ls": (0, (3, 3))}))
        if any(norm is not None for row in rows for norm in row.norms):
            entries.append(("thin box: norm", STRIP - 3, {"fc": OWNED, "ec": "none"}))
        x = float(MARGIN)
        for text, width, look in entries:
            self._box(x, y, width, 12, **look)
            x = self._text(x + width + 7, y, text, color=MUTED) + 20
        return x - 20


@cache
def text_width(text: str, size: float = FONT_SIZE, weight: str = "normal") -> float:
    """The width of a line in pixels, in the font in which PNG files are drawn."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size, weight=weight), False)[0] * DPI / 72)


def _links(segments: Sequence[Sequence[Segment]]) -> list[_Link]:
    """A link from each source layer of a column, the short ones first, each in the nearest lane where it meets no other."""
    readers: dict[int, list[int]] = {}
    for layer, of_layer in enumerate(segments):
        for source in sorted({s.owner for s in of_layer if s.owner is not None} - {layer}):
            readers.setdefault(source, []).append(layer)
    links: list[_Link] = []
    for source, layers in sorted(readers.items(), key=lambda item: (max(*item[1], item[0]) - min(*item[1], item[0]), item[0])):
        first, last = _Link(source, tuple(layers), 0).ends
        taken = {link.lane for link in links if link.ends[0] <= last and first <= link.ends[1]}
        links.append(_Link(source, tuple(layers), next(n for n in range(len(links) + 1) if n not in taken)))
    return links


def _size(count: int) -> str:
    return format_bytes(count) if count else "–"
