"""What every stage of a search needs, how a stage runs its trainings, and the record of what it measured.

Owns `Context` and, of a search that starts from a trained model which shares nothing, that `BaseModel`, with the checks of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from ..config import plain
from ..data import Corpus, TokenFile, bits_per_byte, eval_sequences, train_batches
from ..errors import UserError
from ..export import load_export
from ..export.load import check_folder
from ..model.decoder import Decoder
from ..presets import presets
from ..pretrained import FolderMetadata
from ..pretrained.conversions import PretrainedModel, require_dense
from ..sharing.memory import Memory, MemorySpec, measure
from ..sharing.objectives import AT, OBJECTIVES, SPREAD, plan_values
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..tracking import Tracker
from ..training.device import find_device, on_device
from ..training.evaluation import Evaluation, Losses, NotFinite, Weights, measure_losses
from ..training.loop import TrainSpec
from ..workers import RESULT, Executor, Failure, Job, Task, Train
from .jobs import Array, StandaloneTraining, build_measurer
from .progress import Progress, StepCount
from .run import TRAIN_TOKENS, Run
from .trial import Trial


def presets_in(space: SearchSpace, limited: MemorySpec | None = None) -> dict[SharingConfig, str]:
    """The presets that a space can express (within its limits, if memory is `limited`), each once, with its (first) name."""
    named: dict[SharingConfig, str] = {}
    for name, config in presets(space.shape):
        if space.encode(config) is not None:
            named.setdefault(config, name)
    return {config: name for config, name in named.items() if limited is None or space.meets_limits(config, limited)}


CALIBRATION = 32  # rows of training text, at most, by which conversions choose, and the supernet's initial weights are computed


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model that was read: its folder, the model in float32, a fingerprint of its weights, and its losses.

    `dtype` is its weights' own, in which weights that are made of it are kept. `metadata` goes into every folder that is made of
    it; `notes` say how it was read, for the user. `tokens` are those that the run itself trained it on.
    """

    folder: Path
    model: Decoder
    sha256: str
    losses: Losses
    dtype: torch.dtype
    metadata: FolderMetadata = field(default_factory=FolderMetadata)
    notes: tuple[str, ...] = ()
    tokens: int = 0

    @staticmethod
    def read(folder: Path, measure: Callable[[Decoder], Losses], tokens: int = 0) -> BaseModel:
        """The model in a folder, whose losses are measured. Raises UserError."""
        loaded = load_export(folder)
        sha256, dtype = fingerprint(loaded.model), loaded.model.embed_tokens.weight.dtype
        model = loaded.model.float().requires_grad_(False).eval()
        return BaseModel(folder, model, sha256, measure(model), dtype, loaded.metadata, loaded.notes, tokens)

    @property
    def name(self) -> str:
        """The folder's name, or what the run calls the model that it trained."""
        return "the dense model" if self.tokens else self.folder.resolve().name

    @property
    def summary(self) -> str:
        """Folder, size and perplexity, for a person."""
        whose = f"a dense model trained for {self.tokens:,} tokens" if self.tokens else self.folder
        return f"{whose}: {self.model.shape.words}, perplexity {self.losses.perplexity:.4g} on the test text"

    def provenance(self) -> dict[str, Any]:
        """What a run records of it: where it is, its fingerprint, and its perplexity."""
        return {"from": str(self.folder.resolve()), "from_sha256": self.sha256, "from_perplexity": self.losses.perplexity}

    def pretrained(self, trial: Trial, corpus: Corpus) -> PretrainedModel:
        """The model with its calibration rows, drawn from the training text by the trial's seed."""
        generator = torch.Generator().manual_seed(trial.file.seed)
        seq = trial.file.final.seq
        count = min(CALIBRATION, max(1, trial.file.evaluate.calibration // seq))
        rows = next(train_batches(corpus.train, count, seq, generator, corpus.bos))
        return PretrainedModel(self.model, rows[:, :-1])


def require_base_model(trial: Trial) -> Tokenizer | None:
    """The tokenizer of the trial's base model, if it has one. Raises UserError for one that is incomplete, shares anything or is
    not of the space's shape; no weights are read."""
    if trial.base_model is None:
        return None
    theirs, config, tokenizer = check_folder(trial.base_model)
    require_dense(config, str(trial.base_model))
    space = trial.file.space
    for name in (f.name for f in fields(ModelShape)):
        ours, given = getattr(trial.space.shape, name), getattr(theirs, name)
        if ours != given:
            where = f"model.{name}" if isinstance(space, dict) else f"{space}: model.{name}"
            raise UserError(f"is {ours}, and {given} in {trial.file.from_}", where=where, hint="leave the space's `model:` out")
    return tokenizer


def require_tokenizer(trial: Trial, theirs: Tokenizer, tokenizer_json: str | None) -> None:
    """Raise UserError unless the text's tokenizer, None for one that is trained on it, is the base model's."""
    if tokenizer_json is None or Tokenizer.from_str(tokenizer_json).to_str() != theirs.to_str():
        message = f"{trial.file.data.tokenizer} is not the tokenizer of {trial.file.from_}"
        raise UserError(message, where="data.tokenizer", hint="leave it out, and that one is used")


def read_base_model(trial: Trial, corpus: Corpus) -> BaseModel | None:
    """The trial's base model, measured on the test text as the front is; None if it has none. Raises UserError if it does not
    fit."""
    if trial.base_model is None:
        return None
    require_base_model(trial)

    def measured(model: Decoder) -> Losses:
        with on_device(model, find_device()):
            return measure_losses(model, test_windows(trial, corpus), autocast=trial.file.final.autocast)

    try:
        return BaseModel.read(trial.base_model, measured)
    except NotFinite as error:
        raise UserError(str(error), where=str(trial.base_model), hint="give a trained model") from None


def test_windows(trial: Trial, corpus: Corpus) -> torch.Tensor:
    """The windows of the test text `(windows, seq + 1)` on which models are reported."""
    file = trial.file
    return eval_sequences(corpus.test, file.final.seq, file.evaluate.final_windows, corpus.bos, "test")


def fingerprint(model: Decoder) -> str:
    """The SHA-256 of a model's shape and weights, whatever files they are stored in."""
    digest = hashlib.sha256(json.dumps(plain(model.shape)).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


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
        return presets_in(self.trial.space, self.trial.file.memory)

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
        beside += [f"{name}{AT}{at.name}" for at in self.trial.file.other_memory for name in ("memory_bytes", "kv_cache_bytes")]
        fields |= {"objectives": self.trial.objectives, "values": self.values(config, beside)}
        return Evaluation(config, self.memory(config), losses, bits, weights, tokens=tokens, part=part, **(fields | rest))

    def training(self, config: SharingConfig, spec: TrainSpec, windows: Array, **rest: Any) -> StandaloneTraining:
        """A config's training by itself on the run's text, measured on validation windows; `rest` are other fields of it. One
        array object for all trainings lets the windows travel to the workers once."""
        fields = {"seed": self.trial.file.seed, "teacher": self.teacher, "bos": self.corpus.bos} | rest
        return StandaloneTraining(self.trial.space.shape, config, spec, tokens=self.train_tokens, windows=windows, **fields)

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
            with alone.pool(build_measurer, (self.trial.space.shape, self.trial.file.memory, names)) as pool:
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
        Trainings that are done already are not run again."""
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
