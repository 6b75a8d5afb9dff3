"""The fine-tuned front of a search from a trained model, by the weights on which the search evaluates configs.

    python -m reports.supernet_fronts MODEL_DIR TEXT_TRAIN TEXT_EVAL [--seeds 3] [--limit-minutes N]

A search for each row of `WAYS` and each seed, by `trial.yaml`, whose candidates are fine-tuned alike from the weights that they
were evaluated with. `models.csv` has the models of every front, and a search that is in it is not done again; `README.md` has the
hypervolumes. Without arguments the page is made anew from the table.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import click

import nas
from nas.cli.show import Terminal
from nas.files import write_text
from nas.pareto import hypervolume
from nas.report.tables import Row, markdown_table

from ..grid import read_table, write_table

HERE = Path(__file__).parent
SUPERNET = ("supernet.steps=300", "supernet.batch=8", "supernet.seq=128", "supernet.learning_rate=0.001")
SLOWER = (*SUPERNET[:-1], "supernet.learning_rate=0.0003")
BIASED, NEAR = "supernet.strategy=dense_biased", "supernet.strategy=near_front"


def _split(times: int, configs: str = "uniform") -> tuple[str, ...]:
    return "split.method=gradient-matching", f"split.splits={times}", f"split.configs={configs}"


WAYS: dict[str, tuple[str, ...]] = {
    "the model's own weights": (),
    "the model's own weights, equal tokens": ("final.steps=67",),
    "dense-biased": (*SUPERNET, BIASED),
    "near the front": (*SUPERNET, NEAR),
    "dense-biased, rate 3e-4": (*SLOWER, BIASED),
    "near the front, rate 3e-4": (*SLOWER, NEAR),
    "dense-biased, split in two": (*SUPERNET, BIASED, *_split(1)),
    "dense-biased, split in four": (*SUPERNET, BIASED, *_split(2)),
    "near the front, split in two": (*SUPERNET, NEAR, *_split(1)),
    "near the front, split in two near the front": (*SUPERNET, NEAR, *_split(1, "near_front")),
    "a predictor of 12 short fine-tunings": ("predictor.configs=12", "predictor.steps=12", "predictor.rounds=1"),
    "the model's own weights, steps by loss": ("final.allocation=by_loss",),
    "near the front, steps by loss": (*SUPERNET, NEAR, "final.allocation=by_loss"),
}
"""The settings of each. A supernet takes 307,200 tokens, as 17 more steps of nine fine-tunings do; a predictor 294,912."""
FRACTIONS = 0.8, 0.6, 0.4, 0.3
WORST = 1.05, 1.0  # the reference point of hypervolumes: of the dense memory, and nats beyond the dense model's loss


@dataclass(frozen=True)
class ModelRow:
    """A model of a search's front: the loss after fine-tuning, in nats a token of the test text."""

    way: str
    seed: int
    hash: str
    label: str
    memory_bytes: int
    loss_nats_per_token: float


def search(way: str, seed: int, model: Path, train: Path, evaluate: Path, runs: Path) -> list[ModelRow]:
    """The models that a search fine-tuned."""
    given = (f"from={model}", f"data.text={train}", f"data.eval_text={evaluate}", f"seed={seed}", *WAYS[way])
    name = "".join(c if c.isalnum() else "-" for c in f"{way}-{seed}")
    run = nas.run_search(HERE / "trial.yaml", runs, name=name, overwrite=True, settings=given, progress=Terminal())
    found = (m.evaluation for m in run.front.all)
    return [
        ModelRow(way, seed, e.config.hash, e.label, e.memory.memory_bytes, round(e.losses.loss_nats_per_token, 6)) for e in found
    ]


def page(models: list[ModelRow]) -> str:
    """The page: a row for each way."""
    dense = max(models, key=lambda m: m.memory_bytes)
    reference = WORST[0] * dense.memory_bytes, WORST[1] + dense.loss_nats_per_token
    rows: list[Row] = []
    volumes = {
        way: {seed: volume([*mine], reference) for seed, mine in groupby(group, lambda m: m.seed)}
        for way, group in groupby(models, lambda m: m.way)
    }
    first = next(iter(volumes.values()))
    for way, found in volumes.items():
        row = {"configs are evaluated on": way, "hypervolume": cell([each / first[seed] for seed, each in found.items()], ".3f")}
        for part in FRACTIONS:
            small = {
                s: [m for m in models if (m.way, m.seed) == (way, s) and m.memory_bytes <= part * dense.memory_bytes]
                for s in range(len(found))
            }
            losses = [min(m.loss_nats_per_token for m in mine) for mine in small.values() if mine]
            row[f"loss within {part:.0%}"] = cell(losses, ".3f") if losses else ""
        rows.append(row | {"seeds": str(len(found))})
    return "\n".join([(HERE / "findings.md").read_text().rstrip(), "", markdown_table(rows)])


def volume(models: list[ModelRow], reference: tuple[float, ...]) -> float:
    """The hypervolume of a search's models by memory and loss."""
    return hypervolume([(float(m.memory_bytes), m.loss_nats_per_token) for m in models], reference)


def cell(found: list[float], form: str) -> str:
    """The mean over seeds, ± their standard deviation."""
    return f"{statistics.fmean(found):{form}}" + (f" ± {statistics.stdev(found):{form}}" if len(found) > 1 else "")


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.argument("text_train", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.argument("text_eval", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--limit-minutes", type=float, default=math.inf, help="start no search after so many minutes")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs/supernet_fronts"), show_default=True)
def main(
    model_dir: Path | None, text_train: Path | None, text_eval: Path | None, seeds: int, limit_minutes: float, runs: Path
) -> None:
    """Search on each kind of weights with each seed, and write the page."""
    table, deadline = HERE / "models.csv", time.monotonic() + 60 * limit_minutes
    models = read_table(table, ModelRow)
    if model_dir and text_train and text_eval:
        for seed in range(seeds):
            for way in WAYS:
                if not any((m.way, m.seed) == (way, seed) for m in models) and time.monotonic() < deadline:
                    models += search(way, seed, model_dir.resolve(), text_train.resolve(), text_eval.resolve(), runs)
                    models.sort(key=lambda m: (list(WAYS).index(m.way), m.seed, m.memory_bytes))
                    write_table(table, models, ModelRow)
    write_text(HERE / "README.md", page(models))
    click.echo(HERE / "README.md")


if __name__ == "__main__":
    main()
