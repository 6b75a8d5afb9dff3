"""A run's folder, written so that a crash at any moment loses nothing that was finished.

Owns the layout and the journal. The journal is appended a line at a time, and a line torn by a crash is dropped; every other
file is replaced whole.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from tokenizers import Tokenizer

from ..config import Document, build, dump_yaml, format_bytes, parse_json, read_json, read_text, reading, require_kinds
from ..data import Corpus
from ..errors import UserError, did_you_mean
from ..files import cut_torn_line, locked, require_no_links, write_text
from ..pretrained import FolderMetadata
from ..report.tables import Sample
from ..sharing.label import find_config
from ..sharing.objectives import DEFAULT
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation
from ..workers import RESULT
from .front import Front
from .trial import Trial

FRONT = "front.json"
CONVERTED = "converted"
TEST_TEXT = "test.txt"
TRAIN_TOKENS = "train_tokens.bin"
METADATA = "extras.json"
BEGUN = frozenset({"run.json", "tokenizer.json", TEST_TEXT, METADATA, ".lock"})
"""What is written before the file that makes a folder a run, or a comparison: a kill leaves nothing of worth there."""

PROVENANCE = "run.json"
NOTED: dict[str, Any] = {
    **dict.fromkeys(("trial", "command", "text", "text_sha256"), str),
    **{"seed": int, "commit": (str, NoneType), "versions": dict},
}
FROM_NOTED: dict[str, Any] = {"from": str, "from_sha256": str, "from_perplexity": (int, float)}
"""The kinds of the values in `run.json`, and of those of a run from a checkpoint."""

DAMAGED = "put it back from a copy, or start the run again with --overwrite"
LIBRARIES = ("torch", "optuna", "ray", "mlflow", "transformers", "tokenizers")


@dataclass(frozen=True)
class Run:
    """A run's folder. `trial.yaml` makes a folder a run; the rest appears as stages finish."""

    folder: Path

    @staticmethod
    def create(
        folder: Path, trial: Trial, corpus: Corpus, provenance: Mapping[str, Any], metadata: FolderMetadata | None = None
    ) -> Run:
        """A new run; `metadata` goes into every folder that it exports. Raises UserError if the folder is one already or holds
        anything else."""
        require_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(folder)
        run.write_json("run.json", provenance)
        run.write("tokenizer.json", corpus.tokenizer_json)
        run.write(TEST_TEXT, corpus.test_text.decode())
        (folder / METADATA).unlink(missing_ok=True)
        if metadata is not None:
            run.write_json(METADATA, asdict(metadata))
        run.write("trial.yaml", dump_yaml(trial.to_data()))
        return run

    @staticmethod
    def find(name: str, runs: Path) -> Run:
        """The run of a name below `runs`, or at a path. Raises UserError naming the nearest, or for a link out of its folder."""
        for folder in (runs / name, Path(name)):
            if (folder / "trial.yaml").is_file():
                require_no_links(folder)
                return Run(folder)
        known = sorted(p.parent.name for p in runs.glob("*/trial.yaml"))
        hint = did_you_mean(name, known) if known else "start one with `nas search TRIAL.yaml`"
        raise UserError(f"no such run: {name}", where=str(runs), hint=hint)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def argument(self) -> str:
        """What a person types for the run in a shell: its name among the runs, or its folder."""
        default = self.folder.parts[:1] == ("runs",) and len(self.folder.parts) > 1
        return shlex.quote(str(self.folder.relative_to("runs") if default else self.folder))

    def reopen(self, trial: Trial) -> None:
        """Go on by an extended trial: the run has no front until that is done."""
        (self.folder / FRONT).unlink(missing_ok=True)
        self.write("trial.yaml", dump_yaml(trial.to_data()))

    def trial(self) -> Trial:
        return Trial.load(self.folder / "trial.yaml")

    def has(self, name: str) -> bool:
        """Whether a file is there, and so finished."""
        return (self.folder / name).exists()

    def write(self, name: str, text: str) -> Path:
        """Write a file, whole or not at all."""
        return write_text(self.folder / name, text)

    def write_json(self, name: str, data: Any) -> Path:
        return self.write(name, json.dumps(data, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """The object in a JSON file of the run. Raises UserError."""
        return read_json(self.folder / name, DAMAGED)

    def locked(self) -> AbstractContextManager[None]:
        """Hold the run for this process. Raises UserError if another works on it."""
        message, hint = "another process works on this run", "wait for it to end, or stop it first"
        return locked(self.folder / ".lock", UserError(message, where=str(self.folder), hint=hint))

    def metadata(self) -> FolderMetadata | None:
        """What goes into every folder that the run exports, if it is from a checkpoint. Raises UserError."""
        path = self.folder / METADATA
        return build(FolderMetadata, Document(self.read_json(METADATA), str(path))) if path.exists() else None

    def provenance(self) -> dict[str, Any]:
        """What was noted as the run began. Raises UserError."""
        data = self.read_json(PROVENANCE)
        with reading(self.folder / PROVENANCE, DAMAGED):
            require_kinds(data, NOTED | (FROM_NOTED if "from" in data else {}))
            if "hardware" in data:  # earlier versions noted the kernel, too
                data["hardware"]["machine"] = data["hardware"]["machine"].partition("-")[0]
        return data

    def command(self) -> str:
        """What made the run: the command that began it and, if it was extended, the one that does so. Raises UserError."""
        file = self.trial().file
        more = f"--evaluations {file.search.evaluations} --candidates {file.final.candidates}"
        extended = f"\nnas extend {self.argument} {more}" if file.search.began_with else ""
        return f"{self.provenance()['command']}{extended}"

    def journal(self) -> Journal:
        return Journal(self.folder / "journal.jsonl")

    def front(self) -> Front:
        """The finished run's front. Raises UserError if the run has not come so far."""
        if not self.has(FRONT):
            raise UserError("the run has not finished", where=self.name, hint=f"go on with it: `nas resume {self.argument}`")
        trial, data = self.trial(), self.read_json(FRONT)
        with reading(self.folder / FRONT, DAMAGED):
            front = Front.from_data(trial.space.shape, data, trial.front_objectives)
        return Front(tuple(replace(e, windows=self._windows(e)) for e in front.evaluations))

    def _windows(self, evaluation: Evaluation) -> tuple[float, ...]:
        """The loss of each evaluation window of a model of the front; empty where they were not kept. Raises UserError."""
        with reading(self._result(evaluation), DAMAGED):
            result = self._read_result(evaluation)
            return tuple(map(float, (result["test"] if evaluation.part == "test" else result).get("window_losses", ())))

    def samples(self, evaluation: Evaluation) -> tuple[Sample, ...]:
        """What a model of the front writes after prompts of the test text; empty where that was not kept. Raises UserError."""
        with reading(self._result(evaluation), DAMAGED):
            rows = self._read_result(evaluation).get("samples", ())
            tokenizer = Tokenizer.from_str(read_text(self.folder / "tokenizer.json", DAMAGED))
            return tuple(Sample.read(row, tokenizer) for row in rows)

    def _result(self, evaluation: Evaluation) -> Path:
        return self.weights(evaluation).parent / RESULT

    def _read_result(self, evaluation: Evaluation) -> dict[str, Any]:
        """What the training of a model of the front came to; empty where that was not kept."""
        path = self._result(evaluation)
        return self.read_json(str(path.relative_to(self.folder))) if path.exists() else {"test": {}}

    def config(self, pick: str) -> SharingConfig:
        """The config of a model of the front, by a pick, or of one that the search evaluated, by its label or hash. Raises
        UserError."""
        try:
            return self.front().pick(pick).config
        except UserError as error:
            where = f"{self.name}:{pick}"
            found = find_config(pick, (e.config for e in (*self.searched(), *self.converted())), where)
            if found is None:
                raise UserError(error.message, where=where, hint=error.hint) from None
            return found

    def searched(self) -> list[Evaluation]:
        """The search's evaluations on inherited weights, by the number of their trial."""
        trial = self.trial()
        with reading(self.journal().path, DAMAGED):
            entries = [entry for entry in self.journal().read() if "failure" not in entry]
            found = (Evaluation.from_data(trial.space.shape, entry, trial.objectives) for entry in entries)
            return sorted(found, key=lambda e: e.number)

    def measured(self) -> dict[str, dict[str, Any]]:
        """What was measured of configs at work, by their hashes: objectives, or a `failure`. Raises UserError."""
        with reading(self.speeds().path, DAMAGED):
            return {entry["hash"]: {k: v for k, v in entry.items() if k != "hash"} for entry in self.speeds().read()}

    @property
    def began(self) -> float:
        """When the run began, in seconds since 1970."""
        return (self.folder / PROVENANCE).stat().st_mtime

    def speeds(self) -> Journal:
        return Journal(self.folder / "measured.jsonl")

    def converted(self, comparable: bool = True) -> list[Evaluation]:
        """The base model's conversions; none in a search from scratch. Those that are `comparable` have all objectives."""
        trial, measured, found = self.trial(), self.measured(), list[Evaluation]()
        objectives = trial.objectives if comparable else DEFAULT
        for path in self.folder.glob(f"{CONVERTED}/*/result.json"):
            row = self.read_json(str(path.relative_to(self.folder)))
            row |= measured.get(row.get("hash", ""), {})
            with reading(path, DAMAGED):
                if "refused" not in row and row.keys() >= {*objectives}:
                    found.append(Evaluation.from_data(trial.space.shape, row, objectives))
        return sorted(found, key=lambda e: e.supernet)

    def weights(self, evaluation: Evaluation) -> Path:
        return self.folder / "final" / f"{evaluation.config.hash}-{evaluation.seed}" / "model.safetensors"

    def remove(self) -> None:
        """Delete the run's folder, or the link to it, which leaves the folder; its MLflow run stays."""
        with self.locked():
            self.folder.unlink() if self.folder.is_symlink() else shutil.rmtree(self.folder)


@dataclass(frozen=True)
class Journal:
    """Finished evaluations and failures, one JSON object a line: the run's truth, and what `resume` reads."""

    path: Path

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add an entry; it is on disk when this returns."""
        with self.path.open("a+b") as file:
            cut_torn_line(file)
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> Iterator[dict[str, Any]]:
        """The entries, in the order in which they finished; a torn last line is left out. Raises UserError."""
        if self.path.exists():
            with reading(self.path, DAMAGED):
                whole = self.path.read_bytes()
                entries = [parse_json(line.decode()) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]
            yield from entries


def require_free(folder: Path, overwrite: bool = False) -> None:
    """Raise UserError unless a run can be made in a folder, in place of one that nobody works on if it may be overwritten."""
    if not (folder / "trial.yaml").exists():
        return require_unused(folder, "run")
    with Run(folder).locked():
        if not overwrite:
            hint = f"go on with `nas resume {Run(folder).argument}`, or use --name, or --overwrite"
            raise UserError("there is a run of this name already", where=str(folder), hint=hint)


def require_unused(folder: Path, kind: str) -> None:
    """Raise UserError if a folder holds anything but what a killed start left of a run, or of a comparison."""
    found = {path.name for path in folder.iterdir() if path.suffix != ".part"} if folder.exists() else set()
    if found and ("run.json" not in found or found - BEGUN):
        raise UserError(f"the folder is not empty and is no {kind}", where=str(folder), hint="use another --name")


def require_parts(run: Run) -> None:
    """Raise UserError for a run whose text has no test part: that of an earlier version."""
    if "text_tokens" not in run.provenance():
        hint = "begin it again with --overwrite, or under another --name"
        raise UserError("it was begun by a version that chose and reported on one text", where=str(run.folder), hint=hint)


def provenance(name: str, seed: int, corpus: Corpus, command: str) -> dict[str, Any]:
    """What a run's figures depend on: seed, versions, commit, text, hardware."""
    return {
        "trial": name,
        "command": command,
        "seed": seed,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in ("nas-sharing", *LIBRARIES)},
        "commit": _commit(),
        "text": corpus.source,
        "text_sha256": corpus.sha256,
        "text_tokens": corpus.sizes,
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """System, processor, cores, memory and accelerators of this machine; not its name, nor its kernel's."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = platform.processor() or platform.machine()
    memory = format_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return {"machine": platform.system(), "processor": cpu, "cores": os.cpu_count(), "memory": memory, "gpus": gpus}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit this code is at, with `-dirty` where it was changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
