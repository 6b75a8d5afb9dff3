"""Printing: tables, JSON, and the live progress display.

Owns the terminal. Progress goes to stderr and is quiet when that is no terminal: a stage then is one line when it ends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from ..training.evaluation import Evaluation

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead; it says the same.")
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto (a GPU if there is one), cpu, cuda, cuda:1 or mps."
)
column_option = click.option("--column", default="text", show_default=True, help="Of .jsonl or a dataset: what holds the text.")
runs_option = click.option("--runs", default="runs", show_default=True, help="The folder that holds the runs.")

set_option = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A key of the trial, such as final.steps=100; may be repeated."
)


def renamed_option(old: str, new: str, is_flag: bool = False) -> Callable[[F], F]:
    """An option of version 0.1 that has another name since: it is hidden, and refused with the new name."""

    def refuse(context: click.Context, option: click.Parameter, value: Any) -> None:
        if value:
            raise UserError("unknown option", where=old, hint=f"it is called {new} now")

    return click.option(old, hidden=True, is_flag=is_flag, expose_value=False, callback=refuse)


def print_json(data: Any) -> None:
    """Plain data on stdout."""
    click.echo(json.dumps(data, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", words: int = 1) -> None:
    """A table on stdout: the first `words` columns to the left, and broken where the terminal is narrow, the others to the
    right. The first is never broken."""
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n < words else "right", no_wrap=not 0 < n < words)
    for row in rows:
        table.add_row(*row)
    print_view(table)


def print_view(view: Any, *lines: str) -> None:
    """Something that rich draws, then plain lines, on stdout; as wide as the terminal, or 160 columns where there is none."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(view)
    for line in lines:
        console.print(line, soft_wrap=True)


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` if it is less than an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Terminal:
    """The `Progress` of a run, drawn by rich."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, markup=False)

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[_Bar]:
        """A bar while the stage runs, with the front that it finds, and a line when it has ended."""
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(24 if self.console.width >= 100 else 10),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        ]
        bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        bar = _Bar(bars, bars.add_task(name, total=total, rate="", left=""), self.say)
        with ExitStack() as stack:
            if self.console.is_terminal:
                stack.enter_context(Live(console=self.console, get_renderable=lambda: bar.view, transient=True))
            yield bar
            elapsed = bars.tasks[0].elapsed or 0.0
        note = f" · {bar.note}" if bar.note else ""
        self.say(f"{name}: {bar.done} {unit} in {elapsed:.0f} s{note}")


def front_view(found: Sequence[Evaluation]) -> RenderableType:
    """A plot of what a search has found so far, and its best; nothing where nothing was found."""
    from rich.console import Group
    from rich.text import Text

    from ..report.terminal import best_line, front_plot

    return Group(front_plot(found), Text(best_line(found)), Text()) if found else Group()


EVERY = 60.0  # seconds between the lines of a stage where there is no terminal for a bar


class _Bar:
    def __init__(self, bars: Bars, task: TaskID, say: Callable[[str], None]) -> None:
        self.bars, self.task, self.done, self.note, self.say = bars, task, 0, "", say
        self.begun, self.said = -1, 0.0
        self.found: Sequence[Evaluation] = ()

    @property
    def view(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(front_view(self.found), self.bars, *([Text(f"  {self.note}", style="dim")] if self.note else ()))

    def update(self, done: int, note: str = "", found: Sequence[Evaluation] = ()) -> None:
        """Move the bar. What is left is estimated by what was done since the first count, which may be an earlier process's."""
        task = self.bars.tasks[0]
        elapsed, total = task.elapsed or 0.0, int(task.total or 0)
        self.begun = done if self.begun < 0 else self.begun
        self.done, self.note, self.found, made = done, note, found or self.found, done - self.begun
        rate = f"{made / elapsed:.1f}/s" if elapsed > 1 and made else ""
        left = f"{duration(elapsed / made * (total - done))} left" if elapsed > 1 and made else ""
        self.bars.update(self.task, completed=done, rate=rate, left=left)
        if self.bars.disable and left and elapsed > self.said + EVERY and done < total:
            self.said = elapsed
            self.say(" · ".join(part for part in (f"{task.description}: {done} of {total}", left, note) if part))

    def follow(self, done: int, total: int, loss: float) -> None:
        """Move the bar of a training that finds its own length."""
        self.bars.update(self.task, total=total)
        self.update(done, f"loss {loss:.3f}")
