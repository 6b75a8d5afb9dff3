"""The first stage of a search from a checkpoint: the published conversions of it, made and measured before any training.

Owns which are tried, and where they lie: `converted/METHOD-SIZE/model.safetensors` in the run's folder, the checkpoint as it came
among them as `dense`. How a model is converted is `nas.convert`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from ..data import bits_per_byte
from ..errors import RunFailed, UserError
from ..presets import PRESETS
from ..presets.rows import check_size
from ..pretrained.conversions import METHODS, Conversion, spell
from ..pretrained.conversions.calibration import Numbers
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation, Losses
from ..workers import Failure, Pool, Task
from .context import Context
from .jobs import DENSE, Converting, ConvertTask, build_converter
from .origin import BaseModel
from .run import CONVERTED

SIZES = 3
"""At most so many sizes of a method are tried."""


def convert_all(ctx: Context) -> list[Evaluation]:
    """The conversions that the trial's limits allow, measured; none without a checkpoint. One that this model does not bear is
    passed over, and said; those that are on disk are taken. Raises RunFailed if not even the checkpoint could be measured."""
    if ctx.origin is None:
        return []
    tasks = _tasks(ctx)
    left = [task for task in tasks if not ctx.run.has(_result(str(task.key)))]
    if left:
        with ctx.progress.stage("convert the checkpoint", len(tasks), "ways") as bar, _workers(ctx, ctx.origin) as pool:
            for done, (task, result) in enumerate(pool.run(left), 1 + len(tasks) - len(left)):
                _record(ctx, str(task.key), result)
                bar.update(done)
    space, memory = ctx.trial.space, ctx.trial.file.memory
    return [e for e in ctx.run.converted() if space.meets_limits(e.config, memory)]


def size_grid(method: Conversion, shape: ModelShape) -> list[Numbers]:
    """The sizes of a method that are tried: its usual one, those that the zoo would try, half and double the usual; `SIZES` of
    them at most. None where no size fits the model, or where a method takes training before it converts."""
    if method.penalty is not None:
        return []
    try:
        usual = method.usual(shape)
    except UserError:
        return []
    tried = PRESETS[method.name].sizes(shape) if method.name in PRESETS else []
    zoo = [size if isinstance(size, tuple) else (size,) for size in tried if size is not None]
    scaled = [(first, *usual[1:]) for first in (usual[0] // 2, usual[0] * 2)]
    return [size for size in dict.fromkeys([usual, *zoo, *scaled]) if _fits(method, shape, size)][:SIZES]


def _fits(method: Conversion, shape: ModelShape, size: Numbers) -> bool:
    try:
        check_size(method.name, method.parameters, shape, size)
    except UserError:
        return False
    return True


def _tasks(ctx: Context) -> list[Task[ConvertTask]]:
    sizes = [(method.name, size) for method in METHODS.values() for size in size_grid(method, ctx.trial.space.shape)]
    tried = {DENSE.name: (DENSE.name, ())} | {f"{name}-{spell(size)}": (name, size) for name, size in sizes}
    folder = (ctx.run.folder / CONVERTED).resolve()
    return [Task(key, ConvertTask(name, size, folder / key)) for key, (name, size) in tried.items()]


def _workers(ctx: Context, origin: BaseModel) -> AbstractContextManager[Pool[ConvertTask, dict[str, Any]]]:
    file = ctx.trial.file
    rows = {"calibration": origin.dense(ctx.trial, ctx.corpus).calibration, "windows": ctx.windows(file.evaluate.windows)}
    payload = Converting(ctx.trial.space.shape, ctx.trial.supernet.autocast)
    return ctx.executor.pool(build_converter, payload, origin.model.state_dict() | rows)


def _result(key: str) -> str:
    return f"{CONVERTED}/{key}/result.json"


def _record(ctx: Context, key: str, result: dict[str, Any] | Failure) -> None:
    """Keep what became of a conversion: what it is, or why it is not."""
    reason = result.reason if isinstance(result, Failure) else result.get("refused", "")
    if reason and key == DENSE.name:
        raise RunFailed(f"the checkpoint could not be measured: {reason}")
    if reason:
        ctx.progress.say(f"not converted by {key}: {reason}")
    told = {"refused": reason} if isinstance(result, Failure) or reason else _evaluation(ctx, key, result)
    ctx.run.write_json(_result(key), told)


def _evaluation(ctx: Context, key: str, result: Mapping[str, Any]) -> dict[str, Any]:
    shape = ctx.trial.space.shape
    config = SharingConfig.from_data(shape, result["config"])
    if config.is_dense and key != DENSE.name:
        return {"refused": "it leaves nothing shared in this model"}
    losses = Losses.of(result)
    return Evaluation(
        config=config,
        memory=ctx.memory(config),
        losses=losses,
        bits_per_byte=bits_per_byte(losses.loss_nats_per_token, ctx.corpus),
        weights="converted",
        seed=ctx.trial.file.seed,
        tokens=0,
        seconds=result["seconds"],
        name=ctx.presets.get(config, key if key == DENSE.name else f"{key}-converted"),
        supernet=key,
    ).to_data()
