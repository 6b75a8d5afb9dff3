"""The corpus that every machine already has: Python's standard library, source and documentation.

Owns the list of modules and the order they are read in. It needs no download, is real text that people wrote, and is
about 7 MB of code with its docstrings and of the language reference in prose.

A document is a source file or a topic of the language reference (`help("if")`). Documents are ordered by the hash of
their name: in alphabetical order the evaluation text, which is the end, would be `unittest` to `zoneinfo` and nothing
like the rest. A document is not divided between training and evaluation where it can be helped (`corpus.divide`),
because the second half of a file is easy for a model that has learnt the first.

The text differs between Python versions, as the library does; the corpus's sha256 says which one a run has read.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UserError
from .sources import TextSource, ended, read_file

# Only what every CPython from 3.11 on installs, whoever builds it. Left out: what 3.12 and 3.13 removed; what some
# distributions package apart (tkinter, turtle, idlelib, venv, ensurepip, curses, dbm, sqlite3); what a build generates
# (_sysconfigdata holds its machine's paths); and encodings, which is tables of numbers.
MODULES = """
_collections_abc _compat_pickle _markupbase _py_abc _pydecimal _pyio _strptime _threading_local _weakrefset abc
argparse ast asyncio base64 bdb bisect bz2 cProfile calendar cmd code codecs codeop collections colorsys compileall
concurrent configparser contextlib contextvars copy copyreg csv ctypes dataclasses datetime decimal difflib dis
doctest email enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext glob
graphlib gzip hashlib heapq hmac html http imaplib importlib inspect io ipaddress json keyword linecache locale
logging lzma mailbox mimetypes modulefinder multiprocessing netrc ntpath numbers opcode operator optparse os pathlib
pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc
queue quopri random re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtplib
socket socketserver ssl stat statistics string stringprep struct subprocess symtable sysconfig tabnanny tarfile
tempfile textwrap threading timeit token tokenize tomllib trace traceback tracemalloc tty types typing unittest
urllib uuid warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
"""

LEFT_OUT = {"test", "tests", "__pycache__"}  # folders inside packages; distributions often strip the tests

Read = Callable[[int | None], bytes]


def standard_library() -> TextSource:
    """The running Python's own library. Raises UserError on a Python that comes without source files."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root).as_posix(): path for name in MODULES.split() for path in _module_files(root, name)}
    if not files:
        raise UserError("this Python comes without its library's source", hint="give the path of a text instead")
    topics = _topics()
    documents: dict[str, Read] = {name: _file_reader(path) for name, path in files.items()}
    documents |= {f"pydoc_data/topics/{name}": _text_reader(text) for name, text in topics.items()}
    return TextSource(
        words=f"standard library of Python {platform.python_version()} "
        f"({len(files)} files, {len(topics)} topics of the language reference)",
        files=frozenset(path.resolve() for path in (*files.values(), root / "pydoc_data" / "topics.py")),
        documents=lambda most: _shuffled(documents, most),
    )


def _module_files(root: Path, name: str) -> list[Path]:
    """A module's files. Some are a file in one version and a package in the next: pathlib, sysconfig, zipfile."""
    if (root / f"{name}.py").is_file():
        return [root / f"{name}.py"]
    paths = sorted((root / name).rglob("*.py"))
    return [path for path in paths if not LEFT_OUT.intersection(path.relative_to(root).parts)]


def _topics() -> dict[str, str]:
    """The language reference by topic. Large topics repeat small ones (`compound` holds `if`): those are left out.

    Otherwise a model would be evaluated on paragraphs that it was trained on.
    """
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
    """The paragraphs long enough not to be the same by chance."""
    return {part.strip() for part in text.split("\n\n") if len(part.strip()) > 80}


def _shuffled(documents: dict[str, Read], most: int | None) -> Iterator[bytes]:
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield ended(documents[name](most))


def _file_reader(path: Path) -> Read:
    return lambda most: read_file(path, most)


def _text_reader(text: str) -> Read:
    return lambda most: text.encode()
