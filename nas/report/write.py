"""A run's report: one folder with a page in markdown, its figures and its tables.

Owns the page's words and the files' names. The same run gives the same bytes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..sharing.label import READING
from ..sharing.memory import MemorySpec
from ..sharing.picture import picture
from ..sharing.shape import ModelShape
from ..training.evaluation import Evaluation
from .front import draw_agreement, draw_front, draw_progress, draw_tree
from .measured import CHOSEN_BY_VALIDATION, Panel, budget, measured_at, panels
from .page import front_page
from .sharing import draw_sharing
from .tables import CERTAINTY, Keep, Row, cost_rows, front_csv, front_table, markdown_table, parts_rows


@dataclass(frozen=True)
class Report:
    """What a report is made of.

    `runs` are rows of the runs that it compares, if there are several. `provenance` says where the figures come from (text,
    seeds, versions, commit, hardware): a row of a table each. `tree` is a split tree and `progress` hypervolumes after each
    evaluation, by the search's name; `elsewhere` has the models of the front at other settings of memory.
    """

    title: str
    command: str
    shape: ModelShape
    spec: MemorySpec
    evaluations: Sequence[Evaluation]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    tree: Mapping[str, Any] | None = None
    progress: Mapping[str, Sequence[float]] = field(default_factory=dict)
    runs: Sequence[Row] = ()
    elsewhere: Mapping[MemorySpec, Sequence[Evaluation]] = field(default_factory=dict)


def write_report(folder: Path, report: Report) -> Path:
    """Write `README.md`, the figures beside it and `evaluations.csv` into a folder; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluations.csv").write_text(front_csv(report.evaluations), encoding="utf-8")
    lines = [line for section in (_head, _runs, _front, _elsewhere, _knee, _progress, _split) for line in section(folder, report)]
    page = "\n".join((*lines, *provenance_lines(report.provenance)))
    path = folder / "README.md"
    path.write_text(page.rstrip() + "\n", encoding="utf-8")
    return path


def _head(folder: Path, report: Report) -> Iterator[str]:
    yield from (f"# {report.title}", "", "```", command_without_folders(report.command), "```", "")
    yield from (report.shape.sentence, "")


def _runs(folder: Path, report: Report) -> Iterator[str]:
    if report.runs:
        yield from ("## Runs", "", markdown_table(report.runs), HYPERVOLUMES, "")
        (folder / "front.html").write_text(front_page(report.evaluations, report.title, report.shape, report.spec))
        yield from ("Models off the front of all are hollow in the figure. [front.html](front.html) shows each of them.", "")


HYPERVOLUMES = (
    "Hypervolumes are by the text that everything is chosen by, against one reference point, a tenth beyond the worst of all "
    "models, as a part of the hypervolume of all runs together."
)
"""What the column of hypervolumes means."""


def _front(folder: Path, report: Report) -> Iterator[str]:
    found = panels(report.evaluations)
    yield from ("## Front", "")
    if not found:
        yield from ("Nothing has been evaluated.", "")
        return
    draw_front(report.evaluations, folder / "front.png")
    first = found[0].all[0].objectives[0].words
    yield from (_picture(f"{first[0].upper()}{first[1:]} against perplexity", "front.png"), "")
    for panel in found:
        yield from (" ".join(_said(panel)), "")
    evaluations = [e for m in found[0].all for e in m.evaluations]
    keep: Keep = "front" if report.runs else "presets"
    title = "The front of all" if report.runs else "The front and the presets"
    yield from (f"{title}:", "", markdown_table(front_table(evaluations, keep)), READING, "")
    paired = [CERTAINTY, "", *(f"- {line}" for line in found[0].noise()), ""] if found[0].is_paired else []
    yield from paired
    yield from ("Every evaluation, unrounded, is in [evaluations.csv](evaluations.csv).", "")


def _elsewhere(folder: Path, report: Report) -> Iterator[str]:
    """The front at each other setting of memory."""
    for spec, evaluations in report.elsewhere.items():
        yield from (f"## Front at {spec.words}", "")
        draw_front(evaluations, folder / f"front-{spec.name}.png")
        yield from (_picture(f"The front at {spec.words}", f"front-{spec.name}.png"), "")
        yield from (f"{markdown_table(front_table(evaluations, keep='presets'))}",)


def _said(panel: Panel) -> Iterator[str]:
    """A panel in sentences: how many, on what budget, and how sure."""
    count, presets = len(panel.all), sum(bool(m.names) for m in panel.front)
    yield f"**{panel.title.capitalize()}.** {count:,} config{'s' * (count != 1)} ({budget(panel.all)}), of which"
    yield f"{len(panel.front)} on the front, {presets} preset{'s' * (presets != 1)} among them."
    where = measured_at(panel.all)
    if where:
        yield f"Memory is {where}."
    error = "" if panel.is_paired else ", ± one standard error over its windows"
    yield f"Perplexity is of the {panel.text}{error}."
    if panel.chosen_by_validation:
        yield f"{CHOSEN_BY_VALIDATION.capitalize()}."
    for row in panel.all[0].objectives:
        if row.measure:
            yield f"The {row.words} is that of random weights, ± the distance between the quartiles."
    spreads = [m.spread for m in panel.all if len(m.evaluations) > 1]
    if spreads:
        yield f"Over seeds, perplexity has a standard deviation of {min(spreads):.2g} to {max(spreads):.2g}."


def _knee(folder: Path, report: Report) -> Iterator[str]:
    """Who shares what at the knee, which is the model that `nas export` takes unless told otherwise."""
    found = panels(report.evaluations)
    knee = found[0].knee if found else None
    if knee is None:
        return
    config = knee.first.config
    content = picture(report.shape, config, report.spec)
    draw_sharing(report.shape, config, folder / "knee.svg", report.spec, knee.label)
    yield from (f"## Knee: {knee.label}", "", f"{knee.shown}, perplexity {knee.perplexity:.4g}.", "")
    yield from (_picture(f"Who shares what in {knee.label}", "knee.svg"), "")
    yield from (markdown_table(parts_rows(content.parts)), markdown_table(cost_rows(content.costs)))
    yield from ("```yaml", config.to_yaml().rstrip(), "```", "")


def _progress(folder: Path, report: Report) -> Iterator[str]:
    if any(len(values) for values in report.progress.values()):
        draw_progress(report.progress, folder / "progress.png")
        yield from ("## Search", "", _picture("Hypervolume over evaluations", "progress.png"), "")


def _split(folder: Path, report: Report) -> Iterator[str]:
    if report.tree is None or not report.tree.get("children"):
        return
    draw_tree(report.tree, folder / "split.svg")
    yield from ("## Split of the supernet", "", _picture("The tree of sub-supernets", "split.svg"), "")
    for node in _split_nodes(report.tree):
        if node["split"].get("distances"):
            name, decision = f"agreement-{node['name']}.png", node["split"]["decision"]
            draw_agreement(node["split"], folder / name)
            yield from (_picture(f"{node['name']}: gradient distances between the options of {decision}", name), "")


def _split_nodes(tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if tree.get("children"):
        yield tree
        for child in tree["children"]:
            yield from _split_nodes(child)


def provenance_lines(provenance: Mapping[str, Any]) -> Iterator[str]:
    """A page's last section: what its figures rest on, a row of a table each."""
    if provenance:
        rows = [{"name": name, "value": _value(value)} for name, value in provenance.items()]
        yield from ("## Where the figures come from", "", markdown_table(rows))


def _value(value: Any) -> str:
    """Plain data on a line: `torch 2.13.0, optuna 5.0.0`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    return "none" if value is None else without_folders(str(value))


def without_folders(text: str) -> str:
    """A text with the names alone of absolute paths: the folders of a machine are nobody's business where a page is published."""
    return re.sub(r"(?<![\w.:/~])~?/(?:[^/,;\]]+/)*(?=[^/,;\]\s])", "", text)


def command_without_folders(lines: str) -> str:
    """The same of commands, one a line, whose words may be quoted; a line that no shell would read is taken as a text."""

    def shown(line: str) -> str:
        try:
            return shlex.join(map(without_folders, shlex.split(line)))
        except ValueError:
            return without_folders(line)

    return "\n".join(map(shown, lines.splitlines()))


def _picture(caption: str, file: str) -> str:
    return f"![{caption}]({file})"
