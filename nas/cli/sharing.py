"""The command `zoo`; and the model that it, `describe` and `check` are asked about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UserError
from .show import json_option, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..sharing.memory import MemorySpec
    from ..sharing.shape import ModelShape

model_option = click.option(
    "--model",
    "model_path",
    metavar="M.yaml",
    help="The model's shape: a model or search-space file. Default: 12 layers of width 768.",
)


def shape_in(path: str | None) -> ModelShape:
    """The shape in a model file, or in the `model:` of a search space; a common one, if there is none."""
    from ..config import build, read_yaml
    from ..sharing.shape import ModelShape

    if path is None:
        return ModelShape(vocab_size=32000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048)
    document = read_yaml(Path(path))
    if isinstance(document.data, dict) and "model" in document.data:
        document = document.inside("model")
    return build(ModelShape, document)


def memory_options(command: Any) -> Any:
    """`--context`, `--batch` and `--dtype`: where memory is measured."""
    for option in (
        click.option("--dtype", default="bfloat16", show_default=True, help="Of weights and cache."),
        click.option("--batch", default=1, show_default=True, help="Sequences decoded at once."),
        click.option("--context", default=1024, show_default=True, help="Tokens in the cache."),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("name", required=False)
@click.option("--primitives", is_flag=True, help="The primitives that schemes and search spaces are made of, instead.")
@model_option
@memory_options
@json_option
def zoo(name: str | None, primitives: bool, model_path: str | None, as_json: bool, **memory: Any) -> None:
    """The published sharing schemes; with NAME, one of them as YAML.

    \b
    nas zoo                        every preset, and what it saves
    nas zoo cla-3 --model M.yaml   its sharing.yaml for that model
    nas zoo --primitives           what a sharing.yaml can say
    """
    from ..sharing.memory import MemorySpec

    shape, spec = shape_in(model_path), MemorySpec(**memory)
    if primitives:
        _primitives(shape, as_json)
    elif name is None:
        _zoo(shape, spec, as_json)
    else:
        _preset(name, shape, as_json)


def _preset(name: str, shape: ModelShape, as_json: bool) -> None:
    from textwrap import wrap

    from ..presets import PRESETS, preset
    from ..sharing.label import names_of

    config = preset(name, shape)
    row = PRESETS.get(name) or PRESETS[name.rpartition("-")[0]]
    if as_json:
        head = {"name": name, "paper": row.paper, "shares": row.shares, "note": row.note}
        return print_json(head | names_of(config) | {"config": config.to_data()})
    title = f"{name}: {row.shares}" + (f" ({row.paper})" if row.paper else "")
    for line in (title, *wrap(row.note, 110)):
        click.echo(f"# {line}")
    click.echo(config.to_yaml(), nl=False)


def _zoo(shape: ModelShape, spec: MemorySpec, as_json: bool) -> None:
    rows = list(_zoo_rows(shape, spec))
    if as_json:
        return print_json(rows)
    possible = [row for row in rows if "impossible" not in row]
    model = f"{shape.num_hidden_layers} layers of width {shape.hidden_size}"
    title = f"{model}, cache of {spec.context:,} tokens × {spec.batch}, {spec.dtype}; in brackets, of dense"
    columns = ["preset", "shares", "paper", "weights", "KV cache", "cache read\na token", "operations\na token"]
    print_table(columns, [[*_named(row), *_sizes(row)] for row in possible], title, words=3)
    impossible = [[*_named(row), row["impossible"]] for row in rows if "impossible" in row]
    if impossible:
        print_table(["preset", "shares", "paper", "why not"], impossible, "Not for this model", words=4)


def _zoo_rows(shape: ModelShape, spec: MemorySpec) -> Iterator[dict[str, Any]]:
    """A row for each preset at each size worth trying, the dense model's first; or the reason why there is none."""
    from ..presets import PRESETS
    from ..sharing.label import names_of
    from ..sharing.memory import measure

    dense = measure(shape, PRESETS["dense"].build(shape), spec).to_data()
    for row in PRESETS.values():
        for size in dict.fromkeys(row.sizes(shape) or [None]):
            head = {"name": row.full_name(size), "paper": row.paper, "shares": row.shares}
            try:
                config = row.build(shape, size)
            except UserError as error:
                yield head | {"impossible": "; ".join(part for part in (error.message, error.hint) if part)}
                continue
            memory = measure(shape, config, spec).to_data()
            of_dense = {name: memory[name] / count for name, count in dense.items()}
            yield head | names_of(config) | memory | {"of_dense": of_dense}


def _named(row: dict[str, Any]) -> list[str]:
    return [row["name"], row["shares"], row["paper"]]


def _sizes(row: dict[str, Any]) -> list[str]:
    """Bytes and what they are of the dense model's; of a token's reading and computing this alone, but for the dense model."""
    from ..config import format_bytes, format_flops

    shares = {name: f"{share:.0%}" for name, share in row["of_dense"].items()}
    read, flops = "kv_read_bytes_per_token", "flops_per_token"
    if row["name"] == "dense":
        return [*(format_bytes(row[name]) for name in ("weight_bytes", "kv_cache_bytes", read)), format_flops(row[flops])]
    sizes = [f"{format_bytes(row[name])} ({shares[name]})" for name in ("weight_bytes", "kv_cache_bytes")]
    return [*sizes, shares[read], shares[flops]]


def _primitives(shape: ModelShape, as_json: bool) -> None:
    from ..sharing.label import form
    from ..sharing.primitives import PRIMITIVES

    rows: list[dict[str, Any]] = [
        {"name": row.name, "in_labels": form(row).replace("{}", "N"), "of": "model" if row.per_model else "layer"}
        | {"meaning": row.meaning, "paper": row.paper}
        | {"options": None if row.sources else row.options(shape)}
        for row in PRIMITIVES.values()
    ]
    if as_json:
        return print_json(rows)
    table = [[row["name"], row["of"], row["in_labels"], row["meaning"], row["paper"], _options(row["options"])] for row in rows]
    print_table(["primitive", "of a", "in labels", "meaning", "paper", "default options"], table, words=6)


def _options(values: list[Any] | None) -> str:
    """A space's own options, as YAML has them; a layer j where the primitive is a choice between layers."""
    return "j, a layer" if values is None else ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)
