"""An exported folder, trained on by `transformers.Trainer`.

Owns `train_export`: the settings, which part of a text is kept from training, checkpoints, and the folder that comes out. It
runs this project's copy of the model's code, never the folder's.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..data import Corpus, DataSpec, bits_per_byte, eval_windows, load_corpus
from ..errors import UserError
from ..evaluate import Losses, Stopwatch
from ..loading import Strict
from ..plan import weight_shapes
from .artifact import Artifact, require_free, whole_folder
from .card import FIGURE, Card
from .configuration_nas import NasConfig
from .hugging_face import hf_name, write_folder
from .load import Loaded, load_export
from .measure import LOWER_RATE, EvalSettings, finite_losses
from .modeling_nas import NasForCausalLM

CHECKPOINTS = "checkpoints"

Progress = Callable[[int, int, float], None]
"""Told now and then the steps done, the steps in all, and the loss in nats a token."""


@dataclass(frozen=True)
class TrainSettings(Strict):
    """How a folder is trained: AdamW (betas 0.9, 0.95), linear warm-up, cosine to a tenth of the rate, as the search trains.

    `steps` are as many as make `epochs`, unless given. The text's last `eval_fraction` is not trained on. Every `save_steps` a
    checkpoint is kept, from which `resume` goes on.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch: int = 16
    seq: int = 128
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    autocast: bool = True
    eval_fraction: float = 0.1
    save_steps: int = 500
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch", "seq", "learning_rate", "clip", "save_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{value} is not positive", where=name, remedy="use a number above zero")


@dataclass(frozen=True)
class Trained:
    """A finished training: the folder it is in, and the losses on the part of the text that was kept from it."""

    directory: Path
    steps: int
    tokens: int
    seconds: float
    before: Losses
    after: Losses
    bits_per_byte_before: float
    bits_per_byte_after: float

    def to_data(self) -> dict[str, Any]:
        """One flat row; `perplexity_before`, `perplexity_after` and so on."""
        head = {"directory": str(self.directory), "steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}
        losses = {f"{name}_{when}": v for when in ("before", "after") for name, v in asdict(getattr(self, when)).items()}
        return head | losses | {name: getattr(self, name) for name in ("bits_per_byte_before", "bits_per_byte_after")}


def train_export(
    directory: Path,
    text: str | Path,
    settings: TrainSettings | None = None,
    to: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a folder's model on a text (a path, or a corpus's name), into the folder `to`, by default the same one.

    The folder changes when the training is over, and its weights are float32 then; until then all that is new in it is
    `checkpoints`. Raises UserError for a bad folder or text, a loss that is no number, and checkpoints of another training.
    """
    settings, target, clock = settings or TrainSettings(), to or directory, Stopwatch()
    loaded = load_export(directory)
    if target.resolve() != directory.resolve():
        require_free(target, overwrite=False, ours=frozenset({CHECKPOINTS}))
    corpus = _corpus(directory, text, loaded, settings)
    windows = eval_windows(corpus.eval, settings.seq, EvalSettings().windows)
    rows = _Rows(corpus.train, settings.seq)
    steps = settings.steps or math.ceil(settings.epochs * rows.steps(settings.batch))
    checkpoint = _checkpoint(target / CHECKPOINTS, settings, corpus)
    measuring = EvalSettings(batch=settings.batch, autocast=settings.autocast)
    before = finite_losses(loaded, windows, measuring)
    try:
        _fit(loaded, directory, rows, _arguments(settings, steps, target / CHECKPOINTS), checkpoint, progress)
        after = finite_losses(loaded, windows, measuring)
    except UserError:  # it diverged: there is nothing to go on from
        shutil.rmtree(target / CHECKPOINTS)
        raise
    trained = Trained(
        directory=target,
        steps=steps,
        tokens=rows.seen(steps, settings.batch) * settings.seq,
        seconds=clock.seconds,
        before=before,
        after=after,
        bits_per_byte_before=bits_per_byte(before.loss_nats_per_token, corpus),
        bits_per_byte_after=bits_per_byte(after.loss_nats_per_token, corpus),
    )
    _write(loaded, directory, trained, settings, corpus)
    return trained


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of `seq` inputs and the target after them, one after the other through `(tokens,)`."""

    def __init__(self, tokens: Tensor, seq: int) -> None:
        if len(tokens) <= seq:
            rule = f"the training text has {len(tokens)} tokens, and one window takes {seq + 1}"
            raise UserError(rule, where="text", remedy="use a longer text, or a smaller seq")
        self.windows = tokens.unfold(0, seq + 1, seq)

    def __len__(self) -> int:
        return len(self.windows)

    def steps(self, batch: int) -> int:
        """Batches in one pass; the last may be smaller."""
        return math.ceil(len(self) / batch)

    def seen(self, steps: int, batch: int) -> int:
        """Windows in so many batches, pass after pass."""
        passes, rest = divmod(steps, self.steps(batch))
        return passes * len(self) + rest * batch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.windows[index].long()
        return {"input_ids": row, "labels": row}


class _Report(TrainerCallback):  # type: ignore[misc]
    """Passes the loss on as the Trainer logs it, and ends a training that has diverged."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {state.global_step}", remedy=LOWER_RATE)
        if loss is not None and self.progress:
            self.progress(state.global_step, state.max_steps, loss)


def _corpus(directory: Path, text: str | Path, loaded: Loaded, settings: TrainSettings) -> Corpus:
    tokenizer = str(directory.resolve() / "tokenizer.json")
    spec = DataSpec(text=str(text), tokenizer=tokenizer, eval_fraction=settings.eval_fraction)
    return load_corpus(spec, loaded.shape.vocab_size, Path())


def _checkpoint(folder: Path, settings: TrainSettings, corpus: Corpus) -> str | None:
    """The checkpoint to go on from, if asked; notes in the folder which training its checkpoints are of."""
    note = folder / "training.json"
    this = {"settings": asdict(settings) | {"resume": False}, "sha256": corpus.sha256}
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found and not settings.resume:
        remedy = f"go on with --resume, or delete {folder}"
        raise UserError("there is an unfinished training", where=str(folder), remedy=remedy)
    if found and (not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != this):
        remedy = f"use the settings in {note}, or delete {folder}"
        raise UserError("the unfinished training is of other settings or another text", where=str(folder), remedy=remedy)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(this, indent=2), encoding="utf-8")
    return found


def _arguments(settings: TrainSettings, steps: int, folder: Path) -> TrainingArguments:
    cpu, cuda = not torch.accelerator.is_available(), torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=int(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=settings.clip,
        use_cpu=cpu,
        bf16=settings.autocast and (cpu or (cuda and torch.cuda.is_bf16_supported())),
        save_steps=settings.save_steps,
        save_total_limit=1,
        logging_nan_inf_filter=False,
        logging_steps=max(1, min(10, steps // 50)),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
        seed=settings.seed,
    )


def _fit(
    loaded: Loaded,
    directory: Path,
    rows: _Rows,
    arguments: TrainingArguments,
    checkpoint: str | None,
    progress: Progress | None,
) -> None:
    """Train, and leave the trained weights in the loaded model."""
    model = NasForCausalLM(NasConfig.from_pretrained(directory)).float()
    names = {name: hf_name(name) for name in weight_shapes(loaded.shape, loaded.model.plan)}
    weights = loaded.model.state_dict()
    result = model.load_state_dict({names[name]: weight for name, weight in weights.items()}, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}, result.missing_keys  # the embedding, if they are tied
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[_Report(progress)])
    trainer.remove_callback(PrinterCallback)
    with _without_progress_bars():
        trainer.train(resume_from_checkpoint=checkpoint)
    state = model.state_dict()
    loaded.model.float().load_state_dict({name: state[names[name]].cpu() for name in names})


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Silence `transformers`' own bars, which a checkpoint would draw."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write(loaded: Loaded, source: Path, trained: Trained, settings: TrainSettings, corpus: Corpus) -> None:
    tokenizer = (source / "tokenizer.json").read_text(encoding="utf-8")
    artifact = Artifact(loaded.shape, loaded.config, loaded.model.state_dict(), tokenizer, Card())
    section = _section(trained, settings, corpus)
    with whole_folder(trained.directory) as folder:
        write_folder(artifact, folder)
        for path in source.iterdir():
            if path.name in KEPT:
                shutil.copy2(path, folder)
        with (folder / "README.md").open("a", encoding="utf-8") as readme:
            readme.write(section)
    shutil.rmtree(trained.directory / CHECKPOINTS)


KEPT = {"README.md", FIGURE, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
"""Files that training does not change, but a user may have."""


def _section(trained: Trained, settings: TrainSettings, corpus: Corpus) -> str:
    """What a README says of one more training."""
    before, after = trained.before, trained.after
    return f"""
## Training after the export

{trained.steps:,} steps of {settings.batch} × {settings.seq} tokens at a learning rate of {settings.learning_rate:g}.
Text: {corpus.source}. On that evaluation text:

| | before | after |
|---|---:|---:|
| perplexity a token | {before.perplexity:.4g} | {after.perplexity:.4g} |
| its standard error | {before.perplexity_standard_error:.2g} | {after.perplexity_standard_error:.2g} |
| bits a byte | {trained.bits_per_byte_before:.4g} | {trained.bits_per_byte_after:.4g} |
"""
