"""What can be made of a finished run: an exported model, a report.

Owns what a run's folder tells an export and a report of where they come from. How they are written is `nas.export`'s and
`nas.report`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..export import ModelCard, Provenance, export
from ..pareto import hypervolume
from ..pretrained import FolderMetadata
from ..report.write import Report, write_report
from ..tracking import Link
from ..training.evaluation import Evaluation
from .final import reference
from .jobs import read_model
from .run import EXTRAS, Run
from .trial import Trial


def export_run(run: Run, pick: str, directory: Path, kind: str = "hf", overwrite: bool = False) -> Evaluation:
    """Write the picked model of a run's front to a folder; returns its evaluation. Raises UserError."""
    trial, evaluation = run.trial(), run.front().pick(pick)
    model = read_model(trial.space.shape, evaluation.config, run.weights(evaluation))
    made = run.read_json("run.json")
    card = ModelCard(
        title=f"{run.name}: {evaluation.label}",
        found=f"Found by the search `{run.name}` (trial `{made['trial']}`, seed {made['seed']}) as its pick `{pick}`."
        + _begun(made),
        command=f"{made['command']}\nnas export {run.name} --pick {pick} --to DIR",
        data=made["text"],
        evaluation=evaluation,
        memory=trial.file.memory,
        provenance=_provenance(run, trial, evaluation),
        figure=run.folder / "front.png" if run.has("front.png") else None,
    )
    tokenizer = (run.folder / "tokenizer.json").read_text(encoding="utf-8")
    extras = FolderMetadata(**run.read_json(EXTRAS)) if run.has(EXTRAS) else None
    export(model, evaluation.config, tokenizer, directory, card, kind, overwrite, extras)
    return evaluation


def _provenance(run: Run, trial: Trial, evaluation: Evaluation) -> Provenance:
    """Where the run is, in MLflow too if it was tracked."""
    link = Link.load(run.folder)
    if link is None:
        return Provenance(run.name, trial.file.name)
    experiment, child = trial.file.tracking.experiment or trial.file.name, link.model(evaluation.config.hash)
    return Provenance(run.name, trial.file.name, experiment, link.run_id, link.uri, child or "")


def _begun(made: Mapping[str, Any]) -> str:
    """The checkpoint that a run is from, in a sentence."""
    if "from" not in made:
        return ""
    return f" Its weights were begun as those of `{Path(made['from']).name}`, whose perplexity was {made['from_perplexity']:.4g}."


def write_run_report(run: Run, directory: Path) -> Path:
    """Write a finished run's page, figures and table into a folder of its name; returns the page."""
    trial, front, made = run.trial(), run.front(), run.read_json("run.json")
    searched = run.searched()
    splits = sorted(run.folder.glob("split-*.json"))
    return write_report(
        directory / run.name,
        Report(
            title=f"{run.name}: the front of a search",
            command=f"{made['command']}\nnas report {run.name}",
            shape=trial.space.shape,
            spec=trial.file.memory,
            evaluations=[*front.evaluations, *searched, *run.converted()],
            provenance={key: value for key, value in made.items() if key not in ("command", "versions")} | made["versions"],
            tree=run.read_json(splits[-1].name)["tree"] if splits else None,
            progress={run.name: hypervolumes(searched)},
        ),
    )


def hypervolumes(searched: Sequence[Evaluation]) -> list[float]:
    """The hypervolume after each evaluation of a search, against one reference."""
    if not searched:
        return []
    corner = reference(searched)
    return [hypervolume([e.point for e in searched[: n + 1]], corner) for n in range(len(searched))]
