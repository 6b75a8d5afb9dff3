"""The first stage of a search from a checkpoint: the published conversions of it, made and measured before any training.

Owns which are tried, and where they lie: `converted/METHOD-SIZE/model.safetensors` in the run's folder, the checkpoint as it came
among them as `dense`. How a model is converted is `nas.convert`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..convert import METHODS, Method, spell
from ..convert.rows import Numbers
from ..data import bits_per_byte
from ..errors import RunFailed, UserError
from ..evaluate import Evaluation, Losses
from ..shape import ModelShape
from ..sharing import SharingConfig
from ..supernet import dense_config
from ..workers import Failure
from ..workers.trainings import Job
from ..zoo import PRESETS
from ..zoo.rows import check_size
from .context import Context
from .run import CONVERTED
from .work import DENSE, ConvertJob, convert_checkpoint

SIZES = 3
"""At most so many sizes of a method are tried."""


def convert_all(ctx: Context) -> list[Evaluation]:
    """The conversions that the trial's limits allow, measured; none without a checkpoint. A method that this model does not bear
    is passed over, and said. Raises RunFailed if the checkpoint itself could not be read."""
    if ctx.origin is None:
        return []
    if not ctx.run.has(CONVERTED):
        jobs = _jobs(ctx)
        results = ctx.train("converted", jobs, convert_checkpoint, {job.key: 1 for job in jobs})
        if isinstance(results[DENSE.name], Failure):
            raise RunFailed(f"the checkpoint could not be read: {results[DENSE.name].reason}")  # type: ignore[union-attr]
        found = [e for key, result in results.items() if (e := _evaluation(ctx, key, result))]
        ctx.run.write_json(CONVERTED, [e.to_data() for e in found])
    space, memory = ctx.trial.space, ctx.trial.file.memory
    return [e for e in ctx.run.converted() if space.meets_limits(e.config, memory)]


def ladder(method: Method, shape: ModelShape) -> list[Numbers]:
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


def _fits(method: Method, shape: ModelShape, size: Numbers) -> bool:
    try:
        check_size(method.name, method.parameters, shape, size)
    except UserError:
        return False
    return True


def _jobs(ctx: Context) -> list[Job]:
    assert ctx.origin is not None
    file, shape = ctx.trial.file, ctx.trial.space.shape
    calibration = ctx.origin.dense(ctx.trial, ctx.corpus).calibration.numpy()
    windows, folder = ctx.windows(file.evaluate.windows).numpy(), ctx.origin.folder.resolve()
    sizes: list[tuple[str, Numbers]] = [(DENSE.name, ())]
    sizes += [(method.name, size) for method in METHODS.values() for size in ladder(method, shape)]
    jobs = [ConvertJob(folder, name, size, calibration, windows, file.supernet.autocast) for name, size in sizes]
    return [Job("-".join(filter(None, (job.method, spell(job.size)))), {"job": job}) for job in jobs]


def _evaluation(ctx: Context, key: str, result: Mapping[str, Any] | Failure) -> Evaluation | None:
    """What became of a conversion; None if it is impossible, or if nothing is shared after it."""
    if isinstance(result, Failure) or "refused" in result:
        reason = result.reason if isinstance(result, Failure) else result["refused"]
        ctx.progress.say(f"not converted by {key}: {reason}")
        return None
    shape = ctx.trial.space.shape
    config = SharingConfig.from_data(shape, result["config"])
    if config == dense_config(shape) and key != DENSE.name:
        return None
    losses = Losses(**{name: result[name] for name in Losses.__dataclass_fields__})
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
    )
