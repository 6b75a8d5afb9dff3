"""What each option costs alone, on the base model's own weights: measured once, and kept with the run.

Owns `single_decisions.json`. All that draws configs near the front reads it from the space (`SearchSpace.measured`).
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, replace
from pathlib import Path

from ..errors import RunFailed
from ..sharing.distribution import HOPELESS, ConfigDistribution, single_decisions
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SingleDecision
from ..workers import Failure, Task
from .context import Context
from .jobs import EvaluatorSettings, SubnetTask, build_evaluator, pack, read_supernet

FILE = "single_decisions.json"

MOST = 400
"""The most options that are measured; of more, so many are drawn. Another costs what the nearest of its primitive does."""


def with_single_decisions(ctx: Context, start: Path) -> Context:
    """The context with the costs in its space, on the weights of the supernet at `start`. Raises RunFailed."""
    space = ctx.trial.space
    if not ctx.run.has(FILE):
        found = single_decisions(space, ctx.trial.file.memory)
        if len(found) > MOST:
            drawn = random.Random(f"{ctx.trial.file.seed} single decisions").sample(list(found), MOST)
            found = {one: found[one] for one in drawn}
        losses = _losses(ctx, start, list(dict.fromkeys([space.largest(), *found.values()])))
        dense = losses[space.largest()]
        measured = [replace(one, loss_increase=min(losses[config] - dense, 10 * HOPELESS)) for one, config in found.items()]
        ctx.run.write_json(FILE, {"single_decisions": [asdict(one) for one in measured]})
    rows = ctx.run.read_json(FILE)["single_decisions"]
    space = replace(space, measured=tuple(SingleDecision(**row) for row in rows))
    ctx.progress.say(ConfigDistribution.of(space, ctx.trial.file.memory).summary)
    return replace(ctx, trial=replace(ctx.trial, space=space))


def _losses(ctx: Context, start: Path, configs: list[SharingConfig]) -> dict[SharingConfig, float]:
    """Configs' losses in nats a token, infinite where they are not finite."""
    settings = EvaluatorSettings(ctx.trial.space, ctx.trial.supernet.autocast)
    weights = pack({"0": read_supernet(ctx.trial.space, start)[0]}) | {"windows": ctx.windows(ctx.trial.file.evaluate.windows)}
    found = dict.fromkeys(configs, math.inf)
    with (
        ctx.progress.stage("single decisions", len(configs), "configs") as bar,
        ctx.executor.pool(build_evaluator, settings, weights) as pool,
    ):
        tasks = [Task(n, SubnetTask(config, "0")) for n, config in enumerate(configs)]
        for done, (task, result) in enumerate(pool.run(tasks), 1):
            if not isinstance(result, Failure):
                found[task.data.config] = result[0].loss_nats_per_token
            bar.update(done)
    if math.isinf(found[configs[0]]):
        raise RunFailed("the base model could not be evaluated, so that no option's cost is known")
    return found
