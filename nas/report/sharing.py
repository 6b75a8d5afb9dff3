"""The picture of who shares what: layers as rows, the first on top, so that every loan comes from above.

Owns the drawing of a `Picture` as SVG and PNG. Grey is a part that its layer keeps to itself; a part that other layers use too
has its layer's colour; a borrowed part is a pale copy in its owner's colour, labelled with the owner and joined to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from ..loading import format_bytes
from ..memory import MemorySpec
from ..shape import ModelShape
from ..sharing import SharingConfig
from .palette import FAINT, INK, MUTED, OWNED, PAPER, ink_on, layer_colours, tint
from .picture import CACHE, Part, Picture, Row, Segment, picture
from .scene import Box, Line, Scene, Words

Mark = Box | Line | Words
_Place = tuple[float, float, float, float]
"""Left, top, width, height."""

MARGIN, HEAD, STRIP = 24, 100, 9
COLUMNS = {"attention": 140, "FFN": 120, CACHE: 72}
"""The blocks of a layer and their widths in pixels."""
KV_LABEL, FIGURES, LAYER = 68, 68, 38
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
    marks += _panel(content, layout)
    bottom = max(layout.middle(len(content.rows) + 1) + layout.pitch, HEAD + 34 + 26 * (len(content.parts) + 1))
    marks += _legend(content, bottom + 10, layout)
    title = f"Who shares what in {content.name}: {content.headline}"
    return Scene(layout.right + MARGIN, bottom + 40, tuple(marks), title)


@dataclass(frozen=True)
class _Link:
    """A loan in one column: from a layer to a lower one, `lane` places away from the blocks."""

    owner: int
    layers: tuple[int, ...]
    lane: int


@dataclass(frozen=True)
class _Layout:
    """Where things go: `left[column]` is the left edge of a column's blocks, `pitch` the distance of two layers."""

    pitch: float
    left: dict[str, float]
    links: dict[str, list[_Link]]
    colours: dict[int, str]
    lent: frozenset[tuple[str, int]]
    heads: int

    @property
    def height(self) -> float:
        """The height of a block."""
        return self.pitch - (8 if self.pitch > 24 else 5)

    @property
    def figures(self) -> float:
        """The left edge of the columns of bytes."""
        return self.left[CACHE] + COLUMNS[CACHE] + KV_LABEL

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
    colours = layer_colours({owner for _, owner in content.lent})
    return _Layout(pitch, left, links, colours, content.lent, content.shape.num_key_value_heads)


def _lanes(column: str, rows: Sequence[Row]) -> list[_Link]:
    """The column's loans, each in the nearest lane in which it crosses no shorter one."""
    loans: dict[int, list[int]] = {}
    for row in rows:
        for owner in _borrowed(column, row):
            loans.setdefault(owner, []).append(row.layer)
    links: list[_Link] = []
    for owner, layers in sorted(loans.items(), key=lambda loan: (loan[1][-1] - loan[0], loan[0])):
        taken = {link.lane for link in links if link.owner <= layers[-1] and owner <= link.layers[-1]}
        lane = next(n for n in range(len(links) + 1) if n not in taken)
        links.append(_Link(owner, tuple(layers), lane))
    return links


def _borrowed(column: str, row: Row) -> list[int]:
    """The other layers that a layer's block uses, ascending."""
    if column == CACHE:
        return [row.kv] if row.kv != row.layer else []
    segments = row.attention if column == "attention" else row.ffn
    return sorted({s.owner for s in segments if s.owner is not None and s.owner != row.layer})


def _title(content: Picture) -> Iterator[Mark]:
    yield Words(MARGIN, 26, content.name, size=17, bold=True)
    yield Words(MARGIN, 49, content.headline, size=12)
    yield Words(MARGIN, 67, content.subtitle, MUTED, 11)


def _heads(layout: _Layout) -> Iterator[Mark]:
    y = HEAD - 9
    yield Words(MARGIN, y, "layer", MUTED, 11)
    for column, x in layout.left.items():
        yield Words(x, y, column, INK, 11, bold=True)
    for n, words in enumerate(("own weights", "own cache")):
        yield Words(layout.figures + FIGURES * (n + 1) + 10 * n, y, words, MUTED, 11, "end")


def _links(column: str, layout: _Layout) -> Iterator[Mark]:
    edge = layout.edge(column)
    for link in layout.links[column]:
        x, colour = layout.lane(column, link.lane), layout.colours[link.owner]
        start = layout.middle(link.owner + 1)
        yield Line(((edge, start), (x, start), (x, layout.middle(link.layers[-1] + 1))), colour)
        for layer in link.layers:
            y = layout.middle(layer + 1)
            yield Line(((x - 0.75, y), (edge - 1, y)), colour, arrow=True)


def _ends(content: Picture, layout: _Layout) -> Iterator[Mark]:
    """The embedding above the layers and the head below them."""
    shape, places = content.shape, (0, len(content.rows) + 1)
    parts = {part.part: part for part in content.parts}
    tied = shape.tie_word_embeddings
    words = (f"embedding {shape.vocab_size:,} × {shape.hidden_size}", "head = embedding" if tied else "head")
    fills = (MUTED, tint(MUTED, 0.15)) if tied else (OWNED, OWNED)
    left, right = layout.left["attention"], layout.left["FFN"] + COLUMNS["FFN"]
    for place, text, fill, part in zip(places, words, fills, ("embedding", "head"), strict=True):
        y = layout.middle(place)
        stroke = MUTED if tied and place else "none"
        yield Box(left, y - layout.height / 2, right - left, layout.height, fill, stroke, data={"part": part})
        yield Words((left + right) / 2, y, text, ink_on(fill), 11, "middle")
        yield from _figures([parts[part].bytes if part in parts else 0], y, layout)
    yield Words(MARGIN, layout.middle(0), "in", MUTED, 11)
    yield Words(MARGIN, layout.middle(places[1]), "out", MUTED, 11)


def _row(row: Row, layout: _Layout) -> Iterator[Mark]:
    y = layout.middle(row.layer + 1)
    yield Words(MARGIN, y, str(row.layer), INK, 12, bold=True)
    yield from _block(row, "attention", row.attention, row.norms[0], layout)
    yield from _block(row, "FFN", row.ffn, row.norms[1], layout)
    yield from _cache(row, layout)
    yield from _figures((row.weight_bytes, row.kv_cache_bytes), y, layout)


def _block(row: Row, column: str, segments: Sequence[Segment], norm: int | None, layout: _Layout) -> Iterator[Mark]:
    x, top = layout.left[column], layout.middle(row.layer + 1) - layout.height / 2
    if norm is not None:
        yield _part(row.layer, (f"{column} norm",), norm, (x - STRIP, top, STRIP - 3, layout.height), layout)
    each = COLUMNS[column] / sum(len(segment.slots) for segment in segments)
    starts = accumulate((len(segment.slots) for segment in segments), initial=0)
    for start, segment in zip(starts, segments, strict=False):
        place = x + start * each, top, each * len(segment.slots) - (1.5 if len(segments) > 1 else 0), layout.height
        yield _part(row.layer, segment.slots, segment.owner, place, layout)
        yield from _inside(row, segment, place, layout)


def _inside(row: Row, segment: Segment, place: _Place, layout: _Layout) -> Iterator[Mark]:
    """A segment's words: what it holds, or whose it is."""
    if segment.owner is None:
        return
    own = segment.owner == row.layer
    text = " ".join(segment.slots) if own else f"= layer {segment.owner}" if place[2] > 68 else f"= {segment.owner}"
    colour = ink_on(layout.fill(segment.slots, row.layer)) if own else INK
    yield Words(place[0] + place[2] / 2, place[1] + place[3] / 2, text, colour, 11, "middle")


def _part(layer: int, names: tuple[str, ...], owner: int | None, place: _Place, layout: _Layout) -> Box:
    """A part's box: solid where it is the layer's own, pale in its owner's colour where borrowed, dashed where there is none."""
    what = " ".join(names)
    data = {"layer": layer, "part": what, "owner": "none" if owner is None else owner}
    if owner is None:
        return Box(*place, PAPER, FAINT, dashed=True, tip=f"layer {layer} has no {what}", data=data)
    colour = layout.fill(names, owner)
    if owner == layer:
        return Box(*place, colour, tip=f"layer {layer}: its own {what}", data=data)
    return Box(*place, tint(colour, 0.22), colour, tip=f"layer {layer}: {what} of layer {owner}", data=data)


def _cache(row: Row, layout: _Layout) -> Iterator[Mark]:
    """The KV cache: as wide as it has heads, in a frame as wide as all heads."""
    x, width, height = layout.left[CACHE], COLUMNS[CACHE], layout.height
    top = layout.middle(row.layer + 1) - height / 2
    if row.kv_heads < layout.heads:
        yield Box(x, top, width, height, PAPER, FAINT)
    bar = max(width * row.kv_heads / layout.heads, 4)
    yield _part(row.layer, (CACHE,), row.kv, (x, top, bar, height), layout)
    heads = f"{row.kv_heads} head" + "s" * (row.kv_heads > 1)
    text = heads if row.kv == row.layer else f"= layer {row.kv}"
    yield Words(x + width + 8, layout.middle(row.layer + 1), text, INK, 11)


def _figures(counts: Iterable[int], y: float, layout: _Layout) -> Iterator[Mark]:
    """The layer's own bytes: of weights and, where there are two counts, of cache."""
    for n, count in enumerate(counts):
        text = format_bytes(count) if count else "–"
        yield Words(layout.figures + FIGURES * (n + 1) + 10 * n, y, text, INK if count else MUTED, 11, "end")


def _panel(content: Picture, layout: _Layout) -> Iterator[Mark]:
    """Bytes by part: a bar for this config in the frame of the dense model's."""
    longest = max(max(part.bytes, part.dense_bytes) for part in content.parts)
    name, _, figure, _ = accumulate(PANEL)
    yield Words(layout.panel, HEAD - 9, "bytes by part", INK, 11, bold=True)
    yield Words(layout.right, HEAD - 9, "of dense", MUTED, 11, "end")
    for n, part in enumerate((*content.parts, content.total)):
        y = HEAD + 17 + 26 * n + (6 if part.part == "memory" else 0)
        if part.part == "memory":
            yield Line(((layout.panel, y - 15), (layout.right, y - 15)), FAINT, 1)
        else:
            yield from _bar(part, layout.panel + name, y, PANEL[1] / longest)
        share = part.share_of_dense
        bold = part.part == "memory"
        yield Words(layout.panel, y, part.part, INK, 11, bold=bold)
        yield Words(layout.panel + figure - 2, y, format_bytes(part.bytes), INK, 11, "end", bold)
        if share is not None:
            yield Words(layout.right, y, f"{share:.0%}", INK, 11, "end", bold)


def _bar(part: Part, x: float, y: float, scale: float) -> Iterator[Mark]:
    for count, colour in ((part.dense_bytes, FAINT), (part.bytes, MUTED)):
        if count:
            yield Box(x, y - 6, max(count * scale, 1), 12, colour, radius=1, tip=f"{part.part}: {count:,} bytes")


def _legend(content: Picture, y: float, layout: _Layout) -> Iterator[Mark]:
    """What the boxes mean; a loan is shown in the first lender's colour."""
    entries = [("own", Box(0, y - 6, 16, 12, OWNED))]
    if layout.colours:
        colour = layout.colours[min(layout.colours)]
        entries.append(("own, and lent", Box(0, y - 6, 16, 12, colour)))
        entries.append(("borrowed: kept once, used again", Box(0, y - 6, 16, 12, tint(colour, 0.22), colour)))
    if any(segment.owner is None for row in content.rows for segment in (*row.attention, *row.ffn)):
        entries.append(("none: the keys and values are another layer's", Box(0, y - 6, 16, 12, PAPER, MUTED, dashed=True)))
    entries.append(("thin strip: norm", Box(0, y - 6, STRIP - 3, 12, OWNED)))
    x = float(MARGIN)
    for text, box in entries:
        yield replace(box, x=x)
        yield Words(x + box.width + 7, y, text, MUTED, 11)
        x += box.width + 28 + 6.6 * len(text)
