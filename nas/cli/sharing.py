"""The commands `zoo`, `describe` and `diff`; how a person names a config, and the model that it is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

from ..config import build, format_bytes, format_flops, read_yaml
from ..errors import UserError
from ..files import require_writable
from ..presets import PRESETS, preset
from ..sharing.label import form, label, names_of
from ..sharing.memory import MemorySpec, measure
from ..sharing.picture import bytes_by_part
from ..sharing.primitives import PRIMITIVES
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .show import json_option, print_json, print_table, print_view, runs_option

if TYPE_CHECKING:
    from ..report.measured import MeasuredConfig
    from ..search.run import Run


model_option = click.option(
    "--model",
    "model_path",
    metavar="M.yaml",
    help="The model's shape: a model or search-space file. Default: 12 layers of width 768.",
)


def shape_in(path: str | None) -> ModelShape:
    """The shape in a model file, or in the `model:` of a search space; a common one, if there is none."""
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
    shape, spec = shape_in(model_path), MemorySpec(**memory)
    if primitives:
        _primitives(shape, as_json)
    elif name is None:
        _zoo(shape, spec, as_json)
    else:
        _preset(name, shape, as_json)


def _preset(name: str, shape: ModelShape, as_json: bool) -> None:
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
    title = f"{shape.words}, cache of {spec.context:,} tokens × {spec.batch}, {spec.dtype}; in brackets, of dense"
    columns = ["preset", "shares", "paper", "weights", "KV cache", "cache read\na token", "operations\na token"]
    print_table(columns, [[*_named(row), *_sizes(row)] for row in possible], title, words=3)
    impossible = [[*_named(row), row["impossible"]] for row in rows if "impossible" in row]
    if impossible:
        print_table(["preset", "shares", "paper", "why not"], impossible, "Not for this model", words=4)


def _zoo_rows(shape: ModelShape, spec: MemorySpec) -> Iterator[dict[str, Any]]:
    """A row for each preset at each size worth trying, the dense model's first; or the reason why there is none."""
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
    shares = {name: f"{share:.0%}" for name, share in row["of_dense"].items()}
    read, flops = "kv_read_bytes_per_token", "flops_per_token"
    if row["name"] == "dense":
        return [*(format_bytes(row[name]) for name in ("weight_bytes", "kv_cache_bytes", read)), format_flops(row[flops])]
    sizes = [f"{format_bytes(row[name])} ({shares[name]})" for name in ("weight_bytes", "kv_cache_bytes")]
    return [*sizes, shares[read], shares[flops]]


def _primitives(shape: ModelShape, as_json: bool) -> None:
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


picture_option = click.option(
    "--to", "picture_path", metavar="PICTURE", help="Also draw who shares what into an .svg or .png file."
)


@dataclass(frozen=True)
class _Described:
    """A config with its name, its model's shape, and where memory is measured; of a run's front, the run and what it measured."""

    name: str
    shape: ModelShape
    config: SharingConfig
    memory: MemorySpec
    run: Run | None = None
    measured: MeasuredConfig | None = None

    def to_data(self) -> dict[str, Any]:
        return names_of(self.config) | {"config": self.config.to_data()} | measure(self.shape, self.config, self.memory).to_data()


@click.command()
@click.argument("config")
@model_option
@memory_options
@picture_option
@runs_option
@json_option
def describe(config: str, model_path: str | None, picture_path: str | None, runs: str, as_json: bool, **memory: Any) -> None:
    """Who shares what, bytes by part, and what it costs beside the dense model, for CONFIG: a sharing.yaml, an exported folder,
    a preset's name, or RUN:PICK, a model of a run by what `nas export --pick` takes.

    The memory of a run's model is measured where the run measured it.
    """
    from ..report.sharing import draw_sharing
    from ..report.terminal import sharing_view

    if picture_path:
        require_writable(Path(picture_path), file=True)
    one = _described(config, model_path, runs, memory)
    if picture_path:
        draw_sharing(one.shape, one.config, Path(picture_path), one.memory, one.name)
    if as_json:
        dense = measure(one.shape, SharingConfig.dense(one.shape), one.memory).to_data()
        return print_json(one.to_data() | {"dense": dense, "parts": bytes_by_part(one.shape, one.config, one.memory)})
    print_view(sharing_view(one.shape, one.config, one.memory, one.name))


@click.command()
@click.argument("a")
@click.argument("b")
@model_option
@memory_options
@picture_option
@runs_option
@json_option
def diff(a: str, b: str, model_path: str | None, picture_path: str | None, runs: str, as_json: bool, **memory: Any) -> None:
    """The layers in which two configs differ, and what each costs; A and B are what `nas describe` takes.

    \b
    nas diff quickstart:knee cla-2           a preset for the run's model
    nas diff a.yaml b.yaml --model M.yaml
    """
    from ..report.measured import spell
    from ..report.sharing import draw_side_by_side
    from ..report.terminal import difference_rows, differences, pair_rows, pictures

    if picture_path:
        require_writable(Path(picture_path), file=True)
    first = _described(b, model_path, runs, memory) if _has_model(b) and not _has_model(a) else None
    one = _described(a, model_path, runs, memory, first)
    two = first or _described(b, model_path, runs, memory, one)
    two = replace(two, memory=one.memory)
    both = pictures((one.name, one.shape, one.config), (two.name, two.shape, two.config), one.memory)
    found = differences(one.config, two.config)
    loss = two.measured.less(one.measured) if one.measured and two.measured and one.run == two.run else None
    if picture_path:
        draw_side_by_side(both, Path(picture_path))
    if as_json:
        sides = {side: {"name": one.name, **one.to_data()} for side, one in (("a", one), ("b", two))}
        return print_json(sides | {"differences": found} | ({"loss_b_less_a": asdict(loss)} if loss else {}))
    click.echo(f"A  {one.name}\nB  {two.name}")
    if found:
        rows = difference_rows(found)
        print_table(list(rows[0]), [list(row.values()) for row in rows], words=3)
    else:
        click.echo("the two are one config")
    costs = pair_rows(both)
    print_table(list(costs[0]), [list(row.values()) for row in costs])
    if loss:
        click.echo(f"perplexity of B beside A: {spell(loss)}{', which is noise' * loss.is_noise}")


def _has_model(name: str) -> bool:
    """Whether a name is a folder's, or `RUN:PICK`, with which a model comes."""
    return Path(name).is_dir() or (":" in name and not Path(name).exists())


def _described(name: str, model: str | None, runs: str, memory: dict[str, Any], other: _Described | None = None) -> _Described:
    """What a person names; for the model of `other`, if it comes with none and `--model` names none. Raises UserError."""
    path, context = Path(name), click.get_current_context()
    given = {key: value for key, value in memory.items() if context.get_parameter_source(key) == _COMMANDLINE}
    if path.is_dir():
        from ..export import read_config

        return _Described(path.name, *read_config(path), MemorySpec(**memory))
    if _has_model(name):
        from ..search.run import FRONT, Run

        run, pick = name.rsplit(":", 1)
        found, trial = Run.find(run, Path(runs)), Run.find(run, Path(runs)).trial()
        config = found.config(pick)
        title = pick if pick.startswith(label(config)) else f"{pick}: {label(config)}"
        models = found.front().configs if found.has(FRONT) else ()
        measured = next((m for m in models if m.first.config == config), None)
        return _Described(title, trial.space.shape, config, replace(trial.file.memory, **given), found, measured)
    shape = other.shape if other and model is None else shape_in(model)
    spec = replace(other.memory, **given) if other else MemorySpec(**memory)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        config = SharingConfig.load(shape, path)
        return _Described(f"{path.stem}: {label(config)}", shape, config, spec)
    return _Described(name, shape, preset(name, shape), spec)


_COMMANDLINE = click.core.ParameterSource.COMMANDLINE
