"""The package from Python: the page's examples as they are written, and what the page says is there."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused

import nas
from nas import api

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text()


def test_the_page_works_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (trial,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    Path("trial.yaml").write_text(trial)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        exec(compile(block, "docs/python.md", "exec"), names)
    run, knee, model = names["run"], names["knee"], names["model"]

    assert run.folder == Path("runs/tiny")
    assert [m.figures["memory_bytes"] for m in run.front] == sorted(m.figures["memory_bytes"] for m in run.front)
    assert nas.front_of("tiny").found == run.front.found
    assert len(run.front) <= len(run.front.all) == len(names["table"])
    assert names["table"].perplexity.tolist() == [m.figures["perplexity"] for m in run.front.all]
    assert len(run.evaluations) == len(run.frame) > 1
    exported, own = model.state_dict(), knee.load().state_dict()
    assert exported.keys() == own.keys()
    assert all(torch.equal(exported[name], own[name]) for name in own)
    assert knee.config.resolve(run.shape) == model.plan
    for shown in (knee, knee.draw(), names["nas"].draw(names["cla"], names["shape"])):
        assert shown._repr_html_().startswith("<svg")
    assert run.front._repr_html_().count("<tr") == len(repr(run.front).splitlines()) - 1
    assert knee.config.hash in {m.config.hash for m in run.front}
    refused(lambda: run.front.pick("knees"), "no such model")
    both = names["both"]
    assert {m.run.name for m in both.all} == {"tiny", "other"} == set(both.frame["run"])
    assert len(both.all) > len(run.front.all)
    assert nas.open_run("other").run.trial().file.search.evaluations == run.run.trial().file.search.evaluations + 6
    again = nas.open_run("tiny")
    assert again == run
    assert nas.resume(str(run.folder)).front.found == run.front.found


def test_the_public_names_are_those_of_the_page() -> None:
    assert set(nas.__all__) <= set(api.__all__)
    rows = " ".join(re.findall(r"^\| (`nas\..*?) \|", PAGE, re.M))
    assert set(re.findall(r"nas\.(\w+)", rows)) == set(nas.__all__)
    assert all(getattr(nas, name) is getattr(api, name) for name in nas.__all__)
    assert all(getattr(api, name).__doc__ for name in api.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'serch'"):
        _ = nas.serch


HEAVY = {
    "nas": ("torch", "yaml", "ray", "optuna", "mlflow"),
    "nas.cli": ("torch", "ray", "optuna", "mlflow", "transformers", "rich", "pydantic"),
    "nas.report": ("matplotlib", "plotly", "pandas", "textalloc"),
    "nas.workers": ("torch", "ray"),
}


def test_importing_a_room_loads_no_library_that_it_may_not_need() -> None:
    for room, libraries in HEAVY.items():
        code = f"import sys, {room}; print([name for name in {libraries} if name in sys.modules])"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert found.stdout.strip() == "[]", room
