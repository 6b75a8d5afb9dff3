"""The commands about sharing itself: `zoo` and `describe`; and the model that they, and `check`, are asked about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UserError
from .show import json_option, print_json, print_table, print_view

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..sharing.memory import MemorySpec
    from ..sharing.shape import ModelShape
    from ..sharing.sharing_config import SharingConfig

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

    config = preset(name, shape)
    row = PRESETS.get(name) or PRESETS[name.rpartition("-")[0]]
    if as_json:
        head = {"name": name, "paper": row.paper, "shares": row.shares, "note": row.note}
        return print_json(head | {"hash": config.hash, "config": config.to_data()})
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
            yield head | {"hash": config.hash} | memory | {"of_dense": of_dense}


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
    from ..sharing.primitives import PRIMITIVES

    rows: list[dict[str, Any]] = [
        {"name": row.name, "of": "model" if row.per_model else "layer", "meaning": row.meaning, "paper": row.paper}
        | {"options": None if row.sources else row.options(shape)}
        for row in PRIMITIVES.values()
    ]
    if as_json:
        return print_json(rows)
    table = [[row["name"], row["of"], row["meaning"], row["paper"], _options(row["options"])] for row in rows]
    print_table(["primitive", "of a", "meaning", "paper", "options, in a space that names none"], table, words=5)


def _options(values: list[Any] | None) -> str:
    """A space's own options, as YAML has them; a layer j where the primitive is a choice between layers."""
    return "j, a layer" if values is None else ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)


@click.command()
@click.argument("file")
@model_option
@memory_options
@click.option("--to", "picture_path", metavar="PICTURE", help="Also draw who shares what into an .svg or .png file.")
@json_option
def describe(file: str, model_path: str | None, picture_path: str | None, as_json: bool, **memory: Any) -> None:
    """Who shares what, bytes by part, and what it costs beside the dense model, for FILE: a sharing.yaml, an exported folder, or
    a preset's name."""
    from ..files import require_writable
    from ..report import bytes_by_part, draw_sharing, sharing_view
    from ..report.picture import picture
    from ..sharing.memory import MemorySpec

    if picture_path:
        require_writable(Path(picture_path), file=True)
    shape, config = _described(file, model_path)
    spec = MemorySpec(**memory)
    name = Path(file).stem if Path(file).exists() else file
    if picture_path:
        draw_sharing(shape, config, Path(picture_path), spec, name)
    if as_json:
        drawn = picture(shape, config, spec)
        head = {"hash": config.hash, "config": config.to_data()} | drawn.memory.to_data()
        return print_json(head | {"dense": drawn.dense.to_data(), "parts": bytes_by_part(shape, config, spec)})
    print_view(sharing_view(shape, config, spec, name))


def _described(file: str, model_path: str | None) -> tuple[ModelShape, SharingConfig]:
    from ..presets import preset
    from ..sharing.sharing_config import SharingConfig

    path = Path(file)
    if path.is_dir():
        from ..export import read_config

        return read_config(path)
    shape = shape_in(model_path)
    return shape, (SharingConfig.load(shape, path) if path.suffix in (".yaml", ".yml") else preset(file, shape))
