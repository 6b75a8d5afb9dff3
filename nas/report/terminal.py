"""A `Picture` for the terminal: the layers, bytes by part, and the costs beside the dense model's.

Owns what `nas describe` prints. Colours are those of the drawing; without colour the words say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
from .picture import CACHE, NORM_PARTS, Picture, Row, Segment, picture
from .style import layer_colours
from .tables import cost_rows, parts_rows, share

ASCII = str.maketrans({"·": "|", "×": "x", "–": "-"})
SPARED = ("bars", "own cache", "own weights")  # what the table of layers goes without where the console is narrow, first to last


def sharing_view(shape: ModelShape, config: SharingConfig, spec: MemorySpec | None = None, name: str = "") -> RenderableType:
    """The picture and its tables for a rich console; in ASCII where the console cannot show more."""
    return _View(picture(shape, config, spec or MemorySpec(), name))


class _View:
    """Draws a picture as what the console has room and characters for."""

    def __init__(self, content: Picture) -> None:
        self.content = content
        self.colours = layer_colours({source for _, source in content.shared})
        self.plain, self.mark, self.bar = False, "■", 8

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType | Segments]:
        content, self.plain = self.content, not shows_blocks(console)
        self.mark = "#" if self.plain else "■"
        for spared in range(len(SPARED) + 1):
            layers = self._layers(SPARED[:spared])
            if Measurement.get(console, options.update(width=1000), layers).maximum <= options.max_width:
                break
        title = Text.assemble((content.name, "bold"), "\n", (content.subtitle, "dim"))
        shared = " `= layer j` is layer j's, kept once." if content.shared else ""
        key = Text(f"{content.ends[0]}, layers from 0, {content.ends[1]}. {self.mark} is a layer's own.{shared}", style="dim")
        costs = self._figures(cost_rows(content.costs))
        drawn = console.render(Group(title, layers, key, Text(), self._parts(), Text(), costs), options)
        yield Segments(piece._replace(text=piece.text.translate(ASCII) if self.plain else piece.text) for piece in drawn)

    def _table(self, footer: bool = False) -> Table:
        style = box.ASCII2 if self.plain else box.SIMPLE_HEAD
        return Table(box=style, pad_edge=False, padding=(0, 1), show_footer=footer)

    def _layers(self, spared: Sequence[str]) -> Table:
        self.bar = 0 if "bars" in spared else 8
        columns: dict[str, Callable[[Row], str | Text]] = {
            "layer": lambda row: str(row.layer),
            "attention": lambda row: self._block(row, row.attention, 0),
            "FFN": lambda row: self._block(row, row.ffn, 1),
            CACHE: self._cache,
            **({"also": lambda row: row.also} if any(row.also for row in self.content.rows) else {}),
            "own weights": lambda row: format_bytes(row.weight_bytes) if row.weight_bytes else "–",
            "own cache": lambda row: format_bytes(row.kv_cache_bytes) if row.kv_cache_bytes else "–",
        }
        table, shown = self._table(), {name: cell for name, cell in columns.items() if name not in spared}
        for name in shown:
            figure = name in ("layer", "own weights", "own cache")
            table.add_column(name, justify="right" if figure else "left", no_wrap=figure)
        for row in self.content.rows:
            table.add_row(*(cell(row) for cell in shown.values()))
        return table

    def _block(self, row: Row, segments: Sequence[Segment], block: int) -> Text:
        """`■ q o` where owned, `= layer 0` where all is another layer's, `k v = layer 0` where some is."""
        said = [segment for segment in segments if segment.text]
        text, norm = Text(), row.norms[block]
        for n, segment in enumerate(said):
            style = self._colour(segment.parts, segment.owner)
            text.append(", " if n else "")
            if segment.how == "own":
                text.append(f"{self.mark} ", style).append(segment.text)
            else:
                text.append(segment.text, style)
        if norm not in (row.layer, None) and {segment.owner for segment in said} != {norm}:
            text.append(f", norm = layer {norm}", self._colour((NORM_PARTS[block],), norm))
        return text

    def _cache(self, row: Row) -> Text:
        """A bar as long as the keys and values that the layer makes, and their heads; the source where it makes none."""
        own = [segment for segment in row.cache if segment.how == "own"]
        if not own:
            return Text(row.reads, self._colour(row.cache[0].parts, row.cache[0].owner))
        share_of_heads = sum(segment.size * len(segment.parts) / 2 for segment in own)
        style = self._colour([part for segment in own for part in segment.parts], row.layer)
        return Text.assemble(((self.mark * max(round(self.bar * share_of_heads), 1)).ljust(self.bar), style), f" {row.reads}")

    def _colour(self, parts: Iterable[str], owner: int | None) -> str:
        shared = any((part, owner) in self.content.shared for part in parts)
        return self.colours[owner] if shared and owner is not None else "dim"

    def _parts(self) -> Table:
        parts, total = self.content.parts, self.content.total
        longest = max(part.bytes for part in parts)
        bars = [("#" if self.plain else "█") * round(24 * part.bytes / longest) for part in parts]
        rows: list[Mapping[str, str | Text]] = [
            {**row, "": Text(bar, "dim")} for row, bar in zip(parts_rows(parts), bars, strict=True)
        ]
        footer = total.part, f"{total.params:,}", format_bytes(total.bytes), share(total.share_of_dense), ""
        return self._figures(rows, footer)

    def _figures(self, rows: Sequence[Mapping[str, str | Text]], footer: Sequence[str] = ()) -> Table:
        """Rows whose first column is words."""
        table = self._table(bool(footer))
        for n, name in enumerate(rows[0]):
            table.add_column(name, footer[n] if footer else "", justify="right" if n and name else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row.values())
        return table


def shows_blocks(console: Console) -> bool:
    """Whether a console's encoding has the characters that pictures are drawn with."""
    try:
        "■█●◆·×–─│└".encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
