"""What every stage of a search needs, how a stage runs its trainings, and the record of what it measured.

Owns `Context`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from ..data import Corpus, TokenFile, bits_per_byte, eval_sequences
from ..presets import presets
from ..sharing.memory import Memory, measure
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..tracking import Tracker
from ..training.evaluation import Evaluation, Losses, Weights
from ..workers import RESULT, Executor, Failure, Job, Train
from .base_model import BaseModel, test_windows
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
        return Evaluation(config, self.memory(config), losses, bits, weights, tokens=tokens, part=part, **(fields | rest))

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
        jobs = [Job(key, given) for key, given in settings.items()]
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

            return self.executor.train(jobs, train, self.run.folder / name, report)


_TITLES = {
    "dense": "train the dense model",
    "predictor": "proxy trainings ({} models)",
    "supernet": "train supernets ({})",
    "paused": "train until early stopping ({} models)",
    "retrained": "retrain from scratch ({} models)",
    "fine_tuned": "fine-tune ({} models)",
    "zero_shot": "measure ({} models)",
}
