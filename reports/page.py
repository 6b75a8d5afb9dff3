"""A page that a program prints: its options, what was found and how, and tables of words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nas.report.tables import markdown_table


def options(doc: str | None, given: list[str] | None, **defaults: Any) -> argparse.Namespace:
    """Options by their defaults: a list takes several values, words only those of its default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        first, many = default, dict[str, Any]()
        if isinstance(default, list):
            first = default[0]
            many = {"nargs": "*", "choices": default if isinstance(first, str) else None}
        parser.add_argument(f"--{name}", type=type(first), default=default, **many)
    torch.set_num_threads(1)
    return parser.parse_args(given)


def show(title: str, doc: str | None, *parts: str | Sequence[Mapping[str, str]]) -> None:
    """Print a page: what was found and how, without the first line of `doc`, then tables and words."""
    words = [f"# {title}", (doc or "").partition("\n\n")[2].strip()]
    sys.stdout.write("\n\n".join([*words, *(p if isinstance(p, str) else markdown_table(p).strip() for p in parts)]) + "\n")
