"""An exported folder, trained on by `transformers.Trainer`.

Owns `train_export`: which part of a text is kept from training, the Trainer and its checkpoints. It runs this project's copy of
the model's code, never the folder's. Of several processes (`torchrun`) all train and one writes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..data import Corpus, DataSpec, bits_per_byte, eval_windows, load_corpus
from ..errors import UserError
from ..model.decoder import Decoder, init_weights
from ..sharing.plan import weight_shapes
from ..training.evaluation import Losses, Stopwatch
from .artifact import require_free
from .configuration_nas import NasConfig
from .hugging_face import hf_name
from .load import Loaded, load_export
from .measure import LOWER_RATE, EvalSettings, finite_losses
from .modeling_nas import NasForCausalLM
from .processes import agreed, leads, processes
from .trained import CHECKPOINTS, Trained, TrainSettings, write_trained

Progress = Callable[[int, int, float], None]
"""Told now and then the steps done, the steps in all, and the loss in nats a token."""

Record = Callable[[int, Mapping[str, float]], None]
"""Told figures by their names, and the step they are of: `train_loss_nats_per_token` and `learning_rate` now and then, and on the
evaluation text, before, after and on the way, `perplexity` and its like."""


def train_export(
    directory: Path,
    text: str | Path,
    settings: TrainSettings | None = None,
    to: Path | None = None,
    progress: Progress | None = None,
    record: Record | None = None,
) -> Trained:
    """Train a folder's model on a text (a path, or a corpus's name), into the folder `to`, by default the same one.

    The folder changes when the training is over; until then all that is new in it is `checkpoints`. Raises UserError for a bad
    folder or text, a loss that is no number, a teacher of another vocabulary, and checkpoints of another training.
    """
    settings, target, clock = settings or TrainSettings(), to or directory, Stopwatch()
    settings.rows(processes())
    loaded = load_export(directory)
    _require_possible(loaded, directory, settings)
    teacher = _teacher(loaded, settings)
    if target.resolve() != directory.resolve():
        require_free(target, overwrite=False, ours=frozenset({CHECKPOINTS}))
    dtype = getattr(torch, settings.dtype) if settings.dtype else loaded.model.embed_tokens.weight.dtype
    work = _Work(loaded, settings, _corpus(directory, text, loaded, settings), dtype, record if leads() else None)
    checkpoint = _checkpoint(target / CHECKPOINTS, settings, work.corpus)
    arguments = _arguments(settings, work.steps, target / CHECKPOINTS)  # processes meet here
    if settings.fresh:
        init_weights(loaded.model.float(), torch.Generator().manual_seed(settings.seed))
    before = work.measured(0)
    try:
        _fit(work, _config(loaded), teacher, arguments, checkpoint, progress if leads() else None)
        after = work.measured(work.steps)
    except UserError:  # it diverged: there is nothing to go on from
        if leads():
            shutil.rmtree(target / CHECKPOINTS)
        raise
    trained = Trained(
        directory=target,
        steps=work.steps,
        tokens=work.rows.seen(work.steps, settings.batch) * settings.seq,
        seconds=clock.seconds,
        before=before,
        after=after,
        bits_per_byte_before=bits_per_byte(before.loss_nats_per_token, work.corpus),
        bits_per_byte_after=bits_per_byte(after.loss_nats_per_token, work.corpus),
        dtype=str(dtype).removeprefix("torch."),
    )
    if leads():
        write_trained(loaded, directory, trained, settings, work.corpus)
    return trained


def _require_possible(loaded: Loaded, directory: Path, settings: TrainSettings) -> None:
    if settings.gradient_checkpointing and loaded.model.plan.cycle:
        message = "layers that read keys and values from above cannot be computed again in the backward pass"
        raise UserError(message, where=str(directory), hint="leave out --gradient-checkpointing")


def _teacher(loaded: Loaded, settings: TrainSettings) -> Decoder | None:
    """The model whose probabilities are learned. Raises UserError if its tokens are others."""
    if settings.distill_from is None:
        return None
    teacher = load_export(Path(settings.distill_from))
    alike = teacher.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    if not alike or teacher.shape.vocab_size != loaded.shape.vocab_size:
        sizes = f"{teacher.shape.vocab_size:,} tokens, the model to be trained {loaded.shape.vocab_size:,}"
        message = f"the teacher's vocabulary is another: it has {sizes}{', not the same' * (not alike)}"
        raise UserError(message, where=settings.distill_from, hint="use a teacher with the same tokenizer")
    return teacher.model.eval()


@dataclass(eq=False)
class _Work:
    """A training under way: what is trained, on what, and who is told the figures."""

    loaded: Loaded
    settings: TrainSettings
    corpus: Corpus
    dtype: torch.dtype
    record: Record | None

    def __post_init__(self) -> None:
        said = self.settings
        self.windows = eval_windows(self.corpus.eval, said.seq, EvalSettings().windows)
        self.rows = _Rows(self.corpus.train, said.seq)
        self.steps = said.steps or math.ceil(said.epochs * self.rows.steps(said.batch))
        self.names = {name: hf_name(name) for name in weight_shapes(self.loaded.shape, self.loaded.model.plan)}

    def measured(self, step: int) -> Losses:
        """The loaded model's losses as `nas eval` measures them, the same in all processes; told to who is to be told."""
        losses = agreed(lambda: finite_losses(self.loaded, self.windows, EvalSettings(autocast=self.settings.autocast)))
        if self.record:
            self.record(step, asdict(losses) | {"bits_per_byte": bits_per_byte(losses.loss_nats_per_token, self.corpus)})
        return losses

    def take(self, model: NasForCausalLM) -> None:
        """Bring the weights in training into the loaded model, in its dtype."""
        state = model.state_dict()
        self.loaded.model.load_state_dict({name: state[theirs].cpu() for name, theirs in self.names.items()})


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of `seq` inputs and the target after them, one after the other through `(tokens,)`."""

    def __init__(self, tokens: Tensor, seq: int) -> None:
        if len(tokens) <= seq:
            message = f"the training text has {len(tokens)} tokens, and one window takes {seq + 1}"
            raise UserError(message, where="text", hint="use a longer text, or a smaller seq")
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
    """Passes on what the Trainer logs, measures on the way, and ends a training that has diverged."""

    def __init__(self, work: _Work, progress: Progress | None) -> None:
        self.work, self.progress = work, progress

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {state.global_step}", hint=LOWER_RATE)
        if self.work.record:
            rate = (logs or {})["learning_rate"]
            self.work.record(state.global_step, {"train_loss_nats_per_token": loss, "learning_rate": rate})
        if self.progress:
            self.progress(state.global_step, state.max_steps, loss)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        every = self.work.settings.eval_steps
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            self.work.take(model)
            self.work.measured(state.global_step)


def _corpus(directory: Path, text: str | Path, loaded: Loaded, settings: TrainSettings) -> Corpus:
    tokenizer = str(directory.resolve() / "tokenizer.json")
    spec = DataSpec(str(text), settings.eval_text, settings.eval_fraction, tokenizer)
    return load_corpus(spec, loaded.shape.vocab_size, Path())


def _checkpoint(folder: Path, settings: TrainSettings, corpus: Corpus) -> str | None:
    """The checkpoint to go on from, if asked; notes in the folder which training its checkpoints are of."""
    note = folder / "training.json"
    this = {"settings": asdict(settings) | {"resume": False}, "sha256": corpus.sha256}
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found and not settings.resume:
        hint = f"go on with --resume, or delete {folder}"
        raise UserError("there is an unfinished training", where=str(folder), hint=hint)
    if found and (not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != this):
        hint = f"use the settings in {note}, or delete {folder}"
        raise UserError("the unfinished training is of other settings or another text", where=str(folder), hint=hint)
    if leads() and not found:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(this, indent=2), encoding="utf-8")
    return found


def _arguments(settings: TrainSettings, steps: int, folder: Path) -> TrainingArguments:
    cpu, cuda = not torch.accelerator.is_available(), torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.rows(processes()),
        gradient_accumulation_steps=settings.grad_accumulation,
        activation_checkpointing=settings.gradient_checkpointing,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=int(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=settings.clip,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and processes() > 1 else None,
        ddp_find_unused_parameters=False,  # every weight that is owned is used
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
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one accelerator: a DataParallel would make the batch larger
    return arguments


def _config(loaded: Loaded) -> NasConfig:
    return NasConfig(**asdict(loaded.shape), plan=loaded.model.plan.to_data())


def _fit(
    work: _Work,
    config: NasConfig,
    teacher: Decoder | None,
    arguments: TrainingArguments,
    checkpoint: str | None,
    progress: Progress | None,
) -> None:
    """Train, and leave the trained weights in the loaded model."""
    model = NasForCausalLM(config).float()
    weights = work.loaded.model.state_dict()
    result = model.load_state_dict({work.names[name]: weight for name, weight in weights.items()}, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}, result.missing_keys  # the embedding, if they are tied
    work.loaded.model.to(work.dtype)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=work.rows,
        compute_loss_func=None if teacher is None else _distilled(teacher, work.settings),
        callbacks=[_Report(work, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    with _without_progress_bars():
        trainer.train(resume_from_checkpoint=checkpoint)
    work.take(model)


def _distilled(teacher: Decoder, settings: TrainSettings) -> Callable[..., Tensor]:
    """Cross-entropy with a teacher's probabilities and, for the rest of the loss, with the text; summed over the tokens of a part
    of a step, and divided by those of the whole."""

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
    """Silence `transformers`' own bars, which a checkpoint would draw."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
