"""Laws of `nas.report`: a picture says what the plan says, a front is `nas.pareto`'s, and a table comes back as it went."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
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
from rich.console import Console

from nas import pareto
from nas.config import format_bytes, format_flops
from nas.errors import UserError
from nas.presets import presets
from nas.report import (
    Report,
    bytes_by_part,
    draw_agreement,
    draw_front,
    draw_progress,
    draw_sharing,
    draw_tree,
    front_csv,
    front_page,
    front_table,
    markdown_table,
    read_csv,
    sharing_svg,
    sharing_text,
    terminal_table,
    write_report,
)
from nas.report.front import front_figure
from nas.report.measured import by_config, panels
from nas.report.picture import picture
from nas.report.rows import NORM_PARTS
from nas.report.scene import Box, Line, Scene, Words, words_width
from nas.report.sharing import COLUMNS, scene
from nas.report.splits import tree_scene
from nas.report.style import BLUE, LAYERS, MIB, ink_on, log_ticks
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.plan import ATTENTION, ATTENTION_NORM, FFN, FFN_NORM, MATRICES, ROUTER, Plan
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.training.evaluation import Evaluation, Losses, measure_losses

SPEC = MemorySpec(context=128, batch=2)
SVG = "{http://www.w3.org/2000/svg}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def shape_of(depth: int) -> ModelShape:
    return replace(tiny.MHA, num_hidden_layers=depth, tie_word_embeddings=depth != 2, max_position_embeddings=256)


@cache
def configs(depth: int) -> dict[str, SharingConfig]:
    """Every preset, and configs in which every primitive has its turn."""
    spelled = tiny.configs(shape_of(depth), 30 if depth == 6 else 8)
    named = dict(presets(shape_of(depth)))
    return named | {f"random-{n}": config for n, config in enumerate(c for c in spelled if c not in named.values())}


CONFIGS = [pytest.param(d, c, id=f"{d}-{name}") for d in (2, 6) for name, c in configs(d).items()]
SOME = ("dense", "sequence-2", "mobilellm-ls", "cla-2", "mqa")


def some_presets(shape: ModelShape) -> list[tuple[str, SharingConfig]]:
    """A fifth of the presets, and a few by name."""
    return [pair for n, pair in enumerate(presets(shape)) if n % 5 == 1 or pair[0] in SOME]


@pytest.fixture(scope="module")
def measured() -> list[Evaluation]:
    """Presets and random configs, really evaluated; two seeds retrained, two sub-supernets inherited.

    Untrained weights are equally bad at every size, so perplexity is raised where memory is low, to make a front with a bend.
    """
    shape = shape_of(4)
    spelled = [c for c in tiny.configs(shape, 14) if c not in dict(presets(shape)).values()]
    named = [*some_presets(shape), *(("", config) for config in spelled)]
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


def retrained(measured: list[Evaluation]) -> list[Evaluation]:
    return [e for e in measured if e.weights == "retrained"]


def blank(path: Path) -> bool:
    from matplotlib.image import imread

    return float(np.asarray(imread(path)).std()) == 0


def png_size(path: Path) -> tuple[int, int]:
    from matplotlib.image import imread

    height, width = imread(path).shape[:2]
    return width, height


# Who shares what


def short(slot: str) -> str:
    return slot.rpartition(".")[2].removesuffix("_proj")


def told(plan: Plan, i: int) -> dict[str, set[tuple[str, int | None]]]:
    """How layer i comes by each of its parts, and whose they are, read from the plan."""
    layer = plan.layers[i]
    said: dict[str, set[tuple[str, int | None]]] = {}
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
    for name, owner in (("K", layer.k), ("V", layer.v)):
        said[name] = {("none" if owner is None else "own" if owner == i else "tied", owner)}
    for name, slot in zip(NORM_PARTS, (ATTENTION_NORM, FFN_NORM), strict=True):
        owner = layer.owner(slot)
        said[name] = {("none" if owner is None else "own" if owner == i else "tied", owner)}
    return {name: pairs for name, pairs in said.items() if name not in ("router", *NORM_PARTS) or pairs != {("none", None)}}


def shown(svg: str, i: int) -> dict[str, set[tuple[str, int | None]]]:
    """The same, read from the boxes of a drawing."""
    said: dict[str, set[tuple[str, int | None]]] = {}
    for box in (box.attrib for box in ElementTree.fromstring(svg).iter(f"{SVG}rect")):
        if box.get("data-layer") == str(i):
            name, owner = box["data-part"], box["data-owner"]
            for part in [name] if name in NORM_PARTS else name.split():
                said.setdefault(part, set()).add((box["data-how"], None if owner == "none" else int(owner)))
    return said


@pytest.mark.parametrize(("depth", "config"), CONFIGS)
def test_svg_shows_the_plan(depth: int, config: SharingConfig) -> None:
    shape, plan = shape_of(depth), config.resolve(shape_of(depth))
    svg = sharing_svg(shape, config, SPEC)
    for i in range(depth):
        assert shown(svg, i) == told(plan, i)
    for box in (box.attrib for box in ElementTree.fromstring(svg).iter(f"{SVG}rect")):
        for name in {"K", "V"} & {*box.get("data-part", "").split()}:
            j = None if box["data-owner"] == "none" else plan.layers[int(box["data-owner"])]
            heads = shape.num_key_value_heads if j is None else j.k_heads if name == "K" else j.v_heads
            full = COLUMNS["KV cache"] if box["data-part"] == "K V" else COLUMNS["KV cache"] / 2 - 1
            assert float(box["width"]) == pytest.approx(full * heads / shape.num_key_value_heads)


@pytest.mark.parametrize("depth", [2, 6])
def test_no_two_configs_look_the_same(depth: int) -> None:
    """Neither drawn nor printed; which single heads are tied is said in the drawing's tips alone."""
    shape = shape_of(depth)
    drawn: dict[str, str] = {}
    printed: dict[str, str] = {}
    for name, config in {config: name for name, config in configs(depth).items()}.items():
        other = drawn.setdefault(sharing_svg(shape, name, SPEC, "one"), config)
        assert other == config
        if not any("heads" in dict(layer) for layer in name.layers):
            other = printed.setdefault(ascii_text(shape, name).partition("| part")[0].partition("\n")[2], config)
            assert other == config


@pytest.mark.parametrize(("depth", "config"), CONFIGS)
def test_every_loan_is_coloured_as_its_owner(depth: int, config: SharingConfig) -> None:
    svg = ElementTree.fromstring(sharing_svg(shape_of(depth), config, SPEC))
    drawn = [b.attrib for b in svg.iter(f"{SVG}rect") if b.attrib.get("data-owner", "none") != "none"]
    for b in drawn:
        home = [a for a in drawn if a["data-layer"] == b["data-owner"] and a["data-how"] == "own" and _share_a_part(a, b)]
        if b["data-how"] == "own":
            used = any(a["data-owner"] == b["data-layer"] != a["data-layer"] and _share_a_part(a, b) for a in drawn)
            assert (b["fill"] in LAYERS) == used
        else:
            assert b["stroke"] in {a["fill"] for a in home} or (not home and b["stroke"] in LAYERS)


@pytest.mark.parametrize(("depth", "config"), CONFIGS)
def test_every_loan_has_an_arrow_and_no_two_links_lie_on_each_other(depth: int, config: SharingConfig) -> None:
    shape, plan = shape_of(depth), config.resolve(shape_of(depth))
    drawn = scene(picture(shape, config, SPEC))
    boxes = [m for m in drawn.marks if isinstance(m, Box) and "layer" in m.data]
    rows = {int(str(b.data["layer"])): (b.y, b.y + b.height) for b in boxes}
    columns = [[short(slot) for slot in ATTENTION], [*(short(slot) for slot in FFN), "router"], ["K", "V"]]
    loans = [
        (owner, i)
        for i in range(depth)
        for names in columns
        for owner in {j for name, pairs in told(plan, i).items() if name in names for _, j in pairs} - {None, i}
    ]
    links: list[list[Line]] = []
    for line in (m for m in drawn.marks if isinstance(m, Line) and m.width == 1.5):
        links = (
            [*links, [line]] if not line.arrow and line.points[0][1] == line.points[1][1] else [*links[:-1], [*links[-1], line]]
        )
    found = [
        (_row_at(link[0].points[0][1], rows), _row_at(line.points[1][1], rows)) for link in links for line in link if line.arrow
    ]
    assert sorted(found) == sorted(loans)
    for one, other in itertools.combinations(links, 2):
        assert not any(_on_each_other(a, b) for a in one for b in other)


def _row_at(y: float, rows: dict[int, tuple[float, float]]) -> int:
    (layer,) = [layer for layer, (top, bottom) in rows.items() if top < y < bottom]
    return layer


def _on_each_other(a: Line, b: Line) -> bool:
    """Whether two straight lines run along each other."""
    for axis in (0, 1):
        level = {point[axis] for point in (*a.points, *b.points)}
        if max(level) - min(level) < 1:
            along = [sorted(point[1 - axis] for point in line.points) for line in (a, b)]
            return max(along[0][0], along[1][0]) < min(along[0][1], along[1][1]) - 1e-6
    return False


def _share_a_part(a: dict[str, str], b: dict[str, str]) -> bool:
    return a["data-part"] == b["data-part"] or bool({*a["data-part"].split()} & {*b["data-part"].split()} - {"norm"})


def ascii_text(shape: ModelShape, config: SharingConfig) -> str:
    """What a terminal without UTF-8 gets."""
    console = Console(file=TextIOWrapper(BytesIO(), encoding="ascii"), width=220)
    return sharing_text(shape, config, SPEC, console=console).encode("ascii").decode()


@pytest.mark.parametrize(("depth", "config"), CONFIGS)
def test_text_shows_the_plan(depth: int, config: SharingConfig) -> None:
    shape, plan = shape_of(depth), config.resolve(shape_of(depth))
    lines = ascii_text(shape, config).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if re.match(r"\|\s*\d+ \|", line)]
    assert [int(row[0]) for row in cells] == list(range(depth))
    for i, (_, attention, ffn, keys_values, *also, weights, cached) in enumerate(cells):
        layer, said = plan.layers[i], told(plan, i)
        for text, slots, norm in ((attention, ATTENTION, ATTENTION_NORM), (ffn, (*FFN, ROUTER), FFN_NORM)):
            pairs = {pair for slot in slots for pair in said.get(short(slot), ())}
            assert _pairs_in(text, i) == pairs - {("none", None)}
            owners = {owner for _, owner in pairs} - {None}
            assert ("norm" in text) == (layer.owner(norm) not in {i, None} and owners != {layer.owner(norm)})
        assert _kv_in(keys_values, i) == (layer.k, layer.v, layer.k_heads, layer.v_heads)
        _check_also(" ".join(also), plan, i)
        row = picture(shape, config, SPEC).rows[i]
        assert (weights, cached) == tuple(format_bytes(n) if n else "-" for n in (row.weight_bytes, row.kv_cache_bytes))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["dense", "masa-2", "svformer", "moeut-2", "swiftkv-3x2", "random-0", "random-1", "random-2"])
def test_a_narrow_terminal_cuts_no_word(name: str, width: int) -> None:
    shape, config = shape_of(6), configs(6)[name]
    console = Console(file=TextIOWrapper(BytesIO(), encoding="utf-8"), width=width, force_terminal=True, color_system=None)
    text = sharing_text(shape, config, SPEC, console=console)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for row in picture(shape, config, SPEC).rows:
        for words in (*row.also, row.reads, *(segment.texts[0] for segment in (*row.attention, *row.ffn) if segment.texts)):
            assert {*words.split()} <= {*text.replace(",", " ").split(), *text.split()}


def _pairs_in(text: str, layer: int) -> set[tuple[str, int | None]]:
    """How a cell's parts come about, and whose they are."""
    found: set[tuple[str, int | None]] = {("own", layer)} if "#" in text else set()
    found |= {("dropped", None)} if "dropped" in text else set()
    for part in text.partition(", norm")[0].split(", "):
        match = re.search(r"(map )?= layer (\d+)|(mix|basis) of layer (\d+)", part)
        if match:
            how = "map" if match[1] else "mixed" if match[3] else "tied"
            found.add((how, int(match[2] or match[4])))
    return found


def _kv_in(text: str, layer: int) -> tuple[int | None, int | None, int, int]:
    """The layers whose keys and values a cell says are read, and the heads of its own."""
    if text == "none":
        return None, None, 0, 0
    if match := re.fullmatch(r"= layer (\d+)", text):
        return int(match[1]), int(match[1]), 0, 0
    if match := re.fullmatch(r"#+ +(\d+) heads?", text):
        return layer, layer, int(match[1]), int(match[1])
    sides = {name: (sign, int(number)) for name, sign, number in re.findall(r"([KV]) (= )?(\d+)", text)}
    read = {name: int(number) if sign else layer for name, (sign, number) in sides.items()}
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


@pytest.mark.parametrize(("depth", "config"), CONFIGS)
def test_parts_add_up_to_the_memory(depth: int, config: SharingConfig) -> None:
    shape = shape_of(depth)
    rows, memory = bytes_by_part(shape, config, SPEC), measure(shape, config, SPEC)
    dense = {
        row["part"]: row
        for row in bytes_by_part(shape, SharingConfig.of_plan(shape, SharingConfig.dense(shape).resolve(shape)), SPEC)
    }
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
    assert [cost.value for cost in content.costs[:3]] == [
        format_bytes(n) for n in (memory.weight_bytes, memory.kv_cache_bytes, memory.memory_bytes)
    ]
    json.dumps(rows)


def test_the_costs_of_decoding_are_beside_the_resident_bytes() -> None:
    text = ascii_text(shape_of(6), configs(6)["yoco"])
    memory, dense = (measure(shape_of(6), configs(6)[name], SPEC) for name in ("yoco", "dense"))
    read, flops = ("kv_read_bytes_per_token", format_bytes), ("flops_per_token", format_flops)
    for name, form in (read, flops):
        ours, theirs = getattr(memory, name), getattr(dense, name)
        row = [form(ours), form(theirs), f"{ours / theirs:.0%}"]
        assert any(all(word in line for word in row) for line in text.splitlines())
        assert ours < theirs


LARGE = ModelShape(vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336)


@pytest.mark.parametrize("shape", [*map(shape_of, (2, 6, 12, 32)), LARGE], ids=["2", "6", "12", "32", "large"])
def test_no_words_overlap_or_leave_the_picture(shape: ModelShape) -> None:
    depth = shape.num_hidden_layers
    named = list(dict(presets(shape)).values())
    spelled = [config for name, config in configs(depth).items() if "random" in name] if depth < 32 else []
    for config in [*(named if depth == 6 else named[:: depth // 2]), *spelled]:
        drawn = scene(picture(shape, config, MemorySpec(131072, 8) if shape is LARGE else SPEC))
        boxes = [(m.text, *_extent(m)) for m in drawn.marks if isinstance(m, Words)]
        for text, left, top, right, bottom in boxes:
            assert min(left, top, drawn.width - right, drawn.height - bottom) >= 0, text
        boxes.sort(key=lambda box: box[2])
        for a, b in itertools.combinations(boxes, 2):
            if b[2] >= a[4]:
                continue
            assert a[1] >= b[3] or b[1] >= a[3] or a[2] >= b[4], f"{a[0]!r} lies over {b[0]!r}"


@cache
def _width(text: str, bold: bool) -> float:
    """Of a text of size 1, as matplotlib's font has it."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(weight="bold" if bold else "normal")))
    font.set_size(100, 72)
    font.set_text(text)
    return font.get_width_height()[0] / 64 / 100


def _extent(words: Words) -> tuple[float, float, float, float]:
    width = _width(words.text, words.bold) * words.size
    left = words.x - {"start": 0.0, "middle": width / 2, "end": width}[words.anchor]
    return left, words.y - words.size * 0.4, left + width, words.y + words.size * 0.4


@given(st.text("abcxyzijlmwKVMW0123456789 =+·:,.%×", min_size=1, max_size=40))
def test_words_take_no_more_room_than_is_left_for_them(text: str) -> None:
    assert _width(text, bold=False) <= words_width(text, 1) + 0.05


@pytest.mark.parametrize("depth", [4, 32])
def test_png_has_the_pictures_size_and_the_same_bytes_each_time(depth: int, tmp_path: Path) -> None:
    shape = shape_of(depth)
    config = dict(presets(shape))["mobilellm-ls"]
    paths = [draw_sharing(shape, config, tmp_path / "deep" / f"{n}.png", SPEC) for n in range(2)]
    drawn = scene(picture(shape, config, SPEC))
    assert png_size(paths[0]) == (round(2 * drawn.width), round(2 * drawn.height))
    assert not blank(paths[0])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    svg = draw_sharing(shape, config, tmp_path / "one.svg", SPEC, name="a & b <c>")
    assert "a & b <c>" in [text.text for text in ElementTree.parse(svg).iter(f"{SVG}text")]


def test_other_formats_are_refused(tmp_path: Path, measured: list[Evaluation]) -> None:
    shape = shape_of(4)
    config = measured[0].config
    for draw in (
        lambda p: draw_sharing(shape, config, p),
        lambda p: draw_front(measured, p),
        lambda p: draw_tree({"name": "0"}, p),
    ):
        for name in ("one.gif", "one"):
            with pytest.raises(UserError, match=r"use \.png or \.svg"):
                draw(tmp_path / name)


def test_terminal_colours_follow_the_console() -> None:
    shape, config = shape_of(6), configs(6)["sequence-2"]
    plain = sharing_text(shape, config, SPEC, console=Console(file=TextIOWrapper(BytesIO(), encoding="utf-8")))
    console = Console(file=TextIOWrapper(BytesIO(), encoding="utf-8"), force_terminal=True, color_system="truecolor", width=100)
    coloured = sharing_text(shape, config, SPEC, console=console)
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


def steps(axes: Any) -> list[tuple[float, float]]:
    """The points of the front's line on matplotlib axes, in bytes and perplexity."""
    (line,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post" and line.get_color() == BLUE]
    return [(round(x * MIB), y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_front_in_the_figure_is_paretos(measured: list[Evaluation]) -> None:
    figure = front_figure(panels(measured), "both", (900, 800))
    assert len(figure.axes) == 2
    for axes, kind in zip(figure.axes, ("retrained", "inherited"), strict=True):
        groups: dict[tuple[str, str], list[Evaluation]] = {}
        for e in measured:
            if e.weights == kind:
                groups.setdefault((e.config.hash, e.supernet), []).append(e)
        means = [sum({e.seed: e.losses.perplexity for e in g}.values()) / len({e.seed for e in g}) for g in groups.values()]
        points = [(float(g[0].memory.memory_bytes), mean) for g, mean in zip(groups.values(), means, strict=True)]
        expected = [points[i] for i in pareto.front(points)]
        assert np.array(steps(axes)) == pytest.approx(np.array(expected))
        assert len(expected) > 2
        assert f"{kind} weights" in axes.get_title(loc="left")


def test_front_does_not_depend_on_the_order(measured: list[Evaluation], tmp_path: Path) -> None:
    shuffled = random.Random(3).sample(measured, len(measured))
    fronts = [[[m.point for m in panel.front] for panel in panels(evaluations)] for evaluations in (measured, shuffled)]
    assert fronts[0] == fronts[1]


def test_knee_in_the_figure_is_paretos(measured: list[Evaluation]) -> None:
    (panel,) = panels(retrained(measured))
    assert panel.knee is not None
    points = [m.point for m in panel.all]
    assert panel.knee.point == points[pareto.knee(points)]
    texts = [text.get_text() for text in front_figure([panel], "", (900, 560)).axes[0].texts]
    assert any(text.startswith("knee") and format_bytes(panel.knee.memory_bytes) in text for text in texts)


@pytest.mark.parametrize("size", [(900, 560), (1200, 700)])
def test_the_fronts_presets_are_named_and_no_label_covers_another(measured: list[Evaluation], size: tuple[int, int]) -> None:
    (panel,) = panels(retrained(measured))
    figure = front_figure([panel], "A title", size)
    figure.canvas.draw()
    written = (*figure.texts, *figure.axes[0].texts)
    texts = {text.get_text(): text.get_window_extent() for text in written if text.get_text()}
    named = [m for m in panel.presets if any(m.label in text for text in texts)]
    for m in (*panel.front, *panel.preset_front, panel.dense):
        assert m is not None
        assert not m.names or m in named, m.label
    assert len(named) > len(panel.presets) / 2
    for (a, one), (b, other) in itertools.combinations(texts.items(), 2):
        assert not one.overlaps(other), f"{a} lies over {b}"
    for text, box in texts.items():
        assert min(box.x0, box.y0, size[0] - box.x1, size[1] - box.y1) >= 0, text


def test_figure_has_the_asked_size(measured: list[Evaluation], tmp_path: Path) -> None:
    path = draw_front(measured, tmp_path / "front.png", "A price of $5 and $6", (700, 500))
    assert png_size(path) == (1400, 1000)
    assert not blank(path)
    assert png_size(draw_front(retrained(measured), tmp_path / "one.png")) == (1800, 1120)
    svg = draw_front(retrained(measured), tmp_path / "front.svg").read_bytes()
    ElementTree.fromstring(svg)
    assert draw_front(retrained(measured), tmp_path / "again.svg").read_bytes() == svg


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_evaluations_are_drawn_too(measured: list[Evaluation], count: int, tmp_path: Path) -> None:
    few = retrained(measured)[:count]
    assert draw_front(few, tmp_path / "front.png").stat().st_size > 5000
    assert "<html" in front_page(few)
    assert len(front_table(few)) == len(by_config(few))


def test_presets_that_coincide_are_one_mark_under_both_names(measured: list[Evaluation]) -> None:
    shape = shape_of(4)
    named = dict(presets(shape))
    both = [name for name, config in named.items() if config == named["mobilellm-ls"]]
    assert len(both) > 1
    (m,) = [m for m in by_config(retrained(measured)) if "mobilellm-ls" in m.names]
    assert list(m.names) == both
    assert [e.seed for e in m.evaluations] == [0, 1]


def test_a_seed_more_changes_the_spread_and_not_the_standard_error(measured: list[Evaluation]) -> None:
    one, other = (e for e in retrained(measured) if e.name == "dense")
    far = replace(other, losses=Losses(9.0, one.losses.perplexity + 2, one.losses.perplexity_standard_error))
    (m,) = by_config([one, far])
    assert m.perplexity == pytest.approx(one.losses.perplexity + 1)
    assert m.spread == pytest.approx(math.sqrt(2))
    assert m.standard_error == pytest.approx(one.losses.perplexity_standard_error)
    assert math.isnan(by_config([one])[0].spread)


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
        said = [
            one for one in details.values() if one["hash"] == m.first.config.hash and m.first.weights in one["facts"]["training"]
        ]
        assert {one["yaml"] for one in said} == {m.first.config.to_yaml()}
        assert any(f"{m.memory_bytes:,} bytes" in one["facts"]["memory"] for one in said)
    for m in panels(measured)[0].front:
        assert any(one["svg"] == sharing_svg(shape_of(4), m.first.config, SPEC, m.label) for one in details.values())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_page_in_a_browser(measured: list[Evaluation], tmp_path: Path) -> None:
    """Every mark is there, nothing is asked of a network, and a click shows that point's config."""
    from playwright.sync_api import sync_playwright

    file = tmp_path / "front.html"
    file.write_text(front_page(measured, "A front", shape_of(4), SPEC), encoding="utf-8")
    asked: list[str] = []
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 1000})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(file.as_uri())
        page.wait_for_selector("#front .points path")
        marks = page.locator("#front .points path").count()
        knee = page.locator("#facts").inner_text()
        names = page.locator("#front .annotation-text").all_text_contents()
        point = page.locator("#front .points path").first.bounding_box()
        assert point is not None
        page.mouse.click(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
        page.wait_for_timeout(200)
        shown, drawn = page.locator("#yaml").inner_text(), page.locator("#drawing svg").count()
        clicked = page.locator("#facts").inner_text()
        browser.close()
    found = panels(measured)
    assert marks == sum(len(panel.all) + (panel.knee is not None) for panel in found)
    assert asked == [file.as_uri()]
    assert errors == []
    assert found[0].knee is not None
    assert f"{found[0].knee.memory_bytes:,} bytes" in knee
    assert all(any(m.label in name for name in names) for panel in found for m in panel.presets)
    assert found[0].searched, "the first mark is one off the front"
    first = found[0].searched[0]
    assert f"{first.memory_bytes:,} bytes" in clicked
    assert shown.strip() == first.first.config.to_yaml().strip()
    assert drawn == 1


# Tables


def test_csv_comes_back_and_has_the_named_columns(measured: list[Evaluation]) -> None:
    text = front_csv(measured)
    assert text.splitlines()[0].split(",") == list(measured[0].to_data())
    assert read_csv(shape_of(4), text) == measured
    assert len(text.splitlines()) == len(measured) + 1
    one_window = replace(measured[0], losses=replace(measured[0].losses, perplexity_standard_error=math.nan))
    (back,) = read_csv(shape_of(4), front_csv([one_window]))
    assert math.isnan(back.losses.perplexity_standard_error)


def test_table_says_what_was_measured(measured: list[Evaluation]) -> None:
    (panel,) = panels(retrained(measured))
    rows = front_table(retrained(measured))
    assert [row["name"] for row in rows] == [m.label for m in sorted(panel.all, key=lambda m: m.point)]
    assert panel.dense is not None
    for row in rows:
        (m,) = [m for m in panel.all if m.label == row["name"]]
        value, error = map(float, row["perplexity"].split(" ± "))
        assert value == pytest.approx(m.perplexity, abs=0.06)
        assert error == pytest.approx(m.standard_error, rel=0.06)
        assert row["memory"] == format_bytes(m.memory_bytes)
        saved = m.memory_bytes / panel.dense.memory_bytes - 1
        assert row["memory vs dense"] == ("" if m.is_dense else f"{saved:+.0%}")
        assert row["place"] == ("knee" if m is panel.knee else "front" if m in panel.front else "")
        assert row["seeds"].startswith("2, spread ")
    assert [r for r in rows if r["place"]] == front_table(retrained(measured), keep="front")
    kept = front_table(retrained(measured), keep="presets")
    assert [r["name"] for r in kept] == [m.label for m in sorted(panel.all, key=lambda m: m.point) if m.names or m in panel.front]


def test_columns_that_say_nothing_are_left_out(measured: list[Evaluation]) -> None:
    one_seed = [e for e in retrained(measured) if e.seed == 0 and e.name != "dense"]
    assert not {"seeds", "origin", "memory vs dense"} & front_table(one_seed)[0].keys()
    both = front_table(measured)
    assert {row["origin"] for row in both} == {"retrained", "inherited"}
    assert sum(row["place"] == "knee" for row in both) == 2
    assert front_table([]) == []


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_terminal_table_fits_and_cuts_no_figure(measured: list[Evaluation], width: int) -> None:
    one_seed = [replace(e, name=e.name and e.name[:12]) for e in retrained(measured) if e.seed == 0]
    rows = front_table(one_seed, keep="front")
    console = Console(width=width, file=TextIOWrapper(BytesIO(), encoding="utf-8"))
    with console.capture() as captured:
        console.print(terminal_table(rows, "The front"))
    lines = captured.get().splitlines()
    assert "…" not in captured.get()
    assert all(len(line) <= width for line in lines)
    for row in rows:
        (line,) = [line for line in lines if line.split()[:1] == row["name"].split()[:1]]
        assert row["memory"] in line
        assert row["perplexity"] in line


def test_markdown_has_a_cell_for_every_column(measured: list[Evaluation]) -> None:
    rows = front_table(measured)
    table = markdown_table([row | {"name": "a|b"} for row in rows]).splitlines()
    assert len(table) == len(rows) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(rows[0]) + 1}
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == list(rows[0])
    assert len({len(line) for line in table}) == 1


# Splits, progress, report

OPTIONS = ["own", 0, 1, 2]
DISTANCES = [[0.0, 0.9, 0.2, 0.8], [0.9, 0.0, 0.7, 0.1], [0.2, 0.7, 0.0, 0.9], [0.8, 0.1, 0.9, 0.0]]
CUT = {"decision": "layer_3.kv", "options": OPTIONS, "distances": DISTANCES, "groups": [["own", 1], [0, 2]], "scores": {}}
TREE: dict[str, Any] = {
    "name": "0",
    "split": CUT,
    "children": [
        {
            "name": "0-0",
            "split": CUT | {"decision": "layer_2.kv_heads", "options": [4, 2, 1], "groups": [[4], [2], [1]], "distances": []},
            "children": [{"name": f"0-0-{n}"} for n in range(3)],
        },
        {"name": "0-1"},
    ],
}


def test_tree_shows_every_node_and_every_group() -> None:
    drawn = tree_scene(TREE)
    svg = ElementTree.fromstring(drawn.svg())
    nodes = [box.attrib["data-node"] for box in svg.iter(f"{SVG}rect") if "data-node" in box.attrib]
    assert sorted(nodes) == ["0", "0-0", "0-0-0", "0-0-1", "0-0-2", "0-1"]
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"own, 1", "0, 2", "4", "2", "1", "split by layer_3.kv", "split by layer_2.kv_heads", "4 sub-supernets"} <= {*texts}
    assert _inside(drawn)
    assert _inside(tree_scene({"name": "0"}))


def _inside(drawn: Scene) -> bool:
    extents = [_extent(m) for m in drawn.marks if isinstance(m, Words)]
    return all(left >= 0 and right <= drawn.width and bottom <= drawn.height for left, _, right, bottom in extents)


def test_tree_of_the_splitting_room_can_be_drawn(tmp_path: Path) -> None:
    from nas.splitting import Split, SplitTree

    tree = SplitTree().grow({"0": Split.from_data(CUT)})
    nodes = re.findall(r'data-node="([^"]+)"', draw_tree(tree.to_data(), tmp_path / "tree.svg").read_text())
    assert sorted(nodes) == sorted(["0", *tree.leaves()])
    assert not blank(draw_agreement(tree.to_data()["split"], tmp_path / "cut.png"))


def test_agreement_is_sorted_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn is the matrix of the sorted options: within a group the near ones, here at most 0.2."""
    from matplotlib.axes import Axes

    seen: list[Any] = []
    original: Callable[..., Any] = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, data, **look: seen.append(data) or original(self, data, **look))
    path = draw_agreement(CUT, tmp_path / "agreement.png")
    drawn = np.array(seen[0])
    assert max(drawn[:2, :2].max(), drawn[2:, 2:].max()) <= 0.2 < 0.7 <= drawn[:2, 2:].min()
    assert png_size(path) == (800, 568)
    assert not blank(path)


def test_progress_has_the_asked_size(tmp_path: Path) -> None:
    curves = {"search": [0.0, 1.0, 3.0], "random": [0.0, 0.5, 2.9], "empty": []}
    path = draw_progress(curves, tmp_path / "progress.png", (600, 300))
    assert png_size(path) == (1200, 600)
    assert not blank(path)


def report(measured: list[Evaluation], extra: Path) -> Report:
    words = {"text": "python", "seed": 0, "versions": {"torch": "2.13", "optuna": None}, "gpus": [], "odd": "a|b"}
    return Report(
        "Quickstart", "nas search trials/quickstart.yaml", shape_of(4), SPEC, measured, words, TREE,
        {"search": [0.1, 0.2, 0.3]}, {"Another picture": extra},
    )  # fmt: skip


def test_report_says_what_made_it_and_links_what_is_there(measured: list[Evaluation], tmp_path: Path) -> None:
    extra = draw_tree(TREE, tmp_path / "extra.svg")
    page = write_report(tmp_path / "reports" / "one", report(measured, extra))
    text = page.read_text()
    linked = re.findall(r"\]\(([^)]+)\)", text)
    assert {"front.png", "evaluations.csv", "knee.svg", "progress.png", "split.svg", "agreement-0.png", "extra.svg"} == {*linked}
    assert {file.name for file in page.parent.iterdir()} == {*linked, "README.md"}
    assert "```\nnas search trials/quickstart.yaml\n```" in text
    for said in (
        "1,000 training tokens, 2 seeds",
        "5,000 training tokens",
        "256 tokens" if SPEC.batch == 2 else "",
        "torch 2.13, optuna none",
    ):
        assert said in text
    assert read_csv(shape_of(4), (page.parent / "evaluations.csv").read_text()) == measured
    assert not re.search(r"\n\n\n\n", text)


def test_same_run_gives_the_same_report(measured: list[Evaluation], tmp_path: Path) -> None:
    extra = draw_tree(TREE, tmp_path / "extra.svg")
    one = write_report(tmp_path / "one", report(measured, extra)).parent
    two = write_report(tmp_path / "two", report(measured, one / "extra.svg")).parent
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


def test_report_of_nothing(tmp_path: Path) -> None:
    text = write_report(tmp_path, Report("Nothing", "nas search x.yaml", shape_of(4), SPEC, [])).read_text()
    assert "Nothing has been evaluated" in text


def test_importing_the_room_imports_no_plotting_library() -> None:
    code = "import sys, nas.report; print([m for m in ('matplotlib', 'plotly', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
