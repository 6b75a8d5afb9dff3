"""Several runs, one front: which runs can be compared, and what each of them found of the front of all.

Owns `Fronts`. Nothing is trained or measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import require_writable
from ..pareto import Point, hypervolume, reference_point
from ..report.tables import Row
from ..report.write import Report, write_report
from ..sharing.memory import MemorySpec
from .front import Front
from .run import TEST_TEXT, Run


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
        names = [run.name for run in once.values()]
        found = {run.name if names.count(run.name) == 1 else str(run.folder): run for run in once.values()}
        if len(once) < len(runs):
            twice = next(run for n, run in enumerate(runs) if run.folder.resolve() in {r.folder.resolve() for r in runs[:n]})
            raise UserError("the run is named twice", where=twice.name, hint="name each run once")
        first, *others = found
        there = {name: front_at(run, elsewhere or {}) for name, run in found.items()}
        facts = {name: _facts(run, *there[name]) for name, run in found.items()}
        for other in others:
            said = [f"{what} ({mine[1]}, not {facts[first][what][1]})" for what, mine in _other(facts[other], facts[first])]
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
        """Of a run's models, or of all."""
        return hypervolume([m.point for m in self.front.configs if name in (None, m.first.run)], self.reference)

    def rows(self) -> list[dict[str, Any]]:
        """A row a run, for machines."""
        found, whole = [], self.hypervolume()
        for name, run in self.runs.items():
            trial, models = run.trial().file, self.front.panel.runs[name]
            found.append(
                {
                    "run": name,
                    "folder": str(run.folder),
                    "sampler": trial.search.sampler,
                    "seed": trial.seed,
                    "evaluations": trial.search.evaluations,
                    "models": len(models),
                    "on_front": sum(map(self.front.panel.is_member, models)),
                    "tokens": max(e.tokens for m in models for e in m.evaluations),
                    "perplexity": min(m.perplexity for m in models),
                    "hypervolume": self.hypervolume(name),
                    "hypervolume_share": self.hypervolume(name) / whole if whole else 0.0,
                }
            )
        return found

    def table(self) -> list[Row]:
        """The same for people."""
        return [
            {
                "run": row["run"],
                "sampler": row["sampler"],
                "seed": str(row["seed"]),
                "evaluations": f"{row['evaluations']:,}",
                "tokens a model": f"{row['tokens']:,}",
                "models": str(row["models"]),
                "on the front of all": str(row["on_front"]),
                "lowest perplexity": f"{row['perplexity']:.4g}",
                "hypervolume": f"{row['hypervolume_share']:.1%}",
            }
            for row in self.rows()
        ]

    def to_data(self) -> dict[str, Any]:
        """Plain data."""
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
        "objectives": (trial.objectives, ", ".join(trial.objectives)),
        "memory": (memory, f"{memory.words}, {memory.dtype}"),
        "weights": (front.weights, front.kind),
    }


def _other(mine: _Facts, theirs: _Facts) -> list[tuple[str, tuple[Any, str]]]:
    return [(what, found) for what, found in mine.items() if found[0] != theirs[what][0]]
