"""What every stage of a search needs, how a stage runs its trainings, and the record of what it measured.

Owns `Context`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from ..data import Corpus, TokenFile, bits_per_byte, eval_sequences
from ..presets import presets
from ..sharing.memory import Memory, MemorySpec, measure
from ..sharing.objectives import AT, OBJECTIVES, SPREAD, plan_values
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..tracking import Tracker
from ..training.evaluation import Evaluation, Losses, Weights
from ..workers import RESULT, Executor, Failure, Job, Task, Train
from .base_model import BaseModel, test_windows
from .jobs import MeasureSettings, StandaloneTraining, build_measurer
from .progress import Progress, StepCount
from .run import TRAIN_TOKENS, Run
from .trial import Trial


def presets_in(space: SearchSpace) -> dict[SharingConfig, str]:
    """The presets that a space can express, each once, with its (first) name."""
    named: dict[SharingConfig, str] = {}
    for name, config in presets(space.shape):
        if space.encode(config) is not None:
            named.setdefault(config, name)
    return named


@dataclass(frozen=True)
class Context:
    """A run under way: its folder, trial and text, who is told of it, what does its work, and its base model, if it has one."""

    run: Run
    trial: Trial
    corpus: Corpus
    progress: Progress
    tracker: Tracker
    executor: Executor
    base_model: BaseModel | None = None

    def windows(self, count: int) -> torch.Tensor:
        """Fixed windows of the validation text `(count, seq + 1)`, as long as the final training's: by these everything is
        chosen."""
        return eval_sequences(self.corpus.validation, self.trial.file.final.seq, count, self.corpus.bos, "validation")

    @property
    def test_windows(self) -> torch.Tensor:
        """Those of the test text, on which the front is reported; no choice may see them."""
        return test_windows(self.trial, self.corpus)

    @cached_property
    def train_tokens(self) -> TokenFile:
        """The training text in the run's folder, which trainings map, so that none of them carries it."""
        return self.corpus.put_train(self.run.folder / TRAIN_TOKENS)

    @property
    def teacher(self) -> Path | None:
        """The folder of the model whose probabilities trainings learn from, if it is not the text."""
        return self.base_model.folder.resolve() if self.base_model and self.trial.distills else None

    @cached_property
    def presets(self) -> dict[SharingConfig, str]:
        """The presets that the space can express within its limits, each with its (first) name."""
        space, spec = self.trial.space, self.trial.file.memory
        return {config: name for config, name in presets_in(space).items() if space.meets_limits(config, spec)}

    def memory(self, config: SharingConfig) -> Memory:
        """A config's memory, where the trial measures it."""
        return measure(self.trial.space.shape, config, self.trial.file.memory)

    def evaluation(
        self,
        config: SharingConfig,
        losses: Losses,
        weights: Weights,
        tokens: int,
        part: Literal["validation", "test"] = "validation",
        **rest: Any,
    ) -> Evaluation:
        """The record of a config that was measured on a part of the text; `rest` are other fields of `Evaluation`."""
        fields: dict[str, Any] = {"seed": self.trial.file.seed, "seconds": 0.0, "name": self.presets.get(config, "")}
        bits = bits_per_byte(losses.loss_nats_per_token, self.corpus, part)
        measured = [end for name in self.trial.measured for end in (name, name + SPREAD)]
        beside = [*(name for name in self.trial.objectives if name not in Memory.__dataclass_fields__), *measured]
        beside += [
            f"{name}{AT}{spec.name}" for spec in self.trial.file.other_memory for name in ("memory_bytes", "kv_cache_bytes")
        ]
        fields |= {"objectives": self.trial.objectives, "values": self.values(config, beside)}
        return Evaluation(config, self.memory(config), losses, bits, weights, tokens=tokens, part=part, **(fields | rest))

    def values(self, config: SharingConfig, names: Collection[str], memory: MemorySpec | None = None) -> dict[str, float]:
        """A config's values of the named objectives, and spreads, as far as they are known before it is evaluated."""
        shape, measured = self.trial.space.shape, self._measured.get(config.hash, {})
        known = {name: measured[name] for name in names if name in measured}
        rows = [name for name in names if name in OBJECTIVES]
        return plan_values(shape, config.resolve(shape), memory or self.trial.file.memory, rows) | known

    def costs(self, config: SharingConfig, memory: MemorySpec | None = None) -> tuple[float, ...]:
        """What is minimised beside perplexity, by the first setting of `memory` or another."""
        values = self.values(config, self.trial.objectives, memory)
        return tuple(OBJECTIVES[n].cost(values[n]) if n in values else math.inf for n in self.trial.objectives[:-1])

    def excess(self, config: SharingConfig) -> float:
        """How far beyond the limits, as a part of each; 0 within, as far as values are known."""
        limits = self.trial.space.limits
        return sum(OBJECTIVES[name].excess(value, limits[name]) for name, value in self.values(config, limits).items())

    @cached_property
    def _measured(self) -> dict[str, dict[str, Any]]:
        return self.run.measured()

    def measure(
        self, configs: Iterable[SharingConfig], tell: Callable[[int], None] = lambda done: None
    ) -> dict[SharingConfig, str]:
        """Measure configs at work, each once a run, and one at a time, so that they do not slow one another down; those that
        could not be measured, with the reason. Nothing is done where no objective is measured."""
        names, configs = self.trial.measured, dict.fromkeys(configs)
        left = [config for config in configs if config.hash not in self._measured] if names else []
        if left:
            alone = replace(self.executor, spec=replace(self.executor.spec, workers=min(self.executor.spec.workers, 1)))
            settings = MeasureSettings(self.trial.space.shape, self.trial.file.memory, names)
            with alone.pool(build_measurer, settings) as pool:
                for done, (task, found) in enumerate(pool.run([Task(config.hash, config) for config in left]), 1):
                    values = {"failure": found.reason} if isinstance(found, Failure) else found
                    self.run.speeds().append({"hash": task.key} | values)
                    self._measured[str(task.key)] = values
                    tell(done)
        known = {config: self._measured.get(config.hash, {}) for config in configs}
        return {config: values["failure"] for config, values in known.items() if "failure" in values}

    def measurable(self, configs: Iterable[SharingConfig]) -> list[SharingConfig]:
        """Those of some configs that can be measured, if anything is, and are within the limits; failures are said."""
        configs = list(configs)
        if not self.trial.measured:
            return configs
        with self.progress.stage("measure", len(configs), "configs") as bar:
            failed = self.measure(configs, bar.update)
        for config, reason in failed.items():
            self.progress.say(f"{self.presets.get(config, config.hash)} could not be measured: {reason}")
        return [config for config in configs if config not in failed and not self.excess(config)]

    def _cost(self, settings: Any) -> float:
        return self.memory(settings.config).flops_per_token if isinstance(settings, StandaloneTraining) else 0.0

    def train(
        self,
        name: str,
        settings: Mapping[str, Any],
        train: Train,
        steps: Mapping[str, int],
    ) -> dict[str, dict[str, Any] | Failure]:
        """Run trainings in the run's folder `name` and return their results, all by key; `steps` are those of each training.

        Trainings that are done already are not run again.
        """
        jobs = [Job(key, given, self._cost(given)) for key, given in settings.items()]
        title = _TITLES[self.trial.weights if name == "final" else name.partition("-")[0]].format(len(jobs))
        with self.progress.stage(title, sum(steps.values()), "steps") as stage:
            count = StepCount(stage, steps, [key for key in steps if self.run.has(f"{name}/{key}/{RESULT}")])

            def report(key: str, latest: dict[str, Any]) -> None:
                count(key, latest)
                loss = latest.get("loss_nats_per_token", math.nan)
                if name == "supernet" and math.isfinite(loss):
                    leaf = key.partition(".")[2]
                    of = f"_{leaf}" if "-" in leaf else ""
                    self.tracker.log_series(f"supernet_loss_nats_per_token{of}", loss, latest["step"])

            batch = min((given.spec.batch if given.spec.steps else 1 for given in settings.values()), default=1)
            return self.executor.train(jobs, train, self.run.folder / name, report, batch)


_TITLES = {
    "dense": "train the dense model",
    "predictor": "proxy trainings ({} models)",
    "supernet": "train supernets ({})",
    "paused": "train until early stopping ({} models)",
    "retrained": "retrain from scratch ({} models)",
    "fine_tuned": "fine-tune ({} models)",
    "zero_shot": "measure ({} models)",
}
