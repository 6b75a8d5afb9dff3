"""The pages say what the code does: every key with its default, and every example as it is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from nas.config import key_of
from nas.data import DataSpec
from nas.search.trial import (
    EvaluateSpec,
    FinalSpec,
    PredictorSpec,
    SearchSpec,
    SupernetSpec,
    TrialFile,
)
from nas.sharing.memory import MemorySpec
from nas.sharing.shape import ModelShape
from nas.sharing.space import ChoiceSpec, SpaceFile
from nas.splitting import SplitSpec
from nas.tracking import TrackingSpec
from nas.workers import RunSpec

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SPECS = (
    *(SpaceFile, ChoiceSpec, ModelShape, TrialFile, DataSpec, MemorySpec, PredictorSpec, SupernetSpec, FinalSpec),
    *(SplitSpec, SearchSpec, EvaluateSpec, RunSpec, TrackingSpec),
)


def test_every_key_of_a_file_is_documented_with_its_default() -> None:
    page = (ROOT / "docs" / "experiment_files.md").read_text()
    rows = [(name, default.strip()) for name, default in re.findall(r"^\| `(\w+)` \|(.*?)\| .+ \|$", page, re.MULTILINE)]
    known = {(key_of(f.name), _shown(f.default)) for spec in SPECS for f in fields(spec)}
    documented = {name for name, _ in rows}
    assert {name for name, _ in known} <= documented
    assert documented <= {name for name, _ in known}, "the page names keys that there are none of"
    literal = [row for row in rows if re.fullmatch(r"[a-z\d.e_-]+", row[1]) and row[1] not in ("none", "all")]
    assert len(literal) > 40
    for row in literal:
        assert row in known, row


def _shown(default: Any) -> str:
    return "" if default is MISSING else str(default).lower() if isinstance(default, bool) else str(default)


def test_yaml_examples_are_yaml() -> None:
    for page in PAGES:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            assert isinstance(yaml.safe_load(block), dict), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_what_the_page_adds_works(tmp_path: Path) -> None:
    """docs/extending.md, carried out on a copy of the package."""
    shutil.copytree(ROOT / "nas", tmp_path / "nas", ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r"^```python\n# (.+?)\n(.*?)^```", (ROOT / "docs" / "extending.md").read_text(), re.MULTILINE | re.DOTALL)
    checks = [code for where, code in blocks if where == "check"]
    places = [(where, code) for where, code in blocks if where != "check"]
    assert len(checks) >= 7
    for where, code in places:
        _put(tmp_path, where, code)
    script = tmp_path / "checks.py"
    script.write_text("\n".join(checks))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _put(root: Path, where: str, code: str) -> None:
    """Put a block's code where its first line says: `FILE, in TABLE`, `above TABLE`, `after "LINE"` or `in place of "LINE"`."""
    file, _, place = where.partition(", ")
    path = root / file
    lines = path.read_text().split("\n")
    if place.startswith(("in place of", "after")):
        kind, line, _ = place.split('"')
        n = lines.index(line)
        lines[n : n + 1] = [code] if kind.startswith("in place") else [line, code]
    else:
        kind, table = place.split(" ")
        n = next(n for n, line in enumerate(lines) if re.match(rf"{table}\b.*[(\[{{]$", line))
        while kind == "in" and not re.match(r' +("|[A-Z])', lines[n + 1]):
            n += 1
        n += kind == "in"
        lines[n:n] = [code]
    path.write_text("\n".join(lines))
