"""The command that makes a sharing model of a dense one: `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .show import column_option, device_option, json_option, print_json, print_table, renamed_option

if TYPE_CHECKING:
    from ..search.convert import Converted


def _list_methods(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    """Print the methods and end."""
    if not wanted:
        return
    from ..pretrained.conversions import METHODS

    wide = max(len(f"{row.name} {row.size_name}") for row in METHODS.values())
    for row in METHODS.values():
        init = f" [init: {', '.join(row.starts)}]" if row.starts else ""
        click.echo(f"{row.name} {row.size_name}".ljust(wide) + f"  {row.paper}  {row.meaning}{init}")
    context.exit()


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--methods", is_flag=True, is_eager=True, expose_value=False, callback=_list_methods, help="List the methods.")
@click.option("--method", required=True, help="How it is converted; --methods lists them.")
@click.option("--size", help="Of the method, such as 2 or 3x8; by default a usual one.")
@click.option("--text", required=True, help="A file of text or .jsonl, a folder of them, a saved dataset, or `python`.")
@column_option
@click.option("--to", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--init", help="lower, stepwise or average: what a matrix that layers share begins as.")
@click.option("--fine-tune", default=100, show_default=True, help="Steps of training afterwards; 0 for none.")
@renamed_option("--heal", "--fine-tune")
@click.option("--distill", is_flag=True, help="Fine-tune on the dense model's probabilities.")
@click.option("--align", type=int, help="Steps of drawing heads together before they are tied (headwise-post: 100).")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--seq", default=128, show_default=True, help="Tokens in a row.")
@click.option("--calibration", default=32, show_default=True, help="Rows of training text by which a method chooses.")
@click.option("--windows", default=512, show_default=True, help="At most so many evaluation windows.")
@click.option("--context", default=1024, show_default=True, help="Tokens in the cache whose bytes are said.")
@device_option
@click.option("--seed", default=0, show_default=True)
@json_option
def convert(directory: Path, text: str, to: Path, context: int, as_json: bool, **said: Any) -> None:
    """Convert the dense model in DIR into one that shares, by a published method.

    Perplexity is measured before, after, and fine-tuned by a short training, on the last tenth of the text, which is used for
    nothing else.
    """
    from ..search.convert import ConvertSettings, convert_export
    from ..sharing.memory import MemorySpec
    from .show import Terminal

    done = convert_export(directory, text, to, ConvertSettings(**said, memory=MemorySpec(context)), Terminal())
    if as_json:
        return print_json(done.to_data())
    _print_converted(done, context)


def _print_converted(done: Converted, context: int) -> None:
    from ..config import format_bytes

    rows, first = [], done.stages[0]
    for stage in done.stages:
        losses, names = stage.losses, ("weight_bytes", "kv_cache_bytes", "memory_bytes")
        sizes = [(getattr(stage.memory, name), getattr(first.memory, name)) for name in names]
        words = [format_bytes(now) + (f" ({now / was - 1:+.0%})" if stage is not first else "") for now, was in sizes]
        rows.append([stage.name, f"{losses.perplexity:.3f} ± {losses.perplexity_standard_error:.3f}", *words])
    begun = f" ({done.init})" if done.init else ""
    title = f"{done.directory}: {done.method} {done.size}{begun}, cache of {context:,} tokens, bfloat16"
    print_table(["", "perplexity", "weights", "KV cache", "memory"], rows, title)
    for note in done.notes:
        click.echo(note)
