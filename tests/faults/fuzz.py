"""Every file that is read, broken in a thousand ways: a command then ends well, or with one line, never with a traceback.

Owns the files, the commands that read them, and the mutations. Input `n` of a seed is the same each time: `case(seed, n)`.
"""

import contextlib
import copy
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from nas.search.publish import export_run
from tests.faults.processes import FORKS, Found, listed
from tests.searches import FROM, SHAPE, search

LONGEST = 300
CPU_SECONDS, MEMORY, SILENCE = 60, 6 * 2**30, 900
"""What one input may take of the processor and of memory, and seconds of the clock after which a process is given up."""


class Row(NamedTuple):
    """A file, the commands that read it, how often it is drawn, and whether they write into its folder."""

    path: str
    commands: tuple[str, ...]
    weight: int = 4
    writes: bool = False


RUN = "runs/from/"
EVAL = "--text text.txt --eval-sequences 2 --seq 16"
ROWS = (
    Row("trial.yaml", ("check trial.yaml",), 24),
    Row("space.yaml", ("check space.yaml",), 12),
    Row("zoo.yaml", ("check zoo.yaml",), 6),
    Row("model.yaml", ("check model.yaml", "describe sharing.yaml --model model.yaml"), 10),
    Row("sharing.yaml", ("check sharing.yaml --model model.yaml", "describe sharing.yaml --model model.yaml"), 16),
    Row("hf/config.json", ("describe hf", f"eval hf {EVAL}"), 16),
    Row("hf/sharing.yaml", ("describe hf",), 6),
    Row("hf/tokenizer.json", (f"eval hf {EVAL}",), 10),
    Row("hf/generation_config.json", (f"eval hf {EVAL}",), 2),
    Row("hf/model.safetensors", (f"eval hf {EVAL}",), 12),
    Row("hf/provenance.json", ("train hf --text text.txt --steps 1 --seq 16 --batch 2 --to out --tracking none",), 1, True),
    Row("llama/config.json", ("describe llama", f"eval llama {EVAL}"), 10),
    Row("llama/model.safetensors", (f"eval llama {EVAL}",), 4),
    Row(f"{RUN}trial.yaml", ("front from", "export from --pick smallest --to out"), 4, True),
    Row(f"{RUN}run.json", ("front from", "export from --pick knee --to out", "resume from"), 6, True),
    Row(f"{RUN}front.json", ("front from", "export from --pick knee --to out"), 8, True),
    Row(f"{RUN}extras.json", ("export from --pick knee --to out",), 2, True),
    Row(f"{RUN}tokenizer.json", ("export from --pick knee --to out",), 2, True),
    Row(f"{RUN}journal.jsonl", ("report from",), 2, True),
    Row(f"{RUN}converted/*/result.json", ("report from",), 1, True),
    Row(f"{RUN}tracking.json", ("resume from", "sync from", "export from --pick knee --to out"), 6, True),
    Row(f"{RUN}tracking.jsonl", ("resume from", "sync from"), 4, True),
)


def prepare(folder: Path) -> Path:
    """One right file of every kind, of a finished search from a checkpoint. Addresses in it are relative to the folder."""
    folder.mkdir(parents=True)
    run, front = search(folder, FROM | {"tracking": {}})
    for name, pick, kind in (("hf", "smallest", "hf"), ("dense-export", "dense", "dense")):
        export_run(run, pick, folder / name, kind)
    (folder / "dense-export").rename(folder / "llama")
    trial = yaml.safe_load((folder / "trial.yaml").read_text())
    space = {"model": asdict(SHAPE), **trial["space"]}
    (folder / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    (folder / "model.yaml").write_text(yaml.safe_dump(asdict(SHAPE), sort_keys=False))
    (folder / "sharing.yaml").write_text(front.pick("smallest").config.to_yaml())
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    shutil.copy("trials/zoo.yaml", folder / "zoo.yaml")
    for path in (folder / RUN / "tracking.json", folder / RUN / "tracking.jsonl", folder / "hf/provenance.json"):
        path.write_text(path.read_text().replace(f"sqlite:///{folder.resolve()}/", "sqlite:///"))
    return folder


# ---- mutations

VALUES: list[Any] = [
    *json.loads('[null, true, false, -1, 0, 1, 3, 0.5, 1e308, NaN, Infinity, "", "x", "0", "\\u2028", "[/b]", "previous"]'),
    *json.loads('[[], [[]], {}, {"a": 1}, [0, 1], [null], {"": {}}, "\\ud83d\\ude00"]'),
    *(10**8, 10**30, -(2**63), "x" * 3000, list(range(2000))),
]
WORDS = "!!int x|!!timestamp 2020-99-99|!!binary x|!!set {a}|&a [*a]|*b|1:30|010|1_0|.nan|~|2020-01-01|-Infinity|1e999|é|\\ud800"
MARKS = "<<: {a: 1}|null|NaN|\x00|\ufeff|\x85|{|}|[|]|\"|'|:|- |? |%|!|\t|\n|---\n|!!python/object:os._exit"
SNIPPETS = [*WORDS.split("|"), *MARKS.split("|"), "9" * 5000, "[" * 3000, '{"a":' * 2000]


def _nodes(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in plain data: its container and its key."""
    for key in list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield data, key
        yield from _nodes(data[key])


def _restructured(data: Any, chance: random.Random) -> Any:
    """Data of which one or two places are changed, removed, renamed or put elsewhere."""
    for _ in range(chance.choice((1, 1, 2))):
        places = list(_nodes(data))
        if not places:
            return chance.choice(VALUES)
        places = chance.choice([[p for p in places if p[0] is data], places])
        holder, key = chance.choice(places)
        do = chance.randrange(6)
        if do == 0:
            del holder[key]
        elif do == 1:
            other, elsewhere = chance.choice(list(_nodes(data)))
            holder[key] = copy.deepcopy(other[elsewhere])
        elif do == 2 and isinstance(holder, dict):
            holder[chance.choice(("x", "", f"{key}s", "1"))] = holder.pop(key)
        elif do == 3:
            holder[key] = chance.choice(([holder[key]], {"a": holder[key]}, str(holder[key])))
        else:
            holder[key] = copy.deepcopy(chance.choice(VALUES))
    return data


def _garbled(text: bytes, chance: random.Random) -> bytes:
    """Bytes that are cut, repeated, changed or added to at one place."""
    at = chance.randrange(len(text) + 1)
    end = min(len(text), at + chance.choice((1, 2, 8, 40, 400)))
    word, byte = chance.choice(SNIPPETS).encode(), bytes([chance.randrange(256)])
    middle, rest = chance.choice(
        ((b"", b""), (b"", text[end:]), (b"", text[at - end :]), (word, text[at:]), (word, text[end:]), (byte, text[at + 1 :]))
    )
    return chance.choice((word, b"")) if chance.random() < 0.05 else text[:at] + middle + rest


def mutate(path: str, text: bytes, chance: random.Random) -> bytes:
    """A broken version of a file: half of them still YAML, JSON or safetensors."""
    if chance.random() < 0.5:
        return _garbled(text[: 2**16], chance) + text[2**16 :] if path.endswith(".safetensors") else _garbled(text, chance)
    if path.endswith(".yaml"):
        return yaml.dump(_restructured(yaml.safe_load(text), chance), sort_keys=False, allow_unicode=True).encode()
    if path.endswith(".jsonl"):
        lines = text.splitlines()
        at = chance.randrange(len(lines))
        lines[at] = json.dumps(_restructured(json.loads(lines[at]), chance)).encode()
        return b"\n".join(lines) + b"\n"
    if path.endswith(".safetensors"):
        size = int.from_bytes(text[:8], "little")
        header = json.dumps(_restructured(json.loads(text[8 : 8 + size]), chance)).encode()
        return (len(header) + chance.choice((0, 0, 0, 1, 2**40))).to_bytes(8, "little") + header + text[8 + size :]
    return json.dumps(_restructured(json.loads(text), chance)).encode()


class Case(NamedTuple):
    """An input: which file is what, and the command that is tried."""

    row: Row
    path: Path
    content: bytes | None
    command: str


def case(folder: Path, seed: int, number: int) -> Case:
    """The input of a number; without content the file is a folder."""
    chance = random.Random(f"{seed}:{number}")
    row = chance.choices(ROWS, [row.weight for row in ROWS])[0]
    path = chance.choice(sorted(folder.glob(row.path)))
    content = None if chance.random() < 0.005 else mutate(row.path, path.read_bytes(), chance)
    return Case(row, path.relative_to(folder), content, chance.choice(row.commands))


# ---- trying them


class _Endless(BaseException):
    """An input took too long."""


def _end(number: int, frame: object) -> None:
    raise _Endless


def run(command: str) -> tuple[int, str]:
    """Exit code and stderr of a command, in this process."""
    from nas.cli import main

    errors = io.StringIO()
    sys.argv = ["nas", *command.split()]
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as end:
        return int(end.code or 0), errors.getvalue()
    except _Endless:
        return 99, "no end"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return 0, errors.getvalue()


def verdict(code: int, said: str) -> str:
    """What is wrong with how a command ended; empty if nothing is."""
    last = (said.strip().splitlines() or [""])[-1]
    if "a defect of this program" in said:
        file = re.search(r"with (\S+\.txt)", last)
        frames = re.findall(r'File "\S+?/(nas/\S+?)", line (\d+)', Path(file[1]).read_text()) if file else []
        return f"{last.partition('program: ')[2].partition('; please')[0]} ({':'.join(frames[-1]) if frames else 'nowhere'})"
    errors = sum(line.startswith(("error: ", "Traceback")) for line in said.splitlines())
    right = errors == 0 if code == 0 else code in (1, 2) and errors == 1 and last.startswith("error: ") and len(last) <= LONGEST
    return "" if right else f"exit {code}, {len(last)} characters: {last}"


def _work(pristine: str, folder: str, log: str, seed: int, first: int, last: int) -> None:
    """Try inputs in a process of their own, and write down how each ended."""
    signal.signal(signal.SIGPROF, _end)
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    tempfile.tempdir = str(Path(log).parent)
    good, here, changed = Path(pristine), Path(folder), True
    for number in range(first, last):
        if changed:
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(good, here)
            os.chdir(here)
        found = case(good, seed, number)
        found.path.unlink()
        found.path.write_bytes(found.content) if found.content is not None else found.path.mkdir()
        code, said = run(found.command)
        with Path(log).open("a") as file:
            file.write(json.dumps({"code": code, "wrong": verdict(code, said)}) + "\n")
        changed = found.row.writes or found.content is None
        if not changed:
            shutil.copy(good / found.path, found.path)


def fuzz(folder: Path, inputs: int, seed: int = 0, seconds: float = math.inf) -> Found:
    """Try so many inputs, or as many as some seconds are enough for; a process that dies is one that is wrong, too."""
    good, log, end = prepare(folder / "good"), folder / "log.jsonl", time.monotonic() + seconds
    log.touch()

    def ended() -> list[dict[str, Any]]:
        return [json.loads(line) for line in log.read_text().splitlines()]

    while (first := len(ended())) < inputs and time.monotonic() < end:
        arguments = (str(good), str(folder / "work"), str(log), seed, first, inputs)
        process = FORKS.Process(target=_work, args=arguments, daemon=True)
        process.start()
        while process.is_alive() and time.monotonic() < end and time.time() - log.stat().st_mtime < SILENCE:
            process.join(0.5)
        code = process.exitcode
        process.kill()
        process.join()
        if len(ended()) < inputs and time.monotonic() < end:
            with log.open("a") as file:
                file.write(json.dumps({"code": 99, "wrong": f"the process ended with {code}"}) + "\n")
    tried, codes, wrong = Counter[str](), Counter[int](), dict[tuple[str, str], list[str]]()
    for number, row in enumerate(ended()):
        found = case(good, seed, number)
        tried[found.row.path.removeprefix(RUN)] += 1
        codes[row["code"]] += 1
        if row["wrong"]:
            kind = row["wrong"].partition(" (nas")[2] or row["wrong"][:60]
            wrong.setdefault((found.row.path, kind), []).append(f"input {number}, `nas {found.command}`: {row['wrong'][:250]}")
    often = sorted(wrong.items(), key=lambda item: -len(item[1]))
    lines = [f"{path}, {len(found)} times: {found[0]}" for (path, _), found in often]
    return Found(f"{codes.total()} broken files (seed {seed}): {listed(tried)}; exit codes: {listed(codes)}.", lines)
