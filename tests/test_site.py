"""The site of the pages: what it names is there. `make docs` builds it, and refuses links that lead nowhere."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


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
