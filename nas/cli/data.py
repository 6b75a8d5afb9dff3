"""The command `data`: what the cache of tokens holds, whether it is whole, and how it is emptied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .show import json_option, print_json, print_table

if TYPE_CHECKING:
    from ..data.cache import Entry


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def data(context: click.Context, as_json: bool) -> None:
    """List the texts whose tokens are kept, so that they are made once.

    They lie in NAS_CACHE, or XDG_CACHE_HOME/nas, by default ~/.cache/nas.
    """
    if context.invoked_subcommand is not None:
        return
    from ..config import format_bytes
    from ..data.cache import cache_folder, entries

    rows = [_row(entry) for entry in entries()]
    if as_json:
        return print_json({"folder": str(cache_folder()), "entries": rows})
    cells = [
        [
            row["key"],
            row["tokenizer"],
            row["text"],
            f"{row['tokens']:,}" if row["complete"] else "unfinished",
            format_bytes(row["bytes"]),
        ]
        for row in rows
    ]
    print_table(["key", "tokenizer", "text", "tokens", "size"], cells, words=3)
    click.echo(f"{len(rows)} in {cache_folder()}, {format_bytes(sum(row['bytes'] for row in rows))}")


def _row(entry: Entry) -> dict[str, Any]:
    head = {"key": entry.key, "complete": entry.complete, "bytes": entry.bytes}
    if not entry.complete:
        return head | {"text": "", "tokenizer": "", "tokens": 0}
    meta = entry.meta()
    return head | {"text": meta["source"], "tokenizer": meta["tokenizer"], "tokens": sum(meta["tokens"].values())}


@data.command()
@json_option
def check(as_json: bool) -> None:
    """Read every file again, and compare it with what was written. The exit code is 1 if one differs."""
    from ..data.cache import entries
    from ..errors import RunFailed

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


@data.command()
@click.argument("keys", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All of them.")
def remove(keys: tuple[str, ...], every: bool) -> None:
    """Delete the entries of KEYS. Runs keep the tokens that they need."""
    from ..data.cache import entries
    from ..errors import UserError, did_you_mean

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
