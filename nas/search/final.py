"""The last stage: the best candidates and the presets, each trained to the trial's full budget.

Owns that training and its files: `final/HASH-SEED/model.safetensors` in the run's folder, from a base model in its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import RunFailed
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation, Losses
from ..workers import Failure
from .candidates import best_seen
from .context import Context
from .evaluators import Evaluator
from .front import Front
from .jobs import StandaloneTraining, train_standalone
from .trial import train_spec


def candidates(ctx: Context, evaluator: Evaluator, evaluations: Sequence[Evaluation]) -> list[SharingConfig]:
    """The configs that are trained: those that the evaluator selects and, if the trial asks for them, the presets.

    A base model is itself trained as long, if it is within the limits.
    """
    spec, dense = ctx.trial.file.final, SharingConfig.dense(ctx.trial.space.shape)
    always = list(ctx.presets) if spec.presets else []
    if ctx.base_model and dense not in always and any(e.config == dense for e in evaluations):
        always.append(dense)
    return [*evaluator.select(evaluations, spec.candidates, always), *always]


def train_final(ctx: Context, evaluator: Evaluator, evaluations: Sequence[Evaluation]) -> Front:
    """Train the candidates alike, and make the front of them; `evaluations` are those of the search.

    Raises RunFailed if no training ended. From a base model each starts from the weights of its best evaluation.
    """
    file, seen = ctx.trial.file, best_seen(evaluations)
    configs = candidates(ctx, evaluator, evaluations)
    # One array object for all, so that the tokens travel to the workers once.
    tokens, windows = ctx.corpus.train.numpy(), ctx.windows(file.evaluate.final_windows).numpy()
    base, shape, bos = ctx.base_model, ctx.trial.space.shape, ctx.corpus.bos
    teacher = base.folder.resolve() if base and ctx.trial.distills else None
    dtype = base.dtype if base else torch.float32
    settings = {}
    for config in configs:
        start = evaluator.initial_weights(config, seen.get(config))
        for seed in range(file.seed, file.seed + file.final.seeds):
            settings[f"{config.hash}-{seed}"] = StandaloneTraining(
                shape, config, train_spec(file.final), seed, tokens, windows, start, teacher, bos=bos, dtype=dtype
            )
    steps = dict.fromkeys(settings, file.final.steps)
    done = []
    for key, result in ctx.train("final", settings, train_standalone, steps, file.final.early_stopping).items():
        config, best = settings[key].config, seen.get(settings[key].config)
        name = ctx.presets.get(config) or (best.name if best else "")
        if isinstance(result, Failure):
            ctx.progress.say(f"{name or config.hash} failed: {result.reason}")
        elif result["stopped_early"]:
            ctx.progress.say(f"{name or config.hash} was stopped early and is not in the front")
        else:
            rest = {"seed": settings[key].seed, "seconds": result["seconds"], "name": name}
            losses, number = Losses.of(result), best.number if best else -1
            done.append(ctx.evaluation(config, losses, ctx.trial.weights, result["tokens"], number=number, **rest))
    if not done:
        raise RunFailed("no model could be trained: every training failed or was stopped early")
    return Front(tuple(done))
