"""The ranking's page and table: every estimator beside the others, on each text, and how far the truth can be trusted.

Owns what a person sees of scores. The scores are `score`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..report.tables import Row, markdown_table
from .carry import Section
from .known import Known, Reliability
from .score import Score

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


def score_rows(scores: Sequence[Score], truth_tokens: float) -> list[Row]:
    """One row an estimator: its tokens as a part of those that one seed of the truth takes, and the mean of each measure."""
    return [
        {"estimator": score.estimator, "tokens": f"{score.tokens / truth_tokens:.1%}" if score.tokens else "0"}
        | {words: _cell(score, name) for words, name in MEASURES.items()}
        | {"runs": str(len(score.agreements))}
        for score in scores
    ]


def _cell(score: Score, name: str) -> str:
    mean, off = score.mean(name), score.deviation(name)
    if name in PARTS:
        return f"{mean:.1%}" + (f" ± {off:.1%}" if off else "")
    return f"{mean:.2f}" + (f" ± {off:.2f}" if off else "")


def reliability_lines(known: Known, found: Reliability) -> list[str]:
    """What two halves of the seeds say of each other, for a person."""
    configs, seeds, _ = known.losses.shape
    settled = "; ".join(
        f"{tokens / known.tokens[-1]:.0%} of the tokens: {whole:.2f} ({within:.2f})"
        for tokens, (whole, within) in found.settled.items()
    )
    halves, within = _span(found.halves), _span(found.halves_within)
    one, one_within = _span(found.seed_to_rest), _span(found.seed_to_rest_within)
    return [
        f"{configs} configs, {seeds} seeds, {known.tokens[-1]:,} tokens each. Over seeds a training's loss deviates by "
        f"{found.noise:.4f} nats, over configs their means by {known.truth.std():.4f}.",
        f"Half the seeds against the other half: τ {halves}, within quartiles of memory {within}.",
        f"One seed against the mean of the others: τ {one}, within quartiles {one_within}.",
        f"One half on the way against the other half at the end, τ (within quartiles): {settled}.",
    ]


def _own_line(section: Section) -> str:
    told = "; ".join(f"{tokens / section.known.tokens[-1]:.0%}: {slope:.2f}" for tokens, slope in section.slopes.items())
    return (
        f"What a config is off the predictor after so much of its training tells, of what another seed is off at the end: {told}."
    )


def _span(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def page(command: str, sections: Sequence[Section], truth_tokens: int) -> str:
    """The page in markdown; `truth_tokens` are those that training every config once takes."""
    lines = ["# What a ranking is worth", "", f"Made by `{command}`.", "", EXPLAINED]
    for section in sections:
        said = [*reliability_lines(section.known, section.reliability), _own_line(section)]
        lines += ["", f"## {section.known.text}", "", *(f"- {line}" for line in said), ""]
        lines += [markdown_table(score_rows(section.scores, truth_tokens)).rstrip()]
    return "\n".join(lines) + "\n"


EXPLAINED = """`τ` is Kendall's τ-b of the estimated order and the true one; `τ in quartiles` its mean over quartiles of
memory, which no byte count can fake. `top 10%` is how much of the true best tenth (by loss) is in the estimated
one; `regret, n` how much worse in perplexity the best of the first n is than the best there is, overall and as
a mean over quartiles of memory. `front` is the hypervolume, by true perplexity, of ten configs picked by the
estimate's order, each for what it is expected to add to those before it, as a part of the true front's; the
corner is the worst of both axes. `tokens` are all that the estimator took, as a part of those that training
every config once takes. `alone` is each config's own training up to there, by the other seeds' end; `smoothed`
a line fitted to all of them in its place, `with a predictor` that line, and a quarter of what the config itself
is off it. ± is the standard deviation over seeds (of predictors: over draws of the configs that they learn from,
and they are scored on the others alone)."""
