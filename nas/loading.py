"""Strict loading: a YAML file or text becomes a frozen dataclass, or one line says why not.

Owns the only use of pydantic and the only reading of YAML. Every class loaded here is a standard frozen dataclass that
inherits `Strict`; unknown keys, wrong types and repeated keys are refused with the line they stand on. Nothing is
repaired: `"3"` is not `3`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from .errors import UserError, did_you_mean

T = TypeVar("T")

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Strict:
    """Inherited by the dataclasses that come from a file: unknown keys are errors."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


@dataclass(frozen=True)
class Document:
    """Plain data and where each of its keys stands: `lines[("choices", "kv", "sources")] == 14`."""

    data: Any
    name: str = ""
    lines: dict[tuple[Hashable, ...], int] | None = None

    def where(self, path: tuple[Hashable, ...]) -> str:
        """`space.yaml:14: kv_heads`, with the nearest line that is known."""
        lines = self.lines or {}
        keys = [path[:n] for n in range(len(path), -1, -1)]
        line = next((lines[key] for key in keys if key in lines), None)
        place = f"{self.name}:{line}" if line else self.name
        return ": ".join(part for part in (place, ".".join(map(str, path))) if part)

    def find(self, dotted: str) -> str:
        """The place of the first key whose path ends as `dotted` does; the file alone if there is none."""
        tail = tuple(dotted.split("."))
        for path in self.lines or {}:
            if tuple(map(str, path[-len(tail) :])) == tail:
                return self.where(path)
        return ": ".join(part for part in (self.name, dotted) if part)


def read_yaml(path: Path) -> Document:
    """The document in a YAML file, read by the safe loader. Raises UserError: missing, not text, not YAML, a key twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError("no such file", where=str(path), remedy=did_you_mean(path.name, near) if near else "") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read as text ({error})", where=str(path)) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Document:
    """The document in YAML text; `name` is what its errors are called by."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"not YAML: {getattr(error, 'problem', None) or error}", where=where) from None
    return Document(data, name, dict(_lines(node, (), name)) if node else {})


def _lines(node: yaml.Node, path: tuple[Hashable, ...], name: str) -> Iterator[tuple[tuple[Hashable, ...], int]]:
    if path:
        yield path, node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _lines(child, (*path, index), name)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            if key.value in seen:
                raise UserError(f"{key.value} is given twice", where=f"{name}:{key.start_mark.line + 1}")
            seen.add(key.value)
            yield (*path, key.value), key.start_mark.line + 1
            yield from ((p, line) for p, line in _lines(child, (*path, key.value), name) if p != (*path, key.value))


def build(kind: type[T], document: Document) -> T:
    """A `kind` (a `Strict` dataclass) from a document. Raises UserError with file, line, rule and remedy."""
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(document.data, dict):
        raise UserError(f"expected keys and values, got {type(document.data).__name__}", where=document.name)
    try:
        return TypeAdapter(kind).validate_json(json.dumps(document.data, default=str), strict=True)
    except ValidationError as error:
        raise _first(error.errors(), kind, document) from None
    except UserError as error:
        raise UserError(error.rule, where=document.find(error.where), remedy=error.remedy) from None


def _first(errors: list[Any], kind: type, document: Document) -> UserError:
    """The one line for pydantic's first complaint. A union complains once per member: the deepest says most."""
    error = max(errors, key=lambda e: (e["type"] in ("unexpected_keyword_argument", "missing"), -errors.index(e)))
    path = tuple(part for part in error["loc"] if part in _keys(document.data))
    where = document.where(path)
    if error["type"] == "unexpected_keyword_argument":
        return UserError("unknown key", where=where, remedy=did_you_mean(path[-1], _known(kind, path[:-1])))
    if error["type"] in ("missing", "missing_argument"):
        where = document.where(path)
        return UserError(f"{error['loc'][-1]} is missing", where=where, remedy=f"add `{error['loc'][-1]}:`")
    return UserError(f"{error['msg'].replace('Input should be', 'should be')}, got {error['input']!r}", where=where)


def _keys(data: Any) -> set[Any]:
    if isinstance(data, dict):
        return {str(k) for k in data}.union(*map(_keys, data.values()))
    if isinstance(data, list):
        return set(range(len(data))).union(*map(_keys, data))
    return set()


def _known(kind: Any, path: tuple[Any, ...]) -> list[str]:
    """The keys that the dataclass at `path` below `kind` takes."""
    from typing import get_args, get_type_hints

    for part in path:
        kind = get_type_hints(kind).get(str(part), kind) if hasattr(kind, "__dataclass_fields__") else kind
        kind = next((arg for arg in get_args(kind) if hasattr(arg, "__dataclass_fields__")), kind)
    return sorted(getattr(kind, "__dataclass_fields__", {}))


def load(kind: type[T], path: Path) -> T:
    """A `kind` from a YAML file."""
    return build(kind, read_yaml(path))


def parse_bytes(given: int | str, where: str = "") -> int:
    """Bytes from `300MiB`, `1.5 GB` or a plain number. Raises UserError on anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(given))
    unit = (match.group(2) or "B") if match else ""
    if not match or unit not in UNITS or isinstance(given, bool):
        raise UserError(f"{given!r} is not a size", where=where, remedy=f"write it as 300MiB; units are {', '.join(UNITS)}")
    return int(float(match.group(1)) * UNITS[unit])


def format_bytes(count: float) -> str:
    """`1.4 MiB`: bytes for a person, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024 or (unit == "MiB" and abs(count) < 10240):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
