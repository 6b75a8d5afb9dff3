"""The pages say what the code does: every key with its default, every example as it is written; and their site, and the wheel."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from nas.config import key_of
from nas.data import DataSpec
from nas.search.trial_file import EvaluateSpec, FinalSpec, PredictorSpec, SearchSpec, SupernetSpec, TrialFile
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


def site() -> Any:
    spec = importlib.util.spec_from_file_location("site_of_pages", ROOT / "docs" / "site.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_in(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(part)]


def test_every_module_that_has_a_page_is_there_and_every_page_of_people_is_in_the_navigation() -> None:
    for modules in site().API.values():
        for module in modules:
            path = ROOT / "nas" / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), module
    named = pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert [page for page in named if not page.startswith("api/") and not (ROOT / page).exists()] == []
    written = [*(ROOT / "docs").glob("*.md"), *(ROOT / "reports").glob("*/README.md"), ROOT / "README.md"]
    unnamed = {str(path.relative_to(ROOT)) for path in written} - {*named}
    assert unnamed <= {"reports/ground_truth/README.md"}  # raw data of the ranking, which links to it


@pytest.mark.slow
def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    module = site()
    module.PAGES = tmp_path / "pages"
    module.copy_pages()
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    config |= {"docs_dir": str(module.PAGES), "site_dir": str(tmp_path / "site"), "plugins": ["search"]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(tmp_path / "mkdocs.yml")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    with (module.PAGES / "docs" / "faq.md").open("a") as page:
        page.write("[gone](nowhere.md)\n")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "nowhere.md" in failed.stderr


@pytest.mark.slow
def test_the_wheel_is_all_that_the_command_needs(tmp_path: Path) -> None:
    """Its dependencies are those of this environment: installing them again would only test the registry."""

    def run(*command: str | Path) -> str:
        elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(command, cwd=tmp_path, env=elsewhere, check=True, capture_output=True, text=True).stdout

    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT)
    wheel, archive = sorted((tmp_path / "dist").iterdir(), reverse=True)
    assert "FAILED" not in run(sys.executable, "-m", "twine", "check", "--strict", wheel, archive)
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    nas = tmp_path / "venv" / "bin" / "nas"
    assert str(packages) in run(python, "-c", "import nas; print(nas.__file__)")
    examples = run(nas, "new", "x", "--example", "list").split()
    assert {"quickstart", "from_checkpoint"} <= set(examples)
    for example in examples:
        run(nas, "new", example, "--example", example)
        run(nas, "check", f"{example}/space.yaml")
    assert "a trial: 240 evaluations" in run(nas, "check", "quickstart/trial.yaml")
