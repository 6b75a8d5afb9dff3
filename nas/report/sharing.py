"""The picture of who shares what: layers as rows, the first on top.

Owns the drawing of a `Picture` as SVG and PNG. Grey is a part that its layer keeps to itself; a part that other layers use too
has its layer's colour; a borrowed part is a pale copy in its owner's colour, labelled with the owner and joined to it. Loans come
from above, but for keys and values read from an upper layer, whose arrows go up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from ..config import format_bytes
from ..sharing.memory import MemorySpec
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .picture import CACHE, Part, Picture, picture
from .rows import Lent, Row, Segment, spaced
from .scene import Box, Line, Scene, Words, words_width
from .style import FAINT, INK, MUTED, OWNED, PAPER, ink_on, layer_colours, tint

Mark = Box | Line | Words
_Place = tuple[float, float, float, float]
"""Left, top, width, height."""

MARGIN, HEAD, STRIP, TEXT = 24, 100, 9, 11
COLUMNS = {"attention": 150, "FFN": 132, CACHE: 76}
"""The blocks of a layer and their widths in pixels."""
FIGURES, LAYER = 68, 38
PANEL = (74, 76, 66, 44)
"""Bytes by part: the widths of name, bar, bytes and share."""


def draw_sharing(shape: ModelShape, config: SharingConfig, path: Path, spec: MemorySpec | None = None, name: str = "") -> Path:
    """Draw a config in a model as the `.svg` or `.png` that the path asks for. Raises UserError for another format."""
    return scene(picture(shape, config, spec or MemorySpec(), name)).write(path)


def sharing_svg(shape: ModelShape, config: SharingConfig, spec: MemorySpec | None = None, name: str = "") -> str:
    """The same picture as the text of an SVG document."""
    return scene(picture(shape, config, spec or MemorySpec(), name)).svg()


def scene(content: Picture) -> Scene:
    """The picture's marks and size."""
    layout = _layout(content)
    marks: list[Mark] = [*_title(content), *_heads(layout)]
    for column in COLUMNS:
        marks += _links(column, layout)
    marks += _ends(content, layout)
    for row in content.rows:
        marks += _row(row, layout)
    panel = list(_panel(content, layout))
    bottom = max(layout.middle(len(content.rows) + 1) + layout.pitch, max(m.y for m in panel if isinstance(m, Words)) + 26)
    legend = list(_legend(content, bottom + 10, layout))
    title = f"Who shares what in {content.name}: {content.headline}"
    width = max(layout.right, *(m.x + words_width(m.text, m.size) for m in (*legend, *marks[:3]) if isinstance(m, Words)))
    return Scene(math.ceil(width) + MARGIN, bottom + 40, (*marks, *panel, *legend), title)


@dataclass(frozen=True)
class _Link:
    """A loan in one column: from a layer to others, `lane` places away from the blocks."""

    owner: int
    layers: tuple[int, ...]
    lane: int

    @property
    def span(self) -> tuple[int, int]:
        """The highest and the lowest place that it touches."""
        return min(self.owner, *self.layers), max(self.owner, *self.layers)


@dataclass(frozen=True)
class _Layout:
    """Where things go: `left[column]` is the left edge of a column's blocks, `pitch` the distance of two layers.

    `also` and `figures` are the left edges of the words beside the blocks and of the bytes.
    """

    pitch: float
    left: dict[str, float]
    links: dict[str, list[_Link]]
    colours: dict[int, str]
    lent: Lent
    also: float
    figures: float

    @property
    def height(self) -> float:
        """The height of a block."""
        return self.pitch - (8 if self.pitch > 24 else 5)

    @property
    def panel(self) -> float:
        """The left edge of the bytes by part."""
        return self.figures + 2 * FIGURES + 34

    @property
    def right(self) -> float:
        """The right edge of everything."""
        return self.panel + sum(PANEL)

    def middle(self, place: int) -> float:
        """The height at which a place's blocks have their middle: 0 is the embedding, layer i is i + 1."""
        return HEAD + self.pitch * (place + 0.5)

    def lane(self, column: str, lane: int) -> float:
        """The x of a lane of links."""
        lanes = 1 + max((link.lane for link in self.links[column]), default=0)
        return self.edge(column) - 10 - lane * _spacing(lanes)

    def edge(self, column: str) -> float:
        """The x at which links meet a column's boxes."""
        return self.left[column] - 1 - (STRIP if column != CACHE else 0)

    def port(self, column: str, layer: int, owner: int) -> float:
        """The height at which an owner's link meets a layer's block: apart from the others that meet it."""
        met = sorted(link.owner for link in self.links[column] if layer in (link.owner, *link.layers))
        gap = min(7.0, (self.height - 4) / len(met))
        return self.middle(layer + 1) + (met.index(owner) - (len(met) - 1) / 2) * gap

    def fill(self, parts: tuple[str, ...], owner: int) -> str:
        """The colour of an owner's parts: grey if nobody else uses any of them."""
        return self.colours[owner] if any((part, owner) in self.lent for part in parts) else OWNED


def _spacing(lanes: int) -> float:
    return 7 if lanes <= 4 else 4.5


def _layout(content: Picture) -> _Layout:
    depth = len(content.rows)
    pitch = 34 if depth <= 8 else 28 if depth <= 16 else 21
    links = {column: _lanes(column, content.rows) for column in COLUMNS}
    left, x = {}, float(MARGIN + LAYER)
    for column, width in COLUMNS.items():
        lanes = 1 + max((link.lane for link in links[column]), default=-1)
        x += (STRIP if column != CACHE else 0) + 12 + lanes * _spacing(lanes)
        left[column] = x
        x += width
    also = x + 8 + max(words_width(row.reads, TEXT) for row in content.rows) + 14
    notes = max(words_width(spaced(row), TEXT) for row in content.rows)
    figures = also + (notes + 10 if notes else -10)
    colours = layer_colours({owner for _, owner in content.lent})
    return _Layout(pitch, left, links, colours, content.lent, also, figures)


def _lanes(column: str, rows: Sequence[Row]) -> list[_Link]:
    """The column's loans, each in the nearest lane in which it crosses no shorter one."""
    loans: dict[int, list[int]] = {}
    for row in rows:
        for owner in _borrowed(column, row):
            loans.setdefault(owner, []).append(row.layer)
    found = (_Link(owner, tuple(layers), 0) for owner, layers in loans.items())
    links: list[_Link] = []
    for link in sorted(found, key=lambda link: (link.span[1] - link.span[0], link.owner)):
        taken = {other.lane for other in links if other.span[0] <= link.span[1] and link.span[0] <= other.span[1]}
        links.append(replace(link, lane=next(n for n in range(len(links) + 1) if n not in taken)))
    return links


def _segments(column: str, row: Row) -> tuple[Segment, ...]:
    return {"attention": row.attention, "FFN": row.ffn, CACHE: row.cache}[column]


def _borrowed(column: str, row: Row) -> list[int]:
    """The other layers that a layer's block uses, ascending."""
    return sorted({s.owner for s in _segments(column, row) if s.owner is not None and s.owner != row.layer})


def _title(content: Picture) -> Iterator[Mark]:
    yield Words(MARGIN, 26, content.name, size=17, bold=True)
    yield Words(MARGIN, 49, content.headline, size=12)
    yield Words(MARGIN, 67, content.subtitle, MUTED, TEXT)


def _heads(layout: _Layout) -> Iterator[Mark]:
    y = HEAD - 9
    yield Words(MARGIN, y, "layer", MUTED, TEXT)
    for column, x in layout.left.items():
        yield Words(x, y, column, INK, TEXT, bold=True)
    if layout.figures > layout.also:
        yield Words(layout.also, y, "also", MUTED, TEXT)
    for n, words in enumerate(("own weights", "own cache")):
        yield Words(layout.figures + FIGURES * (n + 1) + 10 * n, y, words, MUTED, TEXT, "end")


def _links(column: str, layout: _Layout) -> Iterator[Mark]:
    edge = layout.edge(column)
    for link in layout.links[column]:
        x, colour = layout.lane(column, link.lane), layout.colours[link.owner]
        start = layout.port(column, link.owner, link.owner)
        ends = [layout.port(column, layer, link.owner) for layer in link.layers]
        yield Line(((edge, start), (x, start)), colour)
        yield Line(((x, min(start, *ends) - 0.75), (x, max(start, *ends) + 0.75)), colour)
        for end in ends:
            yield Line(((x, end), (edge - 1, end)), colour, arrow=True)


def _ends(content: Picture, layout: _Layout) -> Iterator[Mark]:
    """The embedding above the layers and the head below them."""
    places = (0, len(content.rows) + 1)
    parts = {part.part: part for part in content.parts}
    tied = content.outside.tie_word_embeddings
    fills = (MUTED, tint(MUTED, 0.15)) if tied else (OWNED, OWNED)
    left, right = layout.left["attention"], layout.left["FFN"] + COLUMNS["FFN"]
    for place, text, fill, part in zip(places, content.ends, fills, ("embedding", "head"), strict=True):
        y = layout.middle(place)
        stroke = MUTED if tied and place else "none"
        yield Box(left, y - layout.height / 2, right - left, layout.height, fill, stroke, data={"part": part})
        yield Words((left + right) / 2, y, text, ink_on(fill), TEXT, "middle")
        yield from _figures([parts[part].bytes if part in parts else 0], y, layout)
    yield Words(MARGIN, layout.middle(0), "in", MUTED, TEXT)
    yield Words(MARGIN, layout.middle(places[1]), "out", MUTED, TEXT)


def _row(row: Row, layout: _Layout) -> Iterator[Mark]:
    y = layout.middle(row.layer + 1)
    yield Words(MARGIN, y, str(row.layer), INK, 12, bold=True)
    for column, norm in zip(COLUMNS, row.norms, strict=False):
        yield from _block(row, column, norm, layout)
    yield from _cache(row, layout)
    if row.also:
        yield Words(layout.also, y, spaced(row), MUTED, TEXT)
    yield from _figures((row.weight_bytes, row.kv_cache_bytes), y, layout)


def _block(row: Row, column: str, norm: int | None, layout: _Layout) -> Iterator[Mark]:
    x, top, segments = layout.left[column], layout.middle(row.layer + 1) - layout.height / 2, _segments(column, row)
    if norm is not None:
        strip = Segment((f"{column} norm",), "own" if norm == row.layer else "tied", norm)
        yield _part(row.layer, strip, (x - STRIP, top, STRIP - 3, layout.height), layout)
    each = COLUMNS[column] / sum(segment.size for segment in segments)
    starts = accumulate((segment.size for segment in segments), initial=0.0)
    for start, segment in zip(starts, segments, strict=False):
        place = x + start * each, top, each * segment.size - (1.5 if len(segments) > 1 else 0), layout.height
        yield _part(row.layer, segment, place, layout)
        yield from _inside(segment, place, layout)


def _inside(segment: Segment, place: _Place, layout: _Layout) -> Iterator[Mark]:
    """As many of a segment's words as there is room for."""
    text = next((text for text in segment.texts if words_width(text, TEXT) <= place[2] - 2), "")
    if not text:
        return
    colour = INK if segment.how != "own" or segment.owner is None else ink_on(layout.fill(segment.parts, segment.owner))
    colour = MUTED if segment.how == "dropped" else colour
    yield Words(place[0] + place[2] / 2, place[1] + place[3] / 2, text, colour, TEXT, "middle")


def _part(layer: int, segment: Segment, place: _Place, layout: _Layout) -> Box:
    """A part's box: solid where it is the layer's own, pale in its owner's colour where borrowed, dashed where there is none."""
    what, owner = " ".join(segment.parts), segment.owner
    data = {"layer": layer, "part": what, "owner": "none" if owner is None else owner, "how": segment.how}
    tip = f"layer {layer}: {_TIPS[segment.how].format(what=what, owner=owner)}"
    tip += f", {segment.detail}" if segment.detail else ""
    if owner is None:
        return Box(*place, PAPER, FAINT, dashed=True, tip=tip, data=data)
    colour = layout.fill(segment.parts, owner)
    if segment.how == "own":
        return Box(*place, colour, tip=tip, data=data)
    return Box(*place, tint(colour, 0.22), colour, tip=tip, data=data)


_TIPS = {
    "own": "its own {what}",
    "tied": "{what} of layer {owner}",
    "mixed": "its own {what} of what layer {owner} keeps",
    "map": "the softmax map of layer {owner}",
    "none": "no {what}",
    "dropped": "no {what}: not run",
}


def _cache(row: Row, layout: _Layout) -> Iterator[Mark]:
    """The KV cache: as wide as it has heads, in a frame as wide as all heads; keys and values in halves where they differ."""
    x, height = layout.left[CACHE], layout.height
    y = layout.middle(row.layer + 1)
    width = COLUMNS[CACHE] if len(row.cache) == 1 else COLUMNS[CACHE] / 2 - 1
    for n, segment in enumerate(row.cache):
        left = x + n * (width + 2)
        if segment.owner is not None and segment.size < 1:
            yield Box(left, y - height / 2, width, height, PAPER, FAINT)
        yield _part(row.layer, segment, (left, y - height / 2, max(width * segment.size, 4), height), layout)
        if len(row.cache) == 2 and segment.owner is not None and segment.size == 1:
            fill = PAPER if segment.how != "own" else layout.fill(segment.parts, segment.owner)
            yield Words(left + width / 2, y, segment.parts[0], ink_on(fill), TEXT, "middle")
    yield Words(x + COLUMNS[CACHE] + 8, y, row.reads, MUTED if row.reads == "none" else INK, TEXT)


def _figures(counts: Iterable[int], y: float, layout: _Layout) -> Iterator[Mark]:
    """The layer's own bytes: of weights and, where there are two counts, of cache."""
    for n, count in enumerate(counts):
        text = format_bytes(count) if count else "–"
        yield Words(layout.figures + FIGURES * (n + 1) + 10 * n, y, text, INK if count else MUTED, TEXT, "end")


def _panel(content: Picture, layout: _Layout) -> Iterator[Mark]:
    """Bytes by part: a bar for this config in the frame of the dense model's; below, what a token takes."""
    longest = max(max(part.bytes, part.dense_bytes) for part in content.parts)
    yield Words(layout.panel, HEAD - 9, "bytes by part", INK, TEXT, bold=True)
    yield Words(layout.right, HEAD - 9, "of dense", MUTED, TEXT, "end")
    for n, part in enumerate(content.parts):
        y = HEAD + 17 + 26 * n
        yield from _bar(part, layout.panel + PANEL[0], y, PANEL[1] / longest)
        yield from _figure(part.part, format_bytes(part.bytes), part.share_of_dense, y, layout)
    y = HEAD + 23 + 26 * len(content.parts)
    yield Line(((layout.panel, y - 15), (layout.right, y - 15)), FAINT, 1)
    total, decoding = content.costs[2], content.costs[4:]
    yield from _figure(total.words, total.value, total.share, y, layout, bold=True)
    yield Words(layout.panel, y + 34, "to decode a token", INK, TEXT, bold=True)
    for n, (words, cost) in enumerate(zip(("cache read", "operations"), decoding, strict=True)):
        yield from _figure(words, cost.value, cost.share, y + 60 + 26 * n, layout)


def _figure(words: str, value: str, share: float | None, y: float, layout: _Layout, bold: bool = False) -> Iterator[Mark]:
    yield Words(layout.panel, y, words, INK, TEXT, bold=bold)
    yield Words(layout.panel + sum(PANEL[:3]) - 2, y, value, INK, TEXT, "end", bold)
    if share is not None:
        yield Words(layout.right, y, f"{share:.0%}", INK, TEXT, "end", bold)


def _bar(part: Part, x: float, y: float, scale: float) -> Iterator[Mark]:
    for count, colour in ((part.dense_bytes, FAINT), (part.bytes, MUTED)):
        if count:
            yield Box(x, y - 6, max(count * scale, 1), 12, colour, radius=1, tip=f"{part.part}: {count:,} bytes")


def _legend(content: Picture, y: float, layout: _Layout) -> Iterator[Mark]:
    """What the boxes mean, those that occur; a loan is shown in the first lender's colour."""
    hows = {s.how for row in content.rows for s in (*row.attention, *row.ffn)}
    entries = [("own", Box(0, y - 6, 16, 12, OWNED))]
    if layout.colours:
        colour = layout.colours[min(layout.colours)]
        entries.append(("own, and lent", Box(0, y - 6, 16, 12, colour)))
        entries.append(("borrowed: kept once, used again", Box(0, y - 6, 16, 12, tint(colour, 0.22), colour)))
        if "mixed" in hows:
            words = "mix or basis: of what that layer keeps, by own coefficients"
            entries.append((words, Box(0, y - 6, 16, 12, tint(colour, 0.22), colour)))
    if "none" in hows:
        entries.append(("none: another layer's K or V is read", Box(0, y - 6, 16, 12, PAPER, MUTED, dashed=True)))
    if any(norm is not None for row in content.rows for norm in row.norms):
        entries.append(("thin strip: norm", Box(0, y - 6, STRIP - 3, 12, OWNED)))
    x = float(MARGIN)
    for text, box in entries:
        yield replace(box, x=x)
        yield Words(x + box.width + 7, y, text, MUTED, TEXT)
        x += box.width + 21 + words_width(text, TEXT)
