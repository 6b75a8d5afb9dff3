"""What a person sees on opening a search in MLflow: its columns, its charts and its description.

Owns the state that MLflow's page reads from the experiment tag `mlflow.sharedViewState.<key>`, in the form that its "Save view"
button writes, and the description's Markdown. Pure data: nothing here speaks to MLflow.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..sharing.label import READING, sharing_line
from ..sharing.objectives import DEFAULT, OBJECTIVES, QUALITY, SPREAD, Objective
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation

VIEW_TAG = "mlflow.sharedViewState."
SEARCH_TAG = "search"
"""The tag that a search's parent run and its children carry; its value is the search's name and the head of its run id."""

NAME_COLUMNS = {"1": 73, "attributes.`Run Name`": 180}
"""What every list of MLflow's begins with: the box to tick, and the name. Widths are in pixels."""

COLUMNS = {
    "tags.`kind`": 80,
    "metrics.`memory_mib`": 105,
    "metrics.`perplexity`": 90,
    "metrics.`perplexity_standard_error`": 185,
    "metrics.`bits_per_byte`": 105,
    "params.`sharing`": 330,
    "metrics.`weight_bytes`": 105,
    "metrics.`kv_cache_bytes`": 120,
    "metrics.`kv_bytes_per_token`": 145,
    "metrics.`unique_params`": 115,
}
TIME_COLUMNS = {"runDateAndNestInfo": 150, "duration": 80}
KIND_COLORS = {
    "search": "#767676",
    "front": "#D55E00",
    "preset": "#0072B2",
    **dict.fromkeys(("retrained", "fine_tuned", "zero_shot"), "#009E73"),
    "training": "#CC79A7",
}
"""A point's colour says what its run is (Okabe & Ito's colours, told apart by every kind of eye)."""

SECTIONS = (
    ("front", "Front orange, presets blue, the others green", 2, 400),
    ("sharing", "Layers that share, by primitive", 1, 400),
    ("search", "The search's progress", 2, 360),
)
"""The charts' sections: key, title, cards in a row, their height in pixels."""

SERIES = ("hypervolume", "supernet_loss_nats_per_token")
PROGRESS = "progress_percent_"  # what the series of a stage's progress begins with, over the seconds since the run began

STAGES = (
    *("train_the_dense_model", "convert_the_base_model", "single_decisions", "train_supernets", "split_by_gradient_matching"),
    *("proxy_trainings", "search", "train_until_early_stopping", "fine_tune", "retrain_from_scratch", "measure"),
)
"""The stages of the chart of progress."""

LINE = {
    "xAxisKey": "step",
    "lineSmoothness": 0,
    "scaleType": "linear",
    "useGlobalXaxisKey": False,
    "useGlobalLineSmoothing": False,
}
"""How a series is drawn: as it was measured, not smoothed."""

QUIET = (
    *("weight_bytes", "kv_cache_bytes", "kv_bytes_per_token", "kv_read_bytes_per_token", "flops_per_token", "memory_bytes"),
    *("memory_mib", "unique_params", "perplexity", "perplexity_standard_error", "bits_per_byte", "loss_nats_per_token"),
    "validation_perplexity",
    *("tokens", "seconds", "windows_needed", "seeds_needed"),
    *(f"loss_vs_{other}_{what}" for other in ("dense", "neighbour") for what in ("nats_per_token", "standard_error")),
)
"""Metrics that get no bar chart of their own: the scatter, the coordinates and the columns show them."""


def layers_param(primitive: str) -> str:
    """The name of the parameter that counts the layers which state a primitive."""
    return f"{primitive}_layers"


def axis_metric(name: str) -> str:
    """The metric that an objective is drawn by: an axis shows a name and a bare number."""
    return "memory_mib" if name == "memory_bytes" else name


def view_tag(name: str, search: str, primitives: Sequence[str], created_ms: int, objectives: Sequence[str] = DEFAULT) -> str:
    """The tag's value: a named view of the runs of one search, by the first objective; about 2,000 characters."""
    state = json.dumps(view_state(search, primitives, objectives))
    packed = base64.b64encode(zlib.compress(state.encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": created_ms, "state": f"deflate;{packed}"})


def view_state(search: str, primitives: Sequence[str], objectives: Sequence[str] = DEFAULT) -> dict[str, Any]:
    """The page's state: which runs, in which order, with which columns and charts; the layers that state each of `primitives`."""
    shown = COLUMNS | {f"metrics.`{name}`": 150 for name in map(axis_metric, objectives) if f"metrics.`{name}`" not in COLUMNS}
    columns = NAME_COLUMNS | shown | TIME_COLUMNS
    return {
        "searchFilter": f"tags.{SEARCH_TAG} = '{search}'",
        "orderByKey": f"metrics.`{objectives[0]}`",
        "orderByAsc": not OBJECTIVES[objectives[0]].maximize,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(shown),
        "columnOrder": list(columns),
        "columnWidths": columns,
        "runsHiddenMode": "SHOW_ALL",
        "hideEmptyCharts": True,
        "isAccordionReordered": True,
        "compareRunSections": [_section(*section) for section in SECTIONS],
        "compareRunCharts": _charts([layers_param(name) for name in primitives], [*map(axis_metric, objectives)]),
    }


def _charts(axes: Sequence[str], ends: Sequence[str]) -> list[Mapping[str, Any]]:
    scatters = {"memory": ends[0], "cache": "kv_bytes_per_token" if len(ends) == 2 else ends[1]}
    stages = [PROGRESS + name for name in STAGES]
    quiet = dict.fromkeys((*QUIET, *ends, *(name + SPREAD for name in ends if name in OBJECTIVES and OBJECTIVES[name].measure)))
    return [
        *(_chart(key, "SCATTER", "front", xaxis=_metric(x), yaxis=_metric(QUALITY)) for key, x in scatters.items()),
        _chart("layers", "PARALLEL", "sharing", selectedParams=axes, selectedMetrics=ends, showAllRuns=True),
        *(_chart(name, "LINE", "search", metricKey=name, selectedMetricKeys=[name], **LINE) for name in SERIES),
        _chart("progress", "LINE", "search", metricKey=stages[0], selectedMetricKeys=stages, **LINE),
        *(_chart(f"quiet-{name}", "LINE", "search", metricKey=name, **LINE) | {"deleted": True} for name in stages[1:]),
        *(_chart(f"quiet-{name}", "BAR", "front", metricKey=name) | {"deleted": True} for name in quiet),
    ]


def _chart(uuid: str, kind: str, section: str, **settings: Any) -> dict[str, Any]:
    common = {"uuid": uuid, "type": kind, "metricSectionId": section, "deleted": False, "isGenerated": False}
    return common | {"runsCountToCompare": 100} | settings


def _section(uuid: str, name: str, columns: int, height: int) -> dict[str, Any]:
    shown = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    return {"uuid": uuid, "name": name, "columns": columns, "cardHeight": height} | shown


def _metric(key: str) -> dict[str, str]:
    return {"key": key, "type": "METRIC"}


Names = Mapping[SharingConfig, str]

NOTE_LIMIT = 8000  # characters that a run's tag holds; an experiment's holds more
LINE_LIMIT = 300  # characters of a config's line in the front's table; single heads tied in many layers take thousands
GAP = "&emsp;"  # between the table's cells, which MLflow sets without any

SIZES = ("memory_bytes", "weight_bytes", "kv_cache_bytes")
"""What the front's table has of every search; the other objectives follow."""


def front_note(facts: Mapping[str, str], front: Sequence[Evaluation], run: str, names: Names | None = None) -> str:
    """A search's description in Markdown: its front in a sentence, what was searched (`facts`, in their order), how to take a
    member home, the front as a table. MLflow folds all but the first lines away. `run` is what a shell takes for the run,
    `names` tells labels apart.
    """
    members = sorted(front, key=lambda e: e.point)
    lines = [*_headline(members), *(f"- **{name}**: {value}" for name, value in facts.items())]
    if members:
        rows = [OBJECTIVES[name] for name in dict.fromkeys((*SIZES, *members[0].objectives[:-1]))]
        columns = ("config", *(row.words for row in rows), "perplexity", "bits per byte", "sharing")
        budget = math.ceil(members[len(members) // 2].memory.memory_bytes / 2**20 * 10) / 10
        exports = (f"nas export {run} --pick {pick} --to DIR" for pick in ("knee", f"max-memory={budget:g}MiB"))
        lines += ["", "```", f"nas front {run}", *exports, "```", "", _line(columns), _line(["---"] * len(columns))]
        lines += [_line(_cells(e, e.name or (names or {}).get(e.config, e.label), rows)) for e in members]
        lines += ["", READING]
    return clip("\n".join(lines))


def _headline(members: Sequence[Evaluation]) -> list[str]:
    if not members:
        return []
    first = OBJECTIVES[members[0].objectives[0]]
    ends = [f"{first.show(e.value(first.name))} at perplexity {e.losses.perplexity:.2f}" for e in (members[0], members[-1])]
    count = f"**{len(members)} config{'s' * (len(members) > 1)} on the front**"
    return [f"{count}, from {ends[0]} to {ends[1]}" if len(members) > 1 else f"{count}: {ends[0]}", ""]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell if cell == "---" else cell + GAP for cell in cells) + " |"


def _cells(e: Evaluation, name: str, rows: Sequence[Objective]) -> list[str]:
    error = e.losses.perplexity_standard_error
    perplexity = f"{e.losses.perplexity:.2f}" + (f" ± {error:.2f}" if math.isfinite(error) else "")
    sizes = [row.show(e.value(row.name)) for row in rows]
    shared = sharing_line(e.config)
    if len(shared) > LINE_LIMIT:
        shared = shared[: LINE_LIMIT - 2].rsplit(" ", 1)[0] + " …"
    return [f"`{name}`", *sizes, perplexity, f"{e.bits_per_byte:.3f}", shared]


def clip(text: str) -> str:
    """The text, cut at the end of a line if it is longer than MLflow keeps; the cut is said."""
    if len(text) <= NOTE_LIMIT:
        return text
    last = "\n\n(cut here: `nas front` prints all of it)"
    return text[: text.rfind("\n", 0, NOTE_LIMIT - len(last))] + last
