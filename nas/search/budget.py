"""What a search costs before it is paid: for each stage its trainings, tokens, operations, memory, disk and time.

Owns how a stage's cost follows from the trial. A stage is a number of passes (`nas.search.timing`), of which a
handful is timed on the run's own workers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

import torch

from ..config import format_bytes, format_flops
from ..errors import UserError
from ..sharing.distribution import single_decisions
from ..sharing.memory import measure, measure_plan
from ..sharing.objectives import OBJECTIVES
from ..sharing.plan import weight_shapes
from ..sharing.sharing_config import SharingConfig
from ..splitting import Compared, Comparison, SplitTree, split_leaves
from ..training.evaluation import TOKENS, Stopwatch
from ..training.loop import TrainSpec
from ..training.strategies import STRATEGIES, SubnetRandom
from ..workers import Executor
from .context import CALIBRATION, presets_in
from .convert import conversions_of
from .loop import Study
from .progress import StageBudget, said_seconds
from .supernets import MOST
from .timing import Pass, Timed, TimedModels, time_passes
from .trial import Trial
from .trial_file import train_spec

STATE = 12  # bytes of a training's state for each weight: it and the optimizer's two, in float32

CONVERSION = 1.0, 0.1
"""What a conversion takes, in passes over the calibration text and in the mean over methods: so many, and more for each layer,
since methods measure the model again after each layer that they leave out. Measured: 1.4 to 2 at 6 layers, some 4 at 30."""

SAMPLED = 16  # random configs whose operations stand for those of the configs that a search will propose


@dataclass(frozen=True)
class Stage:
    """A stage as its jobs, all alike: how many (`at_most`, where that depends on what will be measured), the passes of each, and
    the part of the dense model's operations that its configs take in the mean (`scale`). `asks`: how many times all configs of
    the search are asked of its sampler. `batch`: the sequences of each step of a training."""

    name: str
    jobs: int
    passes: Mapping[Pass, float]
    tokens: int = 0
    disk_bytes: int = 0
    scale: float = 1.0
    asks: int = 0
    batch: int = 1
    at_most: bool = False


@dataclass(frozen=True)
class Budget:
    """The stages of a trial, whose base model is, or will be, of a dtype, and which an executor will do."""

    trial: Trial
    dtype: torch.dtype = torch.float32
    work: Executor | None = None

    @cached_property
    def sampled(self) -> list[SharingConfig]:
        """Random configs within the limits."""
        space, memory, rng = self.trial.space, self.trial.file.memory, random.Random(0)
        return [space.sample(rng, lambda config: space.meets_limits(config, memory)) for _ in range(SAMPLED)]

    @property
    def workers(self) -> int:
        return max(self.trial.file.run.workers, 1)

    def stages(self) -> list[Stage]:
        trial = self.trial
        found = [self._dense()] if trial.file.dense else []
        if trial.has_base_model:
            found += self._from_base()
        if trial.file.supernet and trial.supernet.steps:
            found += self._supernets()
        if trial.file.predictor:
            found += self._predictor()
        return [*found, *self._search(), *self._final()]

    # ---- what a stage's jobs do

    def _evaluate(self, windows: float, alone: bool = False) -> dict[Pass, float]:
        spec = train_spec(self.trial.file.final)
        rows = min(16, max(1, TOKENS // spec.seq))
        return {Pass("evaluate", TrainSpec(0, rows, spec.seq, autocast=spec.autocast), alone): windows / rows}

    def _train(self, kind: str, spec: TrainSpec, steps: float, jobs: int) -> dict[Pass, float]:
        together = self._together(jobs, spec.batch)
        only = TrainSpec(0, spec.batch // together, spec.seq, clip=spec.clip, autocast=spec.autocast)
        return {Pass(kind, only, alone=jobs == together == 1 < self.workers): steps}

    def _together(self, jobs: int, batch: int) -> int:
        return self.work.together(jobs, batch) if self.work else self.trial.file.run.together

    def _dense(self) -> Stage:
        file = self.trial.file
        assert file.dense is not None
        passes = self._train("train", file.dense, file.dense.steps, 1) | self._evaluate(2 * file.evaluate.final_windows, True)
        return Stage("train the dense model", 1, passes, file.dense.tokens, self.dense_bytes, batch=file.dense.batch)

    def _from_base(self) -> Iterator[Stage]:
        """Conversions, and the cost of single decisions where configs near the front are drawn."""
        trial, file = self.trial, self.trial.file
        calibration = min(CALIBRATION, max(1, file.evaluate.calibration // file.final.seq))
        each = CONVERSION[0] + CONVERSION[1] * trial.space.shape.num_hidden_layers
        passes = self._evaluate(file.evaluate.windows + each * calibration)
        start = self.supernet_params * self.dtype.itemsize  # the supernet that begins as the base model
        yield Stage("convert the base model", len(conversions_of(trial.space.shape)), passes, disk_bytes=start)
        if file.predictor or (trial.supernet.steps and "near_front" in (trial.supernet.strategy, trial.split.configs)):
            found = {trial.space.largest(), *single_decisions(trial.space, file.memory).values()}
            yield Stage("single decisions", min(len(found), MOST + 1), self._evaluate(file.evaluate.windows))

    def _supernets(self) -> Iterator[Stage]:
        spec, split = self.trial.supernet, self.trial.split
        leaves, parts = 1, split.stages(spec.steps)
        for n, steps in enumerate(parts):
            if n:
                yield self._split(n, leaves)
                leaves *= 2
            each = steps // leaves
            passes = self._train("supernet", train_spec(spec), each, leaves)
            disk = leaves * self.supernet_params * (4 if n == len(parts) - 1 else STATE)
            tokens = leaves * each * self.subnets * spec.batch * spec.seq
            yield Stage("train supernets", leaves, passes, tokens, disk, batch=spec.batch)

    @property
    def subnets(self) -> int:
        """The subnets of a supernet's step, at most: a step that draws one twice runs it once."""
        spec, space = self.trial.supernet, self.trial.space
        drawn = len(STRATEGIES[spec.strategy](space, self.trial.file.memory)(SubnetRandom("0")))
        return drawn + (spec.distill and not self.trial.has_base_model)

    def _split(self, stage: int, leaves: int) -> Stage:
        """A round of splits, as if each leaf were the whole supernet."""
        trial, split, seq, counted = self.trial, self.trial.split, self.trial.supernet.seq, list[int]()
        batches = [torch.zeros(split.batch, seq + 1, dtype=torch.long)] * split.batches

        def count(given: Sequence[Comparison]) -> list[Compared]:
            found = [one.uncompared() for one in given]
            counted.extend(tokens for _, tokens in found)
            return found

        rng = random.Random(f"{trial.file.seed} cut {stage}")
        split_leaves(split, SplitTree().spaces(trial.space, trial.file.memory), count, batches, rng)
        tokens, compared = leaves * sum(counted), leaves * len(counted)
        spec = TrainSpec(0, split.batch, seq, autocast=False)
        gradients = tokens / (split.batch * seq) / max(compared, 1)
        return Stage(f"split by {split.method}", compared, {Pass("gradient", spec): gradients}, tokens)

    def _predictor(self) -> Iterator[Stage]:
        """A stage a round; each but the first is where a search by the predictor says."""
        trial, spec = self.trial, self.trial.proxy_training
        kind, rounds, scale = "distill" if trial.distills else "train", trial.predictor.rounds, self.scale(self.sampled)
        for n in range(rounds):
            begun, until = (trial.predictor.configs * m // rounds for m in (n, n + 1))
            count = until - begun
            passes = self._train(kind, spec, spec.steps, count) | self._evaluate(trial.file.evaluate.windows)
            yield Stage("proxy trainings", count, passes, count * spec.tokens, 0, scale, int(n > 0), spec.batch)

    def _search(self) -> Iterator[Stage]:
        file, count = self.trial.file, self.trial.file.search.evaluations
        passes = self._evaluate(file.evaluate.windows) if self.trial.evaluator == "supernet" else {}
        if self.trial.measured:
            passes |= {Pass("measure", TrainSpec(0, 1, 1), alone=True): self.workers}  # one at a time
        yield Stage("search", count, passes, scale=self.scale(self.sampled), asks=1)

    def _final(self) -> Iterator[Stage]:
        """The models of the front, and what early stopping leaves of them; how many it keeps is at least this."""
        trial, spec = self.trial, self.trial.file.final
        presets = {*presets_in(trial.space, trial.file.memory)} if spec.presets else set[SharingConfig]()
        dense = SharingConfig.dense(trial.space.shape)
        always = presets | ({dense} if trial.has_base_model and trial.space.meets_limits(dense, trial.file.memory) else set())
        known, unknown = self._conversions() if spec.conversions else (set[SharingConfig](), 0)
        always |= known
        configs, begun = spec.candidates + len(always) + unknown, 0
        scale = self.scale([*always, *self.sampled[: spec.candidates]])
        kind = "distill" if trial.distills else "train"

        def stage(name: str, until: int, evaluations: float, disk: int = 0) -> Stage:
            jobs, steps = configs * spec.seeds, until - begun
            passes = self._evaluate(evaluations) | (self._train(kind, spec, steps, jobs) if steps else {})
            batch = spec.batch if steps else 1
            at_most = spec.conversions and not begun  # some may be beyond mending, or of one config
            return Stage(name, jobs, passes, jobs * steps * spec.batch * spec.seq, disk, scale, batch=batch, at_most=at_most)

        for until in spec.early_stopping.pauses(spec.steps) if spec.early_stopping else ():
            assert spec.early_stopping is not None
            yield stage("train until early stopping", until, trial.file.evaluate.windows)
            configs, begun = math.ceil(configs / spec.early_stopping.reduction), until
        title = {"retrained": "retrain from scratch", "fine_tuned": "fine-tune", "zero_shot": "measure"}[trial.weights]
        yield stage(title, spec.steps, 2 * trial.file.evaluate.final_windows, configs * spec.seeds * self.dense_bytes)

    def _conversions(self) -> tuple[set[SharingConfig], int]:
        """The configs within the limits that conversions give by the shape alone, and how many others choose by weights."""
        space, tasks = self.trial.space, [task for task in conversions_of(self.trial.space.shape).values() if task.size]
        found = set[SharingConfig]()
        for task in tasks:
            with suppress(UserError):  # of one that is impossible in this shape, and will be refused
                found |= set() if task.row.choose else {task.row.preset(space.shape, task.size)}
        within = {config for config in found if space.meets_limits(config, self.trial.file.memory)}
        return within, sum(task.row.choose is not None for task in tasks)

    # ---- sizes

    @property
    def dense_bytes(self) -> int:
        """Of the dense model, as it is kept."""
        return self.dense_params * self.dtype.itemsize

    @property
    def dense_params(self) -> int:
        return sum(map(math.prod, self._own.values()))

    @property
    def supernet_params(self) -> int:
        return sum(map(math.prod, (self._own | self.trial.space.extra_parameters()).values()))

    @property
    def _own(self) -> dict[str, tuple[int, ...]]:
        shape = self.trial.space.shape
        return weight_shapes(shape, SharingConfig.dense(shape).resolve(shape))

    @property
    def state_bytes(self) -> int:
        """Of a training's state while it lasts, the old one and the new; 0 where nothing is trained."""
        file = self.trial.file
        supernet = bool(file.supernet and file.supernet.steps)
        return 2 * STATE * (self.supernet_params if supernet else self.dense_params) if supernet or file.final.steps else 0

    def flops(self, one: Pass) -> float:
        """Operations of a pass, as of the dense model: a third forward, two thirds backward, and a teacher's forward."""
        if one.kind == "measure":
            return 0.0
        spec = replace(self.trial.file.memory, context=max(one.spec.seq // 2, 1))  # a token attends to half of them in the mean
        shape = self.trial.space.shape
        forward = one.tokens * measure(shape, SharingConfig.dense(shape), spec).flops_per_token
        passes = {"evaluate": 1, "distill": 4}.get(one.kind, 3)
        if one.kind == "supernet":
            passes = 3 * self.subnets + (self.trial.has_base_model and self.trial.supernet.distill)
        return float(passes * forward)

    def scale(self, configs: Sequence[SharingConfig]) -> float:
        """The mean operations of configs, as a part of the dense model's."""
        shape = self.trial.space.shape
        spec = replace(self.trial.file.memory, context=max(self.trial.file.final.seq // 2, 1))
        found = [measure_plan(shape, c.resolve(shape), spec).flops_per_token for c in (SharingConfig.dense(shape), *configs)]
        return fmean(found[1:] or found) / found[0]

    # ---- time

    def timed(self) -> list[StageBudget]:
        """Every stage with its time, by passes that are timed now. Raises RunFailed where a worker cannot do one."""
        assert self.work
        stages, trial = self.stages(), self.trial
        file, passes = trial.file, dict.fromkeys(one for stage in stages for one in stage.passes)
        models = TimedModels(trial.space, file.memory, measured=trial.measured, workers=self.workers)
        if file.supernet:
            spec = trial.supernet
            models = replace(models, strategy=spec.strategy, distill=spec.distill, from_base=trial.has_base_model)
        times, start = time_passes(passes, models, self.work)
        asking = asking_seconds(trial)
        return [self._timed(stage, times, start, asking) for stage in stages]

    def _timed(self, stage: Stage, times: Mapping[Pass, Timed], start: float, asking: float) -> StageBudget:
        each = sum(n * times[one].seconds * (1 if one.kind == "supernet" else stage.scale) for one, n in stage.passes.items())
        together = self._together(stage.jobs, stage.batch)
        trained = {"train", "distill", "supernet"}  # by all workers of a job, of which each does a part of every step
        flops = sum(n * self.flops(one) * (together if one.kind in trained else 1) for one, n in stage.passes.items())
        rounds = math.ceil(stage.jobs / (self.workers // together))
        seconds = start * bool(stage.passes) + rounds * each + asking * stage.asks
        peak = max((times[one].peak_bytes for one in stage.passes), default=0)
        flops *= stage.jobs * stage.scale
        return StageBudget(
            stage.name, stage.jobs, stage.tokens, flops, peak, stage.disk_bytes, round(seconds, 3), together, stage.at_most
        )


def asking_seconds(trial: Trial) -> float:
    """How long the sampler takes to propose all configs of a search: a batch is timed that follows on half of them, whose losses
    are made up."""
    space, spec, rng = trial.space, trial.file.search, random.Random(0)
    half = spec.evaluations // 2
    study = Study(space, spec, trial.file.seed, trial.file.memory, trial.objectives)
    study.enqueue([space.encode(space.sample(rng)) or {} for _ in range(half)])
    for proposal in study.ask(half):
        memory = measure(space.shape, proposal.config, trial.file.memory)
        share = memory.weight_bytes + memory.kv_cache_bytes
        costs = [OBJECTIVES[name].cost(getattr(memory, name, rng.random())) for name in trial.objectives[:-1]]
        study.tell(proposal.number, (*costs, 3.0 + rng.random() - math.log2(share) / 10))
    watch, batch = Stopwatch(), min(spec.batch, spec.evaluations - half)
    study.ask(batch)
    return watch.seconds * spec.evaluations / batch


def budget_lines(found: Sequence[StageBudget], state_bytes: int) -> list[str]:
    """A table for a person, and its sums."""
    head = ("stage", "runs", "tokens", "operations", "a worker's memory", "disk", "time")
    rows = [
        (
            one.stage,
            "at most " * one.at_most + f"{one.count:,}" + f" × {one.workers}" * (one.workers > 1),
            f"{one.tokens:,}" if one.tokens else "",
            format_flops(one.flops) if one.flops else "",
            format_bytes(one.peak_bytes) if one.peak_bytes else "",
            format_bytes(one.disk_bytes) if one.disk_bytes else "",
            said_seconds(one.seconds),
        )
        for one in found
    ]
    sums = ("in all", "", f"{sum(o.tokens for o in found):,}", format_flops(sum(o.flops for o in found)))
    disk, seconds = format_bytes(sum(o.disk_bytes for o in found)), said_seconds(sum(o.seconds for o in found))
    table = [head, *rows, (*sums, "", disk, seconds)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    state = [f"disk    {format_bytes(state_bytes)} more for each worker while it trains"] if state_bytes else []
    return ["plan    by passes that were timed on these workers", *(f"  {line}" for line in lines), *state]
