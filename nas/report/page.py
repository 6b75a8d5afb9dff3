"""The front as one HTML page that needs no network: zoom, hover, and a click that shows a config.

Owns the page; its HTML is `page.html`. It shows the same data as `nas.report.front` draws.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from ..config import format_bytes, format_flops
from ..sharing.label import READING
from ..sharing.memory import MemorySpec
from ..sharing.shape import ModelShape
from ..training.evaluation import PART_WORDS, Evaluation
from .front import ALL_RUNS, front_colours, front_figure, labels, own_front, run_looks
from .measured import MeasuredConfig, Panel, extra_figures, panels, spell
from .sharing import sharing_svg
from .style import BLUE, FAINT, INK, MUTED, PAPER, RED, short_tick, tint
from .tables import SAID, Samples, samples_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FONT = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
BORDER = {"color": BLUE, "width": 2}
WIDTH = 900
BARS = (
    "A bar is two standard errors of the difference to the front's step at its left, over the same windows. One that reaches the "
    "step is within noise"
)
HOLLOW = {False: "; on the front its mark is hollow.", True: ". Models off the front of all are hollow."}
"""How the sentence ends, with one run and with several."""
DRAWN = 40
"""At most so many configs have a picture of who shares what in the page: the first panel, the front and the presets first."""


def front_page(
    evaluations: Sequence[Evaluation],
    title: str = "",
    shape: ModelShape | None = None,
    spec: MemorySpec | None = None,
    samples: Samples | None = None,
) -> str:
    """The text of the page, plotly.js in it. With the model's `shape`, a clicked config is drawn: who shares what. What
    models write is folded."""
    import plotly.io

    with suppress(ImportError):
        # plotly looks into pandas once that is in `sys.modules`, also where another thread (MLflow's) is still importing it.
        importlib.import_module("pandas")
    found = panels(evaluations)
    plot = plotly.io.to_html(
        _figure(found),
        include_plotlyjs=True,
        full_html=False,
        div_id="front",
        default_height=f"{_height(found)}px",
        config={"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]},
    )
    details = json.dumps(_details(found, shape, spec)).replace("</", "<\\/")
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    colours, said = {"ink": INK, "muted": MUTED, "faint": FAINT}, samples_text(samples or {})
    return template.substitute(
        colours,
        title=escape(title or "The front"),
        plot=plot,
        reading=escape(
            " ".join((READING, *([BARS + HOLLOW[bool(found[0].runs)]] if any(panel.is_paired for panel in found) else [])))
        ),
        details=details,
        samples=f"<details><summary>{escape(SAID)}</summary><pre>{escape(said)}</pre></details>" if said else "",
    )


def _figure(found: Sequence[Panel]) -> Any:
    """The plotly figure. Its axes, ticks and label positions are those of `front_figure` at a width of 900 pixels."""
    from plotly.subplots import make_subplots

    drawn = front_figure(found, "", (WIDTH, _height(found)))
    figure = make_subplots(len(found) or 1, 1, shared_xaxes=True)
    font = {"family": PLOT_FONT, "color": INK, "size": 12}
    figure.update_layout(
        height=_height(found),
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        font=font,
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        hoverlabel={"bgcolor": PAPER, "bordercolor": MUTED, "font": font, "align": "left"},
        legend={"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"},
    )
    axis = {"gridcolor": FAINT, "linecolor": MUTED, "zeroline": False, "ticks": "outside", "tickcolor": MUTED}
    figure.update_layout({f"{name}axis{n or ''}": axis for name in "xy" for n in (0, *range(2, len(found) + 1))})
    for n, (panel, axes) in enumerate(zip(found, drawn.axes, strict=True)):
        for trace in _traces(panel, legend=n == 0):
            figure.add_trace(trace, row=n + 1, col=1)
        _copy_axes(figure, axes, n + 1)
        _annotate(figure, axes, panel, n + 1)
    return figure


def _height(found: Sequence[Panel]) -> int:
    return 560 if len(found) < 2 else 820


def _copy_axes(figure: Any, axes: Axes, row: int) -> None:
    """The place, the limits, the ticks and the titles of a panel."""
    box, place = axes.get_position(), {"row": row, "col": 1}
    for update, axis, domain in (
        (figure.update_xaxes, axes.xaxis, [box.x0, box.x1]),
        (figure.update_yaxes, axes.yaxis, [box.y0, box.y1]),
    ):
        log = axis.get_scale() == "log"
        limits = [math.log10(value) if log else value for value in axis.get_view_interval()]
        update(domain=domain, type="log" if log else "linear", range=limits, **place)
        if log:
            ticks = [float(value) for value in axis.get_ticklocs()]
            update(tickvals=ticks, ticktext=[short_tick(tick) for tick in ticks], **place)
        update(title={"text": axis.get_label_text(), "font_size": 12, "standoff": 6}, **place)
    text, corner = axes.get_title(loc="left"), {"x": box.x0, "y": box.y1, "xref": "paper", "yref": "paper"}
    figure.add_annotation(text=text, showarrow=False, xanchor="left", yanchor="bottom", font_color=MUTED, **corner)


def _annotate(figure: Any, axes: Axes, panel: Panel, row: int) -> None:
    """Annotations with the offset in pixels that the drawn label has from its point."""
    named = labels(panel)
    for text in axes.texts:
        m, box = named[text.get_text().replace(r"\$", "$")], text.get_window_extent()
        x, y = axes.transData.transform(m.place)
        across, up = (box.x0 + box.x1) / 2 - x, (box.y0 + box.y1) / 2 - y
        figure.add_annotation(
            x=math.log10(m.place[0]) if axes.get_xscale() == "log" else m.place[0],
            y=math.log10(m.perplexity) if axes.get_yscale() == "log" else m.perplexity,
            ax=across,
            ay=-up,
            text=escape(text.get_text()),
            font={"size": 11, "color": RED if m is panel.knee and not panel.runs else INK},
            bgcolor="rgba(255,255,255,0.7)",
            borderpad=0,
            arrowhead=0,
            arrowwidth=0.7,
            arrowcolor=MUTED,
            standoff=6,
            row=row,
            col=1,
        )


def _traces(panel: Panel, legend: bool) -> Iterator[Any]:
    if panel.runs:
        yield from _run_traces(panel, legend)
        return
    size = 6 if len(panel.searched) < 300 else 4
    yield from _whiskers(panel, [m for m in panel.presets if m not in panel.front], MUTED)
    yield from _whiskers(panel, panel.front, BLUE)  # below the lines: a step goes down where the whisker of its config stands
    yield from _marks(panel, panel.searched, "searched", {"size": size, "color": tint(BLUE, 0.35)}, legend)
    mark = {"size": 9, "symbol": "diamond", "color": PAPER, "line": {"color": MUTED, "width": 1.5}}
    yield from _line(panel.preset_front, {"color": MUTED, "width": 1, "dash": "dash"}, "presets alone" if legend else "")
    yield from _marks(panel, [m for m in panel.presets if m not in panel.front], "preset", mark, legend)
    yield from _line(panel.front, {"color": BLUE, "width": 2.2})
    colours = dict(zip(map(_key, panel.front), front_colours(panel), strict=False))
    sure = [m for m in panel.front if not panel.is_noise(m)]
    for preset, name, look in ((False, "front", {"size": 9}), (True, "front, a preset", {"size": 10, "symbol": "diamond"})):
        found = [m for m in sure if bool(m.names) is preset]
        told = [colours[_key(m)] for m in found] if colours else BLUE
        yield from _marks(panel, found, name, {**look, "color": told}, legend)
    noise = [m for m in panel.front if panel.is_noise(m)]
    mark = {"size": 9, "symbol": ["diamond" if m.names else "circle" for m in noise], "color": PAPER, "line": BORDER}
    yield from _marks(panel, noise, "front, within noise", mark, legend)
    mark = {"size": 18, "color": "rgba(0,0,0,0)", "line": {"color": RED, "width": 2.2}}
    yield from _marks(panel, [panel.knee] if panel.knee else [], "knee", mark, legend)


def _run_traces(panel: Panel, legend: bool) -> Iterator[Any]:
    """Each run's models and their front, over the front of all."""
    yield from _line(panel.front, {"color": FAINT, "width": 9}, ALL_RUNS if legend else "")
    yield from _whiskers(panel, panel.front, MUTED)
    for (name, members), look in zip(panel.runs.items(), run_looks(len(panel.runs)), strict=True):
        yield from _line(own_front(members), {"color": look.colour, "width": 1.4})
        filled = [look.colour if panel.is_member(m) else PAPER for m in members]
        mark = {"size": 1.6 * look.size, "symbol": look.plotly, "color": filled, "line": {"color": look.colour, "width": 1.5}}
        yield from _marks(panel, members, name, mark, legend)
    mark = {"size": 18, "color": "rgba(0,0,0,0)", "line": {"color": INK, "width": 2.2}}
    yield from _marks(panel, [panel.knee] if panel.knee else [], "knee", mark, legend)


def _line(members: Sequence[MeasuredConfig], look: dict[str, Any], name: str = "") -> Iterator[Any]:
    from plotly.graph_objects import Scatter

    if len(members) > 1 and len(members[0].objectives) == 2:
        look = {"shape": "hv", **look}
        yield Scatter(**_xy(members), mode="lines", line=look, hoverinfo="skip", name=name, showlegend=bool(name))


def _whiskers(panel: Panel, members: Sequence[MeasuredConfig], color: str) -> Iterator[Any]:
    """Thick bars for what is noise, thin ones from the lowest to the highest seed."""
    from plotly.graph_objects import Scatter

    noise = {m: ends for m in members if (ends := panel.whisker(m))}
    seeds = {m: (min(m.perplexities), max(m.perplexities)) for m in members if len(m.evaluations) > 1}
    for bars, look in ((noise, {"color": tint(color, 0.45), "width": 3}), (seeds, {"color": color, "width": 1})):
        if bars:
            x = [at for m in bars for at in (m.place[0], m.place[0], None)]
            y = [at for ends in bars.values() for at in (*ends, None)]
            yield Scatter(x=x, y=y, mode="lines", line=look, hoverinfo="skip", showlegend=False)


def _marks(panel: Panel, members: Sequence[MeasuredConfig], name: str, mark: dict[str, Any], legend: bool) -> Iterator[Any]:
    from plotly.graph_objects import Scatter

    if not members:
        return
    yield Scatter(
        **_xy(members),
        mode="markers",
        name=name,
        marker=mark,
        showlegend=legend,
        customdata=[
            [_key(m), "<br>".join((f"<b>{escape(m.full_label)}</b>", *map(": ".join, _facts(m, panel).items())))] for m in members
        ],
        hovertemplate="%{customdata[1]}<extra></extra>",
    )


def _xy(members: Sequence[MeasuredConfig]) -> dict[str, list[float]]:
    return {"x": [m.place[0] for m in members], "y": [m.perplexity for m in members]}


def _key(m: MeasuredConfig) -> str:
    return f"{m.first.run} {m.first.weights} {m.first.config.hash} {m.first.tokens} {m.first.supernet}"


def _facts(m: MeasuredConfig, panel: Panel) -> dict[str, str]:
    memory, found = m.first.memory, m.perplexities
    error = f" ± {m.standard_error:.3f}" if math.isfinite(m.standard_error) else ""
    seeds = {"seeds": f"{len(found)}, perplexity {min(found):.3f} to {max(found):.3f}"} if len(found) > 1 else {}
    return {
        "memory": f"{format_bytes(memory.memory_bytes)} ({memory.memory_bytes:,} bytes)",
        "weights": f"{format_bytes(memory.weight_bytes)} ({memory.unique_params:,} parameters)",
        "KV cache": f"{format_bytes(memory.kv_cache_bytes)} ({memory.kv_bytes_per_token:,} bytes a token)",
        **extra_figures(m),
        "to decode a token": f"{format_bytes(memory.kv_read_bytes_per_token)} of cache, {format_flops(memory.flops_per_token)}",
        "perplexity": f"{m.perplexity:.3f}{error} on the {PART_WORDS[m.first.part]}",
        **({"to choose by": f"{m.point[-1]:.3f} on the validation text"} if m.first.validation_perplexity is not None else {}),
        **_compared(m, panel),
        "bits per byte": f"{m.bits_per_byte:.4f}",
        "training": f"{m.first.weights.replace('_', '-')}, {m.first.tokens:,} tokens",
        **seeds,
    }


def _compared(m: MeasuredConfig, panel: Panel) -> dict[str, str]:
    """The perplexity beside the dense model's and the neighbour's, with paired errors."""
    (dense, found), neighbour = panel.differences(m), panel.neighbour(m)
    said = {"perplexity vs dense": spell(dense)} if dense else {}
    if found and neighbour:
        said[f"perplexity vs {neighbour.label}"] = spell(found) + ", within noise" * found.is_noise
    return said


def _details(found: Sequence[Panel], shape: ModelShape | None, spec: MemorySpec | None) -> dict[str, dict[str, Any]]:
    """What a click shows, by `_key`: name, facts, YAML, and the drawing of the first `DRAWN` that matter."""
    ranked = {_key(m): (m, panel) for panel in found for m in (*panel.front, *panel.presets, *panel.searched)}
    details: dict[str, dict[str, Any]] = {}
    for n, (key, (m, panel)) in enumerate(ranked.items()):
        config = m.first.config
        svg = sharing_svg(shape, config, spec, m.label) if shape is not None and n < DRAWN else ""
        details[key] = {
            "name": m.full_label,
            "hash": config.hash,
            "facts": _facts(m, panel),
            "yaml": config.to_yaml(),
            "svg": svg,
        }
    return details
