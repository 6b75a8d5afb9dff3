"""Each way to get a file wrong gives one line: where, the rule, and what would do."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from nas.config import Strict, build, dump_yaml, format_bytes, parse_bytes, parse_yaml, read_yaml
from nas.errors import UserError, did_you_mean, one_of
from nas.sharing.memory import MemorySpec
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace
from nas.training.loop import TrainSpec

MODEL = """\
model:
  vocab_size: 256
  hidden_size: 64
  num_hidden_layers: 4
  num_attention_heads: 8
  intermediate_size: 96
"""
SPACE = {  # what stands on line 7 and below: the location, and a word of the message or the hint
    "choices: {}\nextra: 1": ("8: extra", "use choices, limits, model or norms"),
    "choice: {}": ("7: choice", "did you mean choices?"),
    "choices: {tie: {source: previous}}": ("7: choices.tie.source", "did you mean sources?"),
    "choices: {tie: {sources: {windw: 2}}}": ("7: choices.tie.sources.windw", "did you mean window?"),
    "choices: {attention: {}}": ("7: choices.attention", "did you mean attn?"),
    "choices:\n  tie: {}\n  tie: {}": ("9", "keep one (the first is on line 8)"),
    "": ("", "add `choices:`"),
    "choices:": ("7: choices", "use keys and values"),
    "choices: [tie]": ("7: choices", "use keys and values"),
    "choices: {tie: }": ("7: choices.tie", "write {} for the defaults"),
    "choices: {tie: 3}": ("7: choices.tie", "3 will not do"),
    "choices: {tie: {sources: all}}": (
        "7: choices.tie.sources",
        "use previous, adjacent, {window: a whole number} or a list, each of it a whole number",
    ),
    "choices: {tie: {sources: {}}}": ("7: choices.tie.sources", "keys and values will not do"),
    "choices: {tie: {sources: previos}}": ("7: choices.tie.sources", "did you mean previous?"),
    "choices: {tie: {sources: {window: '2'}}}": ("7: choices.tie.sources.window", "write 2 without quotes"),
    "choices: {tie: {sources: {window: 0}}}": ("7: choices.tie.sources.window", "use 1 or more"),
    "choices:\n  tie:\n    layers:\n      - 1\n      - x": ("11: choices.tie.layers.1", "use a whole number"),
    "choices: {tie: {layers: 1..3}}": ("7: choices.tie.layers", "write 1-3 or [1, 2, 3]"),
    "choices: {tie: {layers: 3-1}}": ("7: choices.tie.layers", "use 1 to 3"),
    "choices: {tie: {layers: [9]}}": ("7: choices.tie.layers", "use 1 to 3"),
    "choices: {kv: {layers: 0-3}}": ("7: choices.kv.layers", "use 1 to 3"),
    "choices: {kv_heads: {layers: 0-4}}": ("7: choices.kv_heads.layers", "use 0 to 3"),
    "choices: {tie: {options: [1]}}": ("7: choices.tie.options", "write sources: previous"),
    "choices: {kv_heads: {sources: previous}}": ("7: choices.kv_heads.sources", "write options: [...]"),
    "choices:\n  kv_heads:\n    options: [8, 3]": ("9: choices.kv_heads.options", "use 1, 2, 4 or 8"),
    "choices: {kv_heads: {options: []}}": ("7: choices.kv_heads.options", "use 8, 4, 2 or 1"),
    "choices: {kv_heads: {options: 8}}": ("7: choices.kv_heads.options", "8 will not do"),
    "choices: {kv_heads: {options: [true]}}": ("7: choices.kv_heads.options", "use 1, 2, 4 or 8"),
    "choices: {}\nnorms: free": ("8: norms", "use private or tied"),
    "choices: {}\nnorms: []": ("8: norms", "use private or tied"),
    "choices: {}\nnorms: [private, 3]": ("8: norms.1", "use text"),
    "choices: {}\nlimits: {memory: 1}": ("8: limits.memory", "did you mean memory_bytes?"),
    "choices: {}\nlimits: {memory_bytes: 3 MiX}": ("8: limits.memory_bytes", "'3 MiX' is not a size"),
    "choices: {}\nlimits: {memory_bytes: 1.5}": ("8: limits.memory_bytes", "use a whole number or text"),
    "choices: {}\n\tlimits: 3": ("8", "check indentation, colons and quotes there"),
    "choices: [}": ("7", "check indentation, colons and quotes there"),
    "choices: {}\n---\na: 1": ("8", "check indentation, colons and quotes there"),
    "choices: {}\nnorms: \x00": ("8", "check indentation, colons and quotes there"),
    "choices: &a {tie: *a}": ("", "leave out aliases that contain themselves"),
    "yes: 3\nchoices: {}": ("7: yes", "use choices, limits, model or norms"),
    "2026-01-31: 3\nchoices: {}": ("7: 2026-01-31", "use choices, limits, model or norms"),
    "true: 3\nchoices: {}": ("7: true", "use choices, limits, model or norms"),
    "? [a]\n: 3": ("7", "check indentation, colons and quotes there"),
}


def refused(call: Callable[[], object], start: str, words: str = "") -> None:
    """A call ends in an error that begins so, has these words and a hint."""
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value).startswith(start)
    assert words in str(caught.value)
    assert caught.value.hint


def test_a_search_space() -> None:
    for below, (location, words) in SPACE.items():
        start = f"space.yaml{f':{location}' * bool(location)}: "
        refused(lambda below=below: SearchSpace.from_document(parse_yaml(MODEL + below, "space.yaml")), start, words)


SHAPE = [  # a line of `MODEL`, what stands there instead, the location, and a word of the message or the hint
    ("vocab_size: 256", "vocab_size: '256'", "2: model.vocab_size", "write 256 without quotes"),
    ("vocab_size: 256", "vocab_size: many", "2: model.vocab_size", "use a whole number"),
    ("vocab_size: 256", "vocab_size: 2.5", "2: model.vocab_size", "use a whole number"),
    ("vocab_size: 256", "vocab_size: true", "2: model.vocab_size", "use a whole number"),
    ("vocab_size: 256", "vocab_size: no", "2: model.vocab_size", "use a whole number"),
    ("vocab_size: 256", "vocab_size: [1]", "2: model.vocab_size", "use a whole number"),
    ("vocab_size: 256", "vocab_size:", "2: model.vocab_size", "use a whole number"),
    ("vocab_size: 256", "vocab_sze: 256", "2: model.vocab_sze", "did you mean vocab_size?"),
    ("vocab_size: 256", "rope_theta: 1e4", "1: model", "add `vocab_size:`"),
    ("vocab_size: 256", "vocab_size: -1", "2: model.vocab_size", "use 1 or more"),
    ("vocab_size: 256", "vocab_size: 9\n  rope_theta: .nan", "3: model.rope_theta", "use a number"),
    ("vocab_size: 256", "vocab_size: 9\n  tie_word_embeddings: 1", "3: model.tie_word_embeddings", "use true or false"),
    ("vocab_size: 256", "vocab_size: 9\n  num_key_value_heads: 3", "3: model.num_key_value_heads", "use 1, 2, 4 or 8"),
    ("vocab_size: 256", "vocab_size: 9\n  head_dim: -2", "3: model.head_dim", "use 0 or more"),
    ("vocab_size: 256", "vocab_size: 9\n  head_dim: 3", "3: model.head_dim", "use 4"),
    ("hidden_size: 64", "hidden_size: 60", "5: model.num_attention_heads", "8 does not divide hidden_size=60"),
    ("hidden_size: 64", "hidden_size: 72", "3: model.hidden_size", "make hidden_size /"),
]


def test_a_model_shape() -> None:
    for line, instead, location, words in SHAPE:
        document = parse_yaml(MODEL.replace(line, instead) + "choices: {}", "space.yaml")
        refused(partial(SearchSpace.from_document, document), f"space.yaml:{location}: ", words)


SHARING = {  # layers from line 3: the location, and a word of the message or the hint
    "  1: {tie: 2}": ("3: layers.1.tie", "use layer 0"),
    "  3: {tie: 4}": ("3: layers.3.tie", "use an earlier layer, 0 to 2"),
    "  0: {tie: 3}": ("3: layers.0.tie", "leave it out: layer 0 owns its parts"),
    "  1: {ffn: -1}": ("3: layers.1.ffn", "use layer 0"),
    "  1: {tie: '0'}": ("3: layers.1.tie", "give the number of an earlier layer"),
    "  1: {tied: 0}": ("3: layers.1.tied", "did you mean tie?"),
    "  1: {drop: {sources: [0, 1]}}": ("3: layers.1.drop", "not a part of a layer"),
    "  1: {drop: [0]}": ("3: layers.1.drop", "not a part of a layer"),
    "  1: {drop: 3}": ("3: layers.1.drop", "not a part of a layer"),
    "  1: 3": ("3: layers.1", "use keys and values"),
    "  one: {tie: 0}": ("3: layers.one", "use a whole number"),
    "  9: {tie: 0}": ("3: layers.9", "use 0 to 3"),
    "  0: {kv_heads: 3}": ("3: layers.0.kv_heads", "use 1, 2 or 4"),
    "  1: {kv: 0}\n  2: {kv: 1}": ("4: layers.2.kv", "use 0"),
    "  1: {kv: 0, kv_heads: 2}": ("3: layers.1.kv_heads", "set kv_heads at the layer that owns it"),
    "  1: {attn: 0, kv_heads: 2}": ("3: layers.1.kv_heads", "set kv_heads at the layer that owns it"),
    "  1: {kv: 0}\n  2: {tie: 1, kv: 2}": ("4: layers.2.kv", "leave kv out (it reads layer"),
}


def test_a_sharing_file() -> None:
    read = partial(SharingConfig.from_yaml, tiny.MHA)
    for layers, (location, words) in SHARING.items():
        refused(partial(read, f"num_hidden_layers: 4\nlayers:\n{layers}"), f"sharing.yaml:{location}: ", words)
    other = "sharing.yaml:2: num_hidden_layers: 3 is not the model's 4; describe every layer of the model"
    refused(partial(read, "norms: tied\nnum_hidden_layers: 3"), other)
    norms = "sharing.yaml:2: norms: 'both' is not a way to treat norms; use private or tied"
    refused(partial(read, "num_hidden_layers: 4\nnorms: both"), norms)


@dataclass(frozen=True)
class Parts(Strict):
    """Two parts of one kind, as a trial has."""

    first: TrainSpec
    second: TrainSpec
    memory: MemorySpec = field(default_factory=MemorySpec)


def test_a_field_is_named_by_its_whole_path() -> None:
    """Of two parts with the same field, the line is that of the wrong one."""
    for text, says in (
        ("first: {steps: 3}\nsecond: {steps: -3}", "2: second.steps: -3 is too small; use 0 or more"),
        ("first: {steps: 3}\nsecond: {steps: 3, clip: 0}", "2: second.clip: 0 is too small; use more than 0"),
        ("first: {steps: 3}\nsecond: {step: 3}", "2: second.step: unknown key; did you mean steps?"),
        ("first: {steps: 3}\nsecond: {decay: 1}", "2: second.decay: unknown key; it is called lr_decay_fraction now"),
        (
            "first: {steps: 3}\nsecond: {steps: 3, learning_rate: '3e-3'}",
            "2: second.learning_rate: '3e-3' will not do; write 3e-3",
        ),
        (
            "first: {steps: 3}\nsecond: {steps: 3}\nmemory:\n  dtype: int4",
            "4: memory.dtype: 'int4' will not do; use bfloat16, float16 or float32",
        ),
    ):
        refused(partial(build, Parts, parse_yaml(text, "trial.yaml")), f"trial.yaml:{says}")


def test_where_a_file_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_bytes(b"model: \xff")
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "empty.yaml").write_text("")
    for name, says in (
        ("spaec.yaml", "no such file; did you mean space.yaml?"),
        ("space.yaml", "byte 7 is not UTF-8 text; give the path of a YAML file, saved as UTF-8"),
        ("", "cannot be read: Is a directory; give the path of a YAML file"),
        (
            "list.yaml",
            "a list will not do; write keys and values, such as `vocab_size:`, `hidden_size:`, `num_hidden_layers:`, "
            "`num_attention_heads:` or `intermediate_size:`",
        ),
        ("empty.yaml", "has no value; write keys and values, such as"),
    ):
        refused(lambda name=name: build(ModelShape, read_yaml(tmp_path / name)), f"{tmp_path / name}: {says}")


def test_numbers_and_words_are_read_as_in_yaml_1_2() -> None:
    text = "a: 3e-3\nb: 1E4\nc: .5e1\nd: yes\ne: 2026-01-31\nf: true\ng: ~\nh: 0.1\ni: 1e\nj: '3e-3'\nk: -2"
    data = parse_yaml(text, "").data
    assert data == {
        **{"a": 3e-3, "b": 1e4, "c": 5.0, "d": "yes", "e": "2026-01-31", "f": True},
        **{"g": None, "h": 0.1, "i": "1e", "j": "3e-3", "k": -2},
    }
    assert build(TrainSpec, parse_yaml("steps: 3\nlearning_rate: 3e-3", "")) == TrainSpec(steps=3, learning_rate=3e-3)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\x85\u2028\u2029\ufeff"))
    | st.sampled_from(["3e-3", "yes", "1e5", "12e456789012", "2026-01-31", "~", "null", "0x1f", "1:30", "", " a", "a: b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_yaml_returns_what_was_written(data: Any) -> None:
    assert parse_yaml(dump_yaml(data), "").data == data


def test_a_document_knows_its_lines() -> None:
    document = parse_yaml("a:\n  b: [1,\n   2]\n  c:\n    b: 3", "x.yaml")
    assert document.where(("a", "b", 1)) == "x.yaml:3: a.b.1"
    assert document.where(("a", "c", "nowhere")) == "x.yaml:4: a.c.nowhere"
    assert document.find("c.b") == "x.yaml:5: a.c.b"
    assert document.find("b") == "x.yaml:2: a.b"
    assert document.find("z") == "x.yaml: z"
    inside = document.inside("a")
    assert inside.data == {"b": [1, 2], "c": {"b": 3}}
    assert inside.where(("c", "b")) == "x.yaml:5: c.b"


def test_an_error_travels_between_processes() -> None:
    before = UserError("3 does not divide 8", where="space.yaml:14: kv_heads", hint="use 1, 2, 4 or 8")
    after = pickle.loads(pickle.dumps(before))
    assert str(after) == str(before) == "space.yaml:14: kv_heads: 3 does not divide 8; use 1, 2, 4 or 8"
    assert (after.message, after.where, after.hint) == (before.message, before.where, before.hint)
    assert str(before.at("trial.yaml:3")) == "trial.yaml:3: space.yaml:14: kv_heads: 3 does not divide 8; use 1, 2, 4 or 8"


def test_lists_as_a_person_would_write_them() -> None:
    assert [one_of(names) for names in ([], [1], [1, 2], [1, 2, 3])] == ["nothing", "1", "1 or 2", "1, 2 or 3"]
    assert did_you_mean("kv_head", ["kv_heads", "tie"]) == "did you mean kv_heads?"
    assert did_you_mean("zzz", ["b", "a"]) == "use a or b"
    assert did_you_mean("zzz", [f"n{i:02}" for i in range(50)]).endswith(", n39 or one of 10 more")


def test_sizes() -> None:
    found = {"300MiB": 300 * 2**20, "1.5 GB": 1_500_000_000, " 2 KiB ": 2048, "7": 7, 9007199254740993: 9007199254740993}
    assert [parse_bytes(given) for given in (*found, "0.5 KiB")] == [*found.values(), 512]
    for wrong in ("", "MiB", "1 mib", "-1", "1,5 GB", True, "1e3"):
        refused(partial(parse_bytes, wrong, "limits.memory_bytes"), "limits.memory_bytes: ", "is not a size; write it as 300MiB")
    sizes = [0, 1023, 1024, 1536, 5 * 2**20, 9000 * 2**20, 2**34]
    assert [format_bytes(size) for size in sizes] == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "9000.0 MiB", "16.0 GiB"]
