"""Where text is read from: a file, a folder of files, a dataset folder, or a corpus known by name.

Owns paths, bytes on disk and their refusal. Every source gives documents of valid UTF-8 without NUL, in an order that
does not depend on the machine, and reads no more of them than is asked for. What is trained on and what is evaluated
on is `corpus`'s.
"""

from __future__ import annotations

import codecs
import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError, one_of

# What a folder of text may hold; "" is for names without a suffix, common in corpora (wiki_00). Other files are left
# out, and the source's words count them.
TEXT_SUFFIXES = {"", ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv"} | {
    ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh",
}  # fmt: skip

LONGEST_CHARACTER = 4  # bytes, in UTF-8


@dataclass(frozen=True)
class TextSource:
    """A text that can be read: `documents(most)` gives it piece by piece, and may cut a piece after `most` bytes.

    `words` says what it is to a person; `files` are the resolved files that it is read from, so that two sources can be
    compared for text in common.
    """

    words: str
    files: frozenset[Path]
    documents: Callable[[int | None], Iterator[bytes]]


def _python() -> TextSource:
    from .stdlib import standard_library  # it builds on this module

    return standard_library()


CORPORA: dict[str, Callable[[], TextSource]] = {"python": _python}


def open_source(given: str, base: Path, column: str) -> TextSource:
    """The source of a corpus's name or a path, relative to `base`. Raises UserError if there is none such."""
    if given in CORPORA:
        return CORPORA[given]()
    path = resolve(given, base, CORPORA, f"a text file, a folder of text files, a dataset folder or {one_of(CORPORA)}")
    if path.is_file():
        return _file_source(given, path)
    if _is_dataset(path):
        return _dataset_source(given, path, column)
    if path.is_dir():
        return _folder_source(given, path)
    raise UserError(f"{given} is neither a file nor a folder", hint="give a file on disk")


def resolve(given: str, base: Path, names: Iterable[str], wanted: str) -> Path:
    """The existing path meant by `given`. Raises UserError with the nearest of its neighbours and of `names`."""
    path = base / os.path.expanduser(given)
    if os.path.exists(path):  # Path.exists raises on a name too long, as a text given in place of its path is
        return path
    siblings = sorted(os.listdir(path.parent)) if os.path.isdir(path.parent) else []
    near = [str(Path(given).with_name(name)) for name in difflib.get_close_matches(path.name, siblings, n=1)]
    near += difflib.get_close_matches(given, names, n=1)
    raise UserError(f"{given} does not exist", hint=f"did you mean {one_of(near)}?" if near else f"give {wanted}")


def read_file(path: Path, most: int | None = None) -> bytes:
    """A text file's bytes, or at least its first `most`. Raises UserError if they are not UTF-8, or hold a NUL."""
    wanted = -1 if most is None else most + LONGEST_CHARACTER
    try:
        with path.open("rb") as file:
            data = file.read(wanted)
    except OSError as error:
        _refuse(error)
    return data[: _checked(data, str(path), final=len(data) != wanted)]


def _refuse(error: OSError) -> NoReturn:
    message = f"{error.filename} cannot be read ({error.strerror})"
    raise UserError(message, hint="change its permissions, or give another") from None


def _checked(data: bytes, name: str, final: bool = True) -> int:
    """How many of the bytes are whole characters: all, unless more follow. Raises UserError on what is not text."""
    offset = data.find(b"\0")
    try:
        if offset < 0:
            return codecs.utf_8_decode(data, "strict", final)[1]
    except UnicodeDecodeError as error:
        offset = error.start
    what = "NUL" if data[offset] == 0 else f"0x{data[offset]:02x}, which is not UTF-8"
    raise UserError(f"{name} is not text: byte {offset} is {what}", hint="give text in UTF-8, or convert it first")


def ended(document: bytes) -> bytes:
    """The document with a newline at its end, so that the next one does not run into its last line."""
    return document if not document or document.endswith(b"\n") else document + b"\n"


def _file_source(given: str, path: Path) -> TextSource:
    def documents(most: int | None) -> Iterator[bytes]:
        yield read_file(path, most)

    return TextSource(f"file {given}", frozenset([path.resolve()]), documents)


def _folder_source(given: str, root: Path) -> TextSource:
    every = list(_visible_files(root))
    paths = [path for path in every if path.suffix.lower() in TEXT_SUFFIXES]
    if not paths:
        kinds = one_of(sorted(TEXT_SUFFIXES - {""}))
        raise UserError(f"{given} holds no text files", hint=f"give a folder with files in {kinds}")

    def documents(most: int | None) -> Iterator[bytes]:
        yield from (ended(read_file(path, most)) for path in paths)

    others = f" (other files left out: {len(every) - len(paths)})" if len(every) > len(paths) else ""
    words = f"folder {given}, text files: {len(paths)}{others}"
    return TextSource(words, frozenset(path.resolve() for path in paths), documents)


def _visible_files(root: Path) -> Iterator[Path]:
    """The folder's files and its subfolders', sorted; hidden ones (.git) are not text anybody means."""
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _is_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _dataset_source(given: str, path: Path, column: str) -> TextSource:
    """A folder saved by `datasets` (Arrow and JSON; nothing in it is unpickled), one document a row."""
    root = _split_folder(given, path)
    dataset = _open_dataset(given, root)
    if column not in dataset.column_names:
        raise UserError(f"{given} has no column {column}", hint=f"set data.column to {one_of(dataset.column_names)}")
    words = f"dataset {given}{f', split {root.name}' if root != path else ''}, column {column}"
    return TextSource(
        words=words,
        files=frozenset(file.resolve() for file in _visible_files(root)),
        documents=lambda most: _rows(dataset, column, given),
    )


def _split_folder(given: str, path: Path) -> Path:
    """The split that is read: `train`, or the only one. Another is named by its own folder."""
    if not (path / "dataset_dict.json").is_file():
        return path
    try:
        splits = json.loads(read_file(path / "dataset_dict.json"))["splits"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{given}/dataset_dict.json names no splits", hint="save the dataset again") from None
    split = "train" if "train" in splits else splits[0] if len(splits) == 1 else None
    if split is None:
        hint = f"give {one_of(f'{given}/{name}' for name in splits)}"
        raise UserError(f"{given} has several splits and none is called train", hint=hint)
    return path / str(split)


def _open_dataset(given: str, root: Path) -> Any:
    try:
        import datasets  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        message = f"{given} is a dataset folder, and the datasets package is not installed"
        raise UserError(message, hint="pip install datasets, or give a text file") from None
    try:
        return datasets.load_from_disk(str(root))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{given} cannot be read as a dataset ({reason})", hint="save it again") from None


def _rows(dataset: Any, column: str, given: str) -> Iterator[bytes]:
    row = 0
    for batch in dataset.with_format(None).select_columns(column).iter(batch_size=1000):
        for value in batch[column]:
            if not isinstance(value, str):
                kind = "null" if value is None else type(value).__name__
                hint = "set data.column to one of strings, or filter the rows"
                raise UserError(f"{given}: row {row} of column {column} is {kind}, not a string", hint=hint)
            document = value.encode()
            _checked(document, f"{given}: row {row}")
            yield ended(document) or b"\n"  # an empty row is an empty line, as WikiText's are
            row += 1
