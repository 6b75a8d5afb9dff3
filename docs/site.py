"""The pages as a site: `make docs` writes it to `build/site`.

README, `docs/` and the pages and figures of `reports/` are copied in the repository's own layout, so that every link works in
both places; mkdocs then refuses what leads nowhere. A page for each module of `API` is made of its docstrings, which are read.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
COPIED = ("README.md", "CHANGELOG.md", "LICENSE", "docs", "reports")
SHOWN = ("", ".md", ".png", ".svg", ".csv", ".html", ".json")
"""What a page may show, or link to, by the ends of names."""

API = {
    "From Python": ("api",),
    "What a model shares": ("sharing.shape", "sharing.sharing_config", "sharing.space", "sharing.memory", "sharing.objectives"),
    "Presets": ("presets",),
    "Models": ("model.decoder", "model.supernet"),
    "Training": ("training.loop", "training.strategies", "training.evaluation", "training.measured"),
    "Splitting": ("splitting", "splitting.gradients", "splitting.tree"),
    "Pretrained models": ("pretrained.checkpoint", "pretrained.conversions.methods"),
    "Searches": (
        "search.trial",
        "search.trial_file",
        "search.run",
        "search.front",
        "search.evaluators",
        "search.samplers",
        "search.budget",
    ),
    "Work on many machines": ("workers.executor", "workers.work"),
    "Exports": ("export.card", "export.load"),
    "Errors": ("errors",),
}
"""The modules that have a page, by topic."""


def copy_pages() -> None:
    """Fill `build/pages`."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for name in COPIED:
        found = [ROOT / name] if (ROOT / name).is_file() else sorted(p for p in (ROOT / name).rglob("*") if p.is_file())
        for path in found:
            if path.suffix in SHOWN and "__pycache__" not in path.parts:
                target = PAGES / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                if path.suffix == ".md":  # a command that is indented below a list would be taken for a part of it
                    target.write_text(re.sub(r"(?m)^    (python -m .*)$", r"```\n\1\n```", path.read_text()))
    index = ["# API", "", "Made of the docstrings. Names that begin with `_` are nobody's but the module's.", ""]
    for topic, modules in API.items():
        index += [f"- {topic}: " + ", ".join(f"[`nas.{module}`]({module}.md)" for module in modules)]
        for module in modules:
            page = PAGES / "api" / f"{module}.md"
            page.parent.mkdir(exist_ok=True)
            page.write_text(f"# nas.{module}\n\n::: nas.{module}\n")
    (PAGES / "api" / "index.md").write_text("\n".join(index) + "\n")


def build() -> int:
    """Copy the pages and build the site; mkdocs' exit code, which is not 0 where a link leads nowhere."""
    copy_pages()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)  # --quiet counts no warnings
    for line in ran.stderr.splitlines():
        if not line.startswith("INFO"):
            print(line, file=sys.stderr)
    return ran.returncode


if __name__ == "__main__":
    sys.exit(build())
