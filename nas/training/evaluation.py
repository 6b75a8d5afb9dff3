"""The loss of a model on fixed evaluation sequences, and the record of one evaluation.

A record names where the evaluated weights are from: a front never mixes two kinds of weights.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import NoneType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import require_kinds
from ..errors import UserError
from ..model.decoder import Decoder
from ..sharing.label import label, names_of
from ..sharing.memory import Memory, MemorySpec, measure_plan
from ..sharing.objectives import DEFAULT, OBJECTIVES, QUALITY, SPREAD, STANDARD_ERROR, TASK, plan_values
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig

Weights = Literal["inherited", "converted", "retrained", "fine_tuned", "zero_shot", "predicted"]
"""Where the weights of an evaluation are from: `inherited` from a supernet; `converted` from a checkpoint; `retrained` from
scratch; `fine_tuned` from a checkpoint's inherited or converted weights, or `zero_shot`, the same before any fine-tuning. A
`predicted` loss has no weights: it is estimated from the losses of other configs."""


Part = Literal["", "validation", "test"]
"""The part of the text that losses are of: `validation`, by which a search chooses, or `test`, on which its front is reported.
Rows of versions that had one evaluation text for both name none."""

PART_WORDS: dict[Part, str] = {"": "evaluation text", "validation": "validation text", "test": "test text"}
"""The parts, for a person."""


@dataclass(frozen=True)
class Losses:
    """The mean loss over evaluation sequences, its perplexity, and the perplexity's standard error over the sequences."""

    loss_nats_per_token: float
    perplexity: float
    perplexity_standard_error: float

    @staticmethod
    def of(data: Mapping[str, Any]) -> Losses:
        """The losses in a row that has more columns."""
        return Losses(**{name: data[name] for name in Losses.__dataclass_fields__})


@dataclass(frozen=True)
class Evaluation:
    """One evaluated config.

    tokens: the tokens its weights were trained on: the supernet's if they are inherited, those of the fine-tuning if fine-tuned.
    number: the number of its trial in the search, -1 if it had none.
    name: the name of its preset or conversion.
    supernet: the sub-supernet whose weights it inherited, or the conversion that made them.
    part: the part of the text that its losses are of.
    validation_perplexity: that on the validation text, where the losses are of the test text.
    windows: the loss of each evaluation window in nats a token, if it was kept; it stands in no row.
    values: of the objectives that are neither in `memory` nor in `losses`, the spread of measured ones, and `score_values`.
    objectives: by which it is compared, perplexity the last.
    run: the search that it is of, where several stand together.
    """

    config: SharingConfig
    memory: Memory
    losses: Losses
    bits_per_byte: float
    weights: Weights
    seed: int
    tokens: int
    seconds: float
    number: int = -1
    name: str = ""
    supernet: str = ""
    part: Part = ""
    validation_perplexity: float | None = None
    windows: tuple[float, ...] = field(default=(), compare=False, repr=False)
    values: Mapping[str, float] = field(default_factory=dict, hash=False)
    objectives: tuple[str, ...] = DEFAULT
    run: str = ""

    def value(self, name: str) -> float:
        if name in self.values:
            return self.values[name]
        return float(getattr(self.losses if name == QUALITY else self.memory, name))

    @property
    def costs(self) -> tuple[float, ...]:
        """What is minimised beside perplexity; what is maximised is negative."""
        return tuple(OBJECTIVES[name].cost(self.value(name)) for name in self.objectives[:-1])

    @property
    def point(self) -> tuple[float, ...]:
        """`(*costs, perplexity)`, by which fronts, knees and picks are chosen: never a perplexity of the test text, if there is
        another."""
        known = self.validation_perplexity
        return *self.costs, self.losses.perplexity if known is None else known

    def at(self, shape: ModelShape, spec: MemorySpec) -> Evaluation:
        """The same with its memory measured elsewhere. Raises UserError if an objective was measured, and not computed."""
        for name in self.objectives:
            if OBJECTIVES[name].measure:
                hint = "search with it as the trial's `memory`"
                raise UserError("was measured where the trial says, and is not known elsewhere", where=name, hint=hint)
        plan, known = self.config.resolve(shape), [name for name in self.values if name in OBJECTIVES]
        values = {name: value for name, value in self.values.items() if name.startswith(TASK)}
        values |= plan_values(shape, plan, spec, known)
        return replace(self, memory=measure_plan(shape, plan, spec), values=values)

    @property
    def label(self) -> str:
        return self.name or label(self.config)

    def to_data(self) -> dict[str, Any]:
        """One flat row: the columns of every table, journal and report."""
        head = ({"run": self.run} if self.run else {}) | {
            "number": self.number,
            "name": self.name,
            **names_of(self.config),
            "weights": self.weights,
        }
        tail = {"seed": self.seed, "tokens": self.tokens, "seconds": self.seconds, "supernet": self.supernet}
        measured = asdict(self.losses) | {"bits_per_byte": self.bits_per_byte}
        measured |= {"part": self.part, "validation_perplexity": self.validation_perplexity}
        return head | self.memory.to_data() | measured | tail | {**self.values} | {"config": self.config.to_data()}

    @staticmethod
    def from_data(shape: ModelShape, data: Mapping[str, Any], objectives: tuple[str, ...] = DEFAULT) -> Evaluation:
        """The inverse of `to_data`, compared by objectives. Raises LookupError, TypeError or ValueError for data that is no
        evaluation's."""
        values = {name: data[name] for name in data if name not in KINDS and is_value(name)}
        found = Evaluation(
            config=SharingConfig.from_data(shape, data["config"]),
            memory=Memory(**{name: data[name] for name in Memory.__dataclass_fields__}),
            losses=Losses.of(data),
            **{
                name: data[name]
                for name in ("bits_per_byte", "weights", "seed", "tokens", "seconds", "number", "name", "supernet")
            },
            **{name: data[name] for name in ADDED if name in data},
            values=values,
            objectives=objectives,
            run=data.get("run", ""),
        )
        added = {name: kind for name, kind in ADDED.items() if name in data}
        require_kinds(data, dict.fromkeys((*values, *objectives), (int, float)) | KINDS | added)
        if (
            found.weights not in get_args(Weights)
            or found.part not in PART_WORDS
            or not all(map(math.isfinite, (*found.point, found.losses.loss_nats_per_token, found.losses.perplexity)))
        ):
            raise ValueError("weights or losses that no evaluation has")
        return found


def is_value(name: str) -> bool:
    """Whether a column is one of `Evaluation.values`."""
    return name.startswith(TASK) or name.removesuffix(SPREAD) in OBJECTIVES


def score_name(task: str, metric: str) -> str:
    """`task.NAME.METRIC`, of what file formats and command lines take."""
    return re.sub(r"[^\w.-]+", "_", f"{TASK}{task}.{metric}").strip("_")


def score_values(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Downstream scores as `Evaluation.values`: `task.NAME.METRIC`, and its standard error where there is one."""
    values: dict[str, float] = {}
    for row in rows:
        name = score_name(row["task"], row["metric"])
        values[name] = float(row["value"])
        if row["standard_error"] is not None:
            values[name + STANDARD_ERROR] = float(row["standard_error"])
    return values


KINDS: dict[str, Any] = {
    **dict.fromkeys(("weights", "name", "supernet"), str),
    **dict.fromkeys(("seed", "tokens", "number", *Memory.__dataclass_fields__), int),
    **dict.fromkeys(("seconds", "bits_per_byte", *Losses.__dataclass_fields__), (int, float)),
}
"""The kinds of the values in an evaluation's row."""

ADDED: dict[str, Any] = {"part": str, "validation_perplexity": (int, float, NoneType)}
"""The same of those that rows of version 0.1 do not have."""


LOGITS = 2**24
"""Logits that are held at once where no gradient is wanted: 64 MiB in float32. One sequence of 1,024 tokens of a vocabulary of
49,152 has three times as many."""

TOKENS = 2048  # tokens that go through a model at once where no gradient is wanted, if sequences are no longer


class NotFinite(ArithmeticError):
    """A loss was NaN or infinite: the config has failed; the search continues."""


def measure_losses(model: Decoder, sequences: Tensor, batch: int = 16, autocast: bool = True) -> Losses:
    """The losses over sequences `(sequences, seq + 1)`; the model is left as it was. Raises NotFinite."""
    return losses_over(losses_by_sequence(model, sequences, batch, autocast))


@torch.no_grad()
def losses_by_sequence(model: Decoder, sequences: Tensor, batch: int = 16, autocast: bool = True) -> Tensor:
    """The mean loss in nats a token of each of `(sequences, seq + 1)`, `batch` or about `TOKENS` tokens at a time;
    `(sequences,)`."""
    batch = min(batch, max(1, TOKENS // (sequences.shape[1] - 1)))
    return torch.cat([sequence_losses(model, rows, autocast) for rows in sequences.split(batch)])


def losses_over(rows: Tensor) -> Losses:
    """The losses of a model whose sequences have the mean losses `(sequences,)`. Raises NotFinite."""
    rows = rows.cpu().double()  # not every GPU has float64
    mean, count = rows.mean().item(), len(rows)
    if not math.isfinite(mean):
        raise NotFinite(f"the loss over {count} evaluation sequences is {mean}")
    perplexity = math.exp(min(mean, 700.0))
    error = perplexity * rows.std().item() / math.sqrt(count) if count > 1 else math.nan
    return Losses(mean, perplexity, error)


def sequence_losses(model: Decoder, rows: Tensor, autocast: bool = True) -> Tensor:
    """The mean loss in nats a token of each row of `(batch, seq + 1)`, in float32; `(batch,)`. Without gradients no more than
    `LOGITS` logits are held at once."""
    rows = rows.to(model.embed_tokens.weight.device)
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=autocast):
        hidden, targets = model.hidden(model.embed(rows[:, :-1])).flatten(0, 1), rows[:, 1:].flatten()
        at_once = len(targets) if torch.is_grad_enabled() else max(1, LOGITS // model.shape.vocab_size)
        pieces = zip(hidden.split(at_once), targets.split(at_once), strict=True)
        losses = [token_losses(model.logits(states), wanted) for states, wanted in pieces]
    return torch.cat(losses).unflatten(0, (len(rows), -1)).mean(1)


# --- cross-entropy

PIECE = {"cpu": 2**18}
LARGE_PIECE = 2**24  # logits in a piece: as many as a core's cache holds, or enough to keep a GPU busy


def token_losses(logits: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy `(…)`, in float32, of logits `(…, vocab)` with token ids `(…)` or probabilities `(…, vocab)`.

    Of the logits, the largest tensor of a training step, no copy in float32 is made: each piece of the vocabulary's logits is
    converted, used and forgotten, on a CPU while it is in its cache. The forward keeps one number a token for the backward pass.
    """
    tokens = logits.shape[:-1]
    flat = target.flatten() if target.shape == tokens else target.flatten(0, -2)
    losses: Tensor = _TokenLosses.apply(logits.flatten(0, -2), flat)
    return losses.view(tokens)


class _TokenLosses(torch.autograd.Function):
    """log Σ exp x - x[t] for ids t, and log Σ exp x - p · x for probabilities p; its gradient is softmax(x) - p."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """`(tokens,)` of `(tokens, vocab)` and `(tokens,)` or `(tokens, vocab)`."""
        rows, parts = _rows(logits), list[tuple[Tensor, Tensor]]()
        for x, t in zip(logits.split(rows), target.split(rows), strict=True):
            exact = x.float()
            given = exact.gather(1, t[:, None])[:, 0] if t.ndim == 1 else (exact * t).sum(-1)
            parts.append((exact.logsumexp(-1), given))
        norms, found = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(logits, target, norms)
        return norms - found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """The gradient of the logits, in their dtype."""
        logits, target, norms = ctx.saved_tensors
        rows, grad = _rows(logits), torch.empty_like(logits)
        pieces = (tensor.split(rows) for tensor in (logits, target, norms, upstream, grad))
        for x, t, norm, up, out in zip(*pieces, strict=True):
            p = (x.float() - norm[:, None]).exp_()
            p = p.scatter_add_(1, t[:, None], p.new_full((len(p), 1), -1.0)) if t.ndim == 1 else p.sub_(t)
            out.copy_(p.mul_(up[:, None]))
        return grad, None


def _rows(logits: Tensor) -> int:
    return max(PIECE.get(logits.device.type, LARGE_PIECE) // logits.shape[1], 1)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
