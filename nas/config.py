"""Strict loading of YAML and JSON into frozen dataclasses, with one-line errors.

Owns the only use of pydantic and of the YAML parser, and how every file is read that a person may have written or damaged.
A class that is loaded here is a standard frozen dataclass that inherits `Strict`. Bounds are annotations (`PositiveInt`,
`Annotated[str, OneOf(TABLE)]`). Unknown keys, wrong types, values out of bounds and repeated keys are refused with their line.
Input is never repaired: `"3"` is not `3`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge as Ge
from annotated_types import Gt, Lt
from annotated_types import Le as Le

from .errors import UserError, did_you_mean, one_of, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
Path_ = tuple[Hashable, ...]

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


PositiveInt = Annotated[int, Ge(1), Le(2**63 - 1)]
NonNegativeInt = Annotated[int, Ge(0), Le(2**63 - 1)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
OpenFraction = Annotated[float, Gt(0), Lt(1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]


@dataclass(frozen=True, eq=False)
class OneOf:
    """Annotation of a text field that holds a name of a table: `sampler: Annotated[str, OneOf(SAMPLERS)]`."""

    names: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core.core_schema import no_info_after_validator_function

        return no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        if name not in self.names:
            new = RENAMED_VALUES.get(name)
            hint = f"it is called {new} now" if new in self.names else did_you_mean(name, self.names)
            raise UserError(_given(name), hint=hint)
        return name


class Strict:
    """Base of the dataclasses that come from a file: unknown keys, NaN and infinity are errors.

    Bounds of annotated fields also hold for an object made in Python. A key that is a Python keyword has a field with an
    underscore at its end: `from` is `from_`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "allow_inf_nan": False,
        "alias_generator": lambda name: key_of(name),
    }

    def __post_init__(self) -> None:
        from pydantic import ValidationError

        for name, hint in _annotated(cast(Any, type(self))).items():
            try:
                _adapter(cast(Any, hint)).validate_python(getattr(self, name))
            except ValidationError as errors:
                kind = get_type_hints(type(self))[name]
                raise _reason(errors.errors()[0], getattr(self, name), kind).at(name) from None


def key_of(name: str) -> str:
    """A field's key in a file."""
    return name.removesuffix("_")


def plain(data: Any) -> dict[str, Any]:
    """Plain data of a dataclass, with the keys of a file; `build` is the inverse."""
    return asdict(data, dict_factory=lambda pairs: {key_of(name): value for name, value in pairs})


@dataclass(frozen=True)
class Document:
    """Plain data, and the line of each key: `lines[("choices", "kv", "sources")] == 14`; list indices are text."""

    data: Any
    name: str = ""
    lines: dict[tuple[str, ...], int] | None = None

    def where(self, path: Path_) -> str:
        """Such as `space.yaml:14: kv_heads`, with the line of the nearest known key."""
        names, lines = tuple(map(str, path)), self.lines or {}
        keys = [names[:n] for n in range(len(names), -1, -1)]
        line = next((lines[key] for key in keys if key in lines), None)
        place = f"{self.name}:{line}" if line else self.name
        return ": ".join(part for part in (place, ".".join(map(shown, names))) if part)

    def find(self, dotted: str) -> str:
        """The location of the first key whose path ends in `dotted`; the file alone if there is none."""
        tail = tuple(dotted.split("."))
        for path in sorted(self.lines or {}, key=len):
            if path[-len(tail) :] == tail:
                return self.where(path)
        return self.where(tail if dotted else ())

    def inside(self, key: str) -> Document:
        lines = {path[1:]: line for path, line in (self.lines or {}).items() if path[0] == key}
        return Document(self.data[key], self.name, lines)

    def with_settings(self, settings: Iterable[str]) -> Document:
        """The document with other values: a setting is `final.steps=100`, its value in YAML. Raises UserError."""
        data, lines = deepcopy(self.data), self.lines or {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            *above, last = names = key.split(".")
            inside, hint = data, "write KEY=VALUE, such as final.steps=100"
            for name in above:
                inside = inside.setdefault(name, {}) if isinstance(inside, dict) else inside
            if isinstance(inside, list):
                hint = "it is in a list: give the whole list another value"
            if not equals or not last or not isinstance(inside, dict):
                raise UserError("sets no key", where=f"--set {setting}", hint=hint)
            inside[last] = parse_yaml(value, f"--set {key}").data
            lines = {path: line for path, line in lines.items() if path == (*names,) or path[: len(names)] != (*names,)}
        return Document(data, self.name, lines)

    def missing(self) -> list[str]:
        """The keys whose value is `TO_GIVE`, with dots."""

        def walk(data: Any, path: tuple[str, ...]) -> Iterator[str]:
            for key, value in data.items() if isinstance(data, dict) else ():
                yield from walk(value, (*path, str(key)))
            if data == TO_GIVE:
                yield ".".join(path)

        return list(walk(self.data, ()))

    def require_complete(self) -> None:
        """Raise UserError if a value is `TO_GIVE`."""
        if keys := self.missing():
            every = " ".join(f"--set {key}=VALUE" for key in keys)
            raise UserError("is for you to give", where=self.where(tuple(keys[0].split("."))), hint=f"add {every}")


TO_GIVE = "???"  # the value of a key that whoever uses a file has to give (OmegaConf's)
LARGEST = 64 * 2**20  # the most bytes of a file that is read as a whole; the tokenizers of Gemma have half of that
MOST_VALUES = 100_000  # the most values in a YAML file, those that aliases repeat counted each time

MOST_DIGITS = 100


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of more than {MOST_DIGITS} digits")
    return int(digits)


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's numbers and truth values: `3e-3` is a number; `no` and `2026-01-31` are text.

    Underscores between digits are allowed (`1_000`). Numbers that YAML 1.1 and 1.2 read differently are refused (`010`, `1:30`),
    and so are tags of other types than JSON's.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.values, self.sizes = 0, dict[yaml.Node, int]()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """See `Composer`. Raises ComposerError before aliases that repeat one another take the memory."""
        before = self.values
        node = super().compose_node(parent, index)
        if node is not None:
            self.values += self.sizes.get(node, 1)
            self.sizes.setdefault(node, self.values - before)
            if self.values > MOST_VALUES:
                raise yaml.composer.ComposerError(None, None, f"more than {MOST_VALUES:,} values", node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """See `BaseConstructor`. Raises ConstructorError for a value that its tag cannot be."""
        try:
            if node.tag == _INT and len(node.value) > MOST_DIGITS:
                raise ValueError
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError):
            name = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"{shown(node.value)!r} is no {name}", node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """The safe dumper; it quotes text that YAML 1.1 or 1.2 would read as something else."""


_TAG = "tag:yaml.org,2002:"
_INT = f"{_TAG}int"
_FLOAT = (f"{_TAG}float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), "-+.0123456789")
_BOOL = (f"{_TAG}bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF")
_AMBIGUOUS = ("!ambiguous", re.compile(r"[-+]?(0[\d_]+|0b[01_]+|0o[0-7]+|\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?)$"), "-+0123456789")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":timestamp", ":bool"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class, _rule in ((_Loader, _FLOAT), (_Loader, _BOOL), (_Dumper, _FLOAT)):
    _class.add_implicit_resolver(*_rule)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [_AMBIGUOUS[:2], *rules] if first in _AMBIGUOUS[2] else rules
        for first, rules in _class.yaml_implicit_resolvers.items()
    }
_Loader.yaml_constructors = {
    f"{_TAG}{kind}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{kind}"]
    for kind in ("null", "bool", "int", "float", "str", "seq", "map")
}


def _refuse_tag(loader: _Loader, node: yaml.Node) -> None:
    if node.tag == _AMBIGUOUS[0]:
        message = f"{shown(node.value)} is one number in YAML 1.1 and another, or text, in 1.2: write it plainly, or in quotes"
    else:
        message = f"the tag {shown(node.tag)} is not allowed"
    raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)


_Loader.add_constructor(None, _refuse_tag)


def dump_yaml(data: Any) -> str:
    """The YAML text of plain data, in its order; `parse_yaml` is the inverse."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120))


AGAIN = "export the model again, or copy it again from where it came"


@contextmanager
def reading(path: Path, hint: str = AGAIN) -> Iterator[None]:
    """Whatever a damaged file raises when it is read, or taken apart, as a UserError in its name."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        message = "no such file"
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        message = f"byte {error.start} is not UTF-8 text"
    except RecursionError:
        message = "is nested too deeply"
    except json.JSONDecodeError as error:
        message = f"is not JSON ({error})"
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        message = f"is damaged ({type(error).__name__}: {shown(error)})"
    else:
        return
    raise UserError(message, where=str(path), hint=hint)


def read_text(path: Path, hint: str = AGAIN) -> str:
    """The text of a file. Raises UserError: missing, a folder, not UTF-8, larger than `LARGEST`."""
    with reading(path, hint):
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError(f"is larger than {format_bytes(LARGEST)}", where=str(path), hint=hint)
        return data.decode("utf-8-sig")


def parse_json(text: str) -> Any:
    """The data in JSON text. Raises ValueError, for numbers of more than `MOST_DIGITS` digits and halves of characters, too."""
    data = json.loads(text, parse_int=_whole_number)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(data, ensure_ascii=False).encode()
    return data


def require_kinds(data: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise LookupError or TypeError unless each key of `kinds` has a value of its kind: a class, or a tuple of classes."""
    for key, kind in kinds.items():
        if not isinstance(data[key], kind) or isinstance(data[key], bool):
            raise TypeError(f"{key} is {shown(data[key])}")


def read_json(path: Path, hint: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError: as `read_text`, not JSON, no object."""
    with reading(path, hint):
        data = parse_json(read_text(path, hint))
    if not isinstance(data, dict):
        raise UserError("holds no keys and values", where=str(path), hint=hint)
    return data


def read_yaml(path: Path) -> Document:
    """The document in a YAML file, read by the safe loader. Raises UserError: missing, not text, not YAML, a key twice."""
    near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() and not os.path.lexists(path) else []
    hint = did_you_mean(path.name, near) if near else "give the path of a YAML file, saved as UTF-8"
    return parse_yaml(read_text(path, hint), str(path))


def parse_yaml(text: str, name: str) -> Document:
    """The document in YAML text; `name` stands for it in errors."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines = dict(_lines(node, (), name)) if node else {}  # of the keys as written: construction merges `<<` into a node
        return Document(loader.construct_document(node) if node else None, name, lines)
    except RecursionError:
        raise UserError("is nested too deeply", where=name, hint="leave out aliases that contain themselves") from None
    except yaml.YAMLError as error:
        message, line = _syntax(error, text)
        where = f"{name}:{line}" if line else name
        raise UserError(f"not YAML: {message}", where=where, hint="check indentation, colons and quotes there") from None


def _syntax(error: yaml.YAMLError, text: str) -> tuple[str, int | None]:
    """The parser's message in one line, and the line number."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {error.character!r} is not allowed", text.count("\n", 0, error.position) + 1
    mark = getattr(error, "problem_mark", None)
    parts = [getattr(error, name, None) for name in ("context", "problem")]
    return ", ".join(part for part in parts if part) or "cannot be parsed", mark.line + 1 if mark else None


def _lines(node: yaml.Node, path: tuple[str, ...], name: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """The line of every key and list item below a node."""
    children: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.SequenceNode):
        children = [(str(index), child, child) for index, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, child) for key, child in node.value if isinstance(key, yaml.ScalarNode)]
    first: dict[str, int] = {}
    for key, place, child in children:
        line = place.start_mark.line + 1
        if key in first:
            message = f"{shown(key)} is given twice"
            raise UserError(message, where=f"{name}:{line}", hint=f"keep one (the first is on line {first[key]})")
        first[key] = line
        yield (*path, key), line
        yield from _lines(child, (*path, key), name)


def build(kind: type[T], document: Document) -> T:
    """A `kind` (a `Strict` dataclass) from a document. Raises UserError with file, line, message and hint."""
    from pydantic import ValidationError

    if not isinstance(document.data, dict):
        message, keys = _given(document.data), one_of(f"`{key}:`" for key in _required(kind) or _known(kind))
        raise UserError(message, where=document.name, hint=f"write keys and values, such as {keys}")
    try:
        built: T = _adapter(cast(Any, kind)).validate_json(json.dumps(document.data, default=str), strict=True)
        return built
    except ValidationError as errors:
        found = [_complaint(error, kind, document) for error in errors.errors()]
        raise min(found, key=lambda complaint: complaint[0])[1] from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


@cache
def _annotated(kind: type) -> dict[str, Any]:
    """The fields of a class whose annotations carry bounds."""
    plain = get_type_hints(kind)
    return {name: hint for name, hint in get_type_hints(kind, include_extras=True).items() if hint != plain[name]}


RENAMED = {"rule": "strategy", "decay": "lr_decay_fraction", "compare": "similarity", "score": "criterion"}
"""Keys of version 0.1 by their new names, which the error of an unknown key gives."""

RENAMED_VALUES = {"even": "dense_biased", "whole": "global", "module": "per_tensor", "scatter": "variance_reduction"}
"""Values of version 0.1 by their new names."""


BOUNDS = {
    "greater_than_equal": ("is too small", "use {} or more"),
    "greater_than": ("is too small", "use more than {}"),
    "less_than_equal": ("is too large", "use {} or less"),
    "less_than": ("is too large", "use less than {}"),
}
"""Pydantic's errors for values out of bounds: the message, and the hint for the bound."""


def _reason(error: Any, data: Any, kind: Any) -> UserError:
    """Message and hint for a value that its annotation refuses."""
    if error["type"] == "value_error" and isinstance(error["ctx"]["error"], UserError):
        return error["ctx"]["error"]
    if error["type"] in BOUNDS and math.isfinite(data):
        message, hint = BOUNDS[error["type"]]
        bounds = (f"{bound:g}" if isinstance(bound, float) else bound for bound in error["ctx"].values())
        return UserError(f"{shown(data)} {message}", hint=hint.format(*bounds))
    return UserError(_given(data), hint=_hint(data, kind))


def _complaint(error: Any, kind: type, document: Document) -> tuple[tuple[int, int], UserError]:
    """One of pydantic's errors as a UserError, with a rank: the error of lowest rank says most.

    A misspelt key is also a missing one, and a union gives errors for each of its members, of which the deepest says most.
    """
    path, data = _follow(error["loc"], document.data)
    rank, reason = 1, _reason(error, data, _type_at(kind, path))
    if error["type"] == "unexpected_keyword_argument":
        known = _known(_type_at(kind, path[:-1]))
        new = RENAMED.get(path[-1])
        hint = f"it is called {new} now" if new in known else did_you_mean(path[-1], known)
        rank, reason = 0, UserError("unknown key", hint=hint)
    elif error["type"] in ("missing", "missing_argument"):
        key = error["loc"][-1]
        rank, reason = 2, UserError(f"{key} is missing", hint=f"add `{key}:`")
    elif error["loc"][-1:] == ("[key]",):
        wanted = get_args(_type_at(kind, path[:-1]))[0]
        reason = UserError(f"the key {shown(path[-1])} will not do", hint=f"use {_name(wanted)}")
    where = document.where(_join(path, reason.where))
    return (rank, -len(path)), UserError(reason.message, where=where, hint=reason.hint)


def _follow(loc: tuple[Any, ...], data: Any) -> tuple[tuple[str, ...], Any]:
    """The keys of an error's location, and the value there; pydantic's names of union members are skipped."""
    path: list[str] = []
    for part in loc:
        items = data if isinstance(data, dict) else dict(enumerate(data)) if isinstance(data, list) else {}
        named = {_key(key): value for key, value in items.items()}
        if str(part) in named:
            path.append(str(part))
            data = named[str(part)]
    return tuple(path), data


def _key(key: Any) -> str:
    """A key as JSON text, as pydantic sees it."""
    return json.dumps(key) if key is None or isinstance(key, bool) else str(key)


def _join(path: tuple[str, ...], dotted: str) -> tuple[str, ...]:
    """A field's path below a path; both may contain the part in between (`memory` and `memory.dtype`)."""
    field = tuple(dotted.split(".")) if dotted else ()
    overlap = next(n for n in range(min(len(path), len(field)), -1, -1) if path[len(path) - n :] == field[:n])
    return path + field[overlap:]


def _members(kind: Any) -> list[Any]:
    union = get_origin(kind) in (Union, UnionType)
    return [member for member in get_args(kind) if member is not NoneType] if union else [kind]


def _type_at(kind: Any, path: tuple[str, ...]) -> Any:
    """The annotation at a path below a dataclass."""
    for part in path:
        kind = next((inner for member in _members(kind) if (inner := _inside(member, part)) is not None), Any)
    return kind


def _inside(kind: Any, part: str) -> Any:
    if is_dataclass(kind):
        return {key_of(name): hint for name, hint in get_type_hints(kind).items()}.get(part)
    return get_args(kind)[-1] if get_origin(kind) in (dict, list) else None


def _known(kind: Any) -> list[str]:
    """The keys that the dataclass (of a union, the first one) takes."""
    return next(([key_of(f.name) for f in fields(member)] for member in _members(kind) if is_dataclass(member)), [])


def _required(kind: Any) -> list[str]:
    return [key_of(f.name) for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]


WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list", dict: "keys and values"}


def _name(kind: Any) -> str:
    """What a type accepts, for a person: `previous, adjacent or {window: a whole number}`."""
    options: list[str] = []
    for member in _members(kind):
        arguments = get_args(member)
        if get_origin(member) is Literal:
            options += map(str, arguments)
        elif get_origin(member) is list:
            options.append(f"a list, each of it {_name(arguments[0])}")
        elif is_dataclass(member) and len(_known(member)) <= 2:
            options.append(f"{{{', '.join(f'{key}: {_name(_inside(member, key))}' for key in _known(member))}}}")
        elif is_dataclass(member):
            options.append(f"keys and values ({', '.join(_required(member) or _known(member))})")
        else:
            options.append(WORDS.get(get_origin(member) or member, "another value"))
    return one_of(options)


def _given(data: Any) -> str:
    """What was given, for a person."""
    if data is None:
        return "has no value"
    if isinstance(data, dict | list):
        return f"{WORDS[type(data)]} will not do"
    if isinstance(data, float) and not math.isfinite(data):
        return f"{data} is not finite"
    return f"{shown(str(data).lower() if isinstance(data, bool) else repr(data))} will not do"


def _hint(data: Any, kind: Any) -> str:
    """What to write instead: for a quoted number or a misspelt word, the correction itself."""
    if data is None and any(is_dataclass(member) and not _required(member) for member in _members(kind)):
        return "write {} for the defaults"
    numbers = {int, float} & set(_members(kind))
    if isinstance(data, str) and numbers and re.fullmatch(r"[-+]?\d+" if float not in numbers else r"[-+.\deE]+", data):
        return f"write {data} without quotes"
    words = [str(word) for member in _members(kind) if get_origin(member) is Literal for word in get_args(member)]
    guess = did_you_mean(data, words) if isinstance(data, str) else ""
    return guess if guess.startswith("did") else f"use {_name(kind)}"


def parse_bytes(given: int | str, where: str = "") -> int:
    """Bytes from `300MiB`, `1.5 GB` or a plain number, rounded down. Raises UserError on anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(given))
    unit = (match.group(2) or "B") if match else ""
    if not match or unit not in UNITS or isinstance(given, bool):
        hint = f"write it as 300MiB; units are {', '.join(UNITS)}"
        raise UserError(f"{shown(repr(given))} is not a size", where=where, hint=hint)
    return int(Decimal(match.group(1)) * UNITS[unit])


def format_bytes(count: float) -> str:
    """`1.4 MiB`: bytes for a person, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024 or (unit == "MiB" and abs(count) < 10240):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def format_flops(count: float) -> str:
    """`180.1 MFLOP`: floating-point operations for a person."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.1f} {unit}FLOP" if unit else f"{count:.0f} FLOP"
        count /= 1000
    return f"{count:.1f} TFLOP"
