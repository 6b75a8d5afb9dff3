"""The first stage of a search from a base model: its conversions by published methods, measured before any training.

Owns which conversions are tried, and where their results lie: `converted/METHOD-SIZE` in the run's folder, and `converted/dense`
for the base model itself. A conversion keeps its config and its losses; its weights are made again where they are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from ..errors import RunFailed, UserError
from ..presets import PRESETS
from ..presets.rows import check_size
from ..pretrained.conversions import METHODS, Conversion, spell
from ..pretrained.conversions.calibration import Numbers
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation, Losses
from ..workers import Failure, Pool, Task
from .base_model import BaseModel
from .context import Context
from .jobs import DENSE, ConvertTask, EvaluatorSettings, build_converter
from .run import CONVERTED

SIZES = 3  # at most so many sizes of a method are tried


def convert_all(ctx: Context) -> list[Evaluation]:
    """The conversions within the trial's limits, measured; none without a base model.

    Conversions that are on disk are not made again; methods that do not fit the model are skipped, with a line that says so.
    Raises RunFailed if the base model itself could not be measured.
    """
    if ctx.base_model is None:
        return []
    wanted = conversions_of(ctx.trial.space.shape)
    left = {key: task for key, task in wanted.items() if not ctx.run.has(f"{CONVERTED}/{key}/result.json")}
    if left:
        with (
            ctx.progress.stage("convert the base model", len(wanted), "conversions") as bar,
            _workers(ctx, ctx.base_model) as pool,
        ):
            bar.update(done := len(wanted) - len(left))
            for task, results in pool.run(_groups(left)):
                for key in task.data:
                    _record(ctx, key, results if isinstance(results, Failure) else results[key])
                bar.update(done := done + len(task.data))
    space, memory = ctx.trial.space, ctx.trial.file.memory
    found = [e.config for e in ctx.run.converted(comparable=False) if space.meets_limits(e.config, memory)]
    within = {*ctx.measurable(found)}
    return [e for e in ctx.run.converted() if e.config in within]


def conversions_of(shape: ModelShape) -> dict[str, ConvertTask]:
    """The conversions that are tried, by key; the base model itself is the first."""
    sizes = [(method.name, size) for method in METHODS.values() for size in size_grid(method, shape)]
    return {DENSE.name: ConvertTask(DENSE.name, ())} | {f"{name}-{spell(size)}": ConvertTask(name, size) for name, size in sizes}


def _groups(left: Mapping[str, ConvertTask]) -> list[Task[dict[str, ConvertTask]]]:
    """The base model, then conversions that need the same measurements of it together, the largest groups first."""
    groups: dict[str, dict[str, ConvertTask]] = {}
    for key, task in left.items():
        groups.setdefault(task.row.like or task.method, {})[key] = task
    return [Task(name, groups[name]) for name in sorted(groups, key=lambda name: (name != DENSE.name, -len(groups[name])))]


def size_grid(method: Conversion, shape: ModelShape) -> list[Numbers]:
    """The sizes of a method that are tried: its usual one, those of its preset, half and double the usual; `SIZES` at most.

    None where no size fits the model, or where a method takes training before it converts.
    """
    if method.penalty is not None:
        return []
    try:
        usual = method.usual(shape)
    except UserError:
        return []
    tried = PRESETS[method.name].sizes(shape) if method.name in PRESETS else []
    preset = [size if isinstance(size, tuple) else (size,) for size in tried if size is not None]
    scaled = [(first, *usual[1:]) for first in (usual[0] // 2, usual[0] * 2)]
    return [size for size in dict.fromkeys([usual, *preset, *scaled]) if _fits(method, shape, size)][:SIZES]


def _fits(method: Conversion, shape: ModelShape, size: Numbers) -> bool:
    try:
        check_size(method.name, method.parameters, shape, size)
    except UserError:
        return False
    return True


def _workers(ctx: Context, base: BaseModel) -> AbstractContextManager[Pool[dict[str, ConvertTask], dict[str, Any]]]:
    calibration = base.pretrained(ctx.trial, ctx.corpus).calibration
    rows = {"calibration": calibration, "windows": ctx.windows(ctx.trial.file.evaluate.windows)}
    settings = EvaluatorSettings(ctx.trial.space, ctx.trial.supernet.autocast)
    return ctx.executor.pool(build_converter, settings, base.model.state_dict() | rows)


def _record(ctx: Context, key: str, result: dict[str, Any] | Failure) -> None:
    """Write a conversion's evaluation, or why there is none."""
    reason = result.reason if isinstance(result, Failure) else result.get("refused", "")
    if reason and key == DENSE.name:
        raise RunFailed(f"the base model could not be measured: {reason}")
    if isinstance(result, Failure) or reason:
        ctx.progress.say(f"not converted by {key}: {reason}")
        row = {"refused": reason}
    else:
        row = _evaluation_row(ctx, key, result)
    ctx.run.write_json(f"{CONVERTED}/{key}/result.json", row)


def _evaluation_row(ctx: Context, key: str, result: dict[str, Any]) -> dict[str, Any]:
    config = SharingConfig.from_data(ctx.trial.space.shape, result["config"])
    if config.is_dense and key != DENSE.name:
        return {"refused": "it leaves nothing shared in this model"}
    name = ctx.presets.get(config, key if key == DENSE.name else f"{key}-converted")
    losses, seconds = Losses.of(result), result["seconds"]
    return ctx.evaluation(config, losses, "converted", 0, seconds=seconds, name=name, supernet=key).to_data()
