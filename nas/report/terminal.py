"""The picture of who shares what, bytes by part, and the costs beside the dense model's, as text for a terminal.

Owns what `nas describe` prints. Colours follow the SVG's; without colour the words say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from ..config import format_bytes
from ..sharing.memory import MemorySpec
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .picture import CACHE, NORM_PARTS, Part, Picture, Row, Segment, picture
from .style import layer_colours
from .tables import share

BAR = 8
_SIGNS = str.maketrans({"·": "|", "×": "x", "–": "-"})


def sharing_text(
    shape: ModelShape, config: SharingConfig, spec: MemorySpec | None = None, name: str = "", console: Console | None = None
) -> str:
    """The picture and the tables as text, in colour where the console (that of stdout by default) has it."""
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
        title = Text.assemble((content.name, "bold"), "\n", (content.subtitle, "dim"))
        widths = ((spared, _layers(content, plain, spared)) for spared in range(len(SPARED) + 1))
        fits = (
            table for spared, table in widths if spared == len(SPARED) or _width(console, options, table) <= options.max_width
        )
        tables = next(fits), Text(_key(content, plain), style="dim"), Text(), _parts(content, plain)
        drawn = console.render(Group(title, *tables, Text(), _costs(content, plain)), options)
        yield Segments(piece._replace(text=piece.text.translate(_SIGNS) if plain else piece.text) for piece in drawn)


def _width(console: Console, options: ConsoleOptions, table: Table) -> int:
    return Measurement.get(console, options.update(width=1000), table).maximum


def _draws_blocks(console: Console) -> bool:
    try:
        "■█·×–─".encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _key(content: Picture, plain: bool) -> str:
    mark = "#" if plain else "■"
    borrowed = " `= layer j` is layer j's, kept once." if content.shared else ""
    return f"{content.ends[0]}, layers from 0, {content.ends[1]}. {mark} is a layer's own.{borrowed}"


def _table(plain: bool, **settings: bool) -> Table:
    return Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), **settings)  # type: ignore[arg-type]


SPARED = ("bars", "own cache", "own weights")
"""What the table of layers goes without where the console is narrow, first to last."""


def _layers(content: Picture, plain: bool, spared: int) -> Table:
    """The table of layers, without the first `spared` of `SPARED`."""
    gone, table = SPARED[:spared], _table(plain)
    notes = any(row.also for row in content.rows)
    draw = _Drawing(content, "#" if plain else "■", 0 if "bars" in gone else BAR)
    columns: dict[str, Callable[[Row], str | Text]] = {
        "layer": lambda row: str(row.layer),
        "attention": lambda row: draw.block(row, row.attention, 0),
        "FFN": lambda row: draw.block(row, row.ffn, 1),
        CACHE: draw.cache,
        **({"also": lambda row: row.also} if notes else {}),
        "own weights": lambda row: _size(row.weight_bytes),
        "own cache": lambda row: _size(row.kv_cache_bytes),
    }
    shown = {name: cell for name, cell in columns.items() if name not in gone}
    for name in shown:
        figure = name in ("layer", "own weights", "own cache")
        table.add_column(name, justify="right" if figure else "left", no_wrap=figure)
    for row in content.rows:
        table.add_row(*(cell(row) for cell in shown.values()))
    return table


def _size(count: int) -> str:
    return format_bytes(count) if count else "–"


class _Drawing:
    """Draws the cells of one picture."""

    def __init__(self, content: Picture, mark: str, bar: int) -> None:
        self.content, self.mark, self.bar = content, mark, bar
        self.colours = layer_colours({owner for _, owner in content.shared})

    def block(self, row: Row, segments: Sequence[Segment], block: int) -> Text:
        """`■ q o` where owned, `= layer 0` where all is borrowed from there, `k v = layer 0` where some is."""
        said = [segment for segment in segments if segment.text]
        text = Text(", ").join(self._segment(segment) for segment in said)
        norm = row.norms[block]
        if norm not in (row.layer, None) and {segment.owner for segment in said} != {norm}:
            text.append(f", norm = layer {norm}", self._colour((NORM_PARTS[block],), norm or 0))
        return text

    def _segment(self, segment: Segment) -> Text:
        style = self._colour(segment.parts, segment.owner)
        if segment.how == "own":
            return Text.assemble((f"{self.mark} ", style), segment.text)
        return Text(segment.text, style)

    def cache(self, row: Row) -> Text:
        """A bar as long as the keys and values it makes, and their heads; whose they are, where they are read."""
        own = [segment for segment in row.cache if segment.how == "own"]
        if not own:
            return Text(row.reads, self._colour(row.cache[0].parts, row.cache[0].owner))
        share = sum(segment.size * len(segment.parts) / 2 for segment in own)
        style = self._colour([part for segment in own for part in segment.parts], row.layer)
        length = max(round(self.bar * share), 1)
        bar = self.mark * length + " " * (self.bar - length)
        return Text.assemble((bar, style), f" {row.reads}")

    def _colour(self, parts: Iterable[str], owner: int | None) -> str:
        lent = any((part, owner) in self.content.shared for part in parts)
        return self.colours[owner] if lent and owner is not None else "dim"


def _parts(content: Picture, plain: bool) -> Table:
    table, total = _table(plain, show_footer=True), content.total
    table.add_column("part", footer=total.part, no_wrap=True)
    table.add_column("parameters", footer=f"{total.params:,}", justify="right", no_wrap=True)
    table.add_column("bytes", footer=format_bytes(total.bytes), justify="right", no_wrap=True)
    table.add_column("of dense", footer=share(total.share_of_dense), justify="right", no_wrap=True)
    table.add_column("")
    longest = max(part.bytes for part in content.parts)
    for part in content.parts:
        bar = ("#" if plain else "█") * round(24 * part.bytes / longest)
        table.add_row(part.part, _params(part), format_bytes(part.bytes), share(part.share_of_dense), Text(bar, "dim"))
    return table


def _params(part: Part) -> str:
    return f"{part.params:,}" if part.part != CACHE else "–"


def _costs(content: Picture, plain: bool) -> Table:
    table = _table(plain)
    table.add_column("cost", no_wrap=True)
    for heading in ("this config", "dense", "of dense"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cost in content.costs:
        table.add_row(cost.words, cost.value, cost.dense, share(cost.share))
    return table
