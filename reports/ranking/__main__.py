"""Train what estimates a config's loss, score it on the tabular benchmark, and write the page: `python -m reports.ranking`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nas.cli import main
from nas.report.tables import Row, markdown_table
from nas.search.candidates import features
from nas.workers import executor

from ..grid import Numbers, Request, program
from ..ground_truth.table import BenchmarkTable, read_tables, reliability
from ..ground_truth.training import load
from .estimators import RankFile
from .scores import Score, all_scores, own_slopes, train_supernets

HERE = Path(__file__).parent
MEASURES = {
    "τ": "tau",
    "τ in quartiles": "tau_within",
    "top 10%": "top_overlap",
    "regret, 1": "regret_1",
    "regret, 10": "regret_10",
    "regret in quartiles, 1": "regret_1_within",
    "front": "front_share",
}
PARTS = ("top_overlap", "regret_1", "regret_10", "regret_1_within", "front_share")
"""Measures that are shown in percent."""

EXPLAINED = """`τ` is Kendall's τ-b of the estimated order and the benchmark's; `τ in quartiles` its mean over quartiles of
memory, which no byte count can fake. `top 10%` is how much of the best tenth (by loss) is in the estimated
one; `regret, n` how much worse in perplexity the best of the first n is than the best there is, overall and as
a mean over quartiles of memory. `front` is the hypervolume, by the benchmark's perplexity, of ten configs picked
by the estimate's order, each for what it is expected to add to those before it, as a part of the whole front's;
the reference point is a tenth beyond the worst of each. `tokens` are all that the estimator took, as a part of those that
training every config once takes. `alone` is each config's own training up to there, by the other seeds' end;
`smoothed` a predictor fitted to all of them in its place, `with a predictor` that prediction, and a quarter of
what the config itself is off it; `given` a predictor with a supernet's estimate as a feature. ± is the standard
deviation over seeds (of predictors: over draws of the configs that they are fitted to, and they are scored on the
others alone)."""


def score_rows(scores: Sequence[Score], all_tokens: float) -> list[Row]:
    """One row an estimator: its tokens as a part of those that one seed of the benchmark takes, and the mean of each measure."""

    def cell(score: Score, name: str) -> str:
        form = ".1%" if name in PARTS else ".2f"
        deviation = score.deviation(name)
        return f"{score.mean(name):{form}}" + (f" ± {deviation:{form}}" if deviation else "")

    return [
        {"estimator": score.estimator, "tokens": f"{score.tokens / all_tokens:.1%}" if score.tokens else "0"}
        | {words: cell(score, name) for words, name in MEASURES.items()}
        | {"runs": str(len(score.agreements))}
        for score in scores
    ]


def reliability_lines(table: BenchmarkTable, rows: Numbers) -> Iterator[str]:
    """How far the benchmark can be trusted; `rows` are the features of its configs."""

    def span(values: Sequence[float]) -> str:
        return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    found = reliability(table)
    configs, seeds, _ = table.losses.shape
    settled = "; ".join(
        f"{tokens / table.tokens[-1]:.0%} of the tokens: {whole:.2f} ({within:.2f})"
        for tokens, (whole, within) in found.settled.items()
    )
    slopes = "; ".join(f"{tokens / table.tokens[-1]:.0%}: {slope:.2f}" for tokens, slope in own_slopes(table, rows).items())
    yield (
        f"{configs} configs, {seeds} seeds, {table.tokens[-1]:,} tokens each. Over seeds a training's loss deviates by "
        f"{found.noise:.4f} nats, over configs their means by {table.final.std():.4f}."
    )
    one, within = span(found.halves), span(found.halves_within)
    yield f"Half the seeds against the other half: τ {one}, within quartiles of memory {within}."
    one, within = span(found.seed_to_rest), span(found.seed_to_rest_within)
    yield f"One seed against the mean of the others: τ {one}, within quartiles {within}."
    yield f"One half on the way against the other half at the end, τ (within quartiles): {settled}."
    yield f"Slope from a config's residual off the predictor at a part of its tokens to another seed's at the end: {slopes}."


@program(HERE / "ranking.yaml")
def ranking(asked: Request) -> str:
    """Score estimators of a config's loss on a tabular benchmark: byte counts, short trainings, predictors, supernets.

    Supernets are trained with the tokens that FILE allows, and their estimates kept in a table. Stop it when you like: the same
    command goes on.
    """
    file = RankFile.load(asked.path)
    path = asked.path.parent / file.benchmark
    truth = load(path, asked)
    tables = read_tables(path.parent, truth)
    if asked.train:
        with executor(truth.file.run):  # one for all
            for table in tables:
                train_supernets(file, truth, table.text, asked)
    configs, lines = {config.hash: config for config in truth.configs}, [EXPLAINED]
    for table in tables:
        rows = features(truth.space.shape, [configs[h] for h in table.hashes], truth.file.memory)
        scores = all_scores(table, tables, rows, len(configs), asked.to)
        lines += ["", f"## {table.text}", "", *(f"- {line}" for line in reliability_lines(table, rows)), ""]
        lines.append(markdown_table(score_rows(scores, len(configs) * truth.file.train.tokens)).rstrip())
    return str(asked.write_page("What a ranking is worth", "ranking", lines))


if __name__ == "__main__":
    main(ranking)
