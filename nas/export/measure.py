"""An exported folder, evaluated: its quality on a text, its bytes, counted and predicted, and its scores on downstream tasks.

Owns `eval_export`, and `task_scores` on local task files of `lm-eval` (the extra `nas-sharing[tasks]`), which is imported here
alone. A task file may name Python code beside it, which is run. The formulas of the prediction are `nas.sharing.memory`'s.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tokenizers import Tokenizer
from torch import nn

from ..config import PositiveInt, Strict
from ..data import Corpus, bits_per_byte, eval_sequences
from ..data.sources import open_source
from ..data.text import read_text
from ..data.tokenizer import build_tokenizer, end_token
from ..errors import UserError, shown
from ..model.decoder import Decoder
from ..pretrained import FolderMetadata
from ..pretrained.files import weight_files
from ..sharing.memory import Memory, MemorySpec, measure_plan
from ..training.device import find_device
from ..training.evaluation import Losses, NotFinite, measure_losses
from ..training.measured import filled_cache
from .hugging_face import hf_name
from .load import Loaded, load_export

if TYPE_CHECKING:
    from .modeling_nas import NasForCausalLM

LOWER_RATE = "train with a lower learning rate"


@dataclass(frozen=True)
class EvalSettings(Strict):
    """How a folder is evaluated: on at most `eval_sequences` sequences of `seq` tokens, spread over the text; `memory` is the
    setting in which bytes are counted.

    bos: whether sequences begin with the BOS token: `auto` where the tokenizer's post-processor puts one there. device: as
    `find_device` reads it.
    """

    seq: PositiveInt = 128
    eval_sequences: PositiveInt = 512
    batch: PositiveInt = 16
    autocast: bool = True
    device: str = "auto"
    column: str = "text"
    bos: Literal["auto", "yes", "no"] = "auto"
    memory: MemorySpec = field(default_factory=MemorySpec)


@dataclass(frozen=True)
class Measured:
    """The result of an evaluation. The bytes in `memory` are predicted by its formulas; the `measured_` ones are counted.

    measured_weight_bytes: of the distinct tensors of the model, in `spec.dtype`. measured_kv_cache_bytes: of a cache that
    holds `spec.context` tokens of `spec.batch` sequences. file_bytes: of the weights' files, in their own dtype. notes: sentences
    that a user must be told about how the folder was read.
    """

    losses: Losses
    bits_per_byte: float
    tokens: int
    spec: MemorySpec
    memory: Memory
    measured_weight_bytes: int
    measured_kv_cache_bytes: int
    file_bytes: int
    notes: tuple[str, ...] = ()

    def to_data(self) -> dict[str, Any]:
        quality = asdict(self.losses) | {"bits_per_byte": self.bits_per_byte, "tokens": self.tokens}
        counted = {name: getattr(self, name) for name in ("measured_weight_bytes", "measured_kv_cache_bytes", "file_bytes")}
        return quality | asdict(self.spec) | self.memory.to_data() | counted | {"notes": list(self.notes)}


def eval_export(directory: Path, text: str | Path, settings: EvalSettings | None = None) -> Measured:
    """The folder's model on the whole of a text (a path, or a corpus's name), and its bytes. Raises UserError."""
    settings = settings or EvalSettings()
    device, loaded = find_device(settings.device), load_export(directory)
    loaded.model.to(device)
    corpus = whole_corpus(directory, text, loaded.shape.vocab_size, settings.column)
    bos = _bos(loaded, corpus, settings)
    rows = eval_sequences(corpus.eval, settings.seq, settings.eval_sequences, bos)
    losses = finite_losses(loaded, rows, settings)
    begun = () if bos is None else (f"every sequence begins with {loaded.tokenizer.id_to_token(bos)}",)
    spec = settings.memory
    model = loaded.model.to(getattr(torch, spec.dtype))
    return Measured(
        losses=losses,
        bits_per_byte=bits_per_byte(losses.loss_nats_per_token, corpus),
        tokens=rows[:, 1:].numel(),
        spec=spec,
        memory=measure_plan(loaded.shape, model.plan, spec),
        measured_weight_bytes=weight_bytes(model),
        measured_kv_cache_bytes=filled_cache(model, spec.context, spec.batch).bytes,
        file_bytes=sum(path.stat().st_size for path in weight_files(directory)),
        notes=loaded.notes_for(settings.seq) + begun,
    )


def _bos(loaded: Loaded, corpus: Corpus, settings: EvalSettings) -> int | None:
    """The token with which sequences begin. Raises UserError if one is asked for, and the folder names none."""
    if settings.bos == "no":
        return None
    named = loaded.metadata.token_ids.get("bos_token_id")
    bos = corpus.bos if corpus.bos is not None else named if isinstance(named, int) else None
    if settings.bos == "yes" and bos is None:
        raise UserError("the folder names no BOS token", where="bos", hint="leave out --bos yes")
    return bos if settings.bos == "yes" else corpus.bos


def finite_losses(loaded: Loaded, rows: torch.Tensor, settings: EvalSettings) -> Losses:
    """The losses over token sequences `(sequences, seq + 1)`. Raises UserError if they are not finite."""
    try:
        return measure_losses(loaded.model, rows, settings.batch, settings.autocast)
    except NotFinite as error:
        raise UserError(str(error), hint=LOWER_RATE) from None


def whole_corpus(directory: Path, text: str | Path, vocab_size: int, column: str = "text") -> Corpus:
    """A corpus whose test part is the whole text, by the folder's tokenizer."""
    source = open_source(str(text), Path(), column)
    read = read_text(source, None)
    if not read.data:
        raise UserError("is empty", where=str(text), hint="give a text with something in it")
    tokenizer = build_tokenizer(str(directory.resolve() / "tokenizer.json"), vocab_size, b"", Path())
    data = read.joined(tokenizer.end)
    tokens = tokenizer.encode(data)
    return Corpus(tokens[:0], tokens[:0], tokens, b"", data, tokenizer.json, "", source.words, tokenizer.bos, tokenizer.end)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's distinct tensors."""
    distinct = {weight.data_ptr(): weight for weight in model.parameters()}
    return sum(weight.numel() * weight.element_size() for weight in distinct.values())


BOOTSTRAP = 1000  # resamplings for the standard error of metrics that have no formula for it


@dataclass(frozen=True)
class Score:
    """A metric of a task over its samples; `standard_error` is None where lm-eval gives none."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    samples: int
    higher_is_better: bool


def require_lm_eval() -> None:
    """Raise UserError unless lm-eval is installed."""
    if find_spec("lm_eval") is None:
        raise UserError("needs lm-eval, which is not installed", where="task", hint="pip install 'nas-sharing[tasks]'")


def require_tasks(files: Sequence[Path]) -> dict[tuple[str, str], bool]:
    """The scores that models get on the tasks in files, as (task, metric), and whether the higher is the better one. Raises
    UserError unless lm-eval is installed and reads each of the files as a task, or a group of tasks."""
    require_lm_eval()
    found: dict[tuple[str, str], bool] = {}
    with _quiet():
        for file in files:
            for name, task in _load([file])[2].items():
                kept = [each.name for each in getattr(task, "_filters", ())] or ["none"]
                better = task.higher_is_better()
                found |= {(name, _metric(metric, each)): bool(up) for metric, up in better.items() for each in kept}
    return found


def eval_tasks(directory: Path, files: Sequence[Path], batch: int = 16, device: str = "auto") -> list[Score]:
    """The scores of a folder's model; any folder that `load_export` reads. Raises UserError."""
    require_lm_eval()
    loaded = load_export(directory)
    return task_scores(loaded.model.to(find_device(device)), loaded.tokenizer, end_of_text(loaded.metadata), files, batch)


def end_of_text(metadata: FolderMetadata) -> int | None:
    """The token that a folder names as the end of a text, or the first of several."""
    end = metadata.token_ids.get("eos_token_id")
    first = end[0] if isinstance(end, list) and end else end
    return first if isinstance(first, int) else None


def task_scores(model: Decoder, tokenizer: Tokenizer, end: int | None, files: Sequence[Path], batch: int = 16) -> list[Score]:
    """The scores of a model on the tasks of files, where it is and in float32, by greedy decoding and with lm-eval's fixed seeds.

    `end` is the token that ends texts, with which texts begin, too. Raises UserError for a file that is no task of lm-eval's,
    and for a task that cannot be run.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    end = end_token(tokenizer.to_str()) if end is None else end
    token = None if end is None else tokenizer.id_to_token(end)
    if token is None:
        message = "the tokenizer has no token that ends texts, with which lm-eval begins them"
        raise UserError(message, hint="name it in config.json, as eos_token_id")
    names = {"bos_token": token, "eos_token": token, "pad_token": token}
    wrapped, device = as_transformers(model).eval(), model.embed_tokens.weight.device
    with _quiet():
        client = HFLM(
            pretrained=wrapped.to(device),
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names),
            backend="causal",
            batch_size=batch,
        )
        try:
            manager, specs, _ = _load(files)
            found = simple_evaluate(client, tasks=specs, task_manager=manager, bootstrap_iters=BOOTSTRAP, log_samples=False)
        except UserError:
            raise
        except Exception as error:
            raise _wrong(files, "cannot be run by lm-eval", error) from None
    assert found is not None
    return list(_scores(found))


def _metric(metric: str, kept: str) -> str:
    """The name of a metric of what one of a task's filters keeps of the answers."""
    return metric if kept == "none" else f"{metric} ({kept})"


def _load(files: Sequence[Path]) -> tuple[Any, list[str], dict[str, Any]]:
    """lm-eval's tasks in files: their manager, what names them there, and themselves by name. Raises UserError."""
    from lm_eval.tasks import TaskManager

    for file in files:
        if not file.is_file():
            raise UserError("no such file", where=str(file), hint="give the path of a task file of lm-eval's")
    manager = TaskManager(include_defaults=False)
    try:
        specs = [str(file.resolve()) for file in files]
        tasks = manager.load(specs)["tasks"]
    except Exception as error:
        raise _wrong(files, "is no task that lm-eval reads", error) from None
    return manager, specs, tasks


def _wrong(files: Sequence[Path], message: str, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {shown(' '.join(str(error).split()), 160)}"
    hint = "its data files are relative to where you are; `lm-eval run --tasks FILE` says more"
    return UserError(f"{message} ({reason})", where=", ".join(map(str, files)), hint=hint)


def _scores(found: Mapping[str, Any]) -> Iterator[Score]:
    for task, row in found["results"].items():
        samples, better = found["n-samples"].get(task, {}).get("effective", 0), found.get("higher_is_better", {}).get(task, {})
        for key, value in row.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = row.get(f"{metric}_stderr,{kept}")
            error = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            yield Score(task, _metric(metric, kept), float(value), error, samples, bool(better.get(metric, True)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of lm-eval's and of `datasets`' on the terminal: what is wrong is raised."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def as_transformers(decoder: Decoder) -> NasForCausalLM:
    """A copy of a decoder, in float32, by this package's copy of the code: no code of a folder is run."""
    from .configuration_nas import NasConfig
    from .modeling_nas import NasForCausalLM

    model = NasForCausalLM(NasConfig(**asdict(decoder.shape), plan=decoder.plan.to_data())).float()
    result = model.load_state_dict({hf_name(name): weight for name, weight in decoder.state_dict().items()}, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}, result.missing_keys  # the embedding, if they are tied
    return model
