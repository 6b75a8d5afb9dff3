"""Models that a search trains whole: the base model of a trial with `dense:`, and in the last stage the candidates and presets.

Owns those trainings and their files in the run's folder: `dense/checkpoint`, the export from which the search starts as from any
other; `final/HASH-SEED/model.safetensors`, from a base model in its dtype, and `tasks.json` beside it, its scores on the trial's
`final.tasks`; and early stopping, whose pauses have their losses in `paused-STEP/HASH-SEED`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer

from ..config import reading
from ..errors import RunFailed, UserError, did_you_mean, shown
from ..export import ModelCard, export
from ..export.measure import end_of_text, task_scores
from ..pareto import first_fronts
from ..pretrained import FolderMetadata
from ..sharing.label import label
from ..sharing.objectives import OBJECTIVES
from ..sharing.sharing_config import SharingConfig
from ..training.device import find_device
from ..training.evaluation import Evaluation, Losses, score_name, score_values
from ..workers import RESULT, Failure
from .candidates import best_seen
from .context import BaseModel, Context
from .evaluators import Evaluator, working
from .front import Front
from .jobs import STATE, ConvertedWeights, StandaloneTraining, read_model, train_standalone
from .run import DAMAGED
from .trial_file import train_spec


def candidates(ctx: Context, evaluator: Evaluator, evaluations: Sequence[Evaluation]) -> list[SharingConfig]:
    """The configs that are trained: those that the evaluator selects and, if the trial asks for them, the presets and the base
    model's conversions, but for those that no fine-tuning mends.

    A base model is itself trained as long, if it is within the limits.
    """
    spec, dense = ctx.trial.file.final, SharingConfig.dense(ctx.trial.space.shape)
    always = list(ctx.presets) if spec.presets else []
    if ctx.base_model and dense not in always and any(e.config == dense for e in evaluations):
        always.append(dense)
    if spec.conversions:
        always = [*dict.fromkeys((*always, *(e.config for e in working(evaluator.conversions))))]
    chosen, memories, left = list(always), ctx.trial.memories, spec.candidates
    for n, memory in enumerate(memories):  # each setting's front has its share
        there = [e.at(ctx.trial.space.shape, memory) for e in evaluations] if n else evaluations
        found = evaluator.select(there, left // (len(memories) - n), chosen)
        chosen, left = [*found, *chosen], left - len(found)
    return chosen


def train_final(ctx: Context, evaluator: Evaluator, evaluations: Sequence[Evaluation]) -> Front:
    """Train the candidates alike, and make the front of them, reported on the test text; `evaluations` are those of the search.
    Raises RunFailed if no training ended. With `final.start: inherited` each starts from the weights of its best evaluation."""
    file, seen = ctx.trial.file, best_seen(evaluations)
    trained = {path.parent.name.partition("-")[0] for path in ctx.run.folder.glob(f"final/*/{RESULT}")}
    before = [config for config in {**seen, **ctx.presets} if config.hash in trained]  # also by what the run was extended from
    configs = dict.fromkeys((*ctx.measurable(candidates(ctx, evaluator, evaluations)), *before))
    windows, test, spec = ctx.windows(file.evaluate.final_windows).numpy(), ctx.test_windows.numpy(), train_spec(file.final)
    dtype = ctx.base_model.dtype if ctx.base_model else torch.float32
    settings: dict[str, StandaloneTraining] = {}
    allocated = _allocated(ctx, {config: seen.get(config) for config in configs})
    for config in configs:
        spec = replace(spec, steps=allocated[config])
        start = evaluator.initial_weights(config, seen.get(config))
        for seed in range(file.seed, file.seed + file.final.seeds):
            given = {"seed": seed, "start": start, "dtype": dtype, "test_windows": test}
            settings[f"{config.hash}-{seed}"] = ctx.training(config, spec, windows, **given)
    left, begun, seconds = _stop_early(ctx, settings)
    settings = {key: left.get(key, job) for key, job in settings.items() if key in left or job.config in before}
    steps = {key: allocated[job.config] - begun for key, job in settings.items()}
    done = []
    for key, result in ctx.train("final", settings, train_standalone, steps).items():
        config, best = settings[key].config, seen.get(settings[key].config)
        start, name = settings[key].start, ctx.presets.get(config, "")
        name = start.task.name(name) if isinstance(start, ConvertedWeights) else name
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


LEAST_NATS = 0.02  # that a config counts with at least: the best is trained for some steps, too


def _allocated(ctx: Context, configs: Mapping[SharingConfig, Evaluation | None]) -> dict[SharingConfig, int]:
    """The steps of each config's training, `final.steps` in the mean. By loss they are in proportion to the square root of what a
    config lost in the search against the best of them; of one that was not evaluated there, to the mean."""
    spec, losses = ctx.trial.file.final, {c: e.losses.loss_nats_per_token for c, e in configs.items() if e}
    if spec.allocation == "equal" or not (spec.steps and losses):
        return dict.fromkeys(configs, spec.steps)
    least = min(losses.values())
    shares = {config: math.sqrt(max(loss - least, LEAST_NATS)) for config, loss in losses.items()}
    mean = fmean(shares.values())
    return {config: max(round(spec.steps * shares.get(config, mean) / mean), 1) for config in configs}


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


def train_base_model(ctx: Context) -> BaseModel:
    """Train the model that shares nothing, or take it from the run's folder if that is done. Raises RunFailed."""
    file, shape, folder = ctx.trial.file, ctx.trial.space.shape, ctx.run.folder / "dense"
    assert file.dense is not None
    config, key = SharingConfig.dense(shape), f"seed-{file.seed}"
    windows, test = ctx.windows(file.evaluate.final_windows).numpy(), ctx.test_windows.numpy()
    job = ctx.training(config, file.dense, windows, test_windows=test)
    result = ctx.train("dense", {key: job}, train_standalone, {key: file.dense.steps})[key]
    if isinstance(result, Failure):
        raise RunFailed(f"the dense model could not be trained: {result.reason}")
    checkpoint, weights = folder / "checkpoint", folder / key / "model.safetensors"
    if not checkpoint.exists():
        card = ModelCard(
            title=f"{ctx.run.name}: the dense model",
            found=f"Trained for {result['tokens']:,} tokens by the search `{ctx.run.name}`, which starts from it.",
            command=ctx.run.provenance()["command"],
            data=ctx.corpus.source,
            memory=file.memory,
        )
        export(read_model(shape, config, weights), config, ctx.corpus.tokenizer_json, checkpoint, card)
    weights.unlink(missing_ok=True)
    found = BaseModel.read(checkpoint, lambda model: Losses.of(result["test"]), result["tokens"])
    ctx.progress.say(f"from    {found.summary}")
    return found


def score_front(ctx: Context, front: Front) -> Front:
    """The front with the scores of its models, one after the other in this process; what was scored before is not run again.
    Raises UserError for a task that cannot be run."""
    files = ctx.trial.tasks
    if not files:
        return front
    found, tokenizer = [], Tokenizer.from_str(ctx.corpus.tokenizer_json)
    with ctx.progress.stage("tasks", len(front.evaluations), "models") as stage:
        for done, e in enumerate(front.evaluations, 1):
            path = ctx.run.weights(e).parent / "tasks.json"
            if not path.exists():
                model = read_model(ctx.trial.space.shape, e.config, ctx.run.weights(e)).float().to(find_device())
                scores = task_scores(model, tokenizer, end_of_text(ctx.run.metadata() or FolderMetadata()), files)
                ctx.run.write_json(str(path.relative_to(ctx.run.folder)), list(map(asdict, scores)))
            with reading(path, DAMAGED):
                rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
                found.append(replace(e, values={**e.values, **score_values(rows)}))
            stage.update(done)
    return Front(tuple(replace(e, objectives=ctx.trial.front_objectives) for e in found))


def require_score(name: str | None, offered: Mapping[tuple[str, str], bool]) -> None:
    """Raise UserError unless a trial's `final.objective`, if it has one, is among the scores that its tasks give, and is compared
    in their direction."""
    scores = {score_name(*key): higher for key, higher in offered.items()}
    if name and name not in scores:
        raise UserError(f"no task gives {shown(name)}", where="final.objective", hint=did_you_mean(name, scores))
    if name and scores[name] != OBJECTIVES[name].maximize:
        words = "higher" if scores[name] else "lower"
        message = f"the task calls the {words} {shown(name)} the better one, which is not known of that metric"
        raise UserError(message, where="final.objective", hint="use another metric, or `higher_is_better` as its name is known")
