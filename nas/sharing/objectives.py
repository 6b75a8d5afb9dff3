"""What a search minimises or maximises, and what can be limited.

Owns `OBJECTIVES`: a new objective is a row there. How a model at work is timed is `nas.training.measured`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import format_bytes, format_flops, parse_bytes
from ..errors import UserError, did_you_mean, shown
from .memory import MemorySpec, measure_plan
from .plan import Plan
from .shape import ModelShape
from .sharing_config import SharingConfig

MIB = 2**20
QUALITY = "perplexity"  # the objective that every search has: only training tells it
DEFAULT = ("memory_bytes", QUALITY)  # the objectives of a trial that names none


SPREAD = "_spread"  # the end of the name of a measured value's spread: the distance between the quartiles of its samples

TASK, STANDARD_ERROR = "task.", "_standard_error"
"""How the name of a downstream task's score begins, and how that of its standard error ends."""

LOWER_IS_BETTER = re.compile(r"perplexity|bits_per_byte|brier_score|\bter\b")
"""Metrics of lm-eval that are minimised."""


@dataclass(frozen=True)
class Objective:
    """A row of `OBJECTIVES`.

    `words` names it in tables; an axis is in `unit`, of which one is `per`, and `show` writes a value for a person. In closed
    form it is computed by `of_plan`, or is a field of `Memory` where that is None. With `measure` it is the median of several
    samples of a model at work (`nas.training.measured.ModelAtWork`).
    """

    name: str
    words: str
    unit: str = "MiB"
    per: float = MIB
    show: Callable[[float], str] = format_bytes
    of_plan: Callable[[ModelShape, Plan, MemorySpec], float] | None = None
    measure: Callable[[Any], float] | None = None
    maximize: bool = False

    @property
    def in_closed_form(self) -> bool:
        return self.measure is None and self.name != QUALITY and not self.name.startswith(TASK)

    def cost(self, value: float) -> float:
        """What is minimised."""
        return -float(value) if self.maximize else float(value)

    def excess(self, value: float, limit: float) -> float:
        """How far a value is beyond a limit, as a part of it; 0 within. The limit is the least of what is maximised."""
        return max(limit / value - 1 if self.maximize else value / limit - 1, 0.0)

    @property
    def axis(self) -> str:
        return f"{self.words}, {self.unit}" if self.unit else self.words


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _rate(value: float) -> str:
    return f"{value:,.1f}/s"


AT = "_at_"  # `memory_bytes_at_32768x8` is memory_bytes with 32,768 cached tokens of each of 8 sequences


class _Rows(dict[str, Objective]):
    """Rows by name, with those that follow from the name: at another context and batch in the same dtype, and a task's score."""

    def __missing__(self, name: str) -> Objective:
        if name.startswith(TASK):
            words = name.removeprefix(TASK).replace(".", " ")
            return Objective(name, words, "", 1, lambda value: f"{value:.3f}", maximize=not LOWER_IS_BETTER.search(name))
        base, _, at = name.rpartition(AT)
        found = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", at)
        if not found or not (row := self.get(base)) or not row.in_closed_form:
            raise KeyError(name)
        there = MemorySpec(int(found[1]), int(found[2]))

        def value(shape: ModelShape, plan: Plan, spec: MemorySpec) -> float:
            return plan_values(shape, plan, replace(there, dtype=spec.dtype), [base])[base]

        return replace(row, name=name, words=f"{row.words} at {there.words}", of_plan=value)

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and bool(self[name])
        except KeyError:
            return False


OBJECTIVES: dict[str, Objective] = _Rows(
    (row.name, row)
    for row in (
        Objective("weight_bytes", "weights"),
        Objective("kv_cache_bytes", "KV cache"),
        Objective("kv_bytes_per_token", "KV cache of a token", "KiB", 2**10),
        Objective("kv_read_bytes_per_token", "cache read for a token"),
        Objective("memory_bytes", "memory"),
        Objective("flops_per_token", "operations for a token", "MFLOP", 1e6, format_flops),
        Objective("unique_params", "parameters", "millions", 1e6, _count),
        Objective(QUALITY, "perplexity", "", 1, lambda value: f"{value:.4g}"),
        Objective(
            "decode_tokens_per_second",
            "decoding speed",
            "tokens/s",
            1,
            _rate,
            measure=lambda work: work.spec.batch / work.decode_seconds(),
            maximize=True,
        ),
        Objective(
            "prefill_tokens_per_second",
            "prefill speed",
            "tokens/s",
            1,
            _rate,
            measure=lambda work: work.spec.batch * work.spec.context / work.prefill_seconds(),
            maximize=True,
        ),
        Objective("peak_memory_bytes", "peak memory", measure=lambda work: work.peak_bytes()),
    )
)
"""The objectives by name; names carry the unit of their values."""


def require_objectives(names: Sequence[str]) -> None:
    """Raise UserError unless names are two or three objectives that every config has, perplexity among them."""
    for name in names:
        if name.startswith(TASK):
            said = f"a score is known of the last models alone: {shown(name)}"
            raise UserError(said, where="objectives", hint="give it as `final.objective`")
        if name not in OBJECTIVES:
            raise UserError(f"unknown objective {shown(repr(name))}", where="objectives", hint=did_you_mean(name, OBJECTIVES))
    if len({*names}) != len(names) or len(names) not in (2, 3) or QUALITY not in names:
        said = f"[{', '.join(names)}] are not two or three objectives with {QUALITY} among them"
        raise UserError(said, where="objectives", hint=f"such as [{', '.join(DEFAULT)}]")


def parse_limits(given: Mapping[str, int | str], where: Callable[[str], str]) -> dict[str, float]:
    """Limits by the names of objectives; `where` says where a name stands. Raises UserError."""
    for name in given:
        if name not in OBJECTIVES or name == QUALITY or name.startswith(TASK):
            raise UserError("unknown limit", where=where(name), hint=did_you_mean(name, [n for n in OBJECTIVES if n != QUALITY]))
    return {name: parse_value(name, value, where(name)) for name, value in given.items()}


def parse_value(name: str, given: int | str, where: str) -> float:
    """A value of an objective: bytes also as `300MiB`. Raises UserError."""
    if OBJECTIVES[name].show is format_bytes:
        return parse_bytes(given, where)
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{shown(repr(given))} is no number above 0", where=where, hint="write it as 50")
    return value


def said_limit(name: str, limit: float) -> str:
    """A limit for a person."""
    return f"{name} {'≥' if OBJECTIVES[name].maximize else '≤'} {limit:,.15g}"


def tighter(name: str, one: float, other: float) -> float:
    """The tighter of two limits."""
    return max(one, other) if OBJECTIVES[name].maximize else min(one, other)


def plan_values(shape: ModelShape, plan: Plan, spec: MemorySpec, names: Collection[str]) -> dict[str, float]:
    """The values of those of the named objectives that are in closed form."""
    rows = [row for row in map(OBJECTIVES.__getitem__, names) if row.in_closed_form]
    memory = measure_plan(shape, plan, spec) if rows else None
    return {row.name: row.of_plan(shape, plan, spec) if row.of_plan else getattr(memory, row.name) for row in rows}


def config_costs(shape: ModelShape, config: SharingConfig, spec: MemorySpec, names: Sequence[str]) -> tuple[float, ...]:
    """What is minimised by objectives in closed form; what is maximised is negative."""
    values = plan_values(shape, config.resolve(shape), spec, names)
    return tuple(OBJECTIVES[name].cost(values[name]) for name in names)
