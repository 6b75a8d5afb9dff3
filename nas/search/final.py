"""The last stage: the best candidates and the presets, each trained to the trial's full budget.

Owns that training and its files: `final/HASH-SEED/model.safetensors` in the run's folder, from a base model in its dtype; and
early stopping, whose pauses have their losses in `paused-STEP/HASH-SEED`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from ..errors import RunFailed
from ..pareto import first_fronts
from ..sharing.label import label
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation, Losses
from ..workers import RESULT, Failure
from .candidates import best_seen
from .context import Context
from .evaluators import Evaluator
from .front import Front
from .jobs import STATE, StandaloneTraining, train_standalone
from .trial import train_spec


def candidates(ctx: Context, evaluator: Evaluator, evaluations: Sequence[Evaluation]) -> list[SharingConfig]:
    """The configs that are trained: those that the evaluator selects and, if the trial asks for them, the presets.

    A base model is itself trained as long, if it is within the limits.
    """
    spec, dense = ctx.trial.file.final, SharingConfig.dense(ctx.trial.space.shape)
    always = list(ctx.presets) if spec.presets else []
    if ctx.base_model and dense not in always and any(e.config == dense for e in evaluations):
        always.append(dense)
    chosen, memories, left = list(always), ctx.trial.memories, spec.candidates
    for n, memory in enumerate(memories):  # each setting's front has its share
        there = [e.at(ctx.trial.space.shape, memory) for e in evaluations] if n else evaluations
        found = evaluator.select(there, left // (len(memories) - n), chosen)
        chosen, left = [*found, *chosen], left - len(found)
    return chosen


def train_final(ctx: Context, evaluator: Evaluator, evaluations: Sequence[Evaluation]) -> Front:
    """Train the candidates alike, and make the front of them, reported on the test text; `evaluations` are those of the search.

    Raises RunFailed if no training ended. With `final.start: inherited` each starts from the weights of its best evaluation.
    """
    file, seen = ctx.trial.file, best_seen(evaluations)
    trained = {path.parent.name.partition("-")[0] for path in ctx.run.folder.glob(f"final/*/{RESULT}")}
    before = [config for config in {**seen, **ctx.presets} if config.hash in trained]  # also by what the run was extended from
    configs = dict.fromkeys((*ctx.measurable(candidates(ctx, evaluator, evaluations)), *before))
    # One array object for all, so that the windows travel to the workers once.
    tokens, windows, test = ctx.train_tokens, ctx.windows(file.evaluate.final_windows).numpy(), ctx.test_windows.numpy()
    base, shape, bos, spec = ctx.base_model, ctx.trial.space.shape, ctx.corpus.bos, train_spec(file.final)
    dtype = base.dtype if base else torch.float32
    settings: dict[str, StandaloneTraining] = {}
    for config in configs:
        start = evaluator.initial_weights(config, seen.get(config))
        for seed in range(file.seed, file.seed + file.final.seeds):
            settings[f"{config.hash}-{seed}"] = StandaloneTraining(
                shape, config, spec, seed, tokens, windows, start, ctx.teacher, True, bos, dtype, test_windows=test
            )
    left, begun, seconds = _stop_early(ctx, settings)
    settings = {key: left.get(key, job) for key, job in settings.items() if key in left or job.config in before}
    steps = dict.fromkeys(settings, file.final.steps - begun)
    done = []
    for key, result in ctx.train("final", settings, train_standalone, steps).items():
        config, best = settings[key].config, seen.get(settings[key].config)
        name = ctx.presets.get(config) or (best.name if best else "")
        if isinstance(result, Failure):
            ctx.progress.say(f"{name or label(config)} failed: {result.reason}")
        else:
            rest = {"seed": settings[key].seed, "seconds": result["seconds"] + seconds[key], "name": name}
            rest |= {"number": best.number if best else -1, "validation_perplexity": result["perplexity"]}
            rest["windows"] = tuple(result["test"]["window_losses"])
            losses = Losses.of(result["test"])
            done.append(ctx.evaluation(config, losses, ctx.trial.weights, result["tokens"], "test", **rest))
    if not done:
        raise RunFailed("no model could be trained: every training failed")
    _forget_states(ctx, begun, settings)
    return Front(tuple(done))


def _stop_early(
    ctx: Context, settings: Mapping[str, StandaloneTraining]
) -> tuple[dict[str, StandaloneTraining], int, Counter[str]]:
    """The trainings that early stopping leaves, each with the state that it goes on from; the step that they are at; and the
    seconds that they took so far."""
    spec, begun, seconds, left = ctx.trial.file.final, 0, Counter[str](), dict(settings)
    windows = ctx.windows(ctx.trial.file.evaluate.windows).numpy()
    for step in spec.early_stopping.pauses(spec.steps) if spec.early_stopping else ():
        paused = {key: replace(job, until=step, keep=False, windows=windows, test_windows=None) for key, job in left.items()}
        done = {}
        for key, result in ctx.train(f"paused-{step}", paused, train_standalone, dict.fromkeys(paused, step - begun)).items():
            if isinstance(result, Failure):
                ctx.progress.say(f"{label(left[key].config)} failed: {result.reason}")
            else:
                done[key] = Losses.of(result).loss_nats_per_token
                seconds[key] += result["seconds"]
        kept = _kept(ctx, {key: left[key].config for key in done}, done) - _stopped(ctx, step, done)
        ctx.progress.say(f"early stopping at step {step}: {len(kept)} of {len(left)} trainings go on")
        _forget_states(ctx, begun, done)
        _forget_states(ctx, step, done.keys() - kept)
        left = {key: replace(left[key], state=_state(ctx, step, key)) for key in left if key in kept}
        begun = step
    return left, begun, seconds


def _kept(ctx: Context, configs: Mapping[str, SharingConfig], losses: Mapping[str, float]) -> set[str]:
    """The trainings that go on: those of the first fronts of costs and loss, the mean over a config's seeds."""
    assert ctx.trial.file.final.early_stopping is not None
    by_config: dict[SharingConfig, list[float]] = {}
    for key, config in configs.items():
        by_config.setdefault(config, []).append(losses[key])
    tried = list(by_config)
    count, best = math.ceil(len(tried) / ctx.trial.file.final.early_stopping.reduction), set[SharingConfig]()
    for memory in ctx.trial.memories:
        points = [(*ctx.costs(config, memory), fmean(by_config[config])) for config in tried]
        best |= {tried[i] for i in first_fronts(points, count)}
    return {key for key, config in configs.items() if config in best}


def _stopped(ctx: Context, step: int, keys: Iterable[str]) -> set[str]:
    """The trainings that a pause ended before the run was extended: their state is gone, and nothing went on from it."""
    later = ("final", *(f"paused-{other}" for other in range(step + 1, ctx.trial.file.final.steps)))
    gone = (key for key in keys if not _state(ctx, step, key).exists())
    return {key for key in gone if not any(ctx.run.has(f"{name}/{key}/{RESULT}") for name in later)}


def _state(ctx: Context, step: int, key: str) -> Path:
    return (ctx.run.folder / f"paused-{step}" / key / STATE).resolve()


def _forget_states(ctx: Context, step: int, keys: Iterable[str]) -> None:
    """Delete the states that trainings had at a pause: they have gone on from there, or never will."""
    for key in keys:
        _state(ctx, step, key).unlink(missing_ok=True)
