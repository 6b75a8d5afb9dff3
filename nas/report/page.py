"""The front as one HTML page that needs no network: zoom, hover, and a click shows a config whole.

Owns the page. It shows the same data as `nas.report.front` draws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from ..evaluate import Evaluation
from ..loading import format_bytes
from ..memory import MemorySpec
from ..shape import ModelShape
from .front import MIB, is_log
from .measured import Measured, Panel, budget, measured_at, panels
from .palette import BLUE, FAINT, INK, MUTED, PAPER, RED, tint
from .sharing import sharing_svg

PLOT_FONT = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
DRAWN = 60
"""At most so many configs have a picture of who shares what in the page: the front's and the presets' first."""


def front_page(
    evaluations: Sequence[Evaluation],
    presets: Sequence[Evaluation] = (),
    title: str = "",
    shape: ModelShape | None = None,
    spec: MemorySpec | None = None,
) -> str:
    """The text of the page, plotly.js in it. With the model's `shape`, a clicked config is drawn: who shares what."""
    import plotly.io

    found = panels(evaluations, presets)
    plot = plotly.io.to_html(
        _figure(found),
        include_plotlyjs=True,
        full_html=False,
        div_id="front",
        default_height=f"{_height(found)}px",
        config={"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]},
    )
    details = json.dumps(_details(found, shape, spec)).replace("</", "<\\/")
    words = {"title": escape(title or "The front"), "plot": plot, "details": details, "ink": INK, "muted": MUTED, "faint": FAINT}
    page = PAGE
    for name, text in words.items():
        page = page.replace(f"%{name}%", text)
    return page


def _height(found: Sequence[Panel]) -> int:
    return 560 if len(found) < 2 else 820


def _figure(found: Sequence[Panel]) -> Any:
    from plotly.subplots import make_subplots

    rows = len(found) or 1
    heights = [0.62, 0.38] if rows == 2 else [1.0]
    figure = make_subplots(rows, 1, shared_xaxes=True, vertical_spacing=0.1, row_heights=heights)
    for n, panel in enumerate(found):
        for trace in _traces(panel, legend=n == 0):
            figure.add_trace(trace, row=n + 1, col=1)
        figure.update_yaxes(title_text="perplexity per token ± standard error", row=n + 1, col=1)
        words = f"{panel.weights} weights, {budget([*panel.searched, *panel.presets])}"
        place: dict[str, Any] = {"x": 0, "y": 1, "xref": "x domain", "yref": f"y{n + 1 if n else ''} domain"}
        figure.add_annotation(text=words, showarrow=False, xanchor="left", yanchor="bottom", font_color=MUTED, **place)
    _style(figure, found)
    return figure


def _style(figure: Any, found: Sequence[Panel]) -> None:
    everything = [m for panel in found for m in (*panel.searched, *panel.presets)]
    where = measured_at(everything)
    log = is_log([m.memory_bytes for m in everything])
    figure.update_layout(
        height=_height(found),
        margin={"l": 62, "r": 20, "t": 64, "b": 54},
        font={"family": PLOT_FONT, "color": INK, "size": 12},
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        hoverlabel={"bgcolor": PAPER, "bordercolor": MUTED, "font": {"size": 12}, "align": "left"},
        legend={"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"},
    )
    axis = {"gridcolor": FAINT, "linecolor": MUTED, "zeroline": False, "ticks": "outside", "tickcolor": MUTED}
    figure.update_xaxes(**axis, type="log" if log else "linear", **({"dtick": "D2"} if log else {}))
    figure.update_yaxes(**axis)
    title = f"memory, MiB ({where})" if where else "memory, MiB"
    figure.update_xaxes(title_text=title, row=len(found) or 1, col=1)


def _traces(panel: Panel, legend: bool) -> Iterator[Any]:
    front = {id(m) for m in panel.front}
    off = [m for m in panel.searched if id(m) not in front]
    if off:
        yield _marks(off, "searched", {"size": 6, "color": tint(BLUE, 0.35)}, legend)
    if panel.presets:
        yield _line(panel.preset_front, MUTED, 1, "dash")
        mark = {"size": 9, "symbol": "diamond", "color": PAPER, "line": {"color": MUTED, "width": 1.5}}
        yield _marks(panel.presets, "preset", mark, legend, errors=MUTED)
    if panel.front:
        yield _line(panel.front, BLUE, 2.2, "solid")
        yield _marks(panel.front, "front of the search", {"size": 9, "color": BLUE}, legend, errors=BLUE)
    if panel.knee:
        mark = {"size": 18, "color": "rgba(0,0,0,0)", "line": {"color": RED, "width": 2.2}}
        yield _marks([panel.knee], "knee", mark, legend)


def _line(members: Sequence[Measured], colour: str, width: float, dash: str) -> Any:
    from plotly.graph_objects import Scatter

    line = {"shape": "hv", "color": colour, "width": width, "dash": dash}
    return Scatter(**_xy(members), mode="lines", line=line, hoverinfo="skip", showlegend=False)


def _marks(members: Sequence[Measured], name: str, mark: dict[str, Any], legend: bool, errors: str = "") -> Any:
    from plotly.graph_objects import Scatter

    extra: dict[str, Any] = {}
    if errors:
        sizes = [m.standard_error if math.isfinite(m.standard_error) else 0 for m in members]
        extra["error_y"] = {"array": sizes, "color": tint(errors, 0.45), "thickness": 3, "width": 0}
    if name == "preset":
        extra |= {"text": [m.label for m in members], "textposition": "middle right", "textfont": {"size": 11}}
    return Scatter(
        **_xy(members),
        mode="markers+text" if name == "preset" else "markers",
        name=name,
        marker=mark,
        showlegend=legend,
        customdata=[[_key(m), _hover(m)] for m in members],
        hovertemplate="%{customdata[1]}<extra></extra>",
        **extra,
    )


def _xy(members: Sequence[Measured]) -> dict[str, list[float]]:
    return {"x": [m.memory_bytes / MIB for m in members], "y": [m.perplexity for m in members]}


def _key(measured: Measured) -> str:
    return f"{measured.first.weights} {measured.first.config.hash} {measured.first.tokens} {measured.first.supernet}"


def _hover(measured: Measured) -> str:
    """What a pointer resting on a mark shows; the YAML is cut where it would not fit."""
    first = measured.first
    yaml = first.config.to_yaml().splitlines()
    shown = [*yaml[:16], f"… {len(yaml) - 16} lines more: click"] if len(yaml) > 18 else yaml
    lines = [f"<b>{escape(measured.label)}</b>", *(f"{name}: {text}" for name, text in _facts(measured).items())]
    code = "<br>".join(escape(line).replace(" ", "&nbsp;") for line in shown)
    return "<br>".join(lines) + f'<br><span style="font-family:monospace;font-size:11px;color:{MUTED}">{code}</span>'


def _facts(measured: Measured) -> dict[str, str]:
    memory = measured.first.memory
    error = f" ± {measured.standard_error:.3f}" if math.isfinite(measured.standard_error) else ""
    facts = {
        "memory": f"{format_bytes(memory.memory_bytes)} ({memory.memory_bytes:,} bytes)",
        "weights": f"{format_bytes(memory.weight_bytes)} ({memory.unique_params:,} parameters)",
        "KV cache": f"{format_bytes(memory.kv_cache_bytes)} ({memory.kv_bytes_per_token:,} bytes a token)",
        "perplexity": f"{measured.perplexity:.3f}{error}",
        "bits per byte": f"{measured.bits_per_byte:.4f}",
        "training": f"{measured.first.weights}, {measured.first.tokens:,} tokens",
    }
    if len(measured.evaluations) > 1:
        facts["seeds"] = (
            f"{len(measured.evaluations)}, perplexity {min(measured.perplexities):.3f} to {max(measured.perplexities):.3f}"
        )
    return facts


def _details(found: Sequence[Panel], shape: ModelShape | None, spec: MemorySpec | None) -> dict[str, dict[str, Any]]:
    """What a click shows, by `_key`: name, facts, YAML, and the drawing of the first `DRAWN` that matter."""
    ranked = [m for panel in found for m in (*panel.front, *panel.presets)]
    ranked += [m for panel in found for m in panel.searched]
    details: dict[str, dict[str, Any]] = {}
    for m in ranked:
        drawn = shape is not None and len(details) < DRAWN
        svg = sharing_svg(shape, m.first.config, spec, m.label) if shape is not None and drawn else ""
        details.setdefault(
            _key(m),
            {"name": m.label, "hash": m.first.config.hash, "facts": _facts(m), "yaml": m.first.config.to_yaml(), "svg": svg},
        )
    return details


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%title%</title>
<style>
body { margin: 0 auto; max-width: 1100px; padding: 12px 16px 40px; color: %ink%; background: #fff;
       font: 14px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 18px; margin: 4px 0 2px; }
h2 { font-size: 15px; margin: 18px 0 6px; border-top: 1px solid %faint%; padding-top: 14px; }
p { margin: 0 0 6px; color: %muted%; font-size: 13px; }
#config { display: grid; grid-template-columns: minmax(240px, 1fr) minmax(240px, 1fr); gap: 4px 28px; }
table { border-collapse: collapse; font-size: 13px; align-self: start; }
td { padding: 2px 14px 2px 0; vertical-align: top; }
td:first-child { color: %muted%; white-space: nowrap; }
pre { margin: 0; font: 12px/1.45 ui-monospace, Menlo, Consolas, monospace; overflow: auto; max-height: 340px; }
#drawing { grid-column: 1 / -1; }
#drawing svg { max-width: 100%; height: auto; }
@media (max-width: 620px) { #config { grid-template-columns: 1fr; } }
</style>
</head>
<body>
<h1>%title%</h1>
<p>Lower and further left is better. Rest on a point for its figures, click it for its config.</p>
%plot%
<h2 id="name"></h2>
<div id="config"><table id="facts"></table><pre id="yaml"></pre><div id="drawing"></div></div>
<script type="application/json" id="details">%details%</script>
<script>
(function () {
  const details = JSON.parse(document.getElementById("details").textContent);
  const part = id => document.getElementById(id);
  function show(key) {
    const one = details[key];
    if (!one) return;
    part("name").textContent = one.name === one.hash ? one.name : one.name + " (" + one.hash + ")";
    part("facts").replaceChildren(...Object.entries(one.facts).map(pair => {
      const row = document.createElement("tr");
      row.append(...pair.map(text => Object.assign(document.createElement("td"), { textContent: text })));
      return row;
    }));
    part("yaml").textContent = one.yaml;
    part("drawing").innerHTML = one.svg;
  }
  const front = document.getElementById("front");
  if (front.on) front.on("plotly_click", event => show(event.points[0].customdata[0]));
  const knee = (front.data || []).find(trace => trace.name === "knee");
  show(knee ? knee.customdata[0][0] : Object.keys(details)[0]);
})();
</script>
</body>
</html>
"""
