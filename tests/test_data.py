"""Laws of `nas.data`: text comes back from its tokens, and nothing evaluated on was trained on."""

import dataclasses
import gzip
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
from array import array
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from commands import refused, said, told
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from nas.cli import nas
from nas.data import (
    CORPORA,
    TOKENIZERS,
    Corpus,
    DataSpec,
    TokenFile,
    bits_per_byte,
    eval_sequences,
    load_corpus,
    sources,
    train_batches,
)
from nas.data import corpus as corpus_module
from nas.data.cache import entries
from nas.data.sources import MODULES, TextSource, long_paragraphs, open_source
from nas.data.text import FileBytes, Text, divide, read_text
from nas.data.tokenizer import END, build_tokenizer, byte_symbols, bytes_json, chunks, encode, encode_bytes, end_token
from nas.errors import UserError
from nas.export.measure import whole_corpus
from nas.search.jobs import token_batches
from nas.training.loop import TrainSpec

ROWS = 300  # of embedding: more than bytes need, and few enough for a BPE of the texts below
VERSE = "".join(f"{n} green bottles, hanging on the wall;\n\n  isn't it {n}?\n" for n in range(400))

# Spaces and ends of lines of every kind, letters, digits, signs, contractions, and characters of 2, 3 and 4 bytes.
texts = st.text(alphabet=st.sampled_from("ab'sT09 .,;_\n\n\n\r\t\x1c\x85\u00a0\u2028\u3000éß中。🙂\u0301"), max_size=80)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def python_source() -> TextSource:
    return open_source("python", Path(), "text")


@pytest.fixture(scope="session")
def python_text() -> Text:
    return read_text(python_source(), 400_000)


@pytest.fixture(scope="session")
def bpe(python_text: Text) -> Tokenizer:
    return Tokenizer.from_str(build_tokenizer("bpe", 1000, python_text.data, Path()).json)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def decode(corpus: Corpus, side: str) -> bytes:
    ids: list[int] = getattr(corpus, side).tolist()
    return Tokenizer.from_str(corpus.tokenizer_json).decode(ids).encode()


# Tokenizers


@given(any_text | texts)
def test_bytes_ids_are_the_bytes_with_or_without_the_library(text: str) -> None:
    tokenizer = Tokenizer.from_str(bytes_json())
    ids = encode_bytes(text.encode()).tolist()
    assert bytes(ids) == text.encode()
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_bytes_json_is_what_the_tokenizers_library_would_write(python_text: Text, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert sorted(byte_symbols()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert json.loads(Tokenizer.from_str(bytes_json()).to_str()) == json.loads(bytes_json())
    assert torch.equal(encode(Tokenizer.from_str(bytes_json()), python_text.data), encode_bytes(python_text.data))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(write(tmp_path, "tokenizer.json", bytes_json())))
    text = " Two  spaces , an isn't, and 🙂\n\n"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


@settings(max_examples=200)
@given(any_text | texts, st.integers(1, 20))
def test_bpe_encodes_chunks_as_it_does_the_whole_and_gives_any_text_back(bpe: Tokenizer, text: str, chunk: int) -> None:
    assert "".join(chunks(text, chunk)) == text
    ids = encode(bpe, text.encode(), chunk).tolist()
    assert ids == bpe.encode(text).ids
    assert bpe.decode(ids, skip_special_tokens=False) == text


def test_real_text_is_encoded_in_chunks_as_the_whole_is(bpe: Tokenizer, python_text: Text) -> None:
    text = python_text.data.decode()
    pieces = list(chunks(text, 5000))
    assert len(pieces) > 50
    assert max(map(len, pieces)) < 10_000
    assert encode(bpe, python_text.data, 5000).tolist() == bpe.encode(text).ids
    llama = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    llama.pre_tokenizer = pre_tokenizers.Sequence(parts)
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=byte_symbols(), show_progress=False)
    llama.train_from_iterator([text], trainer)
    assert encode(llama, python_text.data, 20_000).tolist() == llama.encode(text).ids


def test_a_text_that_spells_the_end_of_text_holds_the_token_with_or_without_the_library() -> None:
    text = "\n".join(["a", END, f"b{END}{END}c", END[:-1], f"<{END}", "ÿ"])
    ids = encode_bytes(text.encode()).tolist()
    assert ids.count(256) == 4
    library = Tokenizer.from_str(bytes_json())
    assert library.encode(text).ids == encode(library, text.encode(), 1).tolist() == ids
    assert library.decode(ids, skip_special_tokens=False) == text
    assert build_tokenizer("bytes256", 256, b"", Path()).encode(text.encode()).tolist() == list(text.encode())


def test_bpe_has_exactly_the_symbols_asked_for() -> None:
    for size in (257, 258, 500):
        tokenizer = build_tokenizer("bpe", size, VERSE.encode(), Path())
        assert tokenizer.size == size == Tokenizer.from_str(tokenizer.json).get_vocab_size()
        assert tokenizer.end == end_token(tokenizer.json) == size - 1


def test_bpe_is_the_same_in_another_process_and_bytes_need_few_libraries(tmp_path: Path) -> None:
    write(tmp_path, "verse.txt", VERSE)
    program = (
        "import sys, pathlib, hashlib\n"
        "for name in ('tokenizers', 'datasets', 'transformers'): sys.modules[name] = None\n"
        "from nas.data import *\n"
        "for text in ('verse.txt', 'python'):\n"
        "    c = load_corpus(DataSpec(text=text, max_bytes=9000), 257, pathlib.Path(sys.argv[1]))\n"
        "    eval_sequences(c.eval, 8, 4)\n"
        "del sys.modules['tokenizers']\n"
        "c = load_corpus(DataSpec(text='verse.txt', tokenizer='bpe'), 400, pathlib.Path(sys.argv[1]))\n"
        "print(hashlib.sha256(c.tokenizer_json.encode()).hexdigest(), c.train.sum().item())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    there = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    here = load_corpus(DataSpec(text="verse.txt", tokenizer="bpe"), 400, tmp_path)
    assert there == [hashlib.sha256(here.tokenizer_json.encode()).hexdigest(), str(here.train.sum().item())]


def test_eval_text_is_read_in_full_and_bpe_is_trained_on_the_training_text_alone(tmp_path: Path) -> None:
    write(tmp_path, "train.txt", VERSE)
    corpora = []
    for number, text in enumerate(("zzzzzz qqqqqq\n" * 1000, "something else\n" * 1000)):
        write(tmp_path, f"eval{number}.txt", text)
        spec = DataSpec(text="train.txt", eval_text=f"eval{number}.txt", tokenizer="bpe")
        corpora.append(load_corpus(spec, ROWS, tmp_path))
        assert decode(corpora[-1], "train") == VERSE.encode()
        assert decode(corpora[-1], "eval") == text.encode()
    assert corpora[0].tokenizer_json == corpora[1].tokenizer_json
    assert corpora[0].sha256 != corpora[1].sha256


def test_a_tokenizer_file_is_kept_to_the_letter_and_reads_texts_whole(tmp_path: Path, bpe: Tokenizer) -> None:
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    path = write(tmp_path, "mine/tokenizer.json", json.dumps(json.loads(tokenizer.to_str()), indent=3))
    write(tmp_path, "verse.txt", VERSE)
    corpus = load_corpus(DataSpec(text="verse.txt", tokenizer="mine/tokenizer.json"), 5000, tmp_path)
    assert corpus.tokenizer_json == path.read_text()
    assert bpe.decode(corpus.train.tolist()) + bpe.decode(corpus.eval.tolist()) == VERSE


# Training and evaluation text


def test_every_tokenizer_gives_every_corpus_back(tmp_path: Path) -> None:
    write(tmp_path, "verse.txt", VERSE)
    write(tmp_path, "folder/a.md", VERSE)
    write(tmp_path, "folder/b/c.txt", VERSE.upper())
    for tokenizer, text in product(TOKENIZERS, [*CORPORA, "verse.txt", "folder"]):
        corpus = load_corpus(DataSpec(text=text, tokenizer=tokenizer, max_bytes=40_000), ROWS, tmp_path)
        read = read_text(open_source(text, tmp_path, "text"), 40_000).data
        assert decode(corpus, "train") + decode(corpus, "eval") == read
        assert corpus.bytes_of("eval") == len(decode(corpus, "eval"))
        assert corpus.sha256 == hashlib.sha256(read).hexdigest()
        parts = corpus.train, corpus.validation, corpus.test
        assert [part.dtype for part in parts] == [torch.uint16, torch.int32, torch.int32]
        assert max(part.long().max() for part in parts) < ROWS
        assert corpus.sizes == {name: len(getattr(corpus, name)) for name in ("train", "validation", "test")}
        for part in ("validation", "test"):
            assert getattr(corpus, f"{part}_text").replace(END.encode(), b"") == decode(corpus, part)


def test_documents_are_joined_by_the_end_of_text_and_the_evaluation_text_can_be_read_back(tmp_path: Path) -> None:
    documents = [f"{VERSE[:80]}{n:02}\n" for n in range(40)]
    for n, text in enumerate([*documents, ""]):
        write(tmp_path, f"folder/{n:02}.txt", text)
    write(tmp_path, "rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in documents))
    write(tmp_path, "plain.json", bytes_json(end=False))
    for text, tokenizer in product(["folder", "rows.jsonl"], ["bytes", "bpe", "bytes256", "plain.json"]):
        corpus = load_corpus(DataSpec(text=text, tokenizer=tokenizer), ROWS, tmp_path)
        library, end = Tokenizer.from_str(corpus.tokenizer_json), END if tokenizer in ("bytes", "bpe") else ""
        assert corpus.end == library.token_to_id(END) == (None if not end else 256 if tokenizer == "bytes" else ROWS - 1)
        parts = {"train": documents[:36], "validation": documents[36:38], "test": documents[38:]}
        for ids, kept in ((getattr(corpus, part), kept) for part, kept in parts.items()):
            assert library.decode(ids.tolist(), skip_special_tokens=False) == end.join(kept)
        for part in ("validation", "test"):
            assert corpus.bytes_of(part) == len("".join(parts[part]))
            assert bits_per_byte(math.log(2), corpus, part) == len(getattr(corpus, part)) / corpus.bytes_of(part)
        write(tmp_path, "model/tokenizer.json", corpus.tokenizer_json)
        again = whole_corpus(tmp_path / "model", write(tmp_path, "test.txt", corpus.test_text), ROWS)
        assert torch.equal(again.test, corpus.test)
        assert again.bytes_of("test") == corpus.bytes_of("test")


def test_a_text_is_split_where_a_document_ends_else_a_line_else_a_character() -> None:
    before, after = divide(Text(VERSE.encode(), ()), 0.2, "text")
    assert before.data.endswith(b"\n")
    assert len(after.data) / len(VERSE) == pytest.approx(0.2, abs=0.01)
    documents = [f"document {n}\nhas lines\n".encode() for n in range(100)]
    ends = [sum(map(len, documents[: n + 1])) for n in range(99)]
    before, after = divide(Text(b"".join(documents), tuple(ends)), 0.1, "text")
    assert (before, after) == (Text(b"".join(documents[:90]), tuple(ends[:89])), Text(b"".join(documents[90:]), after.ends))
    assert [end + ends[89] for end in after.ends] == ends[90:]
    before, after = divide(Text(("title\n" + "中" * 1000).encode(), ()), 0.1, "text")
    assert len(after.data) == pytest.approx(300, abs=3)
    before.data.decode()


@given(any_text | texts, st.floats(0.01, 0.99), st.lists(st.integers(1, 200), max_size=4))
def test_a_split_text_is_whole_and_its_sides_are_text(text: str, fraction: float, ends: list[int]) -> None:
    data = text.encode()
    whole = {len(text[:n].encode()) for n in range(1, len(text))}
    try:
        before, after = divide(Text(data, tuple(sorted(whole.intersection(ends)))), fraction, "text")
    except UserError:
        train_bytes = len(data) - round(len(data) * fraction)
        assert train_bytes < 4 or train_bytes == len(data)  # a side is nothing, or within one character
        return
    assert before.data
    assert after.data
    assert before.data.decode() + after.data.decode() == text


@given(texts, st.integers(2, 100))
def test_max_bytes_takes_the_beginning(tmp_path_factory: pytest.TempPathFactory, text: str, most: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    write(folder, "any/1.txt", text)
    write(folder, "any/2.txt", VERSE[:50])
    for name in ("any/1.txt", "any"):
        source = open_source(name, folder, "text")
        whole, some = read_text(source, None).data, read_text(source, most).data
        assert whole.startswith(some)
        assert min(most, len(whole)) - 3 <= len(some) <= most
        some.decode()


def test_a_folder_is_read_in_order_of_name_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "c", ".git/config.txt", ".hidden.txt"):
        write(tmp_path, f"all/{name}", f"this is {name}")
    write(tmp_path, "all/picture.png", b"\x89PNG\0")
    source = open_source("all", tmp_path, "text")
    assert set(read_text(source, None).data.decode().splitlines()) == {"this is b.txt", "this is a/z.md", "this is c"}
    assert read_text(source, None) == read_text(open_source("all", tmp_path, "text"), None)
    assert "text files: 3 (other files left out: 1)" in source.words


def test_json_lines_are_documents_and_compressed_files_are_read_as_they_were(tmp_path: Path) -> None:
    rows = VERSE.splitlines()
    lines = "".join(json.dumps({"text": row, "story": row.upper()}) + "\n" for row in rows) + "\n"
    packed = {name: gzip.compress(text.encode()) for name, text in (("rows.jsonl.gz", lines), ("verse.txt.gz", VERSE))}
    for name, content in {"rows.jsonl": lines, **packed}.items():
        write(tmp_path, f"one/{name}", content)
        assert read_text(open_source(f"one/{name}", tmp_path, "text"), None).data.decode() == VERSE, name
    write(tmp_path, "one/blob.gz", b"no text")
    folder = open_source("one", tmp_path, "text")
    assert read_text(folder, None).data.decode() == VERSE * 3
    assert len(read_text(folder, None).ends) == 2 * len(rows)
    assert "text files: 3 (other files left out: 1)" in folder.words
    for column, text in (("text", VERSE), ("story", VERSE.upper())):
        assert read_text(open_source("one/rows.jsonl", tmp_path, column), None).data.decode() == text
    assert len(read_text(open_source("one/rows.jsonl", tmp_path, "text"), 20).data) == 20


def test_zstd_is_read_where_its_package_is(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    write(tmp_path, "verse.txt.zst", zstandard.compress(VERSE.encode()))
    assert read_text(open_source("verse.txt.zst", tmp_path, "text"), None).data.decode() == VERSE
    write(tmp_path, "torn.zst", b"no frame")
    refused(lambda: load_corpus(DataSpec(text="torn.zst"), 257, tmp_path), "decompressed")


def test_parquet_is_read_as_rows_alone_and_in_folders(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = VERSE.splitlines()
    (tmp_path / "mixed").mkdir()
    parquet.write_table(pa.table({"text": rows, "n": range(len(rows))}), tmp_path / "mixed" / "a.parquet", row_group_size=100)
    write(tmp_path, "mixed/b.txt", "the end")
    assert read_text(open_source("mixed/a.parquet", tmp_path, "text"), None).data == VERSE.encode()
    folder = read_text(open_source("mixed", tmp_path, "text"), None)
    assert (folder.data, len(folder.ends)) == (f"{VERSE}the end\n".encode(), len(rows))
    write(tmp_path, "bad.parquet", "no table")
    for name, column, says in (
        ("mixed/a.parquet", "story", "set data.column, or --column, to text or n"),
        ("mixed/a.parquet", "n", "row 0 of column n is int"),
        ("bad.parquet", "text", "bad.parquet cannot be read as Parquet"),
    ):
        refused(lambda name=name, column=column: load_corpus(DataSpec(name, column=column), ROWS, tmp_path), says)


def test_a_dataset_of_the_hub_is_read_row_by_row_and_without_a_network_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*given: Any, **named: Any) -> Any:
        asked.append((*given, named))
        return iter([{"text": "one"}, {"text": "two"}])

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load)
        for name in ("hf:me/tales", "hf:me/tales/short:test"):
            assert read_text(open_source(name, Path(), "text"), None) == Text(b"one\ntwo\n", array("q", [4]))
    stream = {"streaming": True}
    assert asked == [("me/tales", None, {"split": "train"} | stream), ("me/tales", "short", {"split": "test"} | stream)]
    refused(lambda: load_corpus(DataSpec("hf:tales"), ROWS, Path()), "hf:OWNER/NAME")
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: (_ for _ in ()).throw(ConnectionError("no network")))
    says = "data.text: hf:me/tales cannot be read from the hub (ConnectionError: no network)"
    refused(lambda: load_corpus(DataSpec("hf:me/tales"), ROWS, Path()), says)


# The standard library


def test_the_standard_library_is_about_7_mb_and_no_file_is_on_both_sides() -> None:
    assert set(MODULES.split()) <= sys.stdlib_module_names
    root = Path(sysconfig.get_path("stdlib"))
    assert [n for n in MODULES.split() if not (root / f"{n}.py").is_file() and not (root / n).is_dir()] == []
    text = read_text(python_source(), None)
    assert 6e6 < len(text.data) < 9e6
    before, after = divide(text, 0.1, "text")
    assert len(before.data) in text.ends
    assert len(after.data) / len(text.data) == pytest.approx(0.1, abs=0.02)
    left_out = {"site-packages", "test", "tests", "__pycache__"}
    assert not any(left_out & set(path.parts[-3:-1]) for path in python_source().files)


def test_the_language_reference_is_read_once() -> None:
    text = read_text(python_source(), None)
    starts = (0, *text.ends)
    documents = [text.data[a:b].decode() for a, b in zip(starts, (*text.ends, len(text.data)), strict=True)]
    topics = [document for document in documents if "\n****" in document[:200]]
    assert len(topics) > 30
    assert any(document.startswith("Compound statements\n*******") for document in topics)
    assert not any(document.startswith('The "if" statement\n*****') for document in topics)
    paragraphs = [paragraph for document in topics for paragraph in long_paragraphs(document)]
    assert len(paragraphs) - len(set(paragraphs)) <= 5


def test_a_short_beginning_of_the_standard_library_reads_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    plain = sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda path, most=None: read.append(path) or plain(path, most))
    corpus = load_corpus(DataSpec(max_bytes=20_000), 257, Path())
    assert len(read) < 10
    assert len(corpus.train) + len(corpus.eval) == pytest.approx(20_000, abs=3)
    assert load_corpus(DataSpec(max_bytes=20_000), 257, Path()).sha256 == corpus.sha256


# Dataset folders


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("datasets")
    rows = VERSE.splitlines()
    train = datasets.Dataset.from_dict({"text": rows, "words": rows[::-1], "length": [len(row) for row in rows]})
    valid = datasets.Dataset.from_dict({"text": ["something else"] * 9})
    train.save_to_disk(str(folder / "one"))
    datasets.DatasetDict({"train": train, "valid": valid}).save_to_disk(str(folder / "both"))
    datasets.DatasetDict({"left": train, "right": valid}).save_to_disk(str(folder / "odd"))
    datasets.Dataset.from_dict({"text": ["fine", None]}).save_to_disk(str(folder / "null"))
    write(folder, "broken/state.json", "{}")
    return folder


def test_a_dataset_is_read_a_line_a_row(dataset_folder: Path) -> None:
    backwards = "".join(f"{line}\n" for line in VERSE.splitlines()[::-1])
    corpus = load_corpus(DataSpec(text="both", eval_text="both/valid"), 257, dataset_folder)
    assert decode(corpus, "eval") == b"something else\n" * 9
    for text in ("one", "both", "both/train", "odd/left"):
        assert read_text(open_source(text, dataset_folder, "text"), None).data.decode() == VERSE
        assert read_text(open_source(text, dataset_folder, "words"), None).data.decode() == backwards


def test_what_is_held_out_is_halved_unless_the_test_text_is_given(tmp_path: Path) -> None:
    """The training part does not depend on the rest; no byte is in two parts, and a text that is divided is whole."""
    for name, line in (("one", "{} green bottles"), ("two", "{} red cars"), ("three", "{} grey cats")):
        write(tmp_path, f"{name}.txt", "".join(f"{line.format(n)}\n" for n in range(900)))
    one, two, three = ((tmp_path / f"{name}.txt").read_bytes() for name in ("one", "two", "three"))
    made = {
        keys: load_corpus(DataSpec("one.txt", **{key: f"{value}.txt" for key, value in keys}), ROWS, tmp_path)
        for keys in ((), (("eval_text", "two"),), (("test_text", "three"),), (("eval_text", "two"), ("test_text", "three")))
    }
    nothing, evaluated, tested, both = made.values()
    end = len(decode(nothing, "train"))
    for corpus, train, validation, test in (
        (nothing, one[:end], None, None),
        (evaluated, one, None, None),
        (tested, one[:end], one[end:], three),
        (both, one, two, three),
    ):
        assert decode(corpus, "train") == train
        held_out = corpus.validation_text + corpus.test_text
        assert (corpus.validation_text, corpus.test_text) == (validation, test) if test else held_out in (one[end:], two)
        assert test or abs(len(corpus.validation_text) - len(corpus.test_text)) < 40
        assert corpus.eval_text == held_out == decode(corpus, "eval")
        assert corpus.sha256 == hashlib.sha256(train + held_out).hexdigest()
    assert len(one) - end == pytest.approx(len(one) / 10, abs=40)
    assert "validation and test: the last" in nothing.source
    assert "validation: file two.txt; test: file three.txt" in both.source


def test_datasets_refused(dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, says in (
        (DataSpec(text="one", column="story"), "text, words or length"),
        (DataSpec(text="one", column="length"), "row 0 of column length is int"),
        (DataSpec(text="odd"), "odd/left or odd/right"),
        (DataSpec(text="null"), "row 1 of column text is null"),
        (DataSpec(text="broken"), "cannot be read as a dataset"),
        (DataSpec(text="both", eval_text="both/train"), "is in the training text"),
    ):
        refused(lambda spec=spec: load_corpus(spec, 257, dataset_folder), says)
    splits = ('{"splits": {"a": 1}}', '{"splits": []}', '{"splits": 3}', '{"splits": ["../one"]}')
    rows = dataset_folder.joinpath("one/data-00000-of-00001.arrow").read_bytes()
    text = rows.replace(VERSE.encode()[:5], b"\xff" * 5)
    for name, contents in (
        ("dataset_dict.json", splits),
        ("state.json", ("[", "[]", '{"_data_files": 3}', "[" * 100_000)),
        ("dataset_info.json", ('{"features": 3}', "[" * 100_000)),
        ("data-00000-of-00001.arrow", (b"", rows[:300], text)),
    ):
        for content in contents:
            folder = shutil.copytree(dataset_folder / "one", tmp_path / "one", dirs_exist_ok=True)
            write(folder, name, content)
            refused(lambda: load_corpus(DataSpec(text="one", eval_fraction=0.5), 257, tmp_path), "cannot be read as a dataset")
            shutil.rmtree(folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(lambda: load_corpus(DataSpec(text="one"), 257, dataset_folder), "pip install datasets")


# Texts of any size, and the cache


@given(texts, st.lists(texts.filter(bool), min_size=1, max_size=6), st.integers(1, 30), st.booleans())
def test_pieces_of_a_text_join_to_it_are_encoded_as_it_is_and_begin_anywhere(
    bpe: Tokenizer, head: str, documents: list[str], size: int, ended: bool
) -> None:
    parts = [document.encode() for document in ([head] if head else []) + documents]
    text, end = Text(b"".join(parts), [sum(map(len, parts[:n])) for n in range(1, len(parts))]), 0 if ended else None
    whole = (END if ended else "").encode().join(parts)
    assert text.joined(end) == whole
    pieces = list(text.pieces(end, 0, size))
    assert "".join(piece for piece, _ in pieces).encode() == whole
    for n, (_, at) in enumerate(pieces):
        rest = "".join(piece for piece, _ in pieces[n + 1 :])
        assert at == len(whole) - len(rest.encode())
        assert "".join(piece for piece, _ in text.pieces(end, at, size)) == rest
    if not ended:
        ids = [id for piece, _ in pieces for id in encode(bpe, piece.encode()).tolist()]
        assert ids == bpe.encode(whole.decode()).ids


@given(st.binary(min_size=1, max_size=60), st.integers(-70, 70), st.integers(-70, 70), st.integers(0, 59))
def test_bytes_in_a_file_are_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, start: int, stop: int, at: int) -> None:
    there = FileBytes(write(tmp_path_factory.getbasetemp(), "bytes", b"before" + data), 6, 6 + len(data))
    assert (len(there), bytes(there)) == (len(data), data)
    assert bytes(there[start:stop]) == data[start:stop]
    assert bytes(there[1:][start:stop]) == data[1:][start:stop]
    assert there[at % len(data)] == data[at % len(data)]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("NAS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same_tokens(one: Corpus, other: Corpus) -> bool:
    return all(torch.equal(getattr(one, part).long(), getattr(other, part).long()) for part in ("train", "validation", "test"))


def test_tokens_are_made_once_and_again_when_anything_differs(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_cache.parent
    write(folder, "verse.txt", VERSE)
    spec = DataSpec(text="verse.txt", tokenizer="bpe")
    first = load_corpus(spec, ROWS, folder)
    with monkeypatch.context() as patch:
        patch.setattr("nas.data.corpus.read_text", None)
        again = load_corpus(spec, ROWS, folder)
    assert same_tokens(first, again)
    assert (first.sha256, first.source, first.tokenizer_json) == (again.sha256, again.source, again.tokenizer_json)
    assert first.train_file == again.train_file
    (entry,) = entries()
    put = first.train_file.put(folder / "runs" / "train.bin")  # type: ignore[union-attr]
    assert put.path.samefile(entry.folder / "train.bin")
    for other, rows in (
        (dataclasses.replace(spec, tokenizer="bytes"), ROWS),
        (spec, ROWS + 1),
        (dataclasses.replace(spec, max_bytes=9000), ROWS),
        (dataclasses.replace(spec, eval_fraction=0.2), ROWS),
    ):
        before = len(entries())
        load_corpus(other, rows, folder)
        assert len(entries()) == before + 1
    write(folder, "verse.txt", VERSE.upper())
    assert load_corpus(spec, ROWS, folder).sha256 != first.sha256
    for found in entries():
        found.remove()
    assert not entries()
    assert torch.equal(put.read().long(), first.train.long())


def test_a_killed_making_goes_on_from_its_shards_to_the_same_tokens(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever piece it is killed; and what is damaged later is made again."""
    folder, pieces = own_cache.parent, []
    for name, value in {"PIECE": 2000, "SHARD": 4000}.items():
        monkeypatch.setattr(f"nas.data.corpus.{name}", value)
    write(folder, "rows.jsonl", "".join(json.dumps({"text": line}) + "\n" for line in VERSE.splitlines()))
    spec, making = DataSpec(text="rows.jsonl"), corpus_module._encoded
    monkeypatch.setenv("NAS_CACHE", str(folder / "other"))
    whole = load_corpus(spec, ROWS, folder)
    monkeypatch.setenv("NAS_CACHE", str(own_cache))

    def killed_at(last: int) -> Any:
        def encoded(texts: Any, encode: Any) -> Any:
            for n, found in enumerate(making(texts, encode)):
                pieces.append(found[1])
                yield found
                if n == last:
                    raise KeyboardInterrupt

        return encoded

    for last in (0, 3, 5):
        monkeypatch.setattr(corpus_module, "_encoded", killed_at(last))
        with pytest.raises(KeyboardInterrupt):
            load_corpus(spec, ROWS, folder)
        (entry,) = entries()
        assert not entry.complete
    assert len(set(pieces)) > 6  # later ones began behind the first shards
    monkeypatch.setattr(corpus_module, "_encoded", making)
    monkeypatch.setattr(corpus_module, "read_text", None)
    assert same_tokens(load_corpus(spec, ROWS, folder), whole)
    monkeypatch.undo()
    monkeypatch.setenv("NAS_CACHE", str(own_cache))
    (entry,) = entries()
    (entry.folder / "train.bin").write_bytes(b"cut")
    assert same_tokens(load_corpus(spec, ROWS, folder), whole)


def test_an_entry_whose_note_is_damaged_is_made_again(own_cache: Path) -> None:
    """It was listed, or read, with a traceback."""
    folder = own_cache.parent
    write(folder, "verse.txt", VERSE)
    whole = load_corpus(DataSpec(text="verse.txt"), ROWS, folder)
    (entry,) = entries()
    note = json.loads((entry.folder / "meta.json").read_text())
    file = {"bytes": 3, "sha256": "0"}
    for damage in (
        *({key: None} for key in ("text", "tokenizer", "source", "sha256", "dtype", "tokens", "files")),
        *({"bos": "x"}, {"end": []}, {"dtype": "add"}, {"dtype": "int32"}, {"files": []}, {"files": {}}, {"files": {"a": 3}}),
        *({"tokens": {}}, {"tokens": {**note["tokens"], "test": "x"}}, {"files": {**note["files"], "test.bin": file}}),
        {"tokens": {**note["tokens"], "more": 1}},
    ):
        (entry.folder / "meta.json").write_text(json.dumps(note | damage))
        assert "unfinished" in said("data"), damage
        assert said("data", "check").endswith("1 checked, 0 damaged, 1 unfinished\n"), damage
        assert same_tokens(load_corpus(DataSpec(text="verse.txt"), ROWS, folder), whole), damage
        assert json.loads((entry.folder / "meta.json").read_text()) == note


def test_nas_data_lists_checks_and_removes(own_cache: Path) -> None:
    folder = own_cache.parent
    for name in ("a", "b"):
        write(folder, f"{name}.txt", VERSE + name)
        load_corpus(DataSpec(text=f"{name}.txt"), ROWS, folder)

    one, two = told("data")["entries"]
    assert "file a.txt" in said("data")
    assert one["tokens"] == len(VERSE) + 1
    assert "2 checked, 0 damaged" in said("data", "check")
    path = own_cache / "tokens" / one["key"] / "test.bin"
    path.write_bytes(path.read_bytes()[::-1])
    found = CliRunner().invoke(nas, ["data", "check"])
    assert (found.exit_code, f"{one['key']}: damaged: test.bin" in found.output) == (1, True)
    said("data", "remove", one["key"])
    assert [row["key"] for row in told("data")["entries"]] == [two["key"]]
    said("data", "remove", "--all")
    assert not entries()
    for wrong in ([], ["nothing"]):
        refused(lambda wrong=wrong: said("data", "remove", *wrong))


def test_without_a_cache_that_can_be_written_tokens_are_made_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "home", "a file")
    write(tmp_path, "verse.txt", VERSE)
    for name in ("NAS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv("NAS_CACHE", raising=False)
        monkeypatch.setenv(name, str(tmp_path / "home"))
        corpus = load_corpus(DataSpec(text="verse.txt"), ROWS, tmp_path)
        assert decode(corpus, "train") + decode(corpus, "eval") == VERSE.encode()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "verse.txt"]


def test_a_tokenizer_of_a_long_text_is_trained_on_pieces_spread_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.data.corpus.SAMPLE", 2000)
    monkeypatch.setattr("nas.data.corpus.READ", 100)
    text = Text("".join(f"{n:05} é\n" for n in range(9000)).encode())
    lines = corpus_module._sample(text).decode().splitlines()
    found = [int(line[:5]) for line in lines if len(line) == 7]
    assert len(corpus_module._sample(text)) == pytest.approx(2000, abs=20)
    assert found == sorted(found)
    assert max(b - a for a, b in zip([0, *found], [*found, 9000], strict=True)) < 600


# Refusals


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"text": "vers.txt"}, "data.text: vers.txt does not exist; did you mean verse.txt?"),
    ({"text": "folder/b.txt"}, "did you mean folder/a.txt?"),
    ({"text": "pyton"}, "did you mean python?"),
    ({"text": "nowhere/at/all"}, "data.text: nowhere/at/all does not exist"),
    ({"text": VERSE.replace("\n", " ")}, "does not exist"),
    ({"text": "empty.txt"}, "data.text: empty.txt is empty"),
    ({"text": "binary.txt"}, "byte 3 is NUL"),
    ({"text": "latin.txt"}, "byte 3 is 0xe9"),
    ({"text": "half.txt"}, "byte 3 is 0xe4"),
    ({"text": "utf16.txt"}, "is not text"),
    ({"text": "mixed"}, "b.txt is not text: byte 3 is NUL"),
    ({"text": "pictures"}, "data.text: pictures holds no text files"),
    ({"text": "verse.txt", "eval_text": "verse.txt"}, "data.eval_text: "),
    ({"text": "verse.txt", "eval_text": "./folder/../verse.txt"}, "verse.txt is in the training text"),
    ({"text": "verse.txt", "eval_text": "link.txt"}, "verse.txt is in the training text"),
    ({"text": "verse.txt", "eval_text": "copy.txt"}, "copy.txt is in the training text"),
    ({"text": "folder", "eval_text": "folder/a.txt"}, "a.txt is in the training text"),
    ({"text": "python", "eval_text": "python"}, "is in the training text"),
    ({"text": "verse.txt", "eval_text": "empty.txt"}, "data.eval_text: empty.txt is empty"),
    ({"text": "verse.txt", "eval_text": "letter.txt"}, "data.eval_text: 1 bytes cannot be divided"),
    ({"text": "letter.txt"}, "data.text: 1 bytes of it cannot be divided"),
    ({"text": "six.txt"}, "data.text: 1 bytes of it cannot be divided"),
    ({"text": "verse.txt", "test_text": "copy.txt"}, "data.test_text: copy.txt is in the training text"),
    ({"text": "folder", "test_text": "folder/a.txt"}, "a.txt is in the training text"),
    ({"text": "folder", "eval_text": "verse.txt", "test_text": "link.txt"}, "verse.txt is in the evaluation text"),
    ({"text": "verse.txt", "tokenizer": "byte"}, "data.tokenizer: byte does not exist; did you mean bytes?"),
    ({"text": "verse.txt", "tokenizer": "x/y.json"}, "data.tokenizer: x/y.json does not exist"),
    ({"text": "verse.txt", "tokenizer": "folder"}, "give folder/tokenizer.json"),
    ({"text": "verse.txt", "tokenizer": "verse.txt"}, "data.tokenizer: verse.txt is no tokenizer.json"),
    ({"text": "verse.txt", "tokenizer": "large.json"}, "vocab_size: 299 "),
    ({"text": "hello.txt", "tokenizer": "bpe"}, "vocab_size: the training text yields 263 symbols"),
    ({"text": "a.jsonl"}, "a.jsonl:2 is not JSON"),
    ({"text": "b.jsonl"}, "set data.column, or --column, to story or title"),
    ({"text": "c.jsonl"}, "c.jsonl:2: column text is null"),
    ({"text": "d.jsonl"}, "is NUL"),
    ({"text": "e.jsonl"}, "which is not UTF-8"),
    ({"text": "f.jsonl"}, "f.jsonl:1 has no column text"),
    ({"text": "g.txt.gz"}, "g.txt.gz cannot be decompressed"),
    ({"text": "h.jsonl.gz"}, "h.jsonl.gz cannot be decompressed"),
    ({"text": "i.txt.zst"}, "pip install zstandard"),
]


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    contents: dict[str, str | bytes] = {
        "verse.txt": VERSE, "copy.txt": VERSE, "folder/a.txt": VERSE.upper(), "empty.txt": "", "letter.txt": "a",
        "six.txt": "hello\n",
        "hello.txt": "hello " * 9, "binary.txt": b"abc\0def", "latin.txt": b"caf\xe9\n", "half.txt": b"abc\xe4\xb8",
        "utf16.txt": "text".encode("utf-16"), "mixed/a.txt": "text", "mixed/b.txt": b"abc\0", "pictures/a.png": b"\0",
        "large.json": build_tokenizer("bpe", 300, VERSE.encode(), Path()).json,
        "a.jsonl": '{"text": "fine"}\n{"text": \n', "b.jsonl": '{"story": "x", "title": "y"}\n', "c.jsonl": '\n{"text": null}\n',
        "d.jsonl": '{"text": "\\u0000"}\n', "e.jsonl": '{"text": "\\ud800"}\n', "f.jsonl": "[1]\n",
        "g.txt.gz": gzip.compress(VERSE.encode())[:-9], "h.jsonl.gz": b"text", "i.txt.zst": b"",
    }  # fmt: skip
    for name, content in contents.items():
        write(folder, name, content)
    (folder / "link.txt").symlink_to(folder / "verse.txt")
    return folder


def test_refusals(mistakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for keys, says in REFUSED:
        refused(lambda keys=keys: load_corpus(DataSpec(**keys), 299, mistakes), says)
    for tokenizer in TOKENIZERS:
        spec = DataSpec(text="verse.txt", tokenizer=tokenizer)
        refused(lambda spec=spec: load_corpus(spec, 255, mistakes), "vocab_size: 255 ")
    older = "use 257 or more; a model made by version 0.1 has `data: {tokenizer: bytes256}`"
    refused(lambda: load_corpus(DataSpec(text="verse.txt"), 256, mistakes), older)
    for keys in [{"eval_fraction": value} for value in (0.0, 1.0, -0.1, math.nan)] + [{"max_bytes": n} for n in (-1, 0, 1)]:
        refused(lambda keys=keys: DataSpec(**keys), next(iter(keys)))


# Windows


def test_train_windows_are_of_the_whole_text_and_follow_from_the_generator() -> None:
    tokens, generator = torch.arange(1000, dtype=torch.int32), torch.Generator().manual_seed(1)
    first, second = (train_batches(tokens, 4, 16, g) for g in (generator, torch.Generator().manual_seed(1)))
    for _ in range(5):
        batch = next(first)
        assert torch.equal(batch, next(second))
        assert batch.shape == (4, 17)
        assert batch.dtype == torch.int64
        assert torch.equal(batch, batch[:, :1] + torch.arange(17))
    state = generator.get_state()
    expected = next(first)
    assert torch.equal(next(train_batches(tokens, 4, 16, torch.Generator().set_state(state))), expected)
    assert not torch.equal(next(second), next(train_batches(tokens, 4, 16, torch.Generator().manual_seed(2))))
    ends = next(train_batches(torch.arange(20), 500, 16, torch.Generator().manual_seed(0)))
    assert set(ends[:, 0].tolist()) == {0, 1, 2, 3}
    refused(lambda: train_batches(torch.arange(16), 1, 16, generator), "data: the training text has 16 tokens")


@given(st.integers(2, 500), st.integers(1, 40), st.integers(1, 30))
def test_eval_windows_are_apart_spread_and_fixed(length: int, seq: int, count: int) -> None:
    tokens = torch.arange(length, dtype=torch.int32)
    if length <= seq:
        refused(lambda: eval_sequences(tokens, seq, count), f"the evaluation text has {length} tokens")
        return
    windows = eval_sequences(tokens, seq, count)
    assert windows.shape == (min(count, length // (seq + 1)), seq + 1)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + torch.arange(seq + 1))
    assert len(set(windows.flatten().tolist())) == windows.numel()
    assert torch.equal(windows, eval_sequences(tokens, seq, count))
    gaps = windows[:, 0].diff()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_each_part_needs_a_sequence(tmp_path: Path) -> None:
    write(tmp_path, "verse.txt", VERSE)
    parts = {"training": 0.99, "validation": 0.1, "test": 0.1}
    for part, fraction in parts.items():
        corpus = load_corpus(DataSpec(text="verse.txt", eval_fraction=fraction), ROWS, tmp_path)
        least = min(corpus.sizes.values())
        corpus.require(least - 1)
        if part != "test":
            refused(lambda corpus=corpus, least=least: corpus.require(least), f"the {part} text has {least} tokens")
    short = dataclasses.replace(corpus, test=corpus.test[:9])
    refused(lambda: short.require(9), "the test text has 9 tokens")


def stored_tokens(path: Path, tokens: Tensor, dtype: torch.dtype) -> TokenFile:
    tokens.to(dtype).numpy().tofile(path)
    return TokenFile(path, len(tokens), dtype)


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, torch.uint16), (65_536, torch.int32)], ids=str)
def test_stored_tokens_are_those_written_and_a_job_carries_their_path_alone(
    tmp_path: Path, largest: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(largest + 1, (20_000,), generator=generator, dtype=torch.int32)
    tokens[7] = largest
    stored = pickle.loads(pickle.dumps(stored_tokens(tmp_path / "tokens.bin", tokens, dtype)))
    assert torch.equal(stored.read().long(), tokens.long())
    spec = TrainSpec(steps=1, batch=4, seq=8)
    mapped, carried = (token_batches(t, spec, torch.Generator().manual_seed(1), 3) for t in (stored, tokens.numpy()))
    assert all(torch.equal(next(mapped), next(carried)) for _ in range(3))
    assert len(pickle.dumps(stored)) < 1_000
    stored.path.write_bytes(stored.path.read_bytes()[:-2])
    refused(stored.read, "another size")


def test_tokens_that_are_put_somewhere_twice_leave_nothing_beside_them(tmp_path: Path) -> None:
    stored = stored_tokens(tmp_path / "cache.bin", torch.arange(100), torch.uint16)
    for _ in range(2):
        assert torch.equal(stored.put(tmp_path / "run.bin").read(), stored.read())
    assert {path.name for path in tmp_path.iterdir()} == {"cache.bin", "run.bin"}
    stored.path.unlink()
    assert len(TokenFile(tmp_path / "run.bin", stored.count, stored.dtype).read()) == 100
