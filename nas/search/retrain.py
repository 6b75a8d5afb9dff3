"""The last stage: the best candidates and the presets, each trained alone to the trial's full budget.

Owns that training and what it leaves: `final/HASH-SEED/model.safetensors` in the run's folder, and in a search from a checkpoint
the weights that it begins with, `start/HASH.safetensors`. Which configs are candidates, and what the front is, are
`nas.search.final`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import bits_per_byte
from ..errors import RunFailed
from ..model.supernet import standalone
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation, Losses
from ..workers import Failure, Job
from .context import Context
from .final import Front, choose, zero_shot
from .jobs import StandaloneTraining, train_standalone, write_weights
from .supernets import Supernets
from .trial import train_spec


def candidates(ctx: Context, evaluations: Sequence[Evaluation]) -> list[SharingConfig]:
    """What is trained of what was seen on inherited or converted weights: the best in each band of memory, and the presets.

    From a checkpoint, the bands are equal in bytes (those near the checkpoint's size are what is asked for), and it is itself
    trained as long, if it is within the limits.
    """
    spec, seen = ctx.trial.file.final, zero_shot(evaluations)
    dense = SharingConfig.dense(ctx.trial.space.shape)
    always = list(ctx.presets) if spec.presets else []
    always += [dense] if ctx.origin and dense in seen and dense not in always else []
    return [*choose(list(seen.values()), spec.candidates, always, float if ctx.origin else math.log), *always]


def retrain(
    ctx: Context, configs: Sequence[SharingConfig], evaluations: Sequence[Evaluation], supernets: Supernets | None = None
) -> Front:
    """Train configs alike, and make the front of them; `evaluations` are what was seen of them. Raises RunFailed if every
    training failed. From a checkpoint, each begins with the weights that it was seen with at its best."""
    spec, seen = ctx.trial.file.final, zero_shot(evaluations)
    starts = _starts(ctx, supernets, configs, seen) if ctx.origin and supernets else {}
    keys = {f"{config.hash}-{seed}": (config, seed) for config in configs for seed in _seeds(ctx)}
    jobs = _jobs(ctx, keys, starts)
    results = ctx.train("final", jobs, train_standalone, dict.fromkeys(keys, spec.steps), spec.early_stopping)
    done = []
    for key, result in results.items():
        config, seed = keys[key]
        name = ctx.presets.get(config) or (seen[config].name if config in seen else "")
        if isinstance(result, Failure):
            ctx.progress.say(f"{name or config.hash} failed: {result.reason}")
        elif result["stopped_early"]:
            ctx.progress.say(f"{name or config.hash} was stopped early and is not in the front")
        else:
            done.append(_evaluation(ctx, config, seed, result, seen.get(config), name))
    if not done:
        raise RunFailed("no model could be trained: every training failed or was stopped early")
    return Front(tuple(done))


def _starts(
    ctx: Context, supernets: Supernets, configs: Iterable[SharingConfig], seen: Mapping[SharingConfig, Evaluation]
) -> dict[SharingConfig, Path]:
    """Where the weights lie that each config begins with: a conversion's, or those of its subnet, which are written."""
    found = {}
    for config in configs:
        best = seen.get(config)
        if best is not None and best.weights == "converted":
            found[config] = ctx.run.weights(best).resolve()
            continue
        path = found[config] = (ctx.run.folder / "start" / f"{config.hash}.safetensors").resolve()
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            leaf = supernets.tree.route(ctx.trial.space, config)
            write_weights(standalone(supernets.nets[leaf].subnet(config)), path)
    return found


def _seeds(ctx: Context) -> range:
    first = ctx.trial.file.seed
    return range(first, first + ctx.trial.file.final.seeds)


def _jobs(ctx: Context, keys: Mapping[str, tuple[SharingConfig, int]], starts: Mapping[SharingConfig, Path]) -> list[Job]:
    """Their tokens are one array object, so that they travel to the workers once, and not once a job."""
    file, shape = ctx.trial.file, ctx.trial.space.shape
    spec = train_spec(file.final)
    tokens, windows = ctx.corpus.train.numpy(), ctx.windows(file.evaluate.final_windows).numpy()
    teacher = ctx.run.dense.resolve() if ctx.trial.distills else None

    def job(config: SharingConfig, seed: int) -> StandaloneTraining:
        return StandaloneTraining(shape, config, spec, seed, tokens, windows, starts.get(config), teacher)

    return [Job(key, job(config, seed)) for key, (config, seed) in keys.items()]


def _evaluation(
    ctx: Context, config: SharingConfig, seed: int, result: dict[str, Any], seen: Evaluation | None, name: str
) -> Evaluation:
    losses = Losses.of(result)
    return Evaluation(
        config=config,
        memory=ctx.memory(config),
        losses=losses,
        bits_per_byte=bits_per_byte(losses.loss_nats_per_token, ctx.corpus),
        weights=ctx.trial.weights,
        seed=seed,
        tokens=result["tokens"],
        seconds=result["seconds"],
        number=seen.number if seen else -1,
        name=name,
    )
