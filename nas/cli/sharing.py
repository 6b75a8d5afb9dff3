"""The commands about sharing itself: `zoo`, `describe`, `check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UserError
from .show import json_option, print_json, print_table, print_view

if TYPE_CHECKING:
    from ..loading import Document
    from ..memory import MemorySpec
    from ..shape import ModelShape
    from ..sharing import SharingConfig

model_option = click.option(
    "--model",
    "model_path",
    metavar="M.yaml",
    help="The model's shape: a model or search-space file. Default: 12 layers of width 768.",
)


def _shape(path: str | None) -> ModelShape:
    """The shape in a model file, or in the `model:` of a search space."""
    from ..loading import build, read_yaml
    from ..shape import ModelShape

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
@model_option
@memory_options
@json_option
def zoo(name: str | None, model_path: str | None, context: int, batch: int, dtype: str, as_json: bool) -> None:
    """The published sharing schemes; with NAME, one of them as YAML.

    \b
    nas zoo                        every preset, and what it saves
    nas zoo cla-3 --model M.yaml   its sharing.yaml for that model
    """
    from ..memory import MemorySpec
    from ..zoo import preset

    shape, spec = _shape(model_path), MemorySpec(context, batch, dtype)
    if name is None:
        _zoo_table(shape, spec, as_json)
    elif as_json:
        print_json(preset(name, shape).to_data())
    else:
        click.echo(preset(name, shape).to_yaml(), nl=False)


def _zoo_table(shape: ModelShape, spec: MemorySpec, as_json: bool) -> None:
    from ..loading import format_bytes
    from ..memory import measure
    from ..zoo import PRESETS, presets

    rows = []
    for name, config in presets(shape):
        row = PRESETS.get(name) or PRESETS[name.rpartition("-")[0]]
        head = {"name": name, "paper": row.paper, "shares": row.shares, "hash": config.hash}
        rows.append(head | measure(shape, config, spec).to_data())
    if as_json:
        return print_json(rows)
    dense = rows[0]

    def saved(row: dict[str, Any], key: str) -> str:
        return f"{format_bytes(row[key])} ({row[key] / dense[key] - 1:+.0%})" if row is not dense else format_bytes(row[key])

    sizes = ("weight_bytes", "kv_cache_bytes", "memory_bytes")
    table = [[str(r["name"]), str(r["shares"]), str(r["paper"]), *(saved(r, key) for key in sizes)] for r in rows]
    model = f"{shape.num_hidden_layers} layers of width {shape.hidden_size}"
    title = f"{model}, cache of {spec.context} tokens × {spec.batch}, {spec.dtype}"
    print_table(["preset", "shares", "arXiv", "weights", "KV cache", "memory"], table, title)


@click.command()
@click.argument("file")
@model_option
@memory_options
@click.option("--to", "picture", metavar="PICTURE", help="Also draw who shares what into an .svg or .png file.")
@json_option
def describe(file: str, model_path: str | None, context: int, batch: int, dtype: str, picture: str | None, as_json: bool) -> None:
    """Bytes by part and a picture of who shares what, for FILE: a sharing.yaml, an exported folder, or a preset's name."""
    from ..memory import MemorySpec, measure
    from ..report import bytes_by_part, draw_sharing, sharing_view

    shape, config = _described(file, model_path)
    spec = MemorySpec(context, batch, dtype)
    name = Path(file).stem if Path(file).exists() else file
    if picture:
        draw_sharing(shape, config, Path(picture), spec, name)
    if as_json:
        memory, parts = measure(shape, config, spec).to_data(), bytes_by_part(shape, config, spec)
        return print_json({"hash": config.hash, "config": config.to_data()} | memory | {"parts": parts})
    print_view(sharing_view(shape, config, spec, name))


def _described(file: str, model_path: str | None) -> tuple[ModelShape, SharingConfig]:
    from ..sharing import SharingConfig
    from ..zoo import preset

    path = Path(file)
    if path.is_dir():
        from ..export import read_config

        return read_config(path)
    shape = _shape(model_path)
    return shape, (SharingConfig.load(shape, path) if path.suffix in (".yaml", ".yml") else preset(file, shape))


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--model", "model_path", metavar="M.yaml", help="The model that sharing files are for.")
@json_option
def check(files: tuple[str, ...], model_path: str | None, as_json: bool) -> None:
    """Say whether FILES (trials, search spaces, models, sharing files) are right, or why not."""
    from ..loading import read_yaml

    rows = []
    for file in files:
        document = read_yaml(Path(file))
        kind, found = _check(document, Path(file), model_path)
        rows.append({"file": file, "kind": kind, "says": found})
    if as_json:
        return print_json(rows)
    for row in rows:
        click.echo(f"{row['file']}: a {row['kind']}: {row['says']}")


def _check(document: Document, path: Path, model_path: str | None) -> tuple[str, str]:
    keys = set(document.data) if isinstance(document.data, dict) else set()
    if "space" in keys or "supernet" in keys:
        from ..search.trial import Trial

        trial = Trial.load(path)
        return "trial", f"{trial.file.search.evaluations} evaluations, {trial.file.supernet.steps} supernet steps"
    if "choices" in keys:
        return "search space", _space_says(path)
    if "hidden_size" in keys:
        shape = _shape(str(path))
        return "model", f"{shape.num_hidden_layers} layers of width {shape.hidden_size}"
    if "num_hidden_layers" in keys:
        if model_path is None:
            raise UserError("a sharing file is right only for a model", where=str(path), remedy="add --model M.yaml")
        from ..sharing import SharingConfig

        return "sharing config", SharingConfig.load(_shape(model_path), path).hash
    raise UserError(
        "neither a trial (space:), a search space (choices:), a model (hidden_size:) nor a sharing file (num_hidden_layers:)",
        where=str(path),
    )


def _space_says(path: Path) -> str:
    from ..memory import MemorySpec
    from ..space import SearchSpace

    space = SearchSpace.load(path)
    reach = space.reach(MemorySpec())
    space.require_reachable(reach)
    return reach.words()
