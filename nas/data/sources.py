"""Where text is read from: Python's standard library, a file of text, of JSON lines or of Parquet, a folder of them, a dataset
folder or a dataset of the Hugging Face hub.

Owns `SOURCES`, one row for each kind of source, and the reading of text files. Every source yields documents of valid UTF-8
without NUL, in an order that does not depend on the machine, and reads no more than is asked for, a few megabytes at a time.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import hashlib
import json
import math
import os
import platform
import sys
import sysconfig
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn

from ..errors import UserError, one_of, shown

LONGEST_CHARACTER = 4  # bytes, in UTF-8
READ = 1 << 20  # bytes read at a time
Document = bytes | Iterator[bytes]  # a document, or its blocks in a row, which may be cut anywhere


@dataclass(frozen=True)
class TextSource:
    """A text that can be read: `documents(most)` yields its documents, and may cut one after `most` bytes.

    `words` describes it to a person. `files` are the resolved files that it is read from: two sources that have one in common
    overlap. `version` tells it from another of the same words and files.
    """

    words: str
    files: frozenset[Path]
    documents: Callable[[int | None], Iterator[Document]]
    version: str = ""


@dataclass(frozen=True)
class SourceKind:
    """A row of `SOURCES`: `open(given, path, column)` makes the source of an existing path for which `accepts(path)` is true. A
    row without `accepts` is a corpus that is given by the row's name."""

    open: Callable[[str, Path, str], TextSource]
    accepts: Callable[[Path], bool] | None = None


def open_source(given: str, base: Path, column: str) -> TextSource:
    """The source that a corpus's name or a path, relative to `base`, stands for. Raises UserError if there is none."""
    if given in CORPORA:
        return SOURCES[given].open(given, base, column)
    if given.startswith(HUB):
        return _hub(given, column)
    path = resolve(given, base, CORPORA, f"a text file, a folder of text files, a dataset folder or {one_of(CORPORA)}")
    for kind in SOURCES.values():
        if kind.accepts is not None and kind.accepts(path):
            return kind.open(given, path, column)
    raise UserError(f"{given} is neither a file nor a folder", hint="give a file on disk")


def resolve(given: str, base: Path, names: Iterable[str], wanted: str) -> Path:
    """The existing path meant by `given`. Raises UserError with the nearest of its siblings and of `names`."""
    path = base / os.path.expanduser(given)
    if os.path.exists(path):  # Path.exists raises on a name too long, as a text given in place of its path is
        return path
    siblings = sorted(os.listdir(path.parent)) if os.path.isdir(path.parent) else []
    near = [str(Path(given).with_name(name)) for name in difflib.get_close_matches(path.name, siblings, n=1)]
    near += difflib.get_close_matches(given, names, n=1)
    raise UserError(f"{given} does not exist", hint=f"did you mean {one_of(near)}?" if near else f"give {wanted}")


def read_file(path: Path, most: int | None = None) -> bytes:
    """A text file's bytes, or at least its first `most`. Raises UserError if they are not UTF-8, or hold a NUL."""
    return b"".join(file_blocks(path, most))


def file_blocks(path: Path, most: int | None = None) -> Iterator[bytes]:
    """The same in blocks of whole characters."""
    at, held, left = 0, b"", math.inf if most is None else most + LONGEST_CHARACTER
    with _opened(path) as file:
        while left > 0:
            raw = file.read(int(min(READ, left)))
            data = held + raw
            whole = _check_text(data, str(path), final=not raw, at=at)
            yield data[:whole]
            at, held, left = at + whole, data[whole:], left - len(raw) if raw else 0


def _lines_kept(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks with a newline after the last, as `ensure_newline` has it."""
    last = b""
    for block in blocks:
        yield block
        last = block or last
    yield ensure_newline(last)[len(last) :]


def _package(name: str, what: str, instead: str) -> Any:
    """A package that is optional here. Raises UserError if it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"{what}, and the {name} package is not installed", hint=f"pip install {name}, or {instead}") from None


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": lambda path: gzip.open(path, "rb"),  # noqa: SIM115
    ".zst": lambda path: _package("zstandard", f"{path} is compressed by zstd", "give it decompressed").open(path, "rb"),
}
"""How a file of each suffix is opened; any other is opened as it is."""


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to read, decompressed by its suffix. Raises UserError if it cannot be read or decompressed."""
    try:
        with COMPRESSIONS.get(path.suffix.lower(), lambda path: path.open("rb"))(path) as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile, getattr(sys.modules.get("zstandard"), "ZstdError", EOFError)) as error:
        raise UserError(f"{path} cannot be decompressed ({error})", hint="copy it again, or give it decompressed") from None
    except OSError as error:
        _unreadable(error)


def _unreadable(error: OSError) -> NoReturn:
    message = f"{error.filename} cannot be read ({error.strerror})"
    raise UserError(message, hint="change its permissions, or give another") from None


def _check_text(data: bytes, name: str, final: bool = True, at: int = 0) -> int:
    """How many of the bytes, which begin at byte `at`, are whole characters: all, unless more follow. Raises UserError on what is
    not text."""
    offset = data.find(b"\0")
    try:
        if offset < 0:
            return codecs.utf_8_decode(data, "strict", final)[1]
    except UnicodeDecodeError as error:
        offset = error.start
    what = "NUL" if data[offset] == 0 else f"0x{data[offset]:02x}, which is not UTF-8"
    raise UserError(f"{name} is not text: byte {at + offset} is {what}", hint="give text in UTF-8, or convert it first")


def ensure_newline(document: bytes) -> bytes:
    """The document with a newline at its end, so that the next one does not run into its last line."""
    return document if not document or document.endswith(b"\n") else document + b"\n"


# --- Python's standard library

# What every CPython from 3.11 on installs. Left out: what 3.12 and 3.13 removed; what some distributions package apart (tkinter,
# turtle, idlelib, venv, ensurepip, curses, dbm, sqlite3); what a build generates (_sysconfigdata); and encodings, a table.
MODULES = """
_collections_abc _compat_pickle _markupbase _py_abc _pydecimal _pyio _strptime _threading_local _weakrefset abc argparse ast
asyncio base64 bdb bisect bz2 cProfile calendar cmd code codecs codeop collections colorsys compileall concurrent
configparser contextlib contextvars copy copyreg csv ctypes dataclasses datetime decimal difflib dis doctest email enum
filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac
html http imaplib importlib inspect io ipaddress json keyword linecache locale logging lzma mailbox mimetypes modulefinder
multiprocessing netrc ntpath numbers opcode operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib
poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri random re reprlib rlcompleter runpy sched
secrets selectors shelve shlex shutil signal site smtplib socket socketserver ssl stat statistics string stringprep struct
subprocess symtable sysconfig tabnanny tarfile tempfile textwrap threading timeit token tokenize tomllib trace traceback
tracemalloc tty types typing unittest urllib uuid warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile
zipimport zoneinfo
"""
LEFT_OUT = {"test", "tests", "__pycache__"}  # folders inside packages; distributions often strip the tests


def _standard_library(given: str, path: Path, column: str) -> TextSource:
    """The running Python's own library: a document is a source file or a topic of the language reference (`help("if")`).

    Documents are ordered by the hash of their name: in alphabetical order the end, which is the evaluation text, would be
    `unittest` to `zoneinfo` and nothing like the rest. The text differs between Python versions; the corpus's sha256 says which
    one a run has read. Raises UserError on a Python that comes without source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = {file.relative_to(root).as_posix(): file for name in MODULES.split() for file in _module_files(root, name)}
    if not files:
        raise UserError("this Python comes without its library's source", hint="give the path of a text instead")
    topics = {f"pydoc_data/topics/{name}": text.encode() for name, text in _language_reference().items()}
    order = sorted([*files, *topics], key=lambda name: hashlib.sha256(name.encode()).digest())

    def documents(most: int | None) -> Iterator[bytes]:
        yield from (ensure_newline(read_file(files[name], most) if name in files else topics[name]) for name in order)

    counts = f"{len(files)} files, {len(topics)} topics of the language reference"
    words = f"standard library of Python {platform.python_version()} ({counts})"
    every = frozenset(f.resolve() for f in (*files.values(), root / "pydoc_data" / "topics.py"))
    return TextSource(words, every, documents, sys.version)


def _module_files(root: Path, name: str) -> list[Path]:
    """A module's files. Some are a file in one version and a package in the next: pathlib, sysconfig, zipfile."""
    if (root / f"{name}.py").is_file():
        return [root / f"{name}.py"]
    return [path for path in sorted((root / name).rglob("*.py")) if not LEFT_OUT.intersection(path.relative_to(root).parts)]


def _language_reference() -> dict[str, str]:
    """The language reference by topic, without the topics whose paragraphs are mostly in a larger one (`compound` holds `if`):
    otherwise a model would be evaluated on paragraphs that it was trained on."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = long_paragraphs(text)
        if 2 * len(paragraphs & seen) <= len(paragraphs):
            kept[name] = text
        seen |= paragraphs
    return kept


def long_paragraphs(text: str) -> set[str]:
    """The paragraphs too long to be equal by chance."""
    return {part.strip() for part in text.split("\n\n") if len(part.strip()) > 80}


# --- files and folders

# What a folder of text may hold; "" is for names without a suffix, common in corpora (wiki_00). Other files are left out.
TEXT_SUFFIXES = {"", ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv"} | {
    ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh",
}  # fmt: skip


JSON_LINES, PARQUET = ".jsonl", ".parquet"


def _kind(path: Path) -> str:
    """The suffix that says what a file holds, before that of its compression."""
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path.name).suffix.lower()


def _is_text(path: Path) -> bool:
    """Whether a folder's file is read. A compressed one needs a suffix before that of its compression."""
    kind = _kind(path)
    return kind in {*ROWS, *TEXT_SUFFIXES} and (kind != "" or path.suffix == "")


def _file(given: str, path: Path, column: str) -> TextSource:
    def documents(most: int | None) -> Iterator[Document]:
        yield file_blocks(path, most)

    return TextSource(f"file {given}", frozenset([path.resolve()]), documents)


def _row_file(given: str, path: Path, column: str) -> TextSource:
    """A file of rows: a document is a row's `column`."""
    words, read = ROWS[_kind(path)]
    return TextSource(f"{words} {given}, column {column}", frozenset([path.resolve()]), lambda most: read(path, column))


def _json_rows(path: Path, column: str) -> Iterator[bytes]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            _check_text(line, where)
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON ({error})", hint="write one JSON object a line") from None
            if row is None:
                continue
            _require_column(column, row if isinstance(row, dict) else (), where)
            yield _row_document(row[column], f"{where}: column {column}")


def _parquet_rows(path: Path, column: str) -> Iterator[bytes]:
    arrow = _package("pyarrow", f"{path} is Parquet", "give JSON lines")
    try:
        with import_module("pyarrow.parquet").ParquetFile(path) as file:
            _require_column(column, file.schema_arrow.names, str(path))
            row = 0
            for batch in file.iter_batches(batch_size=1000, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield _row_document(value, f"{path}: row {row} of column {column}")
                    row += 1
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({' '.join(str(error).split())})", hint="write it again") from None


ROWS: dict[str, tuple[str, Callable[[Path, str], Iterator[bytes]]]] = {
    JSON_LINES: ("JSON lines", _json_rows),
    PARQUET: ("Parquet file", _parquet_rows),
}
"""The files of rows, by what their names end in: what they are called, and what reads a column of them."""


def _require_column(column: str, names: Collection[str], where: str) -> None:
    if column not in names:
        hint = f"set data.column, or --column, to {one_of(names)}" if names else f'write {{"{column}": "..."}}'
        raise UserError(f"{where} has no column {column}", hint=hint)


def _row_document(value: Any, where: str) -> bytes:
    """A row's text as a document. An empty row is an empty line, as WikiText's are. Raises UserError if it is no text."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        hint = "set data.column, or --column, to one of strings, or filter the rows"
        raise UserError(f"{where} is {kind}, not a string", hint=hint)
    document = value.encode("utf-8", "surrogatepass")
    _check_text(document, where)
    return ensure_newline(document) or b"\n"


def _folder(given: str, root: Path, column: str) -> TextSource:
    every = list(_visible_files(root))
    paths = [path for path in every if _is_text(path)]
    if not paths:
        kinds = one_of(sorted({*ROWS, *TEXT_SUFFIXES} - {""}))
        raise UserError(f"{given} holds no text files", hint=f"give a folder with files in {kinds}")

    def documents(most: int | None) -> Iterator[Document]:
        for path in paths:
            rows = ROWS.get(_kind(path))
            yield from rows[1](path, column) if rows else [_lines_kept(file_blocks(path, most))]

    others = f" (other files left out: {len(every) - len(paths)})" if len(every) > len(paths) else ""
    words = f"folder {given}, text files: {len(paths)}{others}"
    return TextSource(words, frozenset(path.resolve() for path in paths), documents)


def _visible_files(root: Path) -> Iterator[Path]:
    """The folder's files and its subfolders', sorted, without hidden ones (.git)."""
    for folder, subfolders, names in os.walk(root, onerror=_unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


# --- datasets


def _dataset(given: str, path: Path, column: str) -> TextSource:
    """A folder saved by `datasets` (Arrow and JSON; nothing is unpickled), one document a row."""
    datasets = _package("datasets", f"{given} is a dataset folder", "give a text file")
    root = _dataset_split(given, path)
    with _reading_dataset(given):
        dataset = datasets.load_from_disk(str(root))
    _require_column(column, dataset.column_names, given)
    words = f"dataset {given}{f', split {root.name}' if root != path else ''}, column {column}"
    files = frozenset(file.resolve() for file in _visible_files(root))
    return TextSource(words, files, lambda most: _dataset_rows(dataset, column, given))


def _dataset_split(given: str, path: Path) -> Path:
    """The folder of the split that is read: `train`, or the only one. Another is given by its own folder."""
    if not (path / "dataset_dict.json").is_file():
        return path
    with _reading_dataset(given):
        splits = json.loads(read_file(path / "dataset_dict.json"))["splits"]
        if not splits or not isinstance(splits, list) or any(Path(str(name)).name != name for name in splits):
            raise ValueError("dataset_dict.json names no splits")
    split = "train" if "train" in splits else splits[0] if len(splits) == 1 else None
    if split is None:
        hint = f"give {one_of(f'{given}/{name}' for name in splits)}"
        raise UserError(f"{given} has several splits and none is called train", hint=hint)
    return path / str(split)


@contextmanager
def _reading_dataset(given: str) -> Iterator[None]:
    """Whatever a damaged dataset raises, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{given} cannot be read as a dataset ({reason})", hint="save it again") from None


def _dataset_rows(dataset: Any, column: str, given: str) -> Iterator[bytes]:
    row, batches = 0, dataset.with_format(None).select_columns(column).iter(batch_size=1000)
    while True:
        with _reading_dataset(given):
            batch = next(batches, None)
        if batch is None:
            return
        for value in batch[column]:
            yield _row_document(value, f"{given}: row {row} of column {column}")
            row += 1


# --- the hub

HUB = "hf:"


def _hub(given: str, column: str) -> TextSource:
    """`hf:OWNER/NAME`, `hf:OWNER/NAME/CONFIG`, each with `:SPLIT` at its end (by default `train`): read as it comes, and not kept
    but for its tokens. Raises UserError."""
    datasets = _package("datasets", f"{given} is on the Hugging Face hub", "give a text file")
    named, _, split = given.removeprefix(HUB).partition(":")
    owner, _, rest = named.partition("/")
    name, _, config = rest.partition("/")
    if not owner or not name:
        raise UserError(f"{given} names no dataset", hint="write hf:OWNER/NAME, hf:OWNER/NAME/CONFIG or hf:OWNER/NAME:SPLIT")

    def documents(most: int | None) -> Iterator[bytes]:
        where = f"{given}: column {column}"
        try:
            rows = datasets.load_dataset(f"{owner}/{name}", config or None, split=split or "train", streaming=True)
            for row in rows:
                _require_column(column, row, given)
                yield _row_document(row[column], where)
        except UserError:
            raise
        except Exception as error:  # of the network, by whatever library
            reason = shown(" ".join(f"{type(error).__name__}: {error}".split()))
            hint = "check the name and the network, or give a file"
            raise UserError(f"{given} cannot be read from the hub ({reason})", hint=hint) from None

    return TextSource(f"{given}, column {column}", frozenset(), documents)


SOURCES: dict[str, SourceKind] = {
    "python": SourceKind(_standard_library),
    "rows": SourceKind(_row_file, lambda path: path.is_file() and _kind(path) in ROWS),
    "file": SourceKind(_file, Path.is_file),
    "dataset": SourceKind(_dataset, lambda path: any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))),
    "folder": SourceKind(_folder, Path.is_dir),
}
"""Every kind of source; a path is read by the first row that accepts it. A new kind is a row here, and nothing elsewhere."""

CORPORA = tuple(name for name, kind in SOURCES.items() if kind.accepts is None)  # the corpora that are given by name
