"""The commands about single configs, `describe` and `diff`; and how a person names one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .sharing import memory_options, model_option, shape_in
from .show import json_option, print_json, print_table, print_view, runs_option

if TYPE_CHECKING:
    from ..report.measured import MeasuredConfig
    from ..search.run import Run
    from ..sharing.memory import MemorySpec
    from ..sharing.shape import ModelShape
    from ..sharing.sharing_config import SharingConfig

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
        """Plain data: label, hash, config and bytes."""
        from ..sharing.label import names_of
        from ..sharing.memory import measure

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
    from ..files import require_writable
    from ..report import bytes_by_part, draw_sharing, sharing_view
    from ..sharing.memory import measure
    from ..sharing.sharing_config import SharingConfig

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
    from ..files import require_writable
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
    from ..presets import preset
    from ..sharing.label import label
    from ..sharing.memory import MemorySpec
    from ..sharing.sharing_config import SharingConfig

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
    if path.suffix in (".yaml", ".yml"):
        config = SharingConfig.load(shape, path)
        return _Described(f"{path.stem}: {label(config)}", shape, config, spec)
    return _Described(name, shape, preset(name, shape), spec)


_COMMANDLINE = click.core.ParameterSource.COMMANDLINE
