"""What a person sees in MLflow, in a real browser: the search's own view, its description, its pages and pictures."""

import math
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny

from nas.errors import UserError
from nas.pareto import front
from nas.report.page import front_page
from nas.report.sharing import draw_sharing
from nas.sharing.memory import MemorySpec
from nas.tracking import Link, Tracker, TrackingSpec, front_note, ui
from nas.tracking.server import claim

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SHAPE = tiny.MHA
SECONDS = 60_000
"""Milliseconds that a page may take on a busy machine."""

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")


EVALUATIONS = list({e.config: e for e in tiny.evaluated(SHAPE, 3)}.values())
FRONT = [replace(EVALUATIONS[i], name="") for i in front([e.point for e in EVALUATIONS])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was tracked with all that a search hands in."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart-1"
    folder.mkdir()
    pictures = {e.config.hash: draw_sharing(SHAPE, e.config, folder / f"{e.label}.png", MemorySpec(context=64)) for e in FRONT}
    page = folder / "front.html"
    page.write_text(front_page(EVALUATIONS, "memory against perplexity", SHAPE, MemorySpec(context=64)), encoding="utf-8")
    spec = TrackingSpec(uri=f"sqlite:///{folder.parent}/mlflow.db")
    with Tracker(spec, folder, "quickstart") as tracker:
        tracker.start(folder.name, {"sampler": "nsga2"}, {}, "")
        for step in range(50):
            tracker.log_series("hypervolume", math.sqrt(step), step)
        tracker.log_models({"preset": EVALUATIONS, "front": FRONT}, pictures)
        tracker.log_table(EVALUATIONS)
        tracker.log_artifact(page)
        tracker.describe(front_note({"text": "random letters"}, FRONT, folder.name))
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with ui(folder) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    profile, size = tmp_path_factory.mktemp("profile"), {"width": 1600, "height": 1000}
    with sync_playwright() as playwright:
        launch = playwright.chromium.launch_persistent_context
        context = launch(profile, executable_path=CHROMIUM, args=flags, viewport=size)  # type: ignore[arg-type]
        context.set_default_timeout(SECONDS)
        yield context
        context.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A page that asks nobody but this machine's MLflow."""
    base, outside = address.partition("#")[0], []
    page = browser.new_page()
    page.on("request", lambda request: outside.append(request.url))
    yield page
    page.close()
    assert [url for url in outside if not url.startswith((base, "data:", "blob:", "about:"))] == []


def base_of(address: str) -> str:
    return address.partition("/#")[0]


def link_of(folder: Path) -> Link:
    link = Link.load(folder)
    assert link
    return link


def run_page(address: str, folder: Path, tab: str = "") -> str:
    """The address of a tab of the search's parent run."""
    link = link_of(folder)
    return f"{base_of(address)}/#/experiments/{link.experiment_id}/runs/{link.run_id}{tab}?workflowType=machine_learning"


def sorted_across(cells: Any) -> list[str]:
    """The texts of a row's cells as they stand on the page, from left to right."""
    places = cells.evaluate_all("cells => cells.map(cell => [cell.getBoundingClientRect().left, cell.innerText])")
    return [text for _, text in sorted(places)]


@pytest.mark.slow
@needs_browser
def test_the_view_opens_on_its_charts(page: Any, address: str) -> None:
    page.goto(address)
    page.get_by_text("memory_mib vs. perplexity", exact=True).wait_for()
    scatter = page.locator(".js-plotly-plot").first
    scatter.locator(".scatterlayer .point").first.wait_for()
    assert scatter.locator(".scatterlayer .point").count() == len(EVALUATIONS) + len(FRONT)
    assert scatter.locator(".xtitle").text_content() == "memory_mib"
    assert scatter.locator(".ytitle").text_content() == "perplexity"
    colors = {point.evaluate("p => getComputedStyle(p).fill") for point in scatter.locator(".scatterlayer .point").all()}
    assert len(colors) == 2, "the front and the presets are told apart by colour"
    for title in ("Front orange, presets blue, the others green", "Layers that share, by primitive", "The search's progress"):
        page.get_by_text(title).first.wait_for()
    assert f"{len(FRONT)} config" in page.get_by_text("on the front").first.inner_text()


@needs_browser
def test_the_list_has_the_columns_that_matter(page: Any, address: str) -> None:
    page.goto(address.replace("compareRunsMode=CHART", "compareRunsMode=TABLE"))
    page.locator(".ag-header-cell", has_text="memory_mib").wait_for()
    page.get_by_text("nothing shared").first.wait_for()
    heads = [text.strip() for text in sorted_across(page.locator(".ag-header-cell"))]
    shown = [head for head in heads if head in ("kind", "memory_mib", "perplexity", "bits_per_byte", "sharing")]
    assert shown == ["kind", "memory_mib", "perplexity", "bits_per_byte", "sharing"]
    cells = page.locator("[role=gridcell][col-id='metrics.`memory_mib`']").all_inner_texts()
    memory = [float(cell) for cell in cells if cell[0] != "-"]
    assert len(memory) >= 10
    assert memory == sorted(memory)


@needs_browser
def test_the_search_describes_itself(page: Any, address: str, folder: Path) -> None:
    page.goto(run_page(address, folder))
    page.get_by_text("Show more").click()
    page.get_by_text("nas export quickstart-1 --pick knee --to DIR").wait_for()
    page.locator("td code", has_text=FRONT[0].label).wait_for()


@needs_browser
def test_the_interactive_front_is_drawn_without_a_network(page: Any, address: str, folder: Path) -> None:
    page.goto(run_page(address, folder, "/artifacts/front.html"))
    plot = page.frame_locator("iframe").locator(".js-plotly-plot .point")
    plot.first.wait_for()
    assert plot.count() >= len(EVALUATIONS)
    assert "memory" in page.frame_locator("iframe").locator(".xtitle").first.text_content().lower()


@needs_browser
def test_a_member_of_the_front_shows_who_shares_what(page: Any, address: str, folder: Path) -> None:
    member = FRONT[0].label
    page.goto(address)
    page.get_by_role("link", name=member, exact=True).first.click()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text(f"{member}.png").first.click()
    picture = page.locator("img[src^='blob:'], img[src*='get-artifact'], img[src^='data:']").first
    picture.wait_for()
    page.wait_for_function("image => image.naturalWidth > 100", arg=picture.element_handle())


@pytest.mark.slow
def test_nothing_is_left_when_the_process_is_asked_to_end(folder: Path) -> None:
    script = """
        import contextlib, sys, pathlib, nas.tracking as t
        with contextlib.suppress(KeyboardInterrupt), t.ui(pathlib.Path(sys.argv[1])) as url:  # it may come before it waits
            print(url, flush=True)
            t.wait()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        base = base_of(process.stdout.readline().strip())
        socket.create_connection(("127.0.0.1", int(base.rpartition(":")[2]))).close()
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(20)
    assert code == 0
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_what_cannot_be_shown_is_refused_and_a_search_on_a_server_opens_there(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken"), ui(folder, port):
            pass
    with pytest.raises(UserError, match="nothing in MLflow"), ui(tmp_path):
        pass
    Link(f"sqlite:///{tmp_path}/gone.db", "1", "0123456789abcdef").save(tmp_path)
    with pytest.raises(UserError, match="database is gone"), ui(tmp_path, tracking=f"sqlite:///{tmp_path}/gone.db"):
        pass
    Link("http://host:5000/", "7", "0123456789abcdef").save(tmp_path)
    with ui(tmp_path) as url:
        assert url.startswith("http://host:5000/#/experiments/7/runs?viewStateShareKey=search-0123456789ab&")


def test_two_at_once_do_not_meet() -> None:
    """A server binds its port seconds after it was chosen; another must not choose it meanwhile."""
    with claim(0) as one, claim(0) as other:
        assert one != other
        with pytest.raises(UserError, match=f"port {one} is taken"), claim(one):
            pass


@needs_browser
def test_the_assistant_stays_closed(page: Any, address: str) -> None:
    """Its panel would take a quarter of the width at a browser's first visit."""
    page.goto(address)
    page.get_by_text("quickstart").first.wait_for()
    assert page.evaluate("localStorage.getItem('mlflow.assistant.panelOpen_v1')") in (None, "false")
    assert page.get_by_role("button", name="MLflow Assistant").bounding_box()["width"] < 100


def test_the_assistant_is_not_served(address: str) -> None:
    """Its tools run commands on this machine for whoever asks from it."""
    base = base_of(address)
    for path in ("config", "providers", "message", "sessions/1/stream"):
        for method in ("GET", "POST", "PUT"):
            request = urllib.request.Request(f"{base}/ajax-api/3.0/mlflow/assistant/{path}", b"{}", method=method)
            with pytest.raises(urllib.error.HTTPError) as answer:
                urllib.request.urlopen(request, timeout=60)
            assert answer.value.code == 404
