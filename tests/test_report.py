"""Laws of `nas.report`: a picture says what the plan says, a front is `nas.pareto`'s, and a table can be read back."""

import csv
import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from rich.console import Console

from nas import pareto
from nas.config import format_bytes
from nas.errors import UserError
from nas.presets import presets
from nas.report import page
from nas.report.front import draw_agreement, draw_front, draw_progress, draw_tree, front_figure, tree_figure
from nas.report.measured import by_config, panels
from nas.report.page import front_page
from nas.report.sharing import COLUMNS, SharingDrawing, draw_sharing, sharing_svg
from nas.report.style import BLUE, LAYERS, MIB, PERPLEXITY, PERPLEXITY_ERROR, ink_on, log_ticks, short_tick
from nas.report.tables import front_csv, front_table, markdown_table, terminal_table
from nas.report.terminal import sharing_view
from nas.report.write import Report, command_without_folders, without_folders, write_report
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.picture import NORM_PARTS, bytes_by_part, picture
from nas.sharing.plan import ATTENTION, ATTENTION_NORM, FFN, FFN_NORM, MATRICES, ROUTER, Plan
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.training.evaluation import Evaluation, Losses, measure_losses

SPEC = MemorySpec(context=128, batch=2)
LARGE = ModelShape(vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336)
SVG = "{http://www.w3.org/2000/svg}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
Origins = dict[str, set[tuple[str, int | None]]]
"""How a layer comes by each of its parts, and the layer that owns them."""


def shape_of(depth: int) -> ModelShape:
    return replace(tiny.MHA, num_hidden_layers=depth, tie_word_embeddings=depth != 2, max_position_embeddings=256)


@cache
def configs(depth: int) -> dict[str, SharingConfig]:
    """Every preset, and configs in which every primitive occurs."""
    named = dict(presets(shape_of(depth)))
    spelled = [c for c in tiny.configs(shape_of(depth), 30 if depth == 6 else 8) if c not in named.values()]
    return named | {f"random-{n}": config for n, config in enumerate(spelled)}


def everything() -> Iterator[tuple[ModelShape, SharingConfig]]:
    """Every distinct config of two depths."""
    for depth in (2, 6):
        yield from ((shape_of(depth), config) for config in dict.fromkeys(configs(depth).values()))


@pytest.fixture(scope="module")
def measured() -> list[Evaluation]:
    """Presets and random configs, evaluated: two seeds retrained, and on the weights of two sub-supernets.

    Untrained weights are equally bad at every size, so perplexity is raised where memory is low, to make a front with a bend.
    """
    shape, some = shape_of(4), ("dense", "sequence-2", "mobilellm-ls", "cla-2", "mqa")
    spelled = [c for c in tiny.configs(shape, 14) if c not in dict(presets(shape)).values()]
    named = [pair for n, pair in enumerate(presets(shape)) if n % 5 == 1 or pair[0] in some]
    named += [("", config) for config in spelled]
    windows = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(0))
    whole = measure(shape, named[0][1], SPEC).memory_bytes
    found = []
    for seed in (0, 1):
        net = tiny.supernet(shape, seed)
        for number, (name, config) in enumerate(named):
            losses, memory = measure_losses(net.subnet(config), windows, autocast=False), measure(shape, config, SPEC)
            nats = 4 + losses.loss_nats_per_token / 1000 + (1 - memory.memory_bytes / whole) ** 2 / 20
            losses = Losses(nats, math.exp(nats), math.exp(nats) / 500)
            found.append(Evaluation(config, memory, losses, nats, "retrained", seed, 1000, 0.5, number, name))
            found.append(Evaluation(config, memory, losses, nats, "inherited", 0, 5000, 0.1, number, name, f"0-{seed}"))
    return found


@pytest.fixture(scope="module")
def retrained(measured: list[Evaluation]) -> list[Evaluation]:
    return [e for e in measured if e.weights == "retrained"]


def png_size(path: Path) -> tuple[int, int]:
    pixels = np.asarray(imread(path))
    assert pixels.std() > 0
    return pixels.shape[1], pixels.shape[0]


# Who shares what


def short(slot: str) -> str:
    return slot.rpartition(".")[2].removesuffix("_proj")


def planned(plan: Plan, i: int) -> Origins:
    """The origins of layer i's parts, read from the plan."""
    layer = plan.layers[i]
    said: Origins = {}
    for n, slot in enumerate((*MATRICES, ROUTER)):
        owner, factor = layer.owners[n], layer.factors[n] if slot in MATRICES else None
        mixed = factor is not None and owner == i != factor.at
        how = "none" if owner is None else "mixed" if mixed else "own" if owner == i else "tied"
        said[short(slot)] = {(how, factor.at if mixed and factor else owner)}
    names = {part: [short(slot) for slot in slots] for part, slots in (("attention", ATTENTION), ("FFN", FFN))}
    if layer.attn_map is not None:
        said |= {name: {("map", layer.attn_map)} for name in ("q", "k")}
    if layer.owner(ATTENTION[0]) == i and layer.heads:
        said |= {name: {("own" if at == i else "tied", at) for at, _ in layer.heads} for name in names["attention"]}
    said |= {name: {("dropped", None)} for name in names["attention"] if not layer.has_attention}
    said |= {name: {("dropped", None)} for name in names["FFN"] if not layer.has_ffn}
    sides = (
        ("K", layer.k),
        ("V", layer.v),
        *((n, layer.owner(s)) for n, s in zip(NORM_PARTS, (ATTENTION_NORM, FFN_NORM), strict=True)),
    )
    for name, owner in sides:
        said[name] = {("none" if owner is None else "own" if owner == i else "tied", owner)}
    return {name: pairs for name, pairs in said.items() if name not in ("router", *NORM_PARTS) or pairs != {("none", None)}}


TIPS = {
    "mixed": r"its own (?P<parts>.+) of what layer (?P<owner>\d+) keeps",
    "map": r"the softmax map of layer (?P<owner>\d+)",
    "own": r"its own (?P<parts>[^,]+)",
    "dropped": r"no (?P<parts>.+): not run",
    "none": r"no (?P<parts>.+)",
    "tied": r"(?P<parts>.+) of layer (?P<owner>\d+)",
}


Box = tuple[int, str, tuple[str, ...], int | None, FancyBboxPatch]
"""Layer, origin, parts, owner and patch of a box of a drawing, as its tip says."""

TOGETHER = [[short(slot) for slot in ATTENTION], [*map(short, FFN), "router"], ["K", "V"]]
"""Parts of which one arrow tells."""


def boxes(figure: Figure) -> list[Box]:
    found = []
    for box in figure.findobj(FancyBboxPatch):
        match = re.match(r"layer (\d+): (.+)", box.get_gid() or "")
        if match:
            how, said = next((how, m) for how, tip in TIPS.items() if (m := re.match(tip, match[2])))
            parts = said.groupdict().get("parts", "q k")
            names = (parts,) if parts in NORM_PARTS else tuple(parts.split())
            owner = said.groupdict().get("owner", match[1] if how == "own" else None)
            found.append((int(match[1]), how, names, None if owner is None else int(owner), box))
    return found


def test_a_drawing_shows_the_plan_and_no_two_look_the_same() -> None:
    """Which single heads are tied only the tips say, and no text of a terminal."""
    drawn: dict[Any, SharingConfig] = {}
    printed: dict[Any, SharingConfig] = {}
    for shape, config in everything():
        drawing = SharingDrawing(picture(shape, config, SPEC, "one"))
        check_boxes(shape, config, boxes(drawing.figure))
        check_arrows(config.resolve(shape), drawing)
        check_words(drawing.figure)
        words = *(text.get_text() for text in drawing.figure.texts), *(box[-1].get_gid() for box in boxes(drawing.figure))
        assert drawn.setdefault((shape, words), config) == config
        text = ascii_text(shape, config)
        check_text(shape, config, text)
        if not any("heads" in dict(layer) for layer in config.layers):
            assert printed.setdefault((shape, text.partition("| part")[0].partition("\n")[2]), config) == config


def check_boxes(shape: ModelShape, config: SharingConfig, found: list[Box]) -> None:
    """Each box says whose its parts are, in the colour of the owner's box; the cache is as wide as its heads."""
    plan = config.resolve(shape)
    for i, layer in enumerate(plan.layers):
        said: Origins = {}
        for at, how, parts, owner, _ in found:
            for part in parts if at == i else ():
                said.setdefault(part, set()).add((how, owner))
        assert said == planned(plan, i)
        for _, _, parts, owner, box in (b for b in found if b[0] == i and b[2][0] in "KV"):
            source = layer if owner is None else plan.layers[owner]
            heads = shape.num_key_value_heads if owner is None else source.k_heads if parts[0] == "K" else source.v_heads
            full = COLUMNS["KV cache"] if len(parts) == 2 else COLUMNS["KV cache"] / 2 - 1
            assert box.get_width() == pytest.approx(full * heads / shape.num_key_value_heads)
    for at, how, parts, owner, box in found:
        home = {to_hex(b.get_facecolor()) for i, h, p, _, b in found if i == owner and h == "own" and {*p} & {*parts}}
        if how == "own":
            used = any(i != owner == o and {*p} & {*parts} for i, _, p, o, _ in found)
            assert (to_hex(box.get_facecolor()) in LAYERS) == used, at
        elif owner is not None:
            assert to_hex(box.get_edgecolor()) in (home or LAYERS)


def check_arrows(plan: Plan, drawing: SharingDrawing) -> None:
    """Every shared part has one, and no two links lie on each other."""
    expected = []
    for i, names in itertools.product(range(len(plan.layers)), TOGETHER):
        owners = {j for name, pairs in planned(plan, i).items() if name in names for _, j in pairs} - {None, i}
        expected += [(owner, i) for owner in owners]
    lines = drawing.figure.findobj(Line2D)
    heads = [(int(line.get_gid()[11:]), y) for line in lines if line.get_gid() for y in line.get_ydata()]
    middles = np.array(drawing.layers)
    assert all(np.abs(middles - y).min() < drawing.height / 2 for _, y in heads)
    assert sorted((source, int(np.abs(middles - y).argmin())) for source, y in heads) == sorted(expected)
    trunks = [(line.get_xdata(), line.get_ydata()) for line in lines if line.get_linewidth() == 1.1]
    for (x, y), (other_x, other_y) in itertools.combinations(trunks, 2):
        assert x[1] != other_x[1] or max(y) < min(other_y) or max(other_y) < min(y)
        assert x[0] != other_x[0] or not {*y} & {*other_y}


def check_words(figure: Figure) -> None:
    check_apart({(n, text.get_text()): text for n, text in enumerate(figure.texts) if text.get_text()}, figure, trim=1)


def test_no_words_overlap_or_leave_the_picture_of_a_deep_model() -> None:
    deep = [(shape_of(12), c, SPEC) for c in [*configs(12).values()][::6]]
    deep += [(LARGE, c, MemorySpec(131072, 8)) for _, c in [*presets(LARGE)][::16]]
    for shape, config, spec in deep:
        check_words(SharingDrawing(picture(shape, config, spec)).figure)


def check_apart(texts: dict[Any, Any], figure: Figure, trim: float = 0) -> None:
    """No text lies over another (but for `trim` pixels of air above and below) or outside the figure."""
    extents = [(name, *text.get_window_extent().extents) for name, text in texts.items()]
    width, height = figure.get_size_inches() * figure.dpi
    for name, left, low, right, high in extents:
        assert min(left, low, width - right, height - high) >= 0, name
    extents.sort(key=lambda box: box[2])
    for n, a in enumerate(extents):
        for b in extents[n + 1 :]:
            if b[2] >= a[4] - 2 * trim:
                break
            assert a[3] <= b[1] or b[3] <= a[1], f"{a[0]} lies over {b[0]}"


def sharing_text(shape: ModelShape, config: SharingConfig, console: Console) -> str:
    with console.capture() as captured:
        console.print(sharing_view(shape, config, SPEC))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def ascii_text(shape: ModelShape, config: SharingConfig) -> str:
    """What a terminal without UTF-8 gets."""
    console = Console(file=TextIOWrapper(BytesIO(), encoding="ascii"), width=220)
    return sharing_text(shape, config, console).encode("ascii").decode()


def check_text(shape: ModelShape, config: SharingConfig, text: str) -> None:
    """A line a layer says what the plan does."""
    plan, rows = config.resolve(shape), picture(shape, config, SPEC).rows
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if re.match(r"\|\s*\d+ \|", line)]
    assert [int(row[0]) for row in cells] == list(range(len(rows)))
    for i, (_, attention, ffn, keys_values, *also, weights, cached) in enumerate(cells):
        layer = plan.layers[i]
        for cell, segments, norm in zip((attention, ffn), (rows[i].attention, rows[i].ffn), rows[i].norms, strict=True):
            said = [("# " if s.how == "own" else "") + s.text for s in segments if s.text]
            apart = norm not in (i, None) and {s.owner for s in segments if s.text} != {norm}
            assert cell == ", ".join((*said, *([f"norm = layer {norm}"] if apart else [])))
        assert _kv_in(keys_values, i) == (layer.k, layer.v, layer.k_heads, layer.v_heads)
        _check_also(" ".join(also), plan, i)
        assert (weights, cached) == tuple(format_bytes(n) if n else "-" for n in (rows[i].weight_bytes, rows[i].kv_cache_bytes))


def _kv_in(text: str, layer: int) -> tuple[int | None, int | None, int, int]:
    """The layers whose keys and values a cell says are read, and the heads of its own."""
    if text == "none":
        return None, None, 0, 0
    if match := re.fullmatch(r"= layer (\d+)", text):
        return int(match[1]), int(match[1]), 0, 0
    if match := re.fullmatch(r"#+ +(\d+) heads?", text):
        return layer, layer, int(match[1]), int(match[1])
    sides = {name: (sign, int(number)) for name, sign, number in re.findall(r"([KV]) (= )?(\d+)", text)}
    read = {name: number if sign else layer for name, (sign, number) in sides.items()}
    made = {name: 0 if sign else number for name, (sign, number) in sides.items()}
    return read.get("K"), read["V"], made.get("K", 0), made["V"]


def _check_also(text: str, plan: Plan, i: int) -> None:
    """What is in no box is in words."""
    layer = plan.layers[i]
    own_ffn = layer.owner(FFN[0]) == i
    delta = layer.delta and any(layer.owner(slot) not in (None, i) for slot in MATRICES)
    some = [f for f in layer.factors if f and f.kind == "dictionary" and len(f.used) < f.size]
    for words, there in {
        f"window {layer.window}": layer.window is not None and layer.attn_map is None,
        "earlier tokens": layer.reads_later_layer(i),
        f"from layer {layer.kv_input}'s output": layer.kv_input is not None,
        f"{100 * layer.value_residual:g}% of layer 0's V": bool(layer.value_residual),
        f"delta of rank {layer.delta}": bool(delta),
        "atoms": bool(some) and any(layer.owner(slot) == i for slot, f in zip(MATRICES, layer.factors, strict=True) if f in some),
        f"width {layer.width}": own_ffn and layer.width != 48 and bool(layer.experts or any(layer.factors[4:])),
    }.items():
        assert (words in text) == there, words


def test_a_narrow_terminal_cuts_no_word() -> None:
    names = ("dense", "masa-2", "svformer", "moeut-2", "swiftkv-3x2", "random-0", "random-1", "random-2")
    for name, width in itertools.product(names, (80, 120)):
        shape, config = shape_of(6), configs(6)[name]
        console = Console(file=TextIOWrapper(BytesIO(), encoding="utf-8"), width=width, force_terminal=True, color_system=None)
        text = sharing_text(shape, config, console)
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        for row in picture(shape, config, SPEC).rows:
            for words in (row.also, row.reads, *(segment.text for segment in (*row.attention, *row.ffn))):
                assert {*words.split()} <= {*text.replace(",", " ").split(), *text.split()}


def test_parts_add_up_to_the_memory() -> None:
    for shape, config in everything():
        rows, memory = bytes_by_part(shape, config, SPEC), measure(shape, config, SPEC)
        dense = {row["part"]: row for row in bytes_by_part(shape, SharingConfig.dense(shape), SPEC)}
        assert sum(row["params"] for row in rows) == memory.unique_params
        assert sum(row["bytes"] for row in rows) == memory.memory_bytes
        assert "other" not in {row["part"] for row in rows}
        assert {row["part"]: row["bytes"] for row in rows}["KV cache"] == memory.kv_cache_bytes
        for row in rows:
            known = dense.get(row["part"], {"bytes": 0})["bytes"]
            assert row["share_of_dense"] == (row["bytes"] / known if known else None)
        content = picture(shape, config, SPEC)
        outside = sum(row["bytes"] for row in rows if row["part"] in ("embedding", "head")) + 2 * shape.hidden_size
        assert sum(r.weight_bytes for r in content.rows) == memory.weight_bytes - outside
        assert sum(r.kv_cache_bytes for r in content.rows) == memory.kv_cache_bytes
        sizes = memory.weight_bytes, memory.kv_cache_bytes, memory.memory_bytes
        assert [cost.value for cost in content.costs[:3]] == [format_bytes(n) for n in sizes]
        json.dumps(rows)


def test_files_of_a_drawing(tmp_path: Path) -> None:
    """The same bytes each time, a PNG of twice the size, and an SVG with its texts and tips."""
    shape = shape_of(4)
    config = dict(presets(shape))["mobilellm-ls"]
    png = [draw_sharing(shape, config, tmp_path / "deep" / f"{n}.png", SPEC) for n in range(2)]
    size = SharingDrawing(picture(shape, config, SPEC)).figure.get_size_inches() * 100
    assert png_size(png[0]) == tuple(2 * size.astype(int))
    assert png[0].read_bytes() == png[1].read_bytes()
    svg = draw_sharing(shape, config, tmp_path / "one.svg", SPEC, name="a & b <c>").read_text()
    assert "a & b <c>" in [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert "layer 1: q k v o of layer 0" in [title.text for title in ElementTree.fromstring(svg).iter(f"{SVG}title")]
    assert svg.endswith(sharing_svg(shape, config, SPEC, "a & b <c>"))


def test_other_formats_are_refused(tmp_path: Path, measured: list[Evaluation]) -> None:
    config = measured[0].config
    draws: Sequence[Callable[[Path], Path]] = (
        lambda p: draw_sharing(shape_of(4), config, p),
        lambda p: draw_front(measured, p),
        lambda p: draw_tree({"name": "0"}, p),
    )
    for draw, name in itertools.product(draws, ("one.gif", "one")):
        with pytest.raises(UserError, match=r"use \.png or \.svg"):
            draw(tmp_path / name)


def test_terminal_colours_follow_the_console() -> None:
    shape, config = shape_of(6), configs(6)["sequence-2"]
    plain = sharing_text(shape, config, Console(file=TextIOWrapper(BytesIO(), encoding="utf-8"), width=100))
    console = Console(file=TextIOWrapper(BytesIO(), encoding="utf-8"), force_terminal=True, color_system="truecolor", width=100)
    coloured = sharing_text(shape, config, console)
    assert "\x1b" not in plain
    assert "■" in plain
    assert "\x1b[38;2;" in coloured
    assert [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", coloured).splitlines()] == plain.splitlines()


def test_words_stand_out_from_their_colour() -> None:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in LAYERS:
        light, dark = sorted((luminance(colour), luminance(ink_on(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


# The front


def test_front_in_the_figure_is_paretos(measured: list[Evaluation]) -> None:
    figure = front_figure(panels(measured), "both", (900, 800))
    assert len(figure.axes) == 2
    for axes, kind in zip(figure.axes, ("retrained", "inherited"), strict=True):
        groups: dict[tuple[str, str], dict[int, Evaluation]] = {}
        for e in (e for e in measured if e.weights == kind):
            groups.setdefault((e.config.hash, e.supernet), {}).setdefault(e.seed, e)
        points = [(g[0].memory.memory_bytes, sum(e.losses.perplexity for e in g.values()) / len(g)) for g in groups.values()]
        expected = [points[i] for i in pareto.front([(float(x), y) for x, y in points])]
        (line,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post" and line.get_color() == BLUE]
        drawn = [(round(x * MIB), y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
        assert np.array(drawn) == pytest.approx(np.array(expected))
        assert len(expected) > 2
        assert f"{kind} weights" in axes.get_title(loc="left")
    shuffled = panels(random.Random(3).sample(measured, len(measured)))
    assert [[m.point for m in p.front] for p in shuffled] == [[m.point for m in p.front] for p in panels(measured)]


def test_the_knee_and_the_fronts_presets_are_named_and_no_label_covers_another(retrained: list[Evaluation]) -> None:
    (panel,) = panels(retrained)
    assert panel.knee is not None
    points = [m.point for m in panel.all]
    assert panel.knee.point == points[pareto.knee(points)]
    for size in ((900, 560), (1200, 700)):
        figure = front_figure([panel], "A title", size)
        texts = {text.get_text(): text for text in (*figure.texts, *figure.axes[0].texts) if text.get_text()}
        assert any(text.startswith("knee") and format_bytes(panel.knee.memory_bytes) in text for text in texts)
        named = [m for m in panel.presets if any(m.names[0] in text for text in texts)]
        for m in (*panel.front, *panel.preset_front, panel.dense):
            assert m is not None
            assert not m.names or m in named, m.label
        assert len(named) > len(panel.presets) / 2
        check_apart(texts, figure)


def test_figure_has_the_asked_size_and_the_same_bytes(
    measured: list[Evaluation], retrained: list[Evaluation], tmp_path: Path
) -> None:
    assert png_size(draw_front(measured, tmp_path / "front.png", "A price of $5 and $6", (700, 500))) == (1400, 1000)
    assert png_size(draw_front(retrained, tmp_path / "one.png")) == (1800, 1120)
    svg = draw_front(retrained, tmp_path / "front.svg").read_bytes()
    ElementTree.fromstring(svg)
    assert draw_front(retrained, tmp_path / "again.svg").read_bytes() == svg


def test_few_evaluations_are_drawn_too(retrained: list[Evaluation], tmp_path: Path) -> None:
    for few in (retrained[:0], retrained[:1], retrained[:2]):
        assert draw_front(few, tmp_path / "front.png").stat().st_size > 5000
        assert "<html" in front_page(few)
        assert len(front_table(few)) == len(by_config(few))
    one_preset = [e for e in retrained if e.config.is_dense or e.config not in dict(presets(shape_of(4))).values()]
    for some, drawn in ((retrained, True), (one_preset, False)):  # a line of one point is none, nor has it a legend
        legend = {text.get_text() for text in front_figure(panels(some), "", (900, 560)).legends[0].get_texts()}
        assert ("presets alone" in legend) == drawn == ("presets alone" in front_page(some))
    nothing = Report("Nothing", "nas search x.yaml", shape_of(4), SPEC, [])
    assert "Nothing has been evaluated" in write_report(tmp_path, nothing).read_text()


def test_a_broken_model_leaves_the_others_room(retrained: list[Evaluation]) -> None:
    """Perplexity is on a logarithmic scale then, in the picture and on the page."""
    first, *rest = retrained
    worst = 20 * max(e.losses.perplexity for e in rest)
    broken = replace(first, losses=replace(first.losses, loss_nats_per_token=math.log(worst), perplexity=worst))
    for evaluations, scale in ((retrained, "linear"), ([broken, *rest], "log")):
        found = panels(evaluations)
        drawn = front_figure(found, "", (900, 560))
        assert drawn.axes[0].get_yscale() == scale
        assert page._figure(found).layout.yaxis.type == scale
    assert [short_tick(tick) for tick in (7, 30, 2000, 50_000, 200_000, 1e13)] == ["7", "30", "2000", "5e4", "2e5", "1e13"]
    low, high = drawn.axes[0].get_ylim()
    shown = [m.perplexity for m in found[0].all]
    assert low < min(shown) < max(shown) < high


def test_presets_that_coincide_are_one_mark_under_both_names(retrained: list[Evaluation]) -> None:
    named = dict(presets(shape_of(4)))
    both = [name for name, config in named.items() if config == named["mobilellm-ls"]]
    assert len(both) > 1
    (m,) = [m for m in by_config(retrained) if "mobilellm-ls" in m.names]
    assert list(m.names) == both
    assert [e.seed for e in m.evaluations] == [0, 1]


def test_another_seed_changes_the_spread_and_not_the_standard_error(retrained: list[Evaluation]) -> None:
    one, other = (e for e in retrained if e.name == "dense")
    far = replace(other, losses=Losses(9.0, one.losses.perplexity + 2, one.losses.perplexity_standard_error))
    (m,) = by_config([one, far])
    assert m.perplexity == pytest.approx(one.losses.perplexity + 1)
    assert m.spread == pytest.approx(math.sqrt(2))
    assert m.standard_error == pytest.approx(one.losses.perplexity_standard_error)
    assert math.isnan(by_config([one])[0].spread)


def with_windows(evaluations: Sequence[Evaluation], noise: float, count: int = 40) -> list[Evaluation]:
    """The same, with losses of windows that have their mean: some are hard for all, and each config has a noise of its own."""
    hard, found = np.random.default_rng(0).normal(0, 0.5, count), []
    for n, e in enumerate(evaluations):
        rows = hard + np.random.default_rng(n + 1).normal(0, noise, count)
        found.append(replace(e, windows=tuple(math.log(e.losses.perplexity) + rows - rows.mean())))
    return found


def test_a_front_is_as_certain_as_its_differences(retrained: list[Evaluation]) -> None:
    for noise in (1e-6, 0.01, 1.0):
        (panel,) = panels(with_windows(retrained, noise))
        for before, m in itertools.pairwise(panel.front):
            assert panel.neighbour(m) is before
        assert panel.neighbour(panel.front[0]) is None
        for m in panel.all:
            neighbour, (dense, found) = panel.neighbour(m), panel.differences(m)
            assert (found is None) == (neighbour is None)
            assert (dense is None) == (m is panel.dense)
            if neighbour and found:
                assert neighbour.memory_bytes <= m.memory_bytes
                smaller = [o.perplexity for o in panel.front if o is not m and o.memory_bytes <= m.memory_bytes]
                assert neighbour.perplexity == min(smaller)
                rows = np.array([a.windows for a in m.evaluations]) - [b.windows for b in neighbour.evaluations]
                assert found.mean == pytest.approx(rows.mean())
                assert found.windows_standard_error == pytest.approx(rows.mean(0).std(ddof=1) / math.sqrt(rows.shape[1]))
                assert found.seeds == len(m.evaluations) > 1
                ends = panel.whisker(m)
                assert ends is not None
                within = ends[0] <= m.perplexity * math.exp(-found.mean) <= ends[1]
                assert panel.is_noise(m) == within or m.perplexity == pytest.approx(neighbour.perplexity)
    noisy = {noise: sum(map(p.is_noise, p.front)) for noise in (1e-6, 1.0) for p in panels(with_windows(retrained, noise))}
    assert noisy[1.0] > noisy[1e-6]


def test_noise_is_marked_where_windows_were_kept(retrained: list[Evaluation], tmp_path: Path) -> None:
    known = with_windows(retrained, 0.01)
    (panel,) = panels(known)
    noise = [m for m in panel.front if panel.is_noise(m)]
    sure = [m for m in panel.front[1:] if not panel.is_noise(m)]
    assert noise
    assert sure
    rows = {row["name"]: row for row in front_table(known)}
    for m in panel.all:
        cell = rows[m.label]["perplexity vs neighbour"]
        assert cell.startswith("≈") == panel.is_noise(m)
        assert (cell == "") == (panel.neighbour(m) is None)
    lines = panel.noise()
    assert [line.split(" ")[0] for line in lines] == [m.label.split(" ")[0] for m in noise]
    for m, line in zip(noise, lines, strict=True):
        _, found = panel.differences(m)
        assert found is not None
        windows = found.windows_needed()
        assert (f"`evaluate.final_windows: {windows}`" in line) == (windows is not None)
        assert windows is None or windows > found.windows
        assert ("neither windows nor seeds" in line) == (found.windows_needed() is found.seeds_needed() is None)
    report = Report("Noise", "nas search x.yaml", shape_of(4), SPEC, known)
    assert all(line in write_report(tmp_path, report).read_text() for line in lines)
    figure, plain = (front_figure(panels(some), "", (900, 560)) for some in (known, retrained))
    words = [{text.get_text() for text in drawn.legends[0].get_texts()} for drawn in (figure, plain)]
    assert ["front, within noise" in said for said in words] == [True, False]
    assert [axes.get_ylabel() for drawn in (figure, plain) for axes in drawn.axes] == [PERPLEXITY, PERPLEXITY_ERROR]
    assert "within noise" in front_page(known)
    data = list(csv.DictReader(front_csv(known).splitlines()))
    assert tiny.read_csv(shape_of(4), front_csv(known)) == known
    for row, e in zip(data, known, strict=True):
        (m,) = [m for m in panel.all if m.first.config == e.config]
        for name, found in zip(("dense", "neighbour"), panel.differences(m), strict=True):
            said = row[f"loss_vs_{name}_nats_per_token"], row[f"loss_vs_{name}_standard_error"]
            assert said == (("", "") if found is None else (str(found.mean), str(found.standard_error)))
        assert row["within_noise"] == ("" if panel.neighbour(m) is None else str(panel.is_noise(m)))
    assert "within_noise" not in front_csv(retrained)
    assert not any("vs neighbour" in row for row in front_table(retrained))


@given(st.floats(1e-3, 1e5), st.floats(1.5, 1e5))
def test_log_ticks_lie_within(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert ticks == sorted(ticks)
    assert all(low <= tick <= low * factor for tick in ticks)
    assert factor < 5 or 1 <= len(ticks) <= 12


# The page


def test_page_needs_no_network(measured: list[Evaluation]) -> None:
    page = front_page(measured, "<Title>", shape_of(4), SPEC)
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*\s(?:src|href)\s*=", page)
    assert "<title>&lt;Title&gt;</title>" in page
    details = json.loads(re.findall(r'id="details">(.*?)</script>', page, re.S)[0])
    for m in (m for panel in panels(measured) for m in panel.all):
        mine = [d for d in details.values() if d["hash"] == m.first.config.hash and m.first.weights in d["facts"]["training"]]
        assert {one["yaml"] for one in mine} == {m.first.config.to_yaml()}
        assert any(f"{m.memory_bytes:,} bytes" in one["facts"]["memory"] for one in mine)
    drawn = {one["svg"] for one in details.values()}
    assert {sharing_svg(shape_of(4), m.first.config, SPEC, m.label) for m in panels(measured)[0].front[::4]} <= drawn


def test_the_pages_steps_are_drawn_above_the_whiskers(retrained: list[Evaluation]) -> None:
    """A step goes down where the whisker of its config stands, and would be hidden below it."""
    traces = page._figure(panels(retrained)).data
    steps = [n for n, trace in enumerate(traces) if trace.line.shape == "hv"]
    whiskers = [n for n, trace in enumerate(traces) if trace.mode == "lines" and trace.line.shape != "hv"]
    assert whiskers
    assert max(whiskers) < min(n for n in steps if traces[n].line.dash != "dash")
    assert not [trace for trace in traces if trace.error_y.array is not None]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_page_in_a_browser(measured: list[Evaluation], tmp_path: Path) -> None:
    """Every mark is there, nothing is asked of a network, and a click shows that point's config."""
    from playwright.sync_api import sync_playwright

    file = tmp_path / "front.html"
    file.write_text(front_page(measured, "A front", shape_of(4), SPEC), encoding="utf-8")
    asked: list[str] = []
    errors: list[str] = []
    found = panels(measured)
    assert found[0].knee is not None
    assert found[0].searched, "the first mark is one off the front"
    first = found[0].searched[0]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 1000})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(file.as_uri())
        page.wait_for_selector("#front .points path")
        assert page.locator("#front .points path").count() == sum(len(p.all) + (p.knee is not None) for p in found)
        assert f"{found[0].knee.memory_bytes:,} bytes" in page.locator("#facts").inner_text()
        names = page.locator("#front .annotation-text").all_text_contents()
        point = page.locator("#front .points path").first.bounding_box()
        assert point is not None
        page.mouse.click(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
        page.wait_for_function(
            "text => document.getElementById('facts').innerText.includes(text)", arg=f"{first.memory_bytes:,} bytes"
        )
        assert page.locator("#yaml").inner_text().strip() == first.first.config.to_yaml().strip()
        assert page.locator("#drawing svg").count() == 1
        browser.close()
    assert asked == [file.as_uri()]
    assert errors == []
    for panel in found:
        assert all(any(m.names[0] in name for name in names) for m in panel.front if m.names)


# Tables


def test_csv_can_be_read_back_and_has_the_named_columns(measured: list[Evaluation]) -> None:
    text = front_csv(measured)
    assert text.splitlines()[0].split(",") == list(measured[0].to_data())
    assert tiny.read_csv(shape_of(4), text) == measured
    one_window = replace(measured[0], losses=replace(measured[0].losses, perplexity_standard_error=math.nan))
    (back,) = tiny.read_csv(shape_of(4), front_csv([one_window]))
    assert math.isnan(back.losses.perplexity_standard_error)


def test_table_says_what_was_measured(retrained: list[Evaluation]) -> None:
    (panel,) = panels(retrained)
    rows, members = front_table(retrained), sorted(panel.all, key=lambda m: m.point)
    assert [row["name"] for row in rows] == [m.label for m in members]
    assert panel.dense is not None
    for row, m in zip(rows, members, strict=True):
        value, error = map(float, row["perplexity"].split(" ± "))
        assert value == pytest.approx(m.perplexity, abs=0.06)
        assert error == pytest.approx(m.standard_error, rel=0.06)
        assert row["memory"] == format_bytes(m.memory_bytes)
        saved = m.memory_bytes / panel.dense.memory_bytes - 1
        assert row["memory vs dense"] == ("" if m is panel.dense else f"{saved:+.0%}")
        assert row["place"] == ("knee" if m is panel.knee else "front" if m in panel.front else "")
        assert row["seeds"].startswith("2, spread ")
    assert [r for r in rows if r["place"]] == front_table(retrained, keep="front")
    kept = front_table(retrained, keep="presets")
    assert [r["name"] for r in kept] == [m.label for m in members if m.names or m in panel.front]


def test_columns_that_say_nothing_are_left_out(measured: list[Evaluation], retrained: list[Evaluation]) -> None:
    one_seed = [e for e in retrained if e.seed == 0 and e.name != "dense"]
    assert not {"seeds", "origin", "memory vs dense"} & front_table(one_seed)[0].keys()
    both = front_table(measured)
    assert {row["origin"] for row in both} == {"retrained", "inherited"}
    assert sum(row["place"] == "knee" for row in both) == 2
    assert front_table([]) == []


def test_terminal_table_fits_and_cuts_no_figure(retrained: list[Evaluation]) -> None:
    rows = front_table([replace(e, name=e.name and e.name[:12]) for e in retrained if e.seed == 0], keep="front")
    for width in (60, 80, 100, 140):
        console = Console(width=width, file=TextIOWrapper(BytesIO(), encoding="utf-8"))
        with console.capture() as captured:
            console.print(terminal_table(rows, "The front"))
        lines = captured.get().splitlines()
        assert "…" not in captured.get()
        assert all(len(line) <= width for line in lines)
        for row in rows:
            figures = [line for line in lines if row["memory"] in line and row["perplexity"] in line]
            assert any(row["name"].startswith(line.split()[0]) for line in figures), "a long name goes on in the next line"


def test_markdown_has_a_cell_for_every_column(measured: list[Evaluation]) -> None:
    rows = front_table(measured)
    table = markdown_table([row | {"name": "a|b"} for row in rows]).splitlines()
    assert len(table) == len(rows) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(rows[0]) + 1}
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == list(rows[0])
    assert len({len(line) for line in table}) == 1


# Splits, progress, report

DISTANCES = [[0.0, 0.9, 0.2, 0.8], [0.9, 0.0, 0.7, 0.1], [0.2, 0.7, 0.0, 0.9], [0.8, 0.1, 0.9, 0.0]]
OPTIONS = {"options": ["own", 0, 1, 2], "groups": [["own", 1], [0, 2]]}
SPLIT: dict[str, Any] = {"decision": "layer_3.kv", "distances": DISTANCES, "scores": {}, **OPTIONS}
HEADS = SPLIT | {"decision": "layer_2.kv_heads", "options": [4, 2, 1], "groups": [[4], [2], [1]], "distances": []}
INNER: dict[str, Any] = {"name": "0-0", "split": HEADS, "children": [{"name": f"0-0-{n}"} for n in range(3)]}
TREE: dict[str, Any] = {"name": "0", "split": SPLIT, "children": [INNER, {"name": "0-1"}]}


def test_tree_shows_every_node_and_every_group(tmp_path: Path) -> None:
    from nas.splitting import Split, SplitTree

    drawn = tree_figure(TREE)
    assert sorted(box.get_gid() for box in drawn.findobj(FancyBboxPatch)) == ["0", "0-0", "0-0-0", "0-0-1", "0-0-2", "0-1"]
    texts = {text.get_text(): text for text in drawn.axes[0].texts}
    assert {"own, 1", "0, 2", "4", "2", "1", "split by layer_3.kv", "split by layer_2.kv_heads", "4 sub-supernets"} <= {*texts}
    check_apart(texts, drawn)
    assert [text.get_text() for text in tree_figure({"name": "0"}).axes[0].texts] == ["one supernet, not split", "0"]
    grown = SplitTree().grow({"0": Split.from_data(SPLIT)})
    assert sorted(b.get_gid() for b in tree_figure(grown.to_data()).findobj(FancyBboxPatch)) == sorted(["0", *grown.leaves()])
    assert png_size(draw_agreement(grown.to_data()["split"], tmp_path / "split.png"))


def test_agreement_is_sorted_by_group_and_progress_has_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn is the matrix of the sorted options: within a group the near ones, here at most 0.2."""
    from matplotlib.axes import Axes

    seen: list[Any] = []
    original: Callable[..., Any] = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, data, **look: seen.append(data) or original(self, data, **look))
    path = draw_agreement(SPLIT, tmp_path / "agreement.png")
    drawn = np.array(seen[0])
    assert max(drawn[:2, :2].max(), drawn[2:, 2:].max()) <= 0.2 < 0.7 <= drawn[:2, 2:].min()
    assert png_size(path) == (800, 568)
    curves = {"search": [0.0, 1.0, 3.0], "random": [0.0, 0.5, 2.9], "empty": []}
    assert png_size(draw_progress(curves, tmp_path / "progress.png", (600, 300))) == (1200, 600)


def test_what_is_published_has_no_folder_of_a_machine() -> None:
    for text, shown in (
        ("file /home/me/my texts/a.txt, first 9 bytes; test: file ~/b.txt", "file a.txt, first 9 bytes; test: file b.txt"),
        ("folder /data/, text files: 2", "folder data/, text files: 2"),
        ("hf:Salesforce/wikitext at https://huggingface.co/a/b, 3/4 of it", None),
        ("trials/quickstart.yaml", None),
    ):
        assert without_folders(text) == (shown or text)
    typed = "nas search '/home/me/my trials/a.yaml' --runs=/runs --set='final.tasks=[/x/a.yaml, /y/b.yaml]'\nnas report trials/a"
    shown = "nas search a.yaml --runs=runs '--set=final.tasks=[a.yaml, b.yaml]'\nnas report trials/a"
    assert command_without_folders(typed) == shown
    assert command_without_folders("nas search /home/me/it's.yaml") == "nas search it's.yaml"  # damaged: no shell reads it


def test_report_says_what_made_it_and_is_the_same_each_time(measured: list[Evaluation], tmp_path: Path) -> None:
    words = {"text": "python", "seed": 0, "versions": {"torch": "2.13", "optuna": None}, "gpus": [], "odd": "a|b"}
    command, progress = "nas search trials/quickstart.yaml", {"search": [0.1, 0.2, 0.3]}
    report = Report("Quickstart", command, shape_of(4), SPEC, measured, words, TREE, progress)
    page, again = (write_report(tmp_path / "reports" / name, report) for name in ("one", "two"))
    text = page.read_text()
    linked = re.findall(r"\]\(([^)]+)\)", text)
    assert {"front.png", "evaluations.csv", "knee.svg", "progress.png", "split.svg", "agreement-0.png"} == {*linked}
    assert {file.name for file in page.parent.iterdir()} == {*linked, "README.md"}
    for said in (f"```\n{command}\n```", "1,000 training tokens, 2 seeds", "5,000 training tokens", "torch 2.13, optuna none"):
        assert said in text
    assert tiny.read_csv(shape_of(4), (page.parent / "evaluations.csv").read_text()) == measured
    assert "\n\n\n\n" not in text
    for file in page.parent.iterdir():
        assert file.read_bytes() == (again.parent / file.name).read_bytes(), file.name
