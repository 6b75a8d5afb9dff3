"""An exported folder, trained further by `transformers.Trainer`.

Owns `train_export`: the Trainer and its checkpoints, what is evaluated on the way, and the folder that is written. This package's
copy of the model's code is run, never the folder's. Of several processes (`torchrun`) all train and one writes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..config import read_json
from ..data import Corpus, DataSpec, bits_per_byte, eval_sequences, load_corpus
from ..data.batches import begin
from ..errors import UserError
from ..files import require_writable, write_text
from ..model.decoder import Decoder, init_weights
from ..pretrained.files import CARD, TEXTS, own_files
from ..training.device import find_device, on_device
from ..training.evaluation import Losses, Stopwatch
from .card import FIGURE, PROVENANCE, Artifact, ModelCard, without_results
from .formats import replaced_folder, require_free, write_format
from .hugging_face import hf_name
from .load import Loaded, load_export
from .measure import LOWER_RATE, EvalSettings, as_transformers, finite_losses
from .modeling_nas import NasForCausalLM
from .trainers import CHECKPOINTS, Trained, TrainSettings, broadcast_from_main, is_main_process, world_size

TRAINING_JSON = "training.json"  # the file in the folder of checkpoints that says which training they are of

USER_FILES = {CARD, PROVENANCE, FIGURE, *TEXTS}
"""Files that training does not change, and a user may have edited: they are copied."""

Progress = Callable[[int, int, float], None]  # called with the steps done, the steps in all, and the loss in nats per token

Record = Callable[[int, Mapping[str, float]], None]
"""Called with a step and figures by name: `train_loss_nats_per_token` and `learning_rate` now and then, and on the evaluation
text, before, after and every `eval_steps`, `perplexity` and its like."""


def train_export(
    directory: Path,
    text: str | Path,
    settings: TrainSettings | None = None,
    to: Path | None = None,
    progress: Progress | None = None,
    record: Record | None = None,
) -> Trained:
    """Train a folder's model on a text (a path, or a corpus's name), into the folder `to`, by default the same one.

    The folder changes at the end; until then all that is new in it is `checkpoints`. Raises UserError for a bad folder or text,
    a loss that is not finite, a teacher with another vocabulary, and checkpoints of another training.
    """
    settings, target, clock = settings or TrainSettings(), to or directory, Stopwatch()
    if target.resolve() == directory.resolve():
        require_writable(target)
    else:
        require_free(target, own=frozenset({CHECKPOINTS}))
    kept = own_files(directory, USER_FILES)
    loaded, teacher = _load(directory, settings)
    spec = DataSpec(
        text=str(text),
        eval_text=settings.eval_text,
        eval_fraction=settings.eval_fraction,
        tokenizer=str(directory.resolve() / "tokenizer.json"),
        column=settings.column,
    )
    corpus = load_corpus(spec, loaded.shape.vocab_size, Path())
    if not is_main_process():
        progress = record = None
    training = Training(loaded, settings, corpus, target / CHECKPOINTS, progress, record)
    if settings.from_scratch:
        init_weights(loaded.model.float(), torch.Generator().manual_seed(settings.seed))
    before = training.evaluate(0)
    try:
        after = training.run(teacher)
    except UserError:  # it diverged: its checkpoints are of no use
        if is_main_process():
            _delete_checkpoints(target / CHECKPOINTS)
        raise
    trained = Trained(
        directory=target,
        steps=training.steps,
        tokens=training.rows.seen(training.steps, settings.batch) * settings.seq,
        seconds=clock.seconds,
        before=before,
        after=after,
        bits_per_byte_before=bits_per_byte(before.loss_nats_per_token, corpus),
        bits_per_byte_after=bits_per_byte(after.loss_nats_per_token, corpus),
        dtype=str(training.dtype).removeprefix("torch."),
        notes=loaded.notes_for(settings.seq),
    )
    if is_main_process():
        _write_trained(loaded, directory, kept, trained, settings, corpus)
    return trained


def _load(directory: Path, settings: TrainSettings) -> tuple[Loaded, Decoder | None]:
    """The model to train, and the one whose probabilities it learns. Raises UserError if the settings do not fit them."""
    settings.rows_per_process()  # refuses a batch that does not divide
    loaded = load_export(directory)
    if settings.gradient_checkpointing and loaded.model.plan.fixed_point_layers:
        message = "layers that read a later layer's keys and values cannot be recomputed in the backward pass"
        raise UserError(message, where=str(directory), hint="leave out --gradient-checkpointing")
    if settings.distill_from is None:
        return loaded, None
    teacher = load_export(Path(settings.distill_from))
    same = teacher.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    if not same or teacher.shape.vocab_size != loaded.shape.vocab_size:
        sizes = f"{teacher.shape.vocab_size:,} tokens, the model to be trained {loaded.shape.vocab_size:,}"
        message = f"the teacher's vocabulary is another: it has {sizes}{', not the same' * (not same)}"
        raise UserError(message, where=settings.distill_from, hint="use a teacher with the same tokenizer")
    return loaded, teacher.model.eval()


class Training(TrainerCallback):  # type: ignore[misc]
    """A training in progress. It changes the weights of the loaded model, and is the Trainer's callback: it passes on what the
    Trainer logs, evaluates every `eval_steps`, and raises UserError when the loss is not finite."""

    def __init__(
        self,
        loaded: Loaded,
        settings: TrainSettings,
        corpus: Corpus,
        checkpoints: Path,
        progress: Progress | None,
        record: Record | None,
    ) -> None:
        self.loaded, self.settings, self.corpus = loaded, settings, corpus
        self.progress, self.record = progress, record
        self.eval_rows = eval_sequences(corpus.eval, settings.seq, EvalSettings().eval_sequences, corpus.bos)
        self.rows = Rows(corpus.train, settings.seq, corpus.bos)
        self.steps = settings.steps or math.ceil(settings.epochs * self.rows.steps(settings.batch))
        self.dtype = getattr(torch, settings.dtype) if settings.dtype else loaded.model.embed_tokens.weight.dtype
        self.checkpoint = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
        _open_checkpoints(checkpoints, self.checkpoint, settings, corpus)
        self.arguments = _arguments(settings, self.steps, checkpoints)  # with several processes, they meet here

    def run(self, teacher: Decoder | None) -> Losses:
        """Train to the end; the losses of the trained model, which is in the loaded one."""
        loaded = self.loaded
        model = as_transformers(loaded.model)
        loaded.model.to(self.dtype)
        trainer = Trainer(
            model=model,
            args=self.arguments,
            train_dataset=self.rows,
            compute_loss_func=None if teacher is None else _distillation_loss(teacher, self.settings),
            callbacks=[self],
        )
        trainer.remove_callback(PrinterCallback)
        with _without_progress_bars():
            trainer.train(resume_from_checkpoint=self.checkpoint)
        self._take_weights(model)
        return self.evaluate(self.steps)

    def evaluate(self, step: int) -> Losses:
        """The loaded model's losses as `nas eval` computes them, the same in all processes; they are recorded."""
        losses = broadcast_from_main(self._measure)
        if self.record:
            self.record(step, asdict(losses) | {"bits_per_byte": bits_per_byte(losses.loss_nats_per_token, self.corpus)})
        return losses

    def _measure(self) -> Losses:
        with on_device(self.loaded.model, self.arguments.device):
            return finite_losses(self.loaded, self.eval_rows, EvalSettings(autocast=self.settings.autocast))

    def _take_weights(self, model: NasForCausalLM) -> None:
        """Copy the weights in training into the loaded model, in its dtype."""
        state, mine = model.state_dict(), self.loaded.model
        mine.load_state_dict({name: state[hf_name(name)].cpu() for name in mine.state_dict()})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {state.global_step}", hint=LOWER_RATE)
        if self.record:
            rate = (logs or {})["learning_rate"]
            self.record(state.global_step, {"train_loss_nats_per_token": loss, "learning_rate": rate})
        if self.progress:
            self.progress(state.global_step, state.max_steps, loss)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        every = self.settings.eval_steps
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            self._take_weights(model)
            self.evaluate(state.global_step)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of `seq` inputs and the target after them, one after the other through `(tokens,)`; each begins with `bos`, if any."""

    def __init__(self, tokens: Tensor, seq: int, bos: int | None = None) -> None:
        if len(tokens) <= seq:
            message = f"the training text has {len(tokens)} tokens, and one row takes {seq + 1}"
            raise UserError(message, where="text", hint="use a longer text, or a smaller seq")
        self.tokens, self.bos = tokens.unfold(0, seq + 1, seq), bos

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = begin(self.tokens[index].long(), self.bos)
        return {"input_ids": row, "labels": row}

    def steps(self, batch: int) -> int:
        """Batches in one epoch; the last may be smaller."""
        return math.ceil(len(self) / batch)

    def seen(self, steps: int, batch: int) -> int:
        """Rows in so many batches, epoch after epoch."""
        epochs, rest = divmod(steps, self.steps(batch))
        return epochs * len(self) + rest * batch


def _arguments(settings: TrainSettings, steps: int, folder: Path) -> TrainingArguments:
    device = find_device(settings.device)
    cpu, cuda = device.type == "cpu", device.type == "cuda"
    here = {
        "per_device_train_batch_size": settings.rows_per_process(),
        "activation_checkpointing": settings.gradient_checkpointing,
        "warmup_steps": int(settings.warmup * steps),
        "bf16": settings.autocast and (cpu or (cuda and torch.cuda.is_bf16_supported())),
        "ddp_backend": "gloo" if cpu and world_size() > 1 else None,
        "logging_steps": max(1, min(10, steps // 50)),
        **{"use_cpu": cpu, "dataloader_pin_memory": cuda},
        **{"save_total_limit": 1, "logging_nan_inf_filter": False, "disable_tqdm": True},
    }
    arguments = TrainingArguments(output_dir=str(folder), max_steps=steps, **settings.arguments | here)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one accelerator: a DataParallel would make the batch larger
    if device.index and world_size() == 1:  # the Trainer knows the first GPU only
        arguments.distributed_state.device = arguments.__dict__["_setup_devices"] = device
        torch.cuda.set_device(device)
    return arguments


def _distillation_loss(teacher: Decoder, settings: TrainSettings) -> Callable[..., Tensor]:
    """Cross-entropy with the teacher's probabilities and, for the rest of the loss, with the text: summed over the tokens of a
    part of a batch, and divided by those of the whole batch."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        logits, rows = outputs["logits"][:, :-1].float().flatten(0, 1), labels[:, :-1]
        with torch.no_grad(), torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=settings.autocast):
            wanted = teacher.to(rows.device)(rows)
        soft = F.cross_entropy(logits, wanted.float().softmax(-1).flatten(0, 1), reduction="sum")
        hard = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return torch.lerp(hard, soft, settings.distill_weight) / num_items_in_batch

    return loss


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Silence the bars of `transformers`, which writing a checkpoint would show."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _open_checkpoints(folder: Path, last: str | None, settings: TrainSettings, corpus: Corpus) -> None:
    """Note in a folder of checkpoints which training they are of; `last` is the one that is there already. Raises UserError if
    it is of another training, or is not to be continued."""
    note = folder / TRAINING_JSON
    this = {"settings": asdict(settings) | {"resume": False, "device": "auto"}, "sha256": corpus.sha256}
    if last and not settings.resume:
        hint = f"go on with --resume, or delete {folder}"
        raise UserError("there is an unfinished training", where=str(folder), hint=hint)
    if last and (not note.is_file() or read_json(note) != this):
        hint = f"use the settings in {note}, or delete {folder}"
        raise UserError("the unfinished training is of other settings or another text", where=str(folder), hint=hint)
    if is_main_process() and not last:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps(this, indent=2))


def _delete_checkpoints(folder: Path) -> None:
    """Delete a training's checkpoints. Other files in their folder stay, such as what MLflow has not received yet."""
    (folder / TRAINING_JSON).unlink()
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    if not any(folder.iterdir()):
        folder.rmdir()


def _write_trained(
    loaded: Loaded, source: Path, kept: Sequence[Path], trained: Trained, settings: TrainSettings, corpus: Corpus
) -> None:
    """Write a trained model into its folder in the format of the source, with the files of it that are `kept` and a section on
    the training in its README; delete the checkpoints."""
    tokenizer, weights = (source / "tokenizer.json").read_text(encoding="utf-8"), loaded.model.state_dict()
    artifact = Artifact(loaded.shape, loaded.config, weights, tokenizer, ModelCard(), loaded.metadata, loaded.family)
    with replaced_folder(trained.directory) as folder:
        write_format(artifact, folder, loaded.format)
        for path in kept:
            shutil.copy2(path, folder)
        card = folder / CARD
        text = without_results(card.read_text(encoding="utf-8")) + _section(trained, settings, corpus)
        card.write_text(text, encoding="utf-8")
    _delete_checkpoints(trained.directory / CHECKPOINTS)


def _section(trained: Trained, settings: TrainSettings, corpus: Corpus) -> str:
    before, after = trained.before, trained.after
    start = ", from new weights" * settings.from_scratch
    if settings.distill_from:
        start += f", {settings.distill_weight:.0%} of the loss on the probabilities of `{settings.distill_from}`"
    return f"""
## Training after the export

{trained.steps:,} steps of {settings.batch} × {settings.seq} tokens at a learning rate of
{settings.learning_rate:g}{start}. Weights in {trained.dtype}. Text: {corpus.source}. On that evaluation text:

| | before | after |
|---|---:|---:|
| perplexity per token | {before.perplexity:.4g} | {after.perplexity:.4g} |
| its standard error | {before.perplexity_standard_error:.2g} | {after.perplexity_standard_error:.2g} |
| bits per byte | {trained.bits_per_byte_before:.4g} | {trained.bits_per_byte_after:.4g} |
"""
