"""What can be made of a finished run: an exported model, a report.

Owns what a run's folder tells an export and a report of where they come from. How they are written is `nas.export`'s and
`nas.report`'s.
"""

from __future__ import annotations

from pathlib import Path

from ..evaluate import Evaluation
from ..export import Card, export
from .run import Run
from .work import read_model


def export_run(run: Run, pick: str, directory: Path, kind: str = "hf", overwrite: bool = False) -> Evaluation:
    """Write the picked model of a run's front to a folder; returns its evaluation. Raises UserError."""
    trial, evaluation = run.trial(), run.front().pick(pick)
    model = read_model(trial.space.shape, evaluation.config, run.weights(evaluation))
    made = run.read_json("run.json")
    card = Card(
        title=f"{run.name}: {evaluation.label}",
        found=f"Found by the search `{run.name}` (trial `{made['trial']}`, seed {made['seed']}) as its pick `{pick}`.",
        command=f"{made['command']}\nnas export {run.name} --pick {pick} --to DIR",
        data=made["text"],
        evaluation=evaluation,
        memory=trial.file.memory,
    )
    tokenizer = (run.folder / "tokenizer.json").read_text(encoding="utf-8")
    export(model, evaluation.config, tokenizer, directory, card, kind, overwrite)
    return evaluation
