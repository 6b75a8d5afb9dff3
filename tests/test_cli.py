"""The command line: what a person types, sees, and gets wrong."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import click
import pytest
import yaml
from commands import refused, said, told
from searches import SUPERNET as TINY
from searches import write_dense, write_trial

from nas.cli import main, nas, show
from nas.cli.show import Terminal, print_table
from nas.config import format_bytes, format_flops
from nas.presets import PRESETS
from nas.sharing.primitives import PRIMITIVES
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "search_spaces" / "quickstart.yaml"


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nas.cli import main; main()", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_what_cannot_be_is_exit_code_2_and_one_line_on_stderr(tmp_path: Path) -> None:
    """As is what the system refuses; nothing is written."""
    choices = {**TINY["space"]["choices"], "kv_heads": {"options": [3]}}
    write_trial(tmp_path, TINY | {"space": {**TINY["space"], "choices": choices}})
    (tmp_path / "file").write_text("in the way")
    before = sorted(tmp_path.iterdir())
    for words, line in (
        ("search trial.yaml", r"error: trial\.yaml:\d+: .*3 does not divide"),
        ("eval nowhere --text python", "error: nowhere: "),
        ("new file/starter", "error: file/starter: Not a directory\n"),
        (f"check {QUICKSTART} --set=seed=1", "error: .*quickstart.yaml: is a search space, and --set is for trials"),
        (f"check {QUICKSTART} --plan", "error: .*quickstart.yaml: is a search space, and --plan is for trials"),
    ):
        done = run(*words.split(), cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert re.match(line, done.stderr), done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_help_answers_at_once():
    run("--help")
    before = os.times()
    assert "search" in run("--help").stdout
    after = os.times()  # of the processor: other processes of a busy machine must not fail a test
    assert sum(after[2:4]) - sum(before[2:4]) < 0.5


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


FEW = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def model(tmp_path, **changes) -> str:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(FEW | changes))
    return str(tmp_path / "model.yaml")


def test_zoo_says_the_same_as_json():
    rows = told("zoo")
    lines = said("zoo").splitlines()
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


def test_a_preset_that_is_impossible_is_listed_with_the_reason(tmp_path):
    file = model(tmp_path, num_key_value_heads=1)
    rows = told("zoo", "--model", file)
    why = {row["name"]: row["impossible"] for row in rows if "impossible" in row}
    assert why["hymba-kv"] == "needs more layers than num_hidden_layers=3; use 6 or more"
    assert "key/value heads" in why["gqa"]
    possible = {row["name"].rstrip("0123456789x").removesuffix("-") for row in rows if "impossible" not in row}
    assert possible | set(why) == set(PRESETS)
    assert not possible & set(why)
    lines = said("zoo", "--model", file).splitlines()
    for name, reason in why.items():
        assert any(line.split()[:1] == [name] and reason in line for line in lines)


def test_the_primitives_are_listed():
    rows = told("zoo", "--primitives")
    assert [row["name"] for row in rows] == list(PRIMITIVES)
    table = said("zoo", "--primitives")
    for row in rows:
        (line,) = [line for line in table.splitlines() if line.split()[:2] == [row["name"], row["of"]]]
        assert row["paper"] in line
        assert row["meaning"].split()[0] in line


def test_a_presets_yaml_says_where_it_is_from_and_comes_back(tmp_path):
    shape, file = ModelShape(**FEW | {"num_hidden_layers": 6}), model(tmp_path, num_hidden_layers=6)
    for name, row in PRESETS.items():
        text = said("zoo", name, "--model", file)
        comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
        assert comment == " ".join([f"{name}: {row.shares}" + f" ({row.paper})" * bool(row.paper), *row.note.split()])
        assert SharingConfig.from_yaml(shape, text) == row.build(shape)


def test_a_preset_round_trips_through_its_yaml(tmp_path):
    (tmp_path / "cla.yaml").write_text(said("zoo", "cla-2"))
    by_name = told("describe", "cla-2")
    assert told("describe", str(tmp_path / "cla.yaml")) == by_name
    assert by_name["memory_bytes"] == sum(part["bytes"] for part in by_name["parts"])
    assert told("zoo", "cla-2")["config"] == by_name["config"]


def test_describe_says_the_same_as_json(tmp_path):
    found = told("describe", "yoco")
    lines = said("describe", "yoco", "--to", str(tmp_path / "yoco.svg")).splitlines()
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
        said("new", folder, "--example", example)
        said("check", folder / "trial.yaml", folder / "space.yaml")
        refused(lambda folder=folder: said("new", folder), f"{folder / 'space.yaml'}: exists already; ")
    refused(lambda: said("new", tmp_path / "x", "--example", "quickstar"), "did you mean quickstart?")


def test_commands_read_the_column_that_is_named(tmp_path: Path) -> None:
    """Rows of two columns, read by the second, are as rows that have it alone."""
    rows = [{"text": f"line {n} of many lines, all much alike", "story": f"{n} once upon a time {n * n}"} for n in range(300)]
    both, one = tmp_path / "both.jsonl", tmp_path / "one.jsonl"
    both.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    one.write_text("".join(f"{json.dumps({'text': row['story']})}\n" for row in rows))
    folder = write_dense(tmp_path / "dense")

    def printed(command: tuple[str, ...], text: Path, *more: str) -> dict[str, float]:
        to = () if command[0] == "eval" else ("--to", tmp_path / f"{command[0]}-{len(list(tmp_path.iterdir()))}")
        data = told(*command, folder, "--seq=16", f"--text={text}", *to, *more)
        return {name: value for name, value in _figures(data) if "loss" in name}

    for command in (
        ("eval", "--eval-sequences=4"),
        ("convert", "--method=gqa", "--fine-tune=1", "--batch=2", "--windows=4"),
        ("train", "--steps=1", "--batch=2"),
    ):
        story = printed(command, both, "--column=story")
        assert story
        assert story == printed(command, one)
        assert story != printed(command, both)
        refused(lambda command=command: printed(command, both, "--column=poem"), "to text or story")


def _figures(data: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in plain data, with its path."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _figures(value, f"{name}.{key}")
    elif isinstance(data, float):
        yield name, data
