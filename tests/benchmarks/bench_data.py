"""How fast a long text becomes tokens, and how much memory that takes.

Goals: at most 1.5 GB of memory, and at least 0.8 of the tokens a second that `tokenizers` makes alone.

    python -m tests.benchmarks.bench_data [--megabytes 300]

The text is lines of Python's standard library in random order, each with a random word, in one file. A process of its own reads
it, trains a BPE tokenizer of 8,192 symbols, and encodes its three parts into an empty cache. `tokenizers` alone (`encode_batch`,
64 texts of 65,536 characters at a time, its ids counted) encodes the first part of the same text before and after, in the same
process. Peak memory is the process's own (`ru_maxrss`), Python, torch and mapped files with it.
"""

import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from nas.data import DataSpec, load_corpus
from nas.data import corpus as corpus_module
from nas.data.sources import open_source
from nas.data.text import read_text
from nas.data.tokenizer import chunks
from reports.page import options, show

VOCABULARY = 8_192
LARGEST_GB, LEAST_SHARE = 1.5, 0.8
"""The goals: peak memory, and tokens a second as a share of what `tokenizers` makes alone."""

ALONE = 12 * 2**20
"""Bytes that `tokenizers` encodes alone, each time."""


def write_lines(path: Path, megabytes: int) -> None:
    """A text of so many MB, the same each time."""
    lines = bytes(read_text(open_source("python", Path(), "text"), None).data).decode().splitlines()
    rng, left = random.Random(0), megabytes * 10**6
    with path.open("wb") as file:
        while left > 0:
            block = "".join(f"{line} {rng.getrandbits(40):x}\n" for line in rng.choices(lines, k=20_000)).encode()
            left -= file.write(block)


class Stages:
    """How long each stage takes, by its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Any]:
        begun = time.monotonic()
        yield self
        self.seconds[name] = time.monotonic() - begun

    def update(self, done: int, note: str = "") -> None:
        """Nothing is shown."""


def alone(text: str, tokenizer_json: str) -> float:
    """Tokens a second by `tokenizers`."""
    from tokenizers import Tokenizer

    tokenizer, pieces, count, begun = Tokenizer.from_str(tokenizer_json), chunks(text, 1 << 16), 0, time.monotonic()
    while batch := list(islice(pieces, 64)):
        count += sum(len(encoding.ids) for encoding in tokenizer.encode_batch(batch, add_special_tokens=False))
    return count / (time.monotonic() - begun)


def measure(path: str, folder: str) -> tuple[dict[str, str], bool]:
    """Everything of one text, in this process, and whether a goal is missed."""
    os.environ["NAS_CACHE"], corpus_module.SHOWN = folder, 0  # so that each stage is timed, whatever the text's size
    stages = Stages()
    small = Path(path).with_name("first.txt")
    with open(path, "rb") as file:
        small.write_bytes(file.read(ALONE).rpartition(b"\n")[0])
    tokenizer = load_corpus(DataSpec(str(small), tokenizer="bpe"), VOCABULARY, Path()).tokenizer_json
    first = alone(small.read_text(), tokenizer)
    begun = time.monotonic()
    corpus = load_corpus(DataSpec(path, tokenizer="bpe"), VOCABULARY, Path(), stages.stage)
    seconds = time.monotonic() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    second = alone(small.read_text(), tokenizer)
    encoded = corpus.sizes["train"] / stages.seconds["encode the text (train)"]
    share, text_bytes = encoded / ((first + second) / 2), Path(path).stat().st_size
    row = {
        "text": f"{text_bytes / 1e6:.0f} MB",
        "tokens": f"{sum(corpus.sizes.values()):,}",
        "seconds": f"{seconds:.0f}",
        "tokens/s": f"{encoded:,.0f}",
        "tokenizers alone": f"{first:,.0f} and {second:,.0f}",
        "share": f"{share:.2f}",
        "peak memory": f"{peak / 1e9:.2f} GB",
    }
    return row, peak > LARGEST_GB * 1e9 or share < LEAST_SHARE


def main(given: list[str] | None = None) -> int:
    """Print the page; 1 if a goal is missed."""
    args = options(__doc__, given, megabytes=300)
    with tempfile.TemporaryDirectory() as folder:
        write_lines(Path(folder) / "text.txt", args.megabytes)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row, missed = pool.submit(measure, f"{folder}/text.txt", f"{folder}/cache").result()
    show("A long text", __doc__, [row])
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
