"""Train the tabular benchmark, and write its page: `python -m reports.ground_truth`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nas.cli import main
from nas.report.tables import Row, markdown_table

from ..grid import Request, program
from .table import BenchmarkTable, read_tables, reliability
from .training import GroundTruth, load

HERE = Path(__file__).parent
EXPLAINED = """`truth.csv` has a row for each text, config, seed and point of evaluation; `configs.json` has each config by its
hash. A seed that not all configs have is not counted. Trainings of a seed see the same batches. A loss is that of weights
averaged over the last part of the steps so far."""


def reliability_rows(tables: Sequence[BenchmarkTable]) -> list[Row]:
    """One row a measure, one column a text."""
    found = {f"{table.text}, {table.losses.shape[1]} seeds": (table, reliability(table)) for table in tables}

    def both(whole: Sequence[float], within: Sequence[float]) -> str:
        return f"{sum(whole) / len(whole):.2f} ({sum(within) / len(within):.2f})"

    rows = {
        "configs": {text: str(len(table.hashes)) for text, (table, _) in found.items()},
        "one training's deviation over seeds, nats": {text: f"{one.noise:.4f}" for text, (_, one) in found.items()},
        "configs' deviation, nats": {text: f"{table.final.std():.4f}" for text, (table, _) in found.items()},
        "half of the seeds against the other half, τ (within quartiles of memory)": {
            text: both(one.halves, one.halves_within) for text, (_, one) in found.items()
        },
        "one seed against the mean of the others": {
            text: both(one.seed_to_rest, one.seed_to_rest_within) for text, (_, one) in found.items()
        },
    }
    for point in range(len(tables[0].tokens) - 1):
        name = f"half of the seeds at {tables[0].part(point)} of the tokens against the other half at the end"
        settled = {text: one.settled[table.tokens[point]] for text, (table, one) in found.items()}
        rows[name] = {text: both(*([value] for value in pair)) for text, pair in settled.items()}
    return [{"name": name} | row for name, row in rows.items()]


def page(truth: GroundTruth, tables: Sequence[BenchmarkTable]) -> Iterator[str]:
    """The page's lines."""
    file, shape = truth.file, truth.space.shape
    layers, space = shape.num_hidden_layers, Path(file.space).name
    yield f"Configs of `search_spaces/{space}` ({layers} layers of width {shape.hidden_size}): {file.configs} drawn evenly over"
    yield f"{file.bins} bins of memory, and the published schemes that the space can express. Each is trained alone for"
    yield f"{file.train.tokens:,} tokens and evaluated on {file.windows} sequences of {file.train.seq} tokens."
    yield from (EXPLAINED, "", markdown_table(reliability_rows(tables)))


@program(HERE / "ground_truth.yaml")
def ground_truth(asked: Request) -> str:
    """Train a sample of a small space's configs alone, with several seeds: the benchmark that rankings are measured by.

    Stop it when you like: the same command goes on from the table.
    """
    truth = load(asked.path, asked)
    if asked.train:
        truth.train(asked)
    return str(asked.write_page("Ground truth", "ground_truth", page(truth, read_tables(asked.to, truth))))


if __name__ == "__main__":
    main(ground_truth)
