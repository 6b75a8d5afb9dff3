"""The command line: what a person types, sees, and gets wrong."""

import errno
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import click
import pytest
import yaml
from click.testing import CliRunner
from searches import FROM, write_dense, write_trial
from searches import SUPERNET as TINY

from nas.cli import main, nas, show
from nas.cli.show import Terminal, print_table
from nas.config import format_bytes, format_flops
from nas.errors import UserError
from nas.presets import PRESETS
from nas.search.launch import check
from nas.search.trial import Trial
from nas.sharing.primitives import PRIMITIVES
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig

ROOT = Path(__file__).parent.parent


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nas.cli import main; main()", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def changed(path: str, value: object) -> dict:
    """The tiny trial with one key, at a dotted path, changed; `...` takes it away."""
    trial = yaml.safe_load(yaml.safe_dump(TINY))
    *parents, last = path.split(".")
    place = trial
    for parent in parents:
        place = place.setdefault(parent, {})
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return trial


BAD = {
    "unknown key": ("supernet.stepps", 3, "did you mean steps"),
    "unknown section": ("supernett", {}, "did you mean supernet"),
    "wrong type": ("supernet.steps", "many", "steps"),
    "a seed of 23 digits": ("seed", 10**22, "use 9223372036854775807 or less"),
    "missing key": ("final", ..., "final is missing"),
    "a limit nothing can meet": ("limits", {"memory_bytes": 100}, "the smallest that can be met is"),
    "an unknown sampler": ("search.sampler", "nsga", "did you mean nsga"),
    "an unknown strategy": ("supernet.strategy", "unfair", "did you mean fair"),
    "a strategy of version 0.1": ("supernet.strategy", "even", "it is called dense_biased now"),
    "a key of version 0.1": ("supernet.rule", "fair", "it is called strategy now"),
    "an unknown split": ("split.method", "gradients", "gradient-matching"),
    "a decision that is not there": ("split", {"method": "exhaustive", "decision": "layer_9.kv"}, "layer_"),
    "a missing text": ("data.text", "nowhere.txt", "nowhere.txt"),
    "a missing space": ("space", "nowhere.yaml", "no such file"),
    "too long a context": ("memory.context", 100_000, "max_position_embeddings"),
    "too small a vocabulary": ("space.model.vocab_size", 100, "257"),
    "fewer workers than none": ("run", {"workers": -1}, "use 0 or more"),
    "a tracking address that is none": ("tracking", {"uri": "here"}, "write http://"),
    "a text too short": ("data.max_bytes", 40, "use a longer text"),
}

IN_THE_TEXT = ("a text too short",)
"""What is told only when the text is read, which `nas check` does not."""


@pytest.mark.parametrize("name", BAD)
def test_a_bad_trial_is_one_line_with_its_file_and_what_would_do(name, tmp_path):
    path, value, says = BAD[name]
    file = tmp_path / "trial.yaml"
    file.write_text(yaml.safe_dump(changed(path, value), sort_keys=False))
    with pytest.raises(UserError) as error:
        check(Trial.load(file))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    if name not in IN_THE_TEXT:
        assert says_of_check(file) == str(error.value)


def says_of_check(file: Path) -> str:
    """Why `nas check` refuses a file."""
    with pytest.raises(UserError) as error:
        nas.main(["check", str(file)], standalone_mode=False)
    return str(error.value)


def test_check_refuses_what_a_search_from_a_checkpoint_or_a_comparison_does(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense")
    for changes, says in (
        ({"memory": {"context": 2049}}, "memory.context: 2049 tokens are more than the model's max_position_embeddings=2048"),
        ({"final": {"steps": 0, "seq": 4096}}, "final.seq: 4096 tokens"),
        ({"data": {"tokenizer": "bpe"}}, "data.tokenizer: bpe is not the tokenizer of dense"),
        ({"data": {"tokenizer": "bytes256"}}, "data.tokenizer: bytes256 is not the tokenizer of dense"),
        ({"split": {"method": "exhaustive", "decision": "layer_9.kv"}}, "split.decision: layer_9.kv is no decision"),
        ({"search": {"evaluator": "supernett"}}, "did you mean supernet"),
    ):
        trial = write_trial(tmp_path, FROM, **changes)
        with pytest.raises(UserError) as error:
            check(Trial.load(trial))
        assert says in str(error.value)
        assert says_of_check(trial) == str(error.value)
    zoo = yaml.safe_load((ROOT / "trials" / "zoo.yaml").read_text())
    for changes, says in (
        ({"memory": {"context": 9999}}, "memory.context: 9999 tokens"),
        ({"train": zoo["train"] | {"seq": 9999}}, "train.seq: 9999 tokens"),
        ({"data": {"text": "nowhere.txt"}}, "data.text: nowhere.txt does not exist"),
    ):
        (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(zoo | changes))
        assert says in says_of_check(tmp_path / "zoo.yaml")


def test_a_mistake_is_one_line_on_stderr_and_nothing_is_written(tmp_path):
    file = tmp_path / "trial.yaml"
    file.write_text(yaml.safe_dump(changed("space.choices.kv_heads.options", [3]), sort_keys=False))
    done = run("search", "trial.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "options:" in text)
    assert done.stderr.startswith("error: trial.yaml:")
    assert f":{line}" in done.stderr or f":{line + 1}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "words",
    [("front", "nowhere"), ("export", "nowhere", "--to", "x"), ("eval", "nowhere", "--text", "python"), ("check", "no.yaml")],
)
def test_what_does_not_exist_is_exit_code_2(words, tmp_path):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_no_kind_is_told_every_kind(tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match=r"odd.yaml.* a trial \(space:\), .* a sharing config \(num_hidden_layers:\)"):
        nas.main(["check", str(tmp_path / "odd.yaml")], standalone_mode=False)


def test_help_answers_at_once():
    run("--help")
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        assert "search" in run("--help").stdout
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.5


def test_a_stage_without_a_terminal_says_now_and_then_how_far_it_is_and_what_is_left(capsys, monkeypatch):
    monkeypatch.setattr(show, "EVERY", 0.0)
    clock = iter(range(0, 10_000, 10))
    terminal = Terminal()
    terminal.console.get_time = lambda: next(clock)
    with terminal.stage("convert", 10, "conversions") as bar:
        for done in (4, 5, 6, 10):  # four were done before
            bar.update(done)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d:]+ left", "T left", line) for line in lines[:2]] == [f"convert: {n} of 10 · T left" for n in (5, 6)]
    assert lines[2].startswith("convert: 10 conversions in ")
    (minutes, seconds), (later, rest) = (re.search(r"(\d+):(\d+) left", line).groups() for line in lines[:2])
    assert int(later) * 60 + int(rest) < int(minutes) * 60 + int(seconds)


def test_durations_are_written_as_clocks_do():
    assert [show.duration(seconds) for seconds in (0.4, 61, 3661)] == ["0:00", "1:01", "1:01:01"]


def test_help_imports_nothing_heavy():
    heavy = ("torch", "ray", "optuna", "mlflow", "transformers", "rich", "pydantic")
    code = f"import sys, nas.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def said(capsys, *words: str) -> str:
    nas.main(list(words), standalone_mode=False)
    return capsys.readouterr().out


FEW = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def model(tmp_path, **changes) -> str:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(FEW | changes))
    return str(tmp_path / "model.yaml")


def test_zoo_says_the_same_as_json(capsys):
    rows = json.loads(said(capsys, "zoo", "--json"))
    lines = said(capsys, "zoo").splitlines()
    dense = rows[0]
    assert dense["name"] == "dense"
    assert {row["name"].rstrip("0123456789x").removesuffix("-") for row in rows} == set(PRESETS)
    for row in rows[1:]:
        (line,) = [line for line in lines if line.split()[:1] == [row["name"]]]
        words = line.replace("(", "").replace(")", "").split()
        for name in ("weight_bytes", "kv_cache_bytes", "kv_read_bytes_per_token", "flops_per_token"):
            assert row["of_dense"][name] == row[name] / dense[name]
            assert f"{row['of_dense'][name]:.0%}" in words
        assert format_bytes(row["weight_bytes"]) in line
        assert row["paper"] in line


def test_a_preset_that_is_impossible_is_listed_with_the_reason(capsys, tmp_path):
    file = model(tmp_path, num_key_value_heads=1)
    rows = json.loads(said(capsys, "zoo", "--model", file, "--json"))
    why = {row["name"]: row["impossible"] for row in rows if "impossible" in row}
    assert why["hymba-kv"] == "needs more layers than num_hidden_layers=3; use 6 or more"
    assert "key/value heads" in why["gqa"]
    possible = {row["name"].rstrip("0123456789x").removesuffix("-") for row in rows if "impossible" not in row}
    assert possible | set(why) == set(PRESETS)
    assert not possible & set(why)
    lines = said(capsys, "zoo", "--model", file).splitlines()
    for name, reason in why.items():
        assert any(line.split()[:1] == [name] and reason in line for line in lines)


def test_the_primitives_are_listed(capsys):
    rows = json.loads(said(capsys, "zoo", "--primitives", "--json"))
    assert [row["name"] for row in rows] == list(PRIMITIVES)
    table = said(capsys, "zoo", "--primitives")
    for row in rows:
        (line,) = [line for line in table.splitlines() if line.split()[:2] == [row["name"], row["of"]]]
        assert row["paper"] in line
        assert row["meaning"].split()[0] in line


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_yaml_says_where_it_is_from_and_comes_back(name, capsys, tmp_path):
    shape = ModelShape(**FEW | {"num_hidden_layers": 6})
    text = said(capsys, "zoo", name, "--model", model(tmp_path, num_hidden_layers=6))
    row = PRESETS[name]
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert comment == " ".join([f"{name}: {row.shares}" + f" ({row.paper})" * bool(row.paper), *row.note.split()])
    assert SharingConfig.from_yaml(shape, text) == row.build(shape)


def test_a_preset_round_trips_through_its_yaml(capsys, tmp_path):
    (tmp_path / "cla.yaml").write_text(said(capsys, "zoo", "cla-2"))
    by_name = json.loads(said(capsys, "describe", "cla-2", "--json"))
    assert json.loads(said(capsys, "describe", str(tmp_path / "cla.yaml"), "--json")) == by_name
    assert by_name["memory_bytes"] == sum(part["bytes"] for part in by_name["parts"])
    assert json.loads(said(capsys, "zoo", "cla-2", "--json"))["config"] == by_name["config"]


def test_describe_says_the_same_as_json(capsys, tmp_path):
    found = json.loads(said(capsys, "describe", "yoco", "--json"))
    lines = said(capsys, "describe", "yoco", "--to", str(tmp_path / "yoco.svg")).splitlines()
    assert "yoco" in (tmp_path / "yoco.svg").read_text()
    for name, form in (
        ("weight_bytes", format_bytes),
        ("kv_read_bytes_per_token", format_bytes),
        ("flops_per_token", format_flops),
    ):
        ours, theirs = found[name], found["dense"][name]
        assert any(all(w in line for w in (form(ours), form(theirs), f"{ours / theirs:.0%}")) for line in lines)
    for part in found["parts"]:
        assert any(line.split()[:1] == [part["part"].split()[0]] and format_bytes(part["bytes"]) in line for line in lines)


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = run("new", str(tmp_path / "file" / "starter"))
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"error: {tmp_path / 'file' / 'starter'}: Not a directory\n"


ENDS = {
    OSError(errno.ENOSPC, "No space left on device", "runs/x"): (1, "error: runs/x: No space left on device\n"),
    ZeroDivisionError("division\nby zero"): (1, "error: a defect of this program: ZeroDivisionError: division; please report"),
    click.Abort(): (130, "interrupted; a search continues with `nas resume RUN`"),
}


def test_no_error_is_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, (code, line) in ENDS.items():
        monkeypatch.setattr(nas, "main", MagicMock(side_effect=error))
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert (ended.value.code, said.out) == (code, "")
        assert said.err.startswith(line)
        assert said.err.count("\n") == 1


def test_sigterm_is_one_line_and_its_exit_code() -> None:
    script = """if True:
        import time, click
        from nas.cli import main
        main(click.Command("wait", callback=lambda: (click.echo(1), time.sleep(600))))"""
    with subprocess.Popen([sys.executable, "-uc", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        process.terminate()
        assert process.communicate()[1].lstrip().startswith("terminated; a search continues")
        assert process.returncode == 143


def test_brackets_of_the_users_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    name = "exp[/b] corpus[clean].txt"
    Terminal().say(name)
    with Terminal().stage(name, 1, "[/b]") as bar:
        bar.update(1, name)
    print_table([name], [[name]], name)
    said = capsys.readouterr()
    assert said.err.count(name) == 3
    assert said.out.count(name) == 3


def test_the_starter_is_right_and_nothing_is_written_over(tmp_path: Path) -> None:
    for example in ("quickstart", "kv_sharing"):
        folder = tmp_path / example
        assert run("new", str(folder), "--example", example).returncode == 0
        assert run("check", "trial.yaml", "space.yaml", cwd=folder).returncode == 0
        again = run("new", str(folder))
        assert (again.returncode, again.stderr) == (
            2,
            f"error: {folder / 'space.yaml'}: exists already; give an empty or a new folder\n",
        )
    assert "did you mean quickstart?" in run("new", str(tmp_path / "x"), "--example", "quickstar").stderr


def test_commands_read_the_column_that_is_named(tmp_path: Path) -> None:
    """Rows of two columns, read by the second, are as rows that have it alone."""
    rows = [{"text": f"line {n} of many lines, all much alike", "story": f"{n} once upon a time {n * n}"} for n in range(300)]
    both, one = tmp_path / "both.jsonl", tmp_path / "one.jsonl"
    both.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    one.write_text("".join(f"{json.dumps({'text': row['story']})}\n" for row in rows))
    folder = write_dense(tmp_path / "dense")

    def printed(command: tuple[str, ...], text: Path, *more: str) -> dict[str, float]:
        to = () if command[0] == "eval" else ("--to", str(tmp_path / f"{command[0]}-{len(list(tmp_path.iterdir()))}"))
        words = [*command, str(folder), "--seq=16", f"--text={text}", *to, *more, "--json"]
        found = CliRunner().invoke(nas, words, catch_exceptions=False)
        return {name: value for name, value in _figures(json.loads(found.stdout)) if "loss" in name}

    for command in (
        ("eval", "--eval-sequences=4"),
        ("convert", "--method=gqa", "--fine-tune=1", "--batch=2", "--windows=4"),
        ("train", "--steps=1", "--batch=2"),
    ):
        story = printed(command, both, "--column=story")
        assert story
        assert story == printed(command, one)
        assert story != printed(command, both)
        with pytest.raises(UserError, match="to text or story"):
            printed(command, both, "--column=poem")


def _figures(data: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in plain data, with its path."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _figures(value, f"{name}.{key}")
    elif isinstance(data, float):
        yield name, data
