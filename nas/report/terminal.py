"""What a terminal shows: the picture of a config, two configs side by side in words, and a front as a plot of characters.

Owns what `nas describe`, `nas diff` and a search's live display draw. Colours are those of the drawing; without colour the words
say the same, or marks differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from ..config import format_bytes
from ..errors import UserError
from ..pareto import front
from ..sharing.label import label, layer_line, spans
from ..sharing.memory import MemorySpec
from ..sharing.objectives import OBJECTIVES, QUALITY
from ..sharing.picture import CACHE, NORM_PARTS, Picture, Row, Segment, picture
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import LayerChoices, SharingConfig
from ..training.evaluation import Evaluation
from .style import layer_colours
from .tables import Row as TableRow
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


HEIGHT, WIDEST = 12, 100  # rows of the plot, and its columns at most
LOG_RATIO = 5  # as in figures: an axis is logarithmic where the largest value is so many times the smallest

MARKS = {True: ("·", "●", "◆"), False: (".", "o", "#")}
"""Of a config that others dominate, of one of the front, and of the best: in Unicode, and in ASCII."""


def front_plot(evaluations: Sequence[Evaluation]) -> RenderableType:
    """The first objective against perplexity: the front, its best, and what it dominates as far as the front's range shows it."""
    return _Plot(evaluations)


def best_line(evaluations: Sequence[Evaluation]) -> str:
    """The config of the lowest perplexity, in words; the search keeps to the user's limits."""
    best = min(evaluations, key=lambda e: e.point[-1])
    said = ", ".join(f"{OBJECTIVES[name].words} {OBJECTIVES[name].show(best.value(name))}" for name in best.objectives[:-1])
    return f"best within the limits: {best.name or label(best.config)}, perplexity {best.point[-1]:.4g}, {said}"


@dataclass(frozen=True)
class _Plot:
    evaluations: Sequence[Evaluation]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        points = [(e.value(e.objectives[0]), e.point[-1]) for e in self.evaluations]
        if not points:
            return
        dim, member, best = MARKS[shows_blocks(console)]
        members = front([e.point for e in self.evaluations])
        first, ys = OBJECTIVES[self.evaluations[0].objectives[0]], _Axis.of([points[n][1] for n in members])
        ends = [OBJECTIVES[QUALITY].show(ys.high), OBJECTIVES[QUALITY].show(ys.low)]
        margin = max(map(len, ends)) + 1
        width = max(min(options.max_width - margin - 2, WIDEST), 10)
        xs = _Axis.of([x for x, _ in points])
        cells: dict[tuple[int, int], tuple[str, str]] = {}
        for n in sorted(range(len(points)), key=lambda n: (n in members, -points[n][1])):
            row, column = HEIGHT - 1 - ys.cell(points[n][1], HEIGHT), xs.cell(points[n][0], width)
            mark = (member, "bold") if n in members else (dim, "dim")
            if 0 <= row < HEIGHT:
                cells[row, column] = mark
        lowest = min(members, key=lambda n: points[n][1])
        cells[HEIGHT - 1 - ys.cell(points[lowest][1], HEIGHT), xs.cell(points[lowest][0], width)] = (best, "bold")
        bar, corner, line = ("│", "└", "─") if shows_blocks(console) else ("|", "+", "-")
        yield Text("perplexity", style="dim")
        for row in range(HEIGHT):
            said = {0: ends[0], HEIGHT - 1: ends[1]}.get(row, "")
            parts = (cells.get((row, column), (" ", "")) for column in range(width))
            yield Text.assemble((said.rjust(margin - 1) + f" {bar}", "dim"), *parts, no_wrap=True)
        yield Text(" " * margin + corner + line * width, style="dim", no_wrap=True)
        low, high, name = first.show(xs.low), first.show(xs.high), first.words
        left = max((width - len(name)) // 2 - len(low), 1)
        right = max(width - len(low) - left - len(name) - len(high), 1)
        yield Text(" " * (margin + 1) + low + " " * left + name + " " * right + high, style="dim", no_wrap=True)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> _Axis:
        return _Axis(min(values), max(values))

    def cell(self, value: float, count: int) -> int:
        """The number of the cell of a value, of so many; beyond the ends for a value that is."""
        scale = math.log if self.low > 0 and value > 0 and self.high / self.low >= LOG_RATIO else float
        span = scale(self.high) - scale(self.low)
        return round((scale(value) - scale(self.low)) / span * (count - 1)) if span else count // 2 if value == self.low else -1


Named = tuple[str, ModelShape, SharingConfig]  # a config, its name and the shape of its model

NOTHING = "–"


def pictures(a: Named, b: Named, spec: MemorySpec) -> tuple[Picture, Picture]:
    """The two pictures. Raises UserError for configs of two models."""
    if a[1] != b[1]:
        models = (f"{name} is of {shape.words}" for name, shape, _ in (a, b))
        hint = "compare configs of one model; --model says which a sharing.yaml or a preset is for"
        raise UserError(f"of two models: {', '.join(models)}", hint=hint)
    one, other = (picture(shape, config, spec, name) for name, shape, config in (a, b))
    return one, other


def differences(a: SharingConfig, b: SharingConfig) -> list[dict[str, Any]]:
    """The layers that differ, those alike and beside each other as one, and then what is stated for the whole model: `layers`
    (empty for the whole model) and, for `a` and `b`, each primitive's value."""
    pairs = list(zip(a.layers, b.layers, strict=True))
    runs = groupby(range(len(pairs)), key=lambda i: pairs[i])
    found: list[tuple[list[int], tuple[LayerChoices, LayerChoices]]] = [(list(layers), pair) for pair, layers in runs]
    found.append(([], (a.model_choices, b.model_choices)))
    return [{"layers": layers, "a": dict(one), "b": dict(other)} for layers, (one, other) in found if one != other]


def difference_rows(found: list[dict[str, Any]]) -> list[TableRow]:
    """`differences` for people."""
    return [
        {"layer": spans(row["layers"]) or "model"}
        | {side.upper(): layer_line(tuple(row[side].items())) or NOTHING for side in "ab"}
        for row in found
    ]


def pair_rows(both: tuple[Picture, Picture]) -> list[TableRow]:
    """What each costs, for people, and the second beside the first."""
    rows = []
    for one, other in zip(both[0].costs, both[1].costs, strict=True):
        change = "" if not one.amount else f"{other.amount / one.amount - 1:+.1%}"
        rows.append({"cost": one.words, "A": one.value, "B": other.value, "B beside A": change})
    return rows
