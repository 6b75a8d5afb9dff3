"""The commands about the folder of runs: `runs`, `watch`, `rm`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UserError
from .show import duration, front_view, json_option, print_json, print_table, runs_option

if TYPE_CHECKING:
    from ..search.status import StageStatus, Status

COLUMNS = ("run", "state", "stage", "front", "lowest perplexity", "size", "began")


@click.command("runs")
@runs_option
@json_option
def list_runs(runs: str, as_json: bool) -> None:
    """List the runs, the latest first: how far each is, its best so far, its size and its age."""
    from ..search.status import statuses

    found = list(statuses(Path(runs)))
    if as_json:
        return print_json([one.to_data() for one in found])
    if not found:
        return click.echo(f"no runs in {runs}")
    print_table(COLUMNS, [_row(one) for one in found], words=3)


@click.command()
@click.argument("run")
@click.option("--every", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Seconds.")
@runs_option
def watch(run: str, every: float, runs: str) -> None:
    """Follow RUN, which another process works on: its stages with what is left of each, and the front of what its search has
    evaluated so far."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from ..report.tables import front_table, terminal_table
    from ..search.run import Run
    from ..search.status import best_so_far, stages, status

    found = Run.find(run, Path(runs))

    def view(now: Status) -> Any:
        finished = now.state == "finished"
        evaluations = found.front().evaluations if finished else best_so_far(found)
        table = terminal_table(
            front_table(evaluations, keep="front") if evaluations else [], "the front" + " so far" * (not finished)
        )
        if finished:
            return Group(table, Text(_line(now)))
        rows = [_stage_row(one) for one in stages(found)]  # what a low terminal has no room for comes last
        return Group(Text(_line(now)), *([terminal_table(rows)] if rows else []), front_view(found.searched()), table)

    with Live(console=Console(highlight=False, markup=False), auto_refresh=False) as live:
        while True:
            now = status(found)
            live.update(view(now), refresh=live.console.is_terminal)
            if now.state != "working":
                break
            time.sleep(every)


@click.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="RUN…")
@click.option("--yes", is_flag=True, help="Do not ask.")
@runs_option
def remove(names: tuple[str, ...], yes: bool, runs: str) -> None:
    """Delete runs with their models and checkpoints; what MLflow has of them stays."""
    from ..search.run import Run

    found = list({run.folder.resolve(): run for run in (Run.find(name, Path(runs)) for name in names)}.values())
    if not yes:
        try:
            sure = click.confirm(f"delete {', '.join(str(run.folder) for run in found)}?", err=True)
        except click.Abort:
            raise UserError("nothing was deleted", where="nas rm", hint="answer y, or give --yes") from None
        if not sure:
            click.echo("nothing was deleted")
            return
    for run in found:
        run.remove()
        click.echo(f"deleted {run.folder}")


def _row(one: Status) -> list[str]:
    from ..config import format_bytes

    began = f"{duration(one.seconds)} ago" if one.seconds else ""
    best = f"{one.perplexity:.2f}" if one.perplexity else ""
    stage = f"{one.stage}: {one.done} of {one.total} {one.unit}" if one.done else one.stage
    return [one.run, one.state, stage, str(one.front or ""), best, format_bytes(one.bytes), began]


def _line(one: Status) -> str:
    from ..search.progress import said_seconds

    row = dict(zip(COLUMNS, _row(one), strict=True))
    left = f"{said_seconds(one.seconds_left)} left" if one.seconds_left else ""
    began = f"began {row['began']}" if row["began"] else ""
    return " · ".join(part for part in (row["run"], row["state"], row["stage"], left, began) if part)


def _stage_row(one: StageStatus) -> dict[str, str]:
    from ..search.progress import said_seconds

    return {
        "stage": one.stage,
        "done": f"{one.part:.0%}",
        "tokens": f"{one.tokens:,} of {one.all_tokens:,}" if one.all_tokens else "",
        "took": duration(one.seconds) if one.seconds else "",
        "left": said_seconds(one.seconds_left) if one.seconds_left else "",
    }
