"""The picture of who shares what, and bytes by part, as text for a terminal.

Owns what `nas describe` prints. Colours follow the SVG's; without colour the words say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from ..loading import format_bytes
from ..memory import MemorySpec
from ..shape import ModelShape
from ..sharing import SharingConfig
from .palette import layer_colours
from .picture import CACHE, NORM_PARTS, Part, Picture, Row, Segment, picture

BAR = 8


def sharing_text(
    shape: ModelShape, config: SharingConfig, spec: MemorySpec | None = None, name: str = "", console: Console | None = None
) -> str:
    """The picture and the bytes by part as text, in colour where the console (that of stdout by default) has it."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    with console.capture() as captured:
        console.print(sharing_view(shape, config, spec, name))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def sharing_view(shape: ModelShape, config: SharingConfig, spec: MemorySpec | None = None, name: str = "") -> RenderableType:
    """The same for a rich console; it keeps to ASCII where the console cannot show more."""
    return _View(picture(shape, config, spec or MemorySpec(), name))


class _View:
    """A picture that asks the console what it can show."""

    def __init__(self, content: Picture) -> None:
        self.content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType | Segments]:
        content, plain = self.content, not _draws_blocks(console)
        title = Text.assemble((content.name, "bold"), "\n", content.headline, "\n", (content.subtitle, "dim"))
        parts = (title, _layers(content, plain), Text(_key(content, plain), style="dim"), Text(), _parts(content, plain))
        drawn = console.render(Group(*parts), options)
        signs = str.maketrans("·×–", "|x-" if plain else "·×–")
        yield Segments(piece._replace(text=piece.text.translate(signs)) for piece in drawn)


def _draws_blocks(console: Console) -> bool:
    try:
        "■█·×–─".encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _key(content: Picture, plain: bool) -> str:
    mark = "#" if plain else "■"
    borrowed = " `= layer j` is layer j's, kept once." if content.lent else ""
    return f"Tokens enter at layer 0. {mark} is a layer's own.{borrowed}"


def _layers(content: Picture, plain: bool) -> Table:
    colours = layer_colours({owner for _, owner in content.lent})
    table = Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading, justify in (("layer", "right"), ("attention", "left"), ("FFN", "left"), (CACHE, "left")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("own weights", justify="right", no_wrap=True)
    table.add_column("own cache", justify="right", no_wrap=True)
    draw = _Drawing(content, colours, "#" if plain else "■")
    for row in content.rows:
        blocks = draw.block(row, row.attention, 0), draw.block(row, row.ffn, 1), draw.cache(row)
        table.add_row(str(row.layer), *blocks, _size(row.weight_bytes), _size(row.kv_cache_bytes))
    return table


def _size(count: int) -> str:
    return format_bytes(count) if count else "–"


class _Drawing:
    """Draws the cells of one picture."""

    def __init__(self, content: Picture, colours: dict[int, str], mark: str) -> None:
        self.content, self.colours, self.mark = content, colours, mark

    def block(self, row: Row, segments: Sequence[Segment], block: int) -> Text:
        """`■ q o` where owned, `= layer 0` where all is borrowed from there, `k v = layer 0` where some is."""
        slots: dict[int, list[str]] = {}
        for segment in segments:
            if segment.owner is not None:
                slots.setdefault(segment.owner, []).extend(segment.slots)
        text = Text(", ").join(self._part(row.layer, owner, names, whole=len(slots) == 1) for owner, names in slots.items())
        norm = row.norms[block]
        if norm not in (row.layer, None, *(slots if len(slots) == 1 else ())):
            text.append(f", norm = {norm}", self._colour((NORM_PARTS[block],), norm or 0))
        return text

    def _part(self, layer: int, owner: int, names: list[str], whole: bool) -> Text:
        style = self._colour(names, owner)
        if owner == layer:
            return Text.assemble((f"{self.mark} ", style), " ".join(names))
        return Text(("" if whole else f"{' '.join(names)} ") + f"= layer {owner}", style)

    def cache(self, row: Row) -> Text:
        """A bar as long as it has KV heads, and their number; whose it is, where it is read."""
        full = self.content.shape.num_key_value_heads
        style = self._colour((CACHE,), row.kv)
        if row.kv != row.layer:
            return Text(f"= layer {row.kv}", style)
        length = max(round(BAR * row.kv_heads / full), 1)
        heads = f" {row.kv_heads} head" + "s" * (row.kv_heads > 1)
        return Text.assemble((self.mark * length + " " * (BAR - length), style), heads)

    def _colour(self, names: Iterable[str], owner: int) -> str:
        lent = any((name, owner) in self.content.lent for name in names)
        return self.colours[owner] if lent else "dim"


def _parts(content: Picture, plain: bool) -> Table:
    table = Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_footer=True)
    total = content.total
    table.add_column("part", footer=total.part, no_wrap=True)
    table.add_column("parameters", footer=f"{total.params:,}", justify="right", no_wrap=True)
    table.add_column("bytes", footer=format_bytes(total.bytes), justify="right", no_wrap=True)
    table.add_column("of dense", footer=_share(total), justify="right", no_wrap=True)
    table.add_column("")
    longest = max(part.bytes for part in content.parts)
    for part in content.parts:
        bar = ("#" if plain else "█") * round(24 * part.bytes / longest)
        params = f"{part.params:,}" if part.part != CACHE else "–"
        table.add_row(part.part, params, format_bytes(part.bytes), _share(part), Text(bar, "dim"))
    return table


def _share(part: Part) -> str:
    return "" if part.share_of_dense is None else f"{part.share_of_dense:.0%}"
