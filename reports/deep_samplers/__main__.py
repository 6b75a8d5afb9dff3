"""Compare samplers on a deep trained model: `python -m reports.deep_samplers [MODEL_DIR TEXT]`.

Configs are evaluated zero-shot, on the weights that they inherit from the dense model. Without MODEL_DIR a model of `--layers`
layers is trained first, in minutes. `TO/evaluations-NAME.csv` has the loss of each config, whoever proposed it, and
`TO/searches-NAME.csv` the hypervolumes; a second call goes on from there, since what a sampler proposes follows from its seed and
from what it was told.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from nas.cli import main
from nas.config import parse_yaml
from nas.data import DataSpec, eval_sequences, load_corpus, train_batches
from nas.export.load import load_export
from nas.files import write_text
from nas.model.decoder import Decoder, init_weights
from nas.model.supernet import Supernet
from nas.pareto import hypervolume
from nas.report.tables import Row, markdown_table
from nas.search.loop import Study
from nas.search.samplers import SAMPLERS
from nas.search.surrogate import HORIZON
from nas.search.trial_file import SearchSpec
from nas.sharing.distribution import ConfigDistribution, single_decisions
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace, SingleDecision
from nas.training.evaluation import NotFinite, measure_losses
from nas.training.loop import Trainer, TrainSpec, plain_backward

from ..fine_tuned.configs import append_row
from ..grid import read_table, write_table

BATCH = 24
SAME = 1e-5  # nats by which the dense model's loss may differ from that in the table
PATH = "greedy path"
FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
CHOICES = """choices:
  tie: {{sources: adjacent}}
  ffn: {{sources: adjacent}}
  kv: {{sources: adjacent}}
  kv_heads: {{options: [{heads}, 1]}}
  drop: {{options: [own, attn, ffn, both]}}
"""


@dataclass(frozen=True)
class EvaluationRow:
    """A config's bytes and zero-shot loss; a loss that is not finite is NaN."""

    hash: str
    memory_bytes: int
    loss_nats_per_token: float


@dataclass(frozen=True)
class SearchRow:
    """The front of one search after so many evaluations: its hypervolume as a multiple of the dense model's, and the least loss
    within 90%, 80%, 70%, 60%, 50% and 40% of the dense model's memory."""

    sampler: str
    single_decisions: int
    seed: int
    evaluations: int
    hypervolume: float
    least_losses: str


class Benchmark:
    """A dense model's weights, the sequences that configs are evaluated on, and the table of all evaluations."""

    def __init__(self, dense: Decoder, sequences: Tensor, memory: MemorySpec, table: Path) -> None:
        self.shape, self.sequences, self.memory, self.table = dense.shape, sequences, memory, table
        self.space = SearchSpace.from_document(
            parse_yaml(CHOICES.format(heads=self.shape.num_key_value_heads), "space"), self.shape
        )
        self.net = Supernet(self.shape, torch.Generator(), self.space.extra_parameters()).eval().requires_grad_(False)
        self.net.bank.load_state_dict(dense.state_dict())
        self.known = {row.hash: row.loss_nats_per_token for row in read_table(table, EvaluationRow)}
        self.dense = self.point(SharingConfig.dense(self.shape))
        loss = measure_losses(self.net.subnet(SharingConfig.dense(self.shape)), sequences).loss_nats_per_token
        if abs(loss - self.dense[1]) > SAME:
            raise click.ClickException(f"{table} is of another model: dense has {loss:.6f} nats, there {self.dense[1]:.6f}")
        self.reference = 1.05 * self.dense[0], self.dense[1] + HORIZON

    def point(self, config: SharingConfig) -> tuple[float, float]:
        """Bytes and loss of a config."""
        size = measure(self.shape, config, self.memory).memory_bytes
        if config.hash not in self.known:
            try:
                self.known[config.hash] = measure_losses(self.net.subnet(config), self.sequences).loss_nats_per_token
            except NotFinite:
                self.known[config.hash] = float("nan")
            row = EvaluationRow(config.hash, size, round(self.known[config.hash], 6))
            append_row(self.table, tuple(vars(row)), vars(row))
        return float(size), self.known[config.hash]

    def search(self, sampler: str, singles: int, seed: int, counts: Sequence[int]) -> Iterator[SearchRow]:
        """One search: its front after each of `counts` evaluations. Dense and some single decisions are evaluated first."""
        spec, points = SearchSpec(evaluations=counts[-1], sampler=sampler, batch=BATCH), list[tuple[float, float]]()
        study = Study(self.space, spec, seed, self.memory)
        alone = list(single_decisions(self.space, self.memory).values())
        first = [SharingConfig.dense(self.shape), *random.Random(seed).sample(alone, min(singles, len(alone)))]
        study.enqueue([self.space.encode(config) or {} for config in first])
        ends = sorted({*counts, *range(len(first), counts[-1], BATCH)})
        for end in ends:
            for one in (asked := study.ask(max(end - len(points), 0))):
                points.append(self.point(one.config))
            for one, point in zip(asked, points[-len(asked) :], strict=True):
                study.tell(one.number, point if np.isfinite(point[1]) else None)
            if end in counts:
                yield self.row(sampler, singles, seed, points)

    def path(self) -> SearchRow:
        """Every single decision, then 40 steps of adding them in the order of loss per byte."""
        alone = single_decisions(self.space, self.memory)
        measured = [replace(one, loss_increase=self.point(config)[1] - self.dense[1]) for one, config in alone.items()]
        kept = [one for one in measured if np.isfinite(one.loss_increase or 0.0)]
        points = [self.dense, *map(self.point, alone.values()), *map(self.point, self._path(kept))]
        return self.row(PATH, len(alone), 0, points)

    def _path(self, singles: Sequence[SingleDecision]) -> list[SharingConfig]:
        distribution = replace(ConfigDistribution.by_costs(self.space, self.memory, ()), kept=tuple(singles))
        order, setting = distribution.order(lambda: 0.0), dict(distribution.least)
        found, size = list[SharingConfig](), distribution.bytes(setting)
        for one in order:
            larger = setting | {one.decision: one.option}
            if setting[one.decision] == distribution.least[one.decision] and distribution.bytes(larger) < size:
                setting, size = larger, distribution.bytes(larger)
                found.append(self.space.config_of(setting))
        return [found[n] for n in np.unique(np.linspace(0, len(found) - 1, 40).astype(int))]

    def row(self, sampler: str, singles: int, seed: int, points: Sequence[tuple[float, float]]) -> SearchRow:
        """The figures of a search that has come so far."""
        finite = [point for point in points if np.isfinite(point[1])]
        volume = hypervolume(finite, self.reference) / hypervolume([self.dense], self.reference)
        least = [min([y for x, y in finite if x <= part * self.dense[0]], default=float("nan")) for part in FRACTIONS]
        return SearchRow(sampler, singles, seed, len(points), round(volume, 4), " ".join(f"{loss:.2f}" for loss in least))


def train_dense(layers: int, path: Path) -> tuple[Decoder, Tensor]:
    """A model of width 64 trained on Python's source for 2.5 million tokens, and 8 sequences of its text; kept at a path."""
    shape = ModelShape(256, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=176)
    corpus = load_corpus(DataSpec(text="python", tokenizer="bytes256", max_bytes=4_000_000), 256, Path())
    generator, spec = torch.Generator().manual_seed(0), TrainSpec(steps=1200, learning_rate=3e-3, autocast=False)
    model = init_weights(Decoder(shape, SharingConfig.dense(shape).resolve(shape)), generator)
    if not path.exists():
        for _ in Trainer(model, spec, generator).run(
            train_batches(corpus.train, spec.batch, spec.seq, generator), plain_backward(model, spec)
        ):
            pass
        path.parent.mkdir(exist_ok=True)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path))
    return model, eval_sequences(corpus.eval, spec.seq, 8)


def read_dense(model_dir: Path, text: Path) -> tuple[Decoder, Tensor]:
    """A checkpoint, and 4 sequences of 256 tokens of a text."""
    dense = load_export(model_dir).model.float()
    data = DataSpec(str(text), tokenizer=str(model_dir / "tokenizer.json"))
    return dense, eval_sequences(load_corpus(data, dense.shape.vocab_size, Path()).eval, 256, 4)


def table(rows: Sequence[SearchRow]) -> list[Row]:
    """A row for each sampler and number of evaluations: mean and standard deviation over seeds."""
    groups: dict[tuple[str, int, int], list[SearchRow]] = {}
    for row in rows:
        groups.setdefault((row.sampler, row.single_decisions, row.evaluations), []).append(row)
    found: list[Row] = []
    for (sampler, singles, count), group in sorted(groups.items(), key=lambda pair: (pair[0][2], pair[0][0], pair[0][1])):
        volumes = [row.hypervolume for row in group]
        cells = {"hypervolume": f"{np.mean(volumes):.2f} ± {np.std(volumes):.2f} ({len(group)})"}
        losses = np.array([[float(x) for x in row.least_losses.split()] for row in group]).mean(0)
        cells |= {f"at {part:.0%}": f"{loss:.2f}" for part, loss in zip(FRACTIONS, losses, strict=True)}
        found.append({"evaluations": f"{count}", "sampler": sampler, "single decisions first": f"{singles}"} | cells)
    return found


def page(folder: Path) -> Path:
    """Write README.md from the tables in a folder."""
    found = folder / "findings.md"
    lines = ["# Samplers on deep models", "", found.read_text(encoding="utf-8").strip() if found.exists() else ""]
    for path in sorted(folder.glob("searches-*.csv")):
        rows = read_table(path, SearchRow)
        lines += ["", f"## {path.stem.removeprefix('searches-')}", "", markdown_table(table(rows)).rstrip()]
    return write_text(folder / "README.md", "\n".join(lines).rstrip() + "\n")


@click.command()
@click.argument("model_dir", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("text", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="the tables' name; by default the folder's, or the number of layers")
@click.option("--layers", default=12, show_default=True, help="without MODEL_DIR, of the model that is trained")
@click.option("--sampler", "samplers", multiple=True, default=[PATH, *SAMPLERS], type=click.Choice([PATH, *SAMPLERS]))
@click.option("--single-decisions", "singles", default=12, show_default=True, help="evaluated before a sampler proposes")
@click.option("--seed", "seeds", multiple=True, default=[0], type=int)
@click.option(
    "--count", "counts", multiple=True, default=[100, 250], type=int, help="of evaluations, after which a front is judged"
)
@click.option("--to", type=click.Path(path_type=Path), default=Path(__file__).parent)
def deep_samplers(
    model_dir: Path | None,
    text: Path | None,
    name: str | None,
    layers: int,
    samplers: Sequence[str],
    singles: int,
    seeds: Sequence[int],
    counts: Sequence[int],
    to: Path,
) -> None:
    """Compare the samplers of `nas search` on the model in MODEL_DIR, on sequences of TEXT."""
    name = name or (model_dir.name if model_dir else f"{layers}-layers")
    dense, sequences = (
        read_dense(model_dir, text) if model_dir and text else train_dense(layers, Path("runs") / f"dense-{layers}.pt")
    )
    memory = MemorySpec(4096, 8) if model_dir else MemorySpec(1024)
    benchmark, path = Benchmark(dense, sequences, memory, to / f"evaluations-{name}.csv"), to / f"searches-{name}.csv"
    rows = read_table(path, SearchRow)

    def keep(row: SearchRow) -> None:
        click.echo(row)
        rows[:] = [old for old in rows if (old.sampler, old.single_decisions, old.seed, old.evaluations) != _key(row)] + [row]
        write_table(path, sorted(rows, key=_key), SearchRow)

    for sampler in samplers:
        if sampler == PATH:
            keep(benchmark.path())
        for seed in seeds if sampler != PATH else ():
            for row in benchmark.search(sampler, singles, seed, sorted(counts)):
                keep(row)
    click.echo(page(to))


def _key(row: SearchRow) -> tuple[str, int, int, int]:
    return row.sampler, row.single_decisions, row.seed, row.evaluations


if __name__ == "__main__":
    main(deep_samplers)
