"""What every stage of a search needs, and how a stage runs its trainings.

Owns `Context`. What the stages do is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..data import Corpus, eval_sequences
from ..presets import presets
from ..sharing.memory import Memory, measure
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..tracking import Tracker
from ..workers import RESULT, EarlyStopping, Executor, Failure, Job, Train
from .origin import BaseModel
from .progress import Progress, StepCount
from .run import Run
from .trial import Trial


def published(space: SearchSpace) -> dict[SharingConfig, str]:
    """The presets that a space can express, each once, with its (first) name."""
    named: dict[SharingConfig, str] = {}
    for name, config in presets(space.shape):
        if space.encode(config) is not None:
            named.setdefault(config, name)
    return named


@dataclass(frozen=True)
class Context:
    """The run's folder, its trial and text, who is told, what does the work, and the checkpoint that it is from, if any."""

    run: Run
    trial: Trial
    corpus: Corpus
    progress: Progress
    tracker: Tracker
    executor: Executor
    origin: BaseModel | None = None

    def windows(self, count: int) -> torch.Tensor:
        """Fixed evaluation windows `(count, seq + 1)`, as long as the final training's."""
        return eval_sequences(self.corpus.eval, self.trial.file.final.seq, count)

    @cached_property
    def presets(self) -> dict[SharingConfig, str]:
        """The published schemes that the space can express within its limits, each with its (first) name."""
        space, spec = self.trial.space, self.trial.file.memory
        return {config: name for config, name in published(space).items() if space.meets_limits(config, spec)}

    def memory(self, config: SharingConfig) -> Memory:
        """A config's memory, where the trial measures it."""
        return measure(self.trial.space.shape, config, self.trial.file.memory)

    def train(
        self, name: str, jobs: Sequence[Job], train: Train, steps: Mapping[str, int], early_stopping: EarlyStopping | None = None
    ) -> dict[str, dict[str, Any] | Failure]:
        """Run trainings in the run's folder `name`, those that are done already taken as they are; `steps` are each job's."""
        done = [key for key in steps if self.run.has(f"{name}/{key}/{RESULT}")]
        title = _TITLES[self.trial.weights if name == "final" else name].format(len(jobs))
        with self.progress.stage(title, sum(steps.values()), "steps") as stage:
            count = StepCount(stage, steps, done)

            def tell(key: str, latest: dict[str, Any]) -> None:
                count(key, latest)
                loss = latest.get("loss_nats_per_token", math.nan)
                if name == "supernet" and math.isfinite(loss):
                    self.tracker.log_series("supernet_loss_nats_per_token", loss, latest["step"])

            return self.executor.train(jobs, train, self.run.folder / name, early_stopping, tell)


_TITLES = {
    "predictor": "train alone, to learn from ({} models)",
    "supernet": "train supernets ({})",
    "retrained": "retrain from scratch ({} models)",
    "fine_tuned": "fine-tune ({} models)",
    "zero_shot": "measure ({} models)",
}
