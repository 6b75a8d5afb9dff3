"""The pages say what the code does: every key with its default, and every example as it is written."""

from __future__ import annotations

import re
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
