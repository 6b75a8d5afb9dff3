"""Compare a finished search from a checkpoint with whittle's: `python -m reports.whittle RUN WORK`, before and after `peer.py`.

Before, it writes what that program needs of the search RUN to WORK/texts.npz. After it, it fine-tunes the folders in WORK/found
as RUN did its candidates, which goes on if it was stopped, and writes README.md from `findings.md`, and the tables.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from nas.cli.show import Terminal
from nas.config import format_bytes
from nas.data import Corpus, eval_sequences, train_batches
from nas.export import load_export, read_config
from nas.model.decoder import Decoder
from nas.paired import difference
from nas.pareto import hypervolume, reference_point
from nas.report.tables import Row, markdown_table
from nas.search.context import test_windows
from nas.search.jobs import StandaloneTraining, train_standalone
from nas.search.launch import check
from nas.search.run import Run
from nas.search.trial import Trial
from nas.search.trial_file import train_spec
from nas.sharing.memory import Memory, measure
from nas.sharing.sharing_config import SharingConfig
from nas.workers import RESULT, RunSpec

from ..grid import train_left

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class FolderWeights:
    """The weights in a folder, to train from."""

    folder: Path

    def __call__(self, config: SharingConfig) -> Decoder:
        return load_export(self.folder).model.float()


def write_texts(trial: Trial, corpus: Corpus, path: Path) -> None:
    """The windows of the search's evaluations, and the batches of its fine-tuning."""
    spec, generator = trial.file.final, torch.Generator().manual_seed(trial.file.seed)
    windows = eval_sequences(corpus.validation, spec.seq, trial.file.evaluate.windows, corpus.bos)
    batches = train_batches(corpus.train, spec.batch, spec.seq, generator, corpus.bos)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, windows=windows.numpy(), batches=np.stack([batch.numpy() for batch in islice(batches, spec.steps)]))


def heal(trial: Trial, corpus: Corpus, work: Path, only: str) -> None:
    """Fine-tune the folders in WORK/found that match a pattern as the search did its candidates."""
    spec, seed, test = train_spec(trial.file.final), trial.file.seed, test_windows(trial, corpus).numpy()
    windows = eval_sequences(corpus.validation, spec.seq, trial.file.evaluate.final_windows, corpus.bos).numpy()
    jobs, rest = dict[tuple[Hashable, ...], StandaloneTraining](), (False, corpus.bos, torch.bfloat16)
    tokens = corpus.train.numpy()
    for folder in sorted((work / "found").glob(only)):
        what = (*read_config(folder), spec, seed, tokens, windows, FolderWeights(folder), trial.base_model, *rest)
        jobs[(folder.name,)] = StandaloneTraining(*what, test_windows=test)
    if jobs:
        train_left("fine-tune", jobs, train_standalone, spec.steps, work / "healed", RunSpec(workers=0), Terminal())


def table(run: Run, work: Path) -> list[dict[str, Any]]:
    """The search's front and dense, and what whittle found, by memory: losses after fine-tuning, of the test part."""
    trial, found, rows = run.trial(), run.front(), list[dict[str, Any]]()
    dense = next(e for e in found.evaluations if e.name == "dense")

    def add(name: str, by: str, memory: Memory, tokens: int, perplexity: float, validation: float | None, windows: Any) -> None:
        vs = difference([windows], [dense.windows])
        row: dict[str, Any] = {"model": name, "found_by": by, "memory_bytes": memory.memory_bytes}
        row |= {"weight_bytes": memory.weight_bytes, "kv_cache_bytes": memory.kv_cache_bytes, "tokens": tokens}
        row |= {"seed": trial.file.seed, "perplexity": perplexity, "validation_perplexity": validation}
        rows.append(row | {"loss_vs_dense_nats_per_token": vs.mean, "loss_vs_dense_standard_error": vs.standard_error})

    for e in (m.evaluations[0] for m in found.members):
        by = "dense" if e == dense else "search"
        add(e.label, by, e.memory, e.tokens, e.losses.perplexity, e.validation_perplexity, e.windows)
    for path in (work / "healed").glob(f"*/{RESULT}"):
        memory = measure(*read_config(work / "found" / path.parent.name), trial.file.memory)
        got = json.loads(path.read_text(encoding="utf-8"))
        test = got["test"]
        add(path.parent.name, "whittle", memory, got["tokens"], test["perplexity"], got["perplexity"], test["window_losses"])
    return sorted(rows, key=lambda row: row["memory_bytes"])


def write_page(rows: list[dict[str, Any]], work: Path) -> None:
    """README.md and the tables."""
    shutil.copy(work / "evaluations.csv", FOLDER)
    with (FOLDER / "fine_tuned.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (dense,) = (row for row in rows if row["found_by"] == "dense")
    shown, volumes = list[Row](), list[Row]()
    for row in rows:
        factor, error = math.exp(row["loss_vs_dense_nats_per_token"]), row["loss_vs_dense_standard_error"]
        part = f"{format_bytes(row['memory_bytes'])}, {row['memory_bytes'] / dense['memory_bytes']:.1%}"
        cells = {"model": row["model"], "found by": row["found_by"], "memory, of dense": part}
        cells |= {"weights": format_bytes(row["weight_bytes"]), "KV cache": format_bytes(row["kv_cache_bytes"])}
        shown.append(cells | {"perplexity": f"{row['perplexity']:.2f}", "vs dense": f"{factor - 1:+.1%} ± {factor * error:.1%}"})
    reference = reference_point([(row["memory_bytes"], row["perplexity"]) for row in rows])
    for kinds in (("dense",), ("dense", "whittle"), ("dense", "search"), ("dense", "search", "whittle")):
        points = [(row["memory_bytes"], row["perplexity"]) for row in rows if row["found_by"] in kinds]
        alone = hypervolume([(dense["memory_bytes"], dense["perplexity"])], reference)
        volume = f"{hypervolume(points, reference) / alone:.3f}"
        volumes.append({"models": " and ".join(kinds), "hypervolume, × dense alone": volume})
    text = (FOLDER / "findings.md").read_text(encoding="utf-8"), markdown_table(shown), markdown_table(volumes)
    (FOLDER / "README.md").write_text("\n\n".join(part.strip() for part in text) + "\n", encoding="utf-8")


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--only", default="*", help="Of the folders in WORK/found, fine-tune those that match; the page has all.")
def main(run: Path, work: Path, only: str) -> None:
    """Do what can be done yet of comparing the search RUN with whittle's."""
    trial = Run(run).trial()
    corpus = check(trial)[0]
    if not (work / "texts.npz").exists():
        write_texts(trial, corpus, work / "texts.npz")
    heal(trial, corpus, work, only)
    if (work / "healed").exists():
        write_page(table(Run(run), work), work)


if __name__ == "__main__":
    main()
