"""The package as it is installed: from a wheel, away from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
