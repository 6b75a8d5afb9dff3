"""The command about the whole zoo: `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .show import Terminal, json_option, print_json, print_view, runs_option

COLUMNS = ("name", "weights", "cache", "memory", "perplexity", "vs dense", "front", "rate")
"""What of the page's table a terminal has room for."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.yaml")
@click.option("--to", type=click.Path(path_type=Path), help="Also write the page, its table and its figure into this folder.")
@click.option("--name", help="The comparison's name; by default the file's.")
@click.option("--address", help="A Ray cluster to join (host:6379, or auto); by default a local one is started.")
@click.option("--workers", type=click.IntRange(1), help="Processes at work at once, in place of the file's.")
@click.option("--overwrite", is_flag=True, help="Replace a comparison of the same name.")
@runs_option
@json_option
def compare(file: Path, to: Path | None, as_json: bool, runs: str, **said: Any) -> None:
    """Train the published schemes alone, on equal terms, and print how they compare.

    Each is trained at every learning rate of FILE and shown at its best. Stop it when you like: the same command goes on.
    """
    from ..search.compare import compare as carry_out
    from ..search.launch import Launch

    run, comparison = carry_out(Launch(file, Path(runs), **said), Terminal(), to)
    if as_json:
        rows = [row.to_data() for row in comparison.rows]
        return print_json({"run": run.name, "folder": str(run.folder), "rows": rows, "failed": dict(comparison.failed)})
    from ..report.compare import FIGURE, PAGE, compared_table
    from ..report.tables import terminal_table

    rows = [{name: row[name] for name in COLUMNS} for row in compared_table(comparison.rows)]
    folder = to or run.folder
    print_view(terminal_table(rows, comparison.title), f"page    {folder / PAGE}", f"figure  {folder / FIGURE}")
