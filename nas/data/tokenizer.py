"""Text to token ids, and the tokenizer's JSON that an exported model carries.

Owns `TOKENIZERS`, the end-of-text token and the encoding of whole texts. Every tokenizer is a `tokenizers` JSON, so that an
exported folder can hold it as it is. `bytes` and `bpe` decode to the original text exactly; a user's tokenizer.json loses what it
was made to lose.
"""

from __future__ import annotations

import array
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from .sources import read_file, resolve

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES = 256
END = "<|endoftext|>"  # the token between documents, by GPT-2's name. A text that spells it holds the token, as in `transformers`
NO_BYTE = b"\xff"  # in no UTF-8
CHUNK = 1 << 16  # characters; many chunks keep every core busy
BATCH = 64  # chunks encoded at a time, which bounds the memory that their tokens take


@dataclass(frozen=True)
class TextTokenizer:
    """`encode(text)` gives `(tokens,)` int32, all below `size`; `json` is the same tokenizer for `tokenizers`. bos: the token
    that its post-processor puts before a text, if any; `encode` leaves it out. end: the special token `END`, if it has one."""

    json: str
    size: int
    encode: Callable[[bytes], Tensor]
    bos: int | None = None
    end: int | None = None


def build_tokenizer(given: str, vocab_size: int, train_text: bytes, base: Path) -> TextTokenizer:
    """The tokenizer of a name or of a tokenizer.json, for a model that has `vocab_size` rows of embedding. A tokenizer that is
    trained here sees `train_text` alone. Raises UserError if there is no such tokenizer or it needs more rows."""
    if given in TOKENIZERS:
        least, make = TOKENIZERS[given]
        _check_vocab(vocab_size, least, given)
        return make(vocab_size, train_text)
    tokenizer = _from_file(given, resolve(given, base, TOKENIZERS, "bytes, bpe or the path of a tokenizer.json"))
    _check_vocab(vocab_size, tokenizer.size, given)
    return tokenizer


def _check_vocab(vocab_size: int, size: int, name: str) -> None:
    if vocab_size < size:
        message = f"{vocab_size} is below the {size} symbols of the tokenizer {name}"
        old = "; a model made by version 0.1 has `data: {tokenizer: bytes256}`" if (vocab_size, name) == (BYTES, "bytes") else ""
        raise UserError(message, where="vocab_size", hint=f"use {size} or more{old}")


def byte_symbols() -> list[str]:
    """The printable character of each byte in byte-level vocabularies (GPT-2's table): a byte that prints in Latin-1 is itself;
    the others take the characters from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(BYTES)]


def bytes_json(end: bool = True) -> str:
    """The tokenizer whose ids are the bytes of UTF-8, with or without `END`, written out so that `tokenizers` need not be
    installed."""
    vocab = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    return BYTES_JSON % (END_JSON if end else "", json.dumps(vocab, ensure_ascii=False, separators=(",", ":")))


# As `tokenizers` writes it, but for the vocabulary: no merges, and no pattern that splits the text.
BYTES_JSON = (
    '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[%s],"normalizer":null,'
    '"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false},'
    '"post_processor":null,'
    '"decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false},'
    '"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,'
    '"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,'
    '"vocab":%s,"merges":[]}}'
)
END_JSON = (
    f'{{"id":{BYTES},"content":"{END}","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}'
)


def encode_bytes(text: bytes) -> Tensor:
    """`(tokens,)` int32: the bytes themselves, and 256 for `END`."""
    tokens = _encode_each_byte(text.replace(END.encode(), NO_BYTE))
    return tokens.masked_fill_(tokens == ord(NO_BYTE), BYTES)


def _encode_each_byte(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int32) if text else torch.empty(0, dtype=torch.int32)


def _bpe(vocab_size: int, train_text: bytes) -> TextTokenizer:
    """Byte-level BPE in GPT-2's manner (Sennrich et al. 2016; Radford et al. 2019), of exactly `vocab_size` symbols; the last is
    `END`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    # The whole alphabet, or bytes that the training text lacks would have no symbol.
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=byte_symbols(), show_progress=False)
    tokenizer.train_from_iterator(chunks(train_text.decode(), CHUNK), trainer)
    tokenizer.add_special_tokens([END])
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        message = f"the training text yields {size} symbols, not {vocab_size}"
        raise UserError(message, where="vocab_size", hint=f"use {size}, or a longer text")
    return TextTokenizer(tokenizer.to_str(), size, lambda text: encode(tokenizer, text), end=size - 1)


TOKENIZERS: dict[str, tuple[int, Callable[[int, bytes], TextTokenizer]]] = {
    "bytes": (BYTES + 1, lambda vocab_size, text: TextTokenizer(bytes_json(), BYTES + 1, encode_bytes, end=BYTES)),
    "bpe": (BYTES + 1, _bpe),
    "bytes256": (BYTES, lambda vocab_size, text: TextTokenizer(bytes_json(end=False), BYTES, _encode_each_byte)),
}
"""The tokenizers that are made here: the least symbols, and `make(vocab_size, train_text)`. `bytes256` is for models made by
version 0.1, whose `bytes` had no `END`."""


def _from_file(given: str, path: Path) -> TextTokenizer:
    from tokenizers import Tokenizer

    if path.is_dir():
        raise UserError(f"{given} is a folder", hint=f"give {given}/tokenizer.json")
    text = read_file(path).decode()
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{given} is no tokenizer.json ({reason})", hint="give one that tokenizers saved") from None
    tokenizer.no_truncation()  # they are set for a model's inputs; a corpus is read whole
    tokenizer.no_padding()
    return TextTokenizer(text, vocabulary_size(tokenizer), lambda text: encode(tokenizer, text), _bos(text), end_token(text))


def end_token(tokenizer_json: str) -> int | None:
    """The id of the special token `END`, if a tokenizer has one."""
    added = json.loads(tokenizer_json).get("added_tokens") or []
    return next((int(token["id"]) for token in added if token["content"] == END and token.get("special")), None)


def _bos(tokenizer_json: str) -> int | None:
    """The token that a tokenizer's post-processor puts before a text, such as Gemma's and Llama 3's; None for most others. It
    is read and not tried out: a vocabulary need not have any text that could be tried."""
    processor = json.loads(tokenizer_json).get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        first = part["single"][0] if part.get("type") == "TemplateProcessing" and part["single"] else {}
        if "SpecialToken" in first:
            return int(part["special_tokens"][first["SpecialToken"]["id"]]["ids"][0])
    return None


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The rows of embedding that a tokenizer needs."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)


def encode(tokenizer: Tokenizer, text: bytes, chunk: int = CHUNK) -> Tensor:
    """`(tokens,)` int32 of a text of any length, without special tokens around it; on every core, in order."""
    ids = array.array("i")
    pieces = chunks(text.decode(), chunk)
    while batch := list(islice(pieces, BATCH)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            ids.extend(encoding.ids)
    return torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)


# Where every GPT-like tokenizer splits text anyway: its patterns carry no white space at the end of a word, so the newline after
# one begins a new piece. GPT-4's and Llama 3's join newlines to the punctuation before them, hence letters and digits first; any
# other end of line is for texts that have none of those.
LINE_ENDS = (re.compile(r"[^\W_](?=\n)"), re.compile(r"\S(?=\n)"))


def chunks(text: str, size: int) -> Iterator[str]:
    """Pieces of about `size` characters that join to the text, split so that `bpe` encodes them as it does the whole.

    Each piece but the last ends before the newline of a line's last word; a text without any is one piece. A tokenizer that marks
    the beginning of a text (SentencePiece's) marks the beginning of each piece.
    """
    start, (word, any_end) = 0, LINE_ENDS
    while start < len(text):
        after = start + size
        found = word.search(text, after - 1, after + size) or any_end.search(text, after - 1)
        stop = found.end() if found else len(text)
        yield text[start:stop]
        start = stop
