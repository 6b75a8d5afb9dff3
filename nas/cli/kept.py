"""The commands about what is kept: `runs`, `watch` and `rm` of the folder of runs, and `data` of the cache of tokens."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import format_bytes
from ..errors import RunFailed, UserError, did_you_mean
from .show import duration, front_view, json_option, print_json, print_table, runs_option

if TYPE_CHECKING:
    from ..data.cache import Entry
    from ..search.progress import StageStatus, Status

COLUMNS = ("run", "state", "stage", "front", "lowest perplexity", "size", "began")


@click.command("runs")
@runs_option
@json_option
def list_runs(runs: str, as_json: bool) -> None:
    """List the runs, the latest first: how far each is, its best so far, its size and its age."""
    from ..search.progress import statuses

    found = list(statuses(Path(runs)))
    if as_json:
        return print_json(list(map(asdict, found)))
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
    from ..search.progress import best_so_far, stages, status
    from ..search.run import Run

    found = Run.find(run, Path(runs))

    def view(now: Status) -> Any:
        finished = now.state == "finished"
        evaluations = found.front().evaluations if finished else best_so_far(found)
        front = front_table(evaluations, keep="front") if evaluations else []
        table = terminal_table(front, "the front" + " so far" * (not finished))
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


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def data(context: click.Context, as_json: bool) -> None:
    """List the texts whose tokens are kept, so that they are made once.

    They lie in NAS_CACHE, or XDG_CACHE_HOME/nas, by default ~/.cache/nas.
    """
    if context.invoked_subcommand is not None:
        return
    from ..data.cache import cache_folder, entries

    rows = [_cached(entry) for entry in entries()]
    if as_json:
        return print_json({"folder": str(cache_folder()), "entries": rows})
    cells = [
        [
            *(row[name] for name in ("key", "tokenizer", "text")),
            f"{row['tokens']:,}" if row["complete"] else "unfinished",
            format_bytes(row["bytes"]),
        ]
        for row in rows
    ]
    print_table(["key", "tokenizer", "text", "tokens", "size"], cells, words=3)
    click.echo(f"{len(rows)} in {cache_folder()}, {format_bytes(sum(row['bytes'] for row in rows))}")


def _cached(entry: Entry) -> dict[str, Any]:
    head = {"key": entry.key, "complete": entry.complete, "bytes": entry.bytes}
    if not entry.complete:
        return head | {"text": "", "tokenizer": "", "tokens": 0}
    meta = entry.meta()
    return head | {"text": meta["source"], "tokenizer": meta["tokenizer"], "tokens": sum(meta["tokens"].values())}


@data.command("check")
@json_option
def check_data(as_json: bool) -> None:
    """Read every file again, and compare it with what was written. The exit code is 1 if one differs."""
    from ..data.cache import entries

    damaged = {entry.key: found for entry in entries() if entry.complete and (found := entry.damaged())}
    unfinished = [entry.key for entry in entries() if not entry.complete]
    if as_json:
        print_json({"damaged": damaged, "unfinished": unfinished})
    else:
        for key, files in damaged.items():
            click.echo(f"{key}: damaged: {', '.join(files)}; `nas data remove {key}`, and it is made again")
        for key in unfinished:
            click.echo(f"{key}: unfinished; the command that began it goes on with it, or `nas data remove {key}`")
        click.echo(f"{len(entries())} checked, {len(damaged)} damaged, {len(unfinished)} unfinished")
    if damaged:
        raise RunFailed(f"{len(damaged)} of the cache's entries are not what was written: {', '.join(damaged)}")


@data.command("remove")
@click.argument("keys", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All of them.")
def remove_data(keys: tuple[str, ...], every: bool) -> None:
    """Delete the entries of KEYS. Runs keep the tokens that they need."""
    from ..data.cache import entries

    known = {entry.key: entry for entry in entries()}
    if not keys and not every:
        raise UserError("names no entry", where="nas data remove", hint="give keys of `nas data`, or --all")
    for key in keys:
        if key not in known:
            raise UserError(f"no such entry: {key}", where="nas data remove", hint=did_you_mean(key, known))
    for key in known if every else keys:
        size = known[key].bytes
        known[key].remove()
        click.echo(f"{key}: removed, {size:,} bytes")
