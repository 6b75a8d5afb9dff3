"""Every benchmark, each into its page: `reports/bench_*.md`."""

import contextlib
import io
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
REPORTS = HERE.parent.parent / "reports"


def main() -> int:
    """Run all; 1 if one missed its goal."""
    missed = 0
    for path in sorted(HERE.glob("bench_*.py")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            missed |= import_module(f"tests.benchmarks.{path.stem}").main([])
        command = f"\nMade by `python -m tests.benchmarks.{path.stem}`.\n"
        (REPORTS / f"{path.stem}.md").write_text(printed.getvalue() + command, encoding="utf-8")
        sys.stdout.write(f"reports/{path.stem}.md\n")
    return missed


if __name__ == "__main__":
    sys.exit(main())
