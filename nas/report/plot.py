"""A front as a small plot of characters, for a terminal.

Owns what a search's live display and `nas watch` draw. Nothing is told by colour: marks differ, and the rest is dim or bold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from ..pareto import front
from ..sharing.label import label
from ..sharing.objectives import OBJECTIVES, QUALITY
from ..training.evaluation import Evaluation
from .terminal import shows_blocks

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
