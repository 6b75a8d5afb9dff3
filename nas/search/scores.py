"""Scores of the front's models on downstream tasks: the trial's `final.tasks`, reported beside perplexity.

They choose nothing: a search compares thousands of configs on inherited weights, and has a score of none but the last models.
Owns `final/HASH-SEED/tasks.json` in the run's folder. How a task is run is `nas.export.tasks`'s.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..config import reading
from ..export.tasks import Score, end_of_text, task_scores
from ..pretrained import FolderMetadata
from ..training.device import find_device
from ..training.evaluation import Evaluation, score_values
from .context import Context
from .front import Front
from .jobs import read_model
from .run import DAMAGED


def score_front(ctx: Context, front: Front) -> Front:
    """The front with the scores of its models, one after the other in this process; what was scored before is not run again.

    Raises UserError for a task that cannot be run.
    """
    files = ctx.trial.tasks
    if not files:
        return front
    found = []
    with ctx.progress.stage("tasks", len(front.evaluations), "models") as stage:
        for done, e in enumerate(front.evaluations, 1):
            path = ctx.run.weights(e).parent / "tasks.json"
            if not path.exists():
                ctx.run.write_json(str(path.relative_to(ctx.run.folder)), [score.to_data() for score in _score(ctx, e, files)])
            with reading(path, DAMAGED):
                rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
                found.append(replace(e, values={**e.values, **score_values(rows)}))
            stage.update(done)
    return Front(tuple(found))


def _score(ctx: Context, e: Evaluation, files: list[Path]) -> list[Score]:
    model = read_model(ctx.trial.space.shape, e.config, ctx.run.weights(e)).float().to(find_device())
    metadata = ctx.run.metadata() or FolderMetadata()
    return task_scores(model, Tokenizer.from_str(ctx.corpus.tokenizer_json), end_of_text(metadata), files)
