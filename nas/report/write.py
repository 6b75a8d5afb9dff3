"""A run's report: one folder with a page in markdown, its figures and its tables.

Owns the page's words and the files' names. The same run gives the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import format_bytes
from ..sharing.memory import MemorySpec
from ..sharing.shape import ModelShape
from ..training.evaluation import Evaluation
from .front import draw_front, draw_progress
from .measured import Panel, budget, measured_at, panels
from .picture import picture
from .sharing import draw_sharing
from .splits import draw_agreement, draw_tree
from .tables import cost_rows, front_csv, front_table, markdown_table, parts_rows


@dataclass(frozen=True)
class Report:
    """What a report is made of.

    `provenance` says where the figures come from (text, seeds, versions, commit, hardware): a row of a table each. `tree` is a
    split tree and `progress` hypervolumes after each evaluation, by the search's name. `figures` are other pictures, files by
    their captions, which are copied.
    """

    title: str
    command: str
    shape: ModelShape
    spec: MemorySpec
    evaluations: Sequence[Evaluation]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    tree: Mapping[str, Any] | None = None
    progress: Mapping[str, Sequence[float]] = field(default_factory=dict)
    figures: Mapping[str, Path] = field(default_factory=dict)


def write_report(folder: Path, report: Report) -> Path:
    """Write `README.md`, the figures beside it and `evaluations.csv` into a folder; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluations.csv").write_text(front_csv(report.evaluations), encoding="utf-8")
    sections = (_head, _front, _knee, _progress, _split, _others, _provenance)
    page = "\n".join(line for section in sections for line in section(folder, report))
    path = folder / "README.md"
    path.write_text(page.rstrip() + "\n", encoding="utf-8")
    return path


def _head(folder: Path, report: Report) -> Iterator[str]:
    yield from (f"# {report.title}", "", "```", report.command, "```", "")
    shape = report.shape
    heads = f"{shape.num_attention_heads} heads, FFN width {shape.intermediate_size}"
    yield f"A model of {shape.num_hidden_layers} layers of width {shape.hidden_size}, {heads}, vocabulary {shape.vocab_size:,}."
    yield ""


def _front(folder: Path, report: Report) -> Iterator[str]:
    found = panels(report.evaluations)
    yield from ("## Front", "")
    if not found:
        yield from ("Nothing has been evaluated.", "")
        return
    draw_front(report.evaluations, folder / "front.png")
    yield from (_picture("Memory against perplexity", "front.png"), "")
    for panel in found:
        yield from (" ".join(_said(panel)), "")
    evaluations = [e for m in found[0].all for e in m.evaluations]
    yield from ("The front and the presets:", "", markdown_table(front_table(evaluations, keep="presets")))
    yield from ("Every evaluation, unrounded, is in [evaluations.csv](evaluations.csv).", "")


def _said(panel: Panel) -> Iterator[str]:
    """A panel in sentences: how many, on what budget, and how sure."""
    presets = _count(sum(bool(m.names) for m in panel.front), "preset")
    yield f"**{panel.title.capitalize()}.** {_count(len(panel.all), 'config')} ({budget(panel.all)}), of which"
    yield f"{len(panel.front)} on the front, {presets} among them."
    where = measured_at(panel.all)
    if where:
        yield f"Memory is {where}."
    yield "± is one standard error over the evaluation windows."
    spreads = [m.spread for m in panel.all if len(m.evaluations) > 1]
    if spreads:
        yield f"Over seeds, perplexity has a standard deviation of {min(spreads):.2g} to {max(spreads):.2g}."


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)


def _knee(folder: Path, report: Report) -> Iterator[str]:
    """Who shares what at the knee, which is the model that `nas export` takes unless told otherwise."""
    knees = [panel.knee for panel in panels(report.evaluations)[:1] if panel.knee]
    for knee in knees:
        config = knee.first.config
        draw_sharing(report.shape, config, folder / "knee.svg", report.spec, knee.label)
        yield from (f"## Knee: {knee.label}", "")
        yield f"{format_bytes(knee.memory_bytes)}, perplexity {knee.perplexity:.4g}."
        yield from ("", _picture(f"Who shares what in {knee.label}", "knee.svg"), "")
        content = picture(report.shape, config, report.spec)
        yield markdown_table(parts_rows(content.parts))
        yield markdown_table(cost_rows(content.costs))
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
            name = f"agreement-{node['name']}.png"
            draw_agreement(node["split"], folder / name)
            yield from (_picture(f"{node['name']}: how far the options of {node['split']['decision']} pull apart", name), "")


def _split_nodes(tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if tree.get("children"):
        yield tree
        for child in tree["children"]:
            yield from _split_nodes(child)


def _others(folder: Path, report: Report) -> Iterator[str]:
    for caption, file in report.figures.items():
        target = folder / file.name
        if file.resolve() != target.resolve():
            shutil.copyfile(file, target)
        yield from (f"## {caption}", "", _picture(caption, target.name), "")


def _provenance(folder: Path, report: Report) -> Iterator[str]:
    yield from provenance_lines(report.provenance)


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
    return "none" if value is None else str(value)


def _picture(caption: str, file: str) -> str:
    return f"![{caption}]({file})"
