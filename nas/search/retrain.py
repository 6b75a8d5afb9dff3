"""The third stage: the best candidates and the presets, each trained alone from scratch to the trial's full budget.

Owns the retraining and what it leaves: `final/HASH-SEED/model.safetensors` in the run's folder. Which configs are candidates, and
what the front is, are `nas.search.final`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data import bits_per_byte
from ..errors import RunFailed
from ..evaluate import Evaluation, Losses
from ..sharing import SharingConfig
from ..training import TrainSpec
from ..workers import Failure
from ..workers.trainings import Job
from .context import Context
from .final import Front, choose
from .work import AloneJob, train_alone


def retrain(ctx: Context, searched: Sequence[Evaluation]) -> Front:
    """Train candidates and presets alike, and make the front of them. Raises RunFailed if every training failed."""
    spec = ctx.trial.file.final
    presets = ctx.presets if spec.presets else {}
    configs = [*choose(searched, spec.candidates, presets), *presets]
    keys = {f"{config.hash}-{seed}": (config, seed) for config in configs for seed in _seeds(ctx)}
    jobs = _jobs(ctx, keys)
    results = ctx.train("final", jobs, train_alone, dict.fromkeys(keys, spec.steps), spec.early_stopping)
    numbers = {e.config: e.number for e in searched}
    done = []
    for key, result in results.items():
        config, seed = keys[key]
        if isinstance(result, Failure):
            ctx.progress.say(f"{ctx.presets.get(config, config.hash)} failed: {result.reason}")
        elif result["stopped_early"]:
            ctx.progress.say(f"{ctx.presets.get(config, config.hash)} was stopped early and is not in the front")
        else:
            done.append(_evaluation(ctx, config, seed, result, numbers.get(config, -1)))
    if not done:
        raise RunFailed("no model could be retrained: every training failed or was stopped early")
    return Front(tuple(done))


def _seeds(ctx: Context) -> range:
    first = ctx.trial.file.seed
    return range(first, first + ctx.trial.file.final.seeds)


def _jobs(ctx: Context, keys: Mapping[str, tuple[SharingConfig, int]]) -> list[Job]:
    """Their tokens are one array object, so that they travel to the workers once, and not once a job."""
    file, shape = ctx.trial.file, ctx.trial.space.shape
    spec = TrainSpec(**{name: getattr(file.final, name) for name in TrainSpec.__dataclass_fields__})
    tokens, windows = ctx.corpus.train.numpy(), ctx.windows(file.evaluate.final_windows).numpy()
    return [Job(key, {"job": AloneJob(shape, config, spec, seed, tokens, windows)}) for key, (config, seed) in keys.items()]


def _evaluation(ctx: Context, config: SharingConfig, seed: int, result: dict[str, Any], number: int) -> Evaluation:
    losses = Losses(**{name: result[name] for name in Losses.__dataclass_fields__})
    return Evaluation(
        config=config,
        memory=ctx.memory(config),
        losses=losses,
        bits_per_byte=bits_per_byte(losses.loss_nats_per_token, ctx.corpus),
        weights="retrained",
        seed=seed,
        tokens=result["tokens"],
        seconds=result["seconds"],
        number=number,
        name=ctx.presets.get(config, ""),
    )
