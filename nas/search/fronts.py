"""What finished runs say beyond their own fronts: the front of several, and the best config within a limit of one.

Owns `Fronts`, which runs can be compared and what each found of the front of all; and `Answer`, for a limit that the run was not
searched for: the surrogate is fitted to the run's evaluations, and solved within the limit. Nothing is trained or measured.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, did_you_mean
from ..files import require_writable
from ..pareto import Point, hypervolume, reference_point
from ..report.tables import Row
from ..report.write import Report, write_report
from ..sharing.label import names_of
from ..sharing.memory import LIMITS, MemorySpec
from ..sharing.objectives import DEFAULT, OBJECTIVES, QUALITY, config_costs, parse_value, plan_values
from ..sharing.sharing_config import SharingConfig
from .front import Front
from .run import TEST_TEXT, Run
from .surrogate import EPSILON, Known, Solver
from .trial import Trial

COLUMNS = {
    **{"run": "{run}", "sampler": "{sampler}", "seed": "{seed}", "evaluations": "{evaluations:,}"},
    **{"tokens a model": "{tokens:,}", "models": "{models}", "on the front of all": "{on_front}"},
    **{"lowest perplexity": "{perplexity:.4g}", "hypervolume": "{hypervolume_share:.1%}"},
}
"""Columns for people, and how each is made of a row for machines."""


@dataclass(frozen=True)
class Fronts:
    """Finished runs by their names, the front of all their models, each of which says its run, and where memory is measured."""

    runs: dict[str, Run]
    front: Front
    memory: MemorySpec

    @staticmethod
    def of(runs: Sequence[Run], elsewhere: Mapping[str, Any] | None = None) -> Fronts:
        """Of two runs or more, with memory where they have it, or `elsewhere` (`front_at`). Raises UserError unless they are
        different, and comparable: on the same test windows, by the same objectives at the same memory, with weights of one kind.
        """
        once = {run.folder.resolve(): run for run in runs}
        found = dict(zip(_told_apart([*once]), once.values(), strict=True))
        if len(once) < len(runs):
            twice = next(run for n, run in enumerate(runs) if run.folder.resolve() in {r.folder.resolve() for r in runs[:n]})
            raise UserError("the run is named twice", where=twice.name, hint="name each run once")
        first, *others = found
        there = {name: front_at(run, elsewhere or {}) for name, run in found.items()}
        facts = {name: _facts(run, *there[name]) for name, run in found.items()}
        for other in others:
            both = ((what, mine, facts[first][what]) for what, mine in facts[other].items())
            said = [f"{what} ({mine[1]}, not {its[1]})" for what, mine, its in both if mine[0] != its[0]]
            if said:
                hint = "compare runs that share these, or look at each alone"
                raise UserError(f"differs from {first} in {'; '.join(said)}", where=other, hint=hint)
        models = (replace(e, run=name) for name, (front, _) in there.items() for e in front.evaluations)
        return Fronts(found, Front(tuple(models)), there[first][1])

    @cached_property
    def reference(self) -> Point:
        """What all hypervolumes are measured against."""
        return reference_point([m.point for m in self.front.configs])

    def hypervolume(self, name: str | None = None) -> float:
        return hypervolume([m.point for m in self.front.configs if name in (None, m.first.run)], self.reference)

    def rows(self) -> list[dict[str, Any]]:
        found, whole = [], self.hypervolume()
        for name, run in self.runs.items():
            trial, models, own = run.trial().file, self.front.panel.runs[name], self.hypervolume(name)
            row = {"run": name, "folder": str(run.folder), "sampler": trial.search.sampler, "seed": trial.seed}
            row |= {"evaluations": trial.search.evaluations, "models": len(models)}
            row |= {"on_front": sum(map(self.front.panel.is_member, models))}
            row |= {"tokens": max(e.tokens for m in models for e in m.evaluations)}
            row |= {"perplexity": min(m.perplexity for m in models)}
            found.append(row | {"hypervolume": own, "hypervolume_share": own / whole if whole else 0.0})
        return found

    def table(self) -> list[Row]:
        return [{column: form.format(**row) for column, form in COLUMNS.items()} for row in self.rows()]

    def to_data(self) -> dict[str, Any]:
        head = {"runs": self.rows(), "reference_point": list(self.reference), "hypervolume": self.hypervolume()}
        return head | {"knee_run": self.front.knee.first.run} | self.front.to_data()

    def write_report(self, directory: Path) -> Path:
        """Write a page with all fronts, their figure and table into a folder named by the runs; returns the page."""
        names = [run.name for run in self.runs.values()]
        folder = directory / ("-and-".join(names) if len(names) < 4 else f"{names[0]}-and-{len(names) - 1}-more")
        require_writable(folder)
        run = next(iter(self.runs.values()))
        made = {name: one.provenance() for name, one in self.runs.items()}
        commands = [one.command() for one in self.runs.values()]
        return write_report(
            folder,
            Report(
                title=f"{len(names)} searches, one front",
                command="\n".join((*commands, f"nas report {' '.join(one.argument for one in self.runs.values())}")),
                shape=run.trial().space.shape,
                spec=self.memory,
                evaluations=self.front.evaluations,
                provenance={n: {k: v for k, v in one.items() if k not in ("command", "trial")} for n, one in made.items()},
                runs=self.table(),
            ),
        )


def front_at(run: Run, given: Mapping[str, Any]) -> tuple[Front, MemorySpec]:
    """A finished run's front with its memory measured as the trial says, but for the context, batch and dtype that are given; and
    where that is. Raises UserError for a context that the model cannot have, and for objectives that were measured."""
    trial = run.trial()
    shape, spec = trial.space.shape, replace(trial.file.memory, **given)
    if spec.context > shape.max_position_embeddings:
        message = f"{spec.context} tokens are more than the model's max_position_embeddings={shape.max_position_embeddings}"
        raise UserError(message, where="--context", hint=f"use {shape.max_position_embeddings} or less")
    return (run.front().at(shape, spec), spec) if given else (run.front(), spec)


def _told_apart(folders: Sequence[Path]) -> Iterator[str]:
    """The name of each folder, in those of one name from where they part: pages show it, so that it is no whole path."""
    for folder in folders:
        same = [other for other in folders if other.name == folder.name]
        yield str(folder.relative_to(os.path.commonpath(same))) if len(same) > 1 else folder.name


_Facts = dict[str, tuple[Any, str]]


def _facts(run: Run, front: Front, memory: MemorySpec) -> _Facts:
    """What must be the same in two runs, each with what a person reads of it."""
    trial = run.trial()
    file = trial.file
    digest = hashlib.sha256()
    for name in (TEST_TEXT, "tokenizer.json"):
        digest.update((run.folder / name).read_bytes() if run.has(name) else b"")
    made = run.provenance()
    return {
        "test text or tokenizer": (digest.hexdigest(), f"{made['text']}, {made.get('text_tokens', {}).get('test', 0):,} tokens"),
        "test windows": (
            (file.final.seq, file.evaluate.final_windows),
            f"{file.evaluate.final_windows} of {file.final.seq} tokens",
        ),
        "objectives": (trial.front_objectives, ", ".join(trial.front_objectives)),
        "memory": (memory, f"{memory.words}, {memory.dtype}"),
        "weights": (front.weights, front.kind),
    }


PROPOSALS = 12  # the search within the limit is that for so many proposals


@dataclass(frozen=True)
class Answer:
    """A config within the limit, the values of `LIMITS` and of what was limited, and its loss in the search in nats a token: as
    it was evaluated (`error` 0), or as expected, with a standard error."""

    config: SharingConfig
    values: Mapping[str, float]
    loss_nats_per_token: float
    error: float

    @property
    def evaluated(self) -> bool:
        return self.error == 0

    def to_data(self) -> dict[str, Any]:
        perplexity = math.exp(min(self.loss_nats_per_token, 700.0))
        loss = {"loss_nats_per_token": self.loss_nats_per_token, "error": self.error, "perplexity": perplexity}
        head = {**names_of(self.config), "evaluated": self.evaluated}
        return {**head, **loss, **self.values, "config": self.config.to_data()}


def parse_limit(text: str) -> tuple[str, float]:
    """A limit such as `memory_bytes=120MiB`. Raises UserError."""
    name, _, value = text.partition("=")
    known = [row.name for row in OBJECTIVES.values() if row.in_closed_form]
    if name not in known:
        raise UserError(f"unknown limit {name!r}", where=f"--limit {text}", hint=did_you_mean(name, known))
    return name, parse_value(name, value, f"--limit {text}")


def best_within(run: Run, limits: Mapping[str, float], seed: int = 0) -> Answer:
    """The config of the least expected loss within limits, by what a run's search evaluated. Raises UserError if none is."""
    trial, known = run.trial(), known_of(run)
    space = replace(trial.space, limits=dict(limits))
    space.require_reachable(space.size(trial.file.memory))
    solver = Solver(space, trial.file.memory, known, random.Random(seed), _objectives(trial))
    found = [*(one for one in known if space.meets_limits(one.config, trial.file.memory)), *solver.breed(PROPOSALS)]
    mean, deviation = solver.surrogate([one.decided for one in found])
    evaluated = {one.config for one in known}
    increase = np.exp(mean) - EPSILON
    errors = np.where([one.config in evaluated for one in found], 0.0, np.exp(mean) * np.expm1(deviation))
    losses = np.where(errors == 0, [one.loss for one in found], solver.surrogate.base + increase)
    best = int(np.argmin(losses + errors))
    config, names = found[best].config, dict.fromkeys((*LIMITS, *limits))
    values = plan_values(space.shape, config.resolve(space.shape), trial.file.memory, names)
    return Answer(config, values, float(losses[best]), float(errors[best]))


def known_of(run: Run) -> list[Known]:
    """The evaluations of a run's search."""
    trial = run.trial()
    space, memory, names = trial.space, trial.file.memory, _objectives(trial)[:-1]
    least, found = space.least_sharing(), []
    for e in run.searched():
        decided = {name: option for name, option in (space.encode(e.config) or {}).items() if option != least[name]}
        costs = config_costs(space.shape, e.config, memory, names)
        found.append(Known(e.config, decided, costs, e.losses.loss_nats_per_token))
    return found


def _objectives(trial: Trial) -> tuple[str, ...]:
    """The trial's objectives that a config without measurement has."""
    names = tuple(name for name in trial.objectives[:-1] if OBJECTIVES[name].in_closed_form)
    return *(names or DEFAULT[:1]), QUALITY
