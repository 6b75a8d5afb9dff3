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
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nas import pareto
from nas.errors import UserError
from nas.evaluate import Evaluation, Losses, measure_losses
from nas.loading import format_bytes
from nas.memory import MemorySpec, measure
from nas.model import ATTENTION, FFN, SLOTS, LayerPlan, Plan
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
from nas.report.labels import place
from nas.report.layout import MIB, log_ticks
from nas.report.measured import by_config, panels
from nas.report.palette import BLUE, LAYERS, ink_on
from nas.report.picture import NORM_PARTS, picture, short
from nas.report.scene import Box, Line, Scene, Words
from nas.report.sharing import COLUMNS, scene
from nas.report.splits import tree_scene
from nas.shape import ModelShape
from nas.sharing import SharingConfig
from nas.space import SearchSpace
from nas.supernet import Supernet, dense_plan
from nas.zoo import presets

SPEC = MemorySpec(context=128, batch=2)
SVG = "{http://www.w3.org/2000/svg}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def shape_of(depth: int) -> ModelShape:
    return ModelShape(
        vocab_size=64, hidden_size=32, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=48,
        tie_word_embeddings=depth != 2,
    )  # fmt: skip


def everything(shape: ModelShape) -> SearchSpace:
    """A space in which every primitive is open everywhere."""
    own: tuple[Any, ...] = ("own",)
    options: dict[str, tuple[Any, ...]] = {"norms": ("private", "tied")}
    for i in range(shape.num_hidden_layers):
        earlier = {name: (*own, *range(i)) for name in ("tie", "attn", "ffn", "kv")}
        options |= {f"layer_{i}.{name}": values for name, values in earlier.items()}
        options[f"layer_{i}.kv_heads"] = (4, 2, 1)
    return SearchSpace(shape, options)


def configs(depth: int) -> dict[str, SharingConfig]:
    rng = random.Random(depth)
    found = dict(presets(shape_of(depth)))
    return found | {f"random-{n}": everything(shape_of(depth)).sample(rng) for n in range(12)}


CONFIGS = [pytest.param(d, c, id=f"{d}-{name}") for d in (2, 6, 12) for name, c in configs(d).items()]


@pytest.fixture(scope="module")
def measured() -> list[Evaluation]:
    """Presets and random configs, really evaluated; two seeds retrained, two sub-supernets inherited.

    Untrained weights are equally bad at every size, so perplexity is raised where memory is low, to make a front with a bend.
    """
    shape, rng = shape_of(4), random.Random(0)
    named = [*presets(shape), *(("", everything(shape).sample(rng)) for _ in range(20))]
    windows = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(0))
    whole = measure(shape, named[0][1], SPEC).memory_bytes
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads wait for one another longer than models as small as these take
    for seed in (0, 1):
        net = Supernet(shape, torch.Generator().manual_seed(seed))
        for number, (name, config) in enumerate(named):
            losses, memory = measure_losses(net.subnet(config), windows, autocast=False), measure(shape, config, SPEC)
            losses = replace(losses, perplexity=losses.perplexity * (1 + 0.05 * (1 - memory.memory_bytes / whole) ** 2))
            bits = losses.loss_nats_per_token / math.log(2)
            found.append(Evaluation(config, memory, losses, bits, "retrained", seed, 1000, 0.5, number, name))
            found.append(Evaluation(config, memory, losses, bits, "inherited", 0, 5000, 0.1, number, name, f"0-{seed}"))
    torch.set_num_threads(threads)
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


def plan_in(svg: str, shape: ModelShape) -> Plan:
    """The plan that a drawing shows, read from its boxes."""
    full = shape.num_key_value_heads
    parts: dict[tuple[int, str], ElementTree.Element] = {}
    for box in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        if "data-layer" in box.attrib:
            name = box.attrib["data-part"]
            for part in [name] if name in (*NORM_PARTS, "KV cache") else name.split():
                assert (int(box.attrib["data-layer"]), part) not in parts, "drawn twice"
                parts[int(box.attrib["data-layer"]), part] = box
    names = [*(short(slot) for slot in SLOTS[:-2]), *NORM_PARTS]
    layers = []
    for i in range(shape.num_hidden_layers):
        owners = [parts[i, name].attrib["data-owner"] for name in names]
        cache = parts[i, "KV cache"]
        heads = round(float(cache.attrib["width"]) / COLUMNS["KV cache"] * full)
        layers.append(LayerPlan(tuple(None if o == "none" else int(o) for o in owners), int(cache.attrib["data-owner"]), heads))
    return Plan(tuple(layers))


@pytest.mark.parametrize(("depth", "config"), CONFIGS)
def test_svg_shows_the_plan(depth: int, config: SharingConfig) -> None:
    shape = shape_of(depth)
    assert plan_in(sharing_svg(shape, config, SPEC), shape) == config.resolve(shape)


@pytest.mark.parametrize(("depth", "config"), CONFIGS)
def test_every_loan_is_written_and_coloured_as_its_owner(depth: int, config: SharingConfig) -> None:
    shape = shape_of(depth)
    content = picture(shape, config, SPEC)
    boxes = [b.attrib for b in ElementTree.fromstring(sharing_svg(shape, config, SPEC)).iter(f"{SVG}rect")]
    drawn = [b for b in boxes if b.get("data-owner", "none") != "none" and b["data-part"] not in NORM_PARTS]
    written = [m.text for m in scene(content).marks if isinstance(m, Words) and m.text.startswith("= ")]
    loans = [b["data-owner"] for b in drawn if b["data-owner"] != b["data-layer"]]
    assert sorted(text.removeprefix("= ").removeprefix("layer ") for text in written) == sorted(loans)
    for b in drawn:
        home = next(a for a in drawn if a["data-layer"] == a["data-owner"] == b["data-owner"] and _share_a_part(a, b))
        assert home is b or b["stroke"] == home["fill"]
        assert (home["fill"] in LAYERS) == any(
            a is not home and a["data-owner"] == home["data-layer"] and _share_a_part(a, home) for a in drawn
        )


@pytest.mark.parametrize(("depth", "config"), CONFIGS)
def test_every_loan_has_an_arrow_and_no_two_links_lie_on_each_other(depth: int, config: SharingConfig) -> None:
    shape, plan = shape_of(depth), config.resolve(shape_of(depth))
    drawn = scene(picture(shape, config, SPEC))
    heights = {int(m.data["layer"]): m.y + m.height / 2 for m in drawn.marks if isinstance(m, Box) and "layer" in m.data}  # type: ignore[call-overload]
    blocks = [[(p.owner(s), i) for s in slots] for i, p in enumerate(plan.layers) for slots in (ATTENTION, FFN)]
    loans = [loan for block in blocks for loan in {*block} if loan[0] not in (None, loan[1])]
    loans += [(p.kv, i) for i, p in enumerate(plan.layers) if p.kv != i]
    lines = [m for m in drawn.marks if isinstance(m, Line)]
    assert sorted(m.points[-1][1] for m in lines if m.arrow) == sorted(heights[layer] for _, layer in loans)
    buses = sorted((m.points[1][0], m.points[1][1], m.points[2][1]) for m in lines if len(m.points) == 3)
    assert {start for _, start, _ in buses} == {heights[owner] for owner, _ in loans}
    for (x, _, end), (other_x, start, _) in itertools.pairwise(buses):
        assert x < other_x or end < start


def _share_a_part(a: dict[str, str], b: dict[str, str]) -> bool:
    return a["data-part"] == b["data-part"] or bool({*a["data-part"].split()} & {*b["data-part"].split()} - {"KV", "cache"})


@pytest.mark.parametrize(("depth", "config"), CONFIGS)
def test_text_shows_the_plan(depth: int, config: SharingConfig) -> None:
    """Read from the ASCII drawing, which a terminal without UTF-8 gets."""
    shape, plan = shape_of(depth), config.resolve(shape_of(depth))
    ascii_only = Console(file=TextIOWrapper(BytesIO(), encoding="ascii"), width=120)
    lines = sharing_text(shape, config, SPEC, console=ascii_only).encode("ascii").decode().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\|\s*\d+ \|", line)]
    assert [int(row[0]) for row in cells] == list(range(depth))
    for i, (_, attention, ffn, cache, weights, cached) in enumerate(cells):
        layer = plan.layers[i]
        for text, slots, norm in ((attention, ATTENTION, SLOTS[-2]), (ffn, FFN, SLOTS[-1])):
            owned = {(short(s), layer.owner(s)) for s in slots if layer.owner(s) is not None}
            assert _owners_in(text, i, [name for name, _ in owned]) == owned
            assert ("norm" in text) == (layer.owner(norm) not in {i, *(layer.owner(s) for s in slots)})
        bar = "#" * (8 * layer.kv_heads // shape.num_key_value_heads)
        assert cache == (f"= layer {layer.kv}" if layer.kv != i else f"{bar:8} {_heads(layer.kv_heads)}")
        row = picture(shape, config, SPEC).rows[i]
        assert (weights, cached) == tuple(format_bytes(n) if n else "-" for n in (row.weight_bytes, row.kv_cache_bytes))


def _heads(count: int) -> str:
    return f"{count} head" + "s" * (count > 1)


def _owners_in(text: str, layer: int, slots: list[str]) -> set[tuple[str, int | None]]:
    """`# q o` or `= layer 0` or `k v = layer 1`, separated by commas."""
    found: set[tuple[str, int | None]] = set()
    for part in (p for p in text.split(", ") if not p.startswith("norm")):
        names, _, owner = part.partition("= layer ")
        listed = names.replace("#", " ").split() or slots
        found |= {(name, int(owner) if owner else layer) for name in listed}
    return found


@pytest.mark.parametrize(("depth", "config"), CONFIGS)
def test_parts_add_up_to_the_memory(depth: int, config: SharingConfig) -> None:
    shape = shape_of(depth)
    rows, memory = bytes_by_part(shape, config, SPEC), measure(shape, config, SPEC)
    dense = {row["part"]: row for row in bytes_by_part(shape, SharingConfig.of_plan(shape, dense_plan(shape)), SPEC)}
    assert sum(row["params"] for row in rows) == memory.unique_params
    assert sum(row["bytes"] for row in rows) == memory.memory_bytes
    assert {row["part"]: row["bytes"] for row in rows}["KV cache"] == memory.kv_cache_bytes
    assert [row["share_of_dense"] for row in rows] == [row["bytes"] / dense[row["part"]]["bytes"] for row in rows]
    assert sum(r.weight_bytes for r in picture(shape, config, SPEC).rows) < memory.weight_bytes
    assert sum(r.kv_cache_bytes for r in picture(shape, config, SPEC).rows) == memory.kv_cache_bytes
    json.dumps(rows)


LARGE = ModelShape(vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336)


@pytest.mark.parametrize("shape", [*map(shape_of, (2, 4, 6, 12, 32)), LARGE], ids=["2", "4", "6", "12", "32", "large"])
def test_no_words_overlap_or_leave_the_picture(shape: ModelShape) -> None:
    rng = random.Random(1)
    for config in (*dict(presets(shape)).values(), *(everything(shape).sample(rng) for _ in range(3))):
        drawn = scene(picture(shape, config, MemorySpec(131072, 8) if shape is LARGE else SPEC))
        boxes = [(m.text, *_extent(m)) for m in drawn.marks if isinstance(m, Words)]
        for text, left, top, right, bottom in boxes:
            assert min(left, top, drawn.width - right, drawn.height - bottom) >= 0, text
        boxes.sort(key=lambda box: box[2])
        for a, b in itertools.combinations(boxes, 2):
            if b[2] >= a[4]:
                continue
            assert a[1] >= b[3] or b[1] >= a[3] or a[2] >= b[4], f"{a[0]!r} lies over {b[0]!r}"


WIDTHS: dict[tuple[str, bool], float] = {}


def _extent(words: Words) -> tuple[float, float, float, float]:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    key = words.text, words.bold
    if key not in WIDTHS:
        font = FontProperties(weight="bold" if words.bold else "normal")
        WIDTHS[key] = TextPath((0, 0), words.text, size=100, prop=font).get_extents().width / 100
    width = WIDTHS[key] * words.size
    left = words.x - {"start": 0.0, "middle": width / 2, "end": width}[words.anchor]
    return left, words.y - words.size * 0.4, left + width, words.y + words.size * 0.4


@pytest.mark.parametrize("depth", [4, 32])
def test_png_has_the_pictures_size_and_the_same_bytes_each_time(depth: int, tmp_path: Path) -> None:
    shape = shape_of(depth)
    config = dict(presets(shape))["sequence-2"]
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
    texts = [text.get_text() for text in front_figure([panel], "", (900, 560)).texts]
    assert any(text.startswith("knee") and format_bytes(panel.knee.memory_bytes) in text for text in texts)


@pytest.mark.parametrize("size", [(900, 560), (1200, 700)])
def test_every_preset_is_named_and_no_label_covers_another(measured: list[Evaluation], size: tuple[int, int]) -> None:
    found = panels(retrained(measured))
    figure = front_figure(found, "A title", size)
    figure.canvas.draw()
    texts = {text.get_text(): text.get_window_extent() for text in figure.texts if text.get_text()}
    for m in found[0].presets:
        assert any(m.label in text for text in texts), m.label
    assert {name for m in found[0].presets for name in m.names} == dict(presets(shape_of(4))).keys()
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
    both = [name for name, config in presets(shape) if config == dict(presets(shape))["mobilellm-ls"]]
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


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 9)), min_size=1, max_size=12, unique=True))
def test_labels_of_points_apart_cover_nothing(spots: list[tuple[int, int]]) -> None:
    anchors = [(60 + 90.0 * x, 40 + 45.0 * y) for x, y in spots]
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in anchors]
    frame = (0.0, 0.0, 860.0, 520.0)
    labels = place(anchors, [(60.0, 12.0)] * len(anchors), marks, frame)
    assert labels == place(anchors, [(60.0, 12.0)] * len(anchors), marks, frame)
    for n, a in enumerate(labels):
        assert min(a[0] - frame[0], a[1] - frame[1], frame[2] - a[2], frame[3] - a[3]) >= 0
        for b in (*labels[:n], *marks):
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


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
    "cut": CUT,
    "children": [
        {
            "name": "0-0",
            "cut": CUT | {"decision": "layer_2.kv_heads", "options": [4, 2, 1], "groups": [[4], [2], [1]], "distances": []},
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
    assert {"own, 1", "0, 2", "4", "2", "1", "cut by layer_3.kv", "cut by layer_2.kv_heads", "4 sub-supernets"} <= {*texts}
    assert _inside(drawn)
    assert _inside(tree_scene({"name": "0"}))


def _inside(drawn: Scene) -> bool:
    extents = [_extent(m) for m in drawn.marks if isinstance(m, Words)]
    return all(left >= 0 and right <= drawn.width and bottom <= drawn.height for left, _, right, bottom in extents)


def test_tree_of_the_splitting_room_can_be_drawn(tmp_path: Path) -> None:
    from nas.splitting import Cut, SplitTree

    tree = SplitTree().grow({"0": Cut.from_data(CUT)})
    nodes = re.findall(r'data-node="([^"]+)"', draw_tree(tree.to_data(), tmp_path / "tree.svg").read_text())
    assert sorted(nodes) == sorted(["0", *tree.leaves()])
    assert not blank(draw_agreement(tree.to_data()["cut"], tmp_path / "cut.png"))


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
