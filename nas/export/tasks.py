"""Downstream tasks: a model's scores on local task files of `lm-eval` (the extra `nas-sharing[tasks]`).

Owns `task_scores`, and is the one place that imports `lm_eval`. A task file may name Python code beside it, which is run.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..data.tokenizer import end_token
from ..errors import UserError, shown
from ..model.decoder import Decoder
from ..pretrained import FolderMetadata
from .load import load_export

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

    def to_data(self) -> dict[str, Any]:
        """One flat row."""
        return asdict(self)


def require_lm_eval() -> None:
    """Raise UserError unless lm-eval is installed."""
    if find_spec("lm_eval") is None:
        raise UserError("needs lm-eval, which is not installed", where="task", hint="pip install 'nas-sharing[tasks]'")


def require_tasks(files: Sequence[Path]) -> None:
    """Raise UserError unless lm-eval is installed and reads each of the files as a task, or a group of tasks."""
    require_lm_eval()
    with _quiet():
        for file in files:
            _load([file])


def eval_tasks(directory: Path, files: Sequence[Path], batch: int = 16, device: str = "auto") -> list[Score]:
    """The scores of a folder's model; any folder that `load_export` reads. Raises UserError."""
    from ..training.device import find_device

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

    from .wrapped import as_transformers

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
            manager, specs = _load(files)
            found = simple_evaluate(client, tasks=specs, task_manager=manager, bootstrap_iters=BOOTSTRAP, log_samples=False)
        except UserError:
            raise
        except Exception as error:
            raise _wrong(files, "cannot be run by lm-eval", error) from None
    assert found is not None
    return list(_scores(found))


def _load(files: Sequence[Path]) -> tuple[Any, list[str]]:
    """lm-eval's tasks in files: their manager, and what names them there. Raises UserError."""
    from lm_eval.tasks import TaskManager

    for file in files:
        if not file.is_file():
            raise UserError("no such file", where=str(file), hint="give the path of a task file of lm-eval's")
    manager = TaskManager(include_defaults=False)
    try:
        specs = [str(file.resolve()) for file in files]
        manager.load(specs)
    except Exception as error:
        raise _wrong(files, "is no task that lm-eval reads", error) from None
    return manager, specs


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
            name = metric if kept == "none" else f"{metric} ({kept})"
            yield Score(task, name, float(value), error, samples, bool(better.get(metric, True)))


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
