"""The ground truth: every config trained alone, seed after seed, and evaluated as it goes.

Owns the trainings and `truth.csv`, which is both the result and what a truth goes on from: a training whose rows are there is not
done again. Trainings of one seed see the same batches and begin with the same weights, as far as they have the same.

    FOLDER/truth.csv       a row for each text, config, seed and point of evaluation
    FOLDER/configs.json    what each config is, by its hash
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data import eval_windows
from ..model.decoder import Decoder, init_weights
from ..search.jobs import Array, Reports, device, token_batches
from ..search.progress import Progress, StepCount
from ..sharing.memory import measure
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import losses_by_window, losses_over
from ..training.loop import Trainer, TrainSpec, WeightAverage, plain_backward
from ..workers import RESULT, Failure, Job, train_all
from .rows import read_rows, write_rows
from .spec import TruthPlan

if TYPE_CHECKING:
    from ..workers import Session

TRUTH, CONFIGS = "truth.csv", "configs.json"


@dataclass(frozen=True)
class TruthRow:
    """One config at one point of one training: `loss_nats_per_token` is of the averaged weights, over fixed windows."""

    text: str
    hash: str
    name: str
    memory_bytes: int
    weight_bytes: int
    kv_cache_bytes: int
    flops_per_token: int
    seed: int
    tokens: int
    loss_nats_per_token: float

    @property
    def training(self) -> tuple[str, str, int]:
        """Which training it is of."""
        return self.text, self.hash, self.seed


def read_truth(path: Path) -> list[TruthRow]:
    """The rows of a `truth.csv`; none if there is none. Raises UserError for another table."""
    return read_rows(path, TruthRow, "make a table of a ground truth with `nas truth`")


def write_truth(path: Path, rows: Sequence[TruthRow]) -> None:
    """Write the table, whole or not at all, in an order that does not depend on who finished first."""
    ordered = sorted(rows, key=lambda row: (row.text, row.memory_bytes, row.hash, row.seed, row.tokens))
    write_rows(path, ordered, TruthRow)


@dataclass(frozen=True)
class TruthJob:
    """Train one config alone, from scratch, and measure it after each of `points` steps."""

    shape: ModelShape
    config: SharingConfig
    spec: TrainSpec
    average: float
    points: tuple[int, ...]
    seed: int
    tokens: Array
    windows: Array


def train_known(job: TruthJob, session: Session) -> dict[str, Any]:
    """Do a `TruthJob`: the loss at each point, by the tokens trained on so far. A training that was stopped begins again."""
    plan = job.config.resolve(job.shape)
    model = init_weights(Decoder(job.shape, plan), torch.Generator().manual_seed(job.seed)).to(device())
    twin = Decoder(job.shape, plan).to(device())
    fit = Trainer(model, job.spec, torch.Generator().manual_seed(job.seed))
    averages = WeightAverage(model, job.average, job.points)
    windows = torch.from_numpy(np.array(job.windows))
    reports, losses = Reports(session, job.spec.steps), {}
    for step, loss in fit.run(token_batches(job.tokens, job.spec, fit.generator), plain_backward(model, job.spec)):
        mean = averages.step(step)
        if mean is not None:
            twin.load_state_dict(mean)
            rows = losses_by_window(twin.eval(), windows, autocast=job.spec.autocast)
            losses[str(step * job.spec.batch * job.spec.seq)] = losses_over(rows).loss_nats_per_token
        reports.step(step, loss)
    return {"step": fit.step, "steps": fit.step, "losses": losses}


@dataclass(frozen=True)
class Entry:
    """One training of a truth."""

    text: str
    config: SharingConfig
    seed: int

    @property
    def key(self) -> str:
        """Its folder's name."""
        return f"{self.text}-{self.config.hash}-{self.seed}"

    @property
    def training(self) -> tuple[str, str, int]:
        """As `TruthRow.training`."""
        return self.text, self.config.hash, self.seed


BLOCK = 8
"""Configs whose seeds are trained together: so that what is known first is known well."""


def entries(plan: TruthPlan) -> Iterator[Entry]:
    """Every training, a block of configs after the other, in a block the texts in turns and seed after seed."""
    configs = list(plan.configs)
    for first in range(0, len(configs), BLOCK):
        for text in plan.corpora:
            for seed in range(plan.file.seed, plan.file.seed + plan.file.seeds):
                for config in configs[first : first + BLOCK]:
                    yield Entry(text, config, seed)


def make_truth(plan: TruthPlan, to: Path, work: Path, progress: Progress) -> list[TruthRow]:
    """Carry a truth through from where it stands, writing each result into `to` as it comes; `work` holds what is under way.

    Returns all rows. Trainings that failed are said, and done again next time.
    """
    to.mkdir(parents=True, exist_ok=True)
    (to / CONFIGS).write_text(json.dumps({c.hash: c.to_data() for c in plan.configs}, indent=1) + "\n", encoding="utf-8")
    rows = read_truth(to / TRUTH)
    done = {row.training for row in rows}
    left = {entry.key: entry for entry in entries(plan) if entry.training not in done}
    jobs, steps = _jobs(plan, left), dict.fromkeys(left, plan.file.train.steps)
    with progress.stage(f"train alone ({len(jobs)} of {len(list(entries(plan)))})", sum(steps.values()), "steps") as stage:
        count = StepCount(stage, steps, [key for key in left if (work / key / RESULT).exists()])

        def tell(key: str, latest: dict[str, Any]) -> None:
            count(key, latest)
            if "losses" in latest:
                rows.extend(_rows(plan, left[key], latest["losses"]))
                write_truth(to / TRUTH, rows)

        results = train_all(jobs, train_known, work, plan.file.run, on_progress=tell)
    for key, result in results.items():
        if isinstance(result, Failure):
            progress.say(f"{key} failed: {result.reason}")
        elif left[key].training not in {row.training for row in rows}:  # it was done, and its rows were not written
            rows += _rows(plan, left[key], result["losses"])
    write_truth(to / TRUTH, rows)
    return rows


def _jobs(plan: TruthPlan, left: Mapping[str, Entry]) -> list[Job]:
    """A text's tokens are one array object, so that they travel to the workers once, and not once a job."""
    file = plan.file
    given = {
        text: (corpus.train.numpy(), eval_windows(corpus.eval, file.train.seq, file.windows).numpy())
        for text, corpus in plan.corpora.items()
    }
    return [
        Job(key, TruthJob(plan.space.shape, e.config, file.train, file.average, tuple(file.steps), e.seed, *given[e.text]))
        for key, e in left.items()
    ]


def _rows(plan: TruthPlan, entry: Entry, losses: Mapping[str, float]) -> Iterator[TruthRow]:
    memory = measure(plan.space.shape, entry.config, plan.file.memory)
    for tokens, loss in losses.items():
        yield TruthRow(
            text=entry.text,
            hash=entry.config.hash,
            name=plan.configs[entry.config],
            memory_bytes=memory.memory_bytes,
            weight_bytes=memory.weight_bytes,
            kv_cache_bytes=memory.kv_cache_bytes,
            flops_per_token=memory.flops_per_token,
            seed=entry.seed,
            tokens=int(tokens),
            loss_nats_per_token=round(loss, 6),
        )
