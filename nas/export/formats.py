"""The formats in which a model can be exported, and `export`, which writes one into a folder: whole or not at all.

Owns the table `FORMATS` and how a folder is replaced. A new format is one row here, and its writer.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..config import dump_yaml
from ..errors import RunFailed, UserError, did_you_mean
from ..files import require_writable
from ..model.decoder import Decoder, is_norm
from ..model.supernet import weights_of
from ..pretrained import FolderMetadata
from ..pretrained.files import CARD, INDEX, LICENCES, TEXTS, WEIGHTS
from ..sharing.memory import MemorySpec
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .card import CONFIG_JSON, FIGURE, MARKERS, MODEL_YAML, PROVENANCE, Artifact, ModelCard, common_texts, write_texts
from .hugging_face import CODE, dense_cost, write_dense, write_hf
from .load import load_export, read_config
from .torch_folder import write_torch
from .trainers import Start, require_start, write_start

CONFIG_USAGE = """
There are no weights here: `model.yaml` has the model's dimensions, `sharing.yaml` what its layers share. The project that made
them builds the model:

```python
import torch
from torch.nn import functional as F

import nas

model = nas.load(".", seed=0)  # a torch.nn.Module, initialised as the search does; each shared weight is one Parameter
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(10):
    rows = torch.randint(model.shape.vocab_size, (8, 65))  # your text as tokens (batch, seq + 1); `tokenizer.json` makes them
    logits = model(rows[:, :-1])  # (batch, seq, vocab) of tokens (batch, seq)
    F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
```

```
nas describe . --to sharing.svg
nas describe sharing.yaml --model model.yaml
```
"""


def write_config(artifact: Artifact, folder: Path) -> Artifact:
    """Fill an empty folder with a `model.yaml` and a `sharing.yaml`."""
    artifact = replace(artifact, weights={})
    texts = {MODEL_YAML: dump_yaml(asdict(artifact.shape))}
    write_texts(folder, texts | common_texts(artifact, CONFIG_USAGE))
    return artifact


@dataclass(frozen=True)
class Format:
    """A way to write a model.

    `write(artifact, folder)` fills an empty folder and returns what should be read back from it. `files` are the names it may
    write, beside those of every format. `cost` says in a sentence what a model loses in this format, if anything.
    """

    name: str
    meaning: str
    files: tuple[str, ...]
    write: Callable[[Artifact, Path], Artifact]
    cost: Callable[[ModelShape, SharingConfig, MemorySpec], str] = lambda shape, config, spec: ""


HF = "a Hugging Face folder, with the code that runs it; transformers loads and trains it"
TORCH = "one Python file and the weights; needs torch and safetensors alone"
DENSE = "a plain Llama, Qwen or Gemma folder without code, shared weights materialised: larger, and only where that is exact"
CONFIG = "model.yaml and sharing.yaml without weights, which nas.load builds"
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("hf", HF, (CONFIG_JSON, WEIGHTS, *CODE, *TEXTS), write_hf),
        Format("torch", TORCH, (CONFIG_JSON, WEIGHTS, "model.py"), write_torch),
        Format("dense", DENSE, (CONFIG_JSON, WEIGHTS, *TEXTS), write_dense, dense_cost),
        Format("config", CONFIG, (MODEL_YAML,), write_config),
    )
}
RENAMED = {"llama": "dense"}  # formats of version 0.1 that have another name since

COMMON_FILES = (CARD, "sharing.yaml", "tokenizer.json", FIGURE, PROVENANCE, *LICENCES)
EXPORTED = frozenset({*COMMON_FILES, *(name for row in FORMATS.values() for name in row.files)})
"""Every file that a format writes: an export deletes those of them that an earlier one left."""

NORM_ROUNDING = 2**-7
"""Error of a norm's weight that is stored in bfloat16 less one (Gemma), relative to the larger of it and one."""


COMPARED = 64  # tokens on which the logits of a dense form are compared with the model's

LOGITS_ERROR = {torch.float32: 1e-2}
"""Largest error of these logits, relative to their norm, by dtype; a half-precision one rounds what is multiplied out."""


def export(
    model: Decoder,
    config: SharingConfig,
    tokenizer_json: str,
    directory: Path,
    card: ModelCard,
    format: str = "hf",
    overwrite: bool = False,
    metadata: FolderMetadata | None = None,
    start: Start | None = None,
) -> Path:
    """Write a stand-alone model or a subnet, which is left unchanged, to a folder; returns the folder.

    `metadata` is carried on from the folder that the model comes from (`Loaded.metadata`). `start` is what other trainers are to
    start from. The folder appears whole or not at all. An earlier export is replaced; files of other names in it stay. Raises
    UserError for an unknown format, for a model that the format cannot hold, for a trainer that cannot start from it, and for a
    folder with anything else in it, unless `overwrite`.
    """
    if format not in FORMATS:
        hint = f"it is called {RENAMED[format]} now" if format in RENAMED else did_you_mean(format, FORMATS)
        raise UserError(f"unknown format {format!r}", where="format", hint=hint)
    start = start or Start()
    require_start(start, format)
    require_free(directory, overwrite)
    artifact = Artifact(model.shape, config, weights_of(model), tokenizer_json, card, metadata or FolderMetadata())
    if artifact.plan != model.plan:
        raise UserError("is not this model's", where="config", hint="give the config that the model was made with")
    with replaced_folder(directory) as folder:
        write_format(artifact, folder, format)
        if card.provenance:
            card.provenance.save(folder)
        if card.figure:
            shutil.copyfile(card.figure, folder / FIGURE)
        assert {path.name for path in folder.iterdir()} <= EXPORTED
        write_start(start, folder)
    return directory


def write_format(artifact: Artifact, folder: Path, format: str) -> None:
    """Fill an empty folder in a format. Raises RunFailed unless the model is read back from it as it was."""
    written = FORMATS[format].write(artifact, folder)
    shape, config = read_config(folder)
    same = replace(shape, tie_word_embeddings=written.shape.tie_word_embeddings) == written.shape
    if not same or config.resolve(shape) != written.plan:
        raise RunFailed(f"the format {format} does not keep what this model shares; please report it")
    if not written.weights:
        return
    model = load_export(folder).model
    found, rounded = model.state_dict(), written.family is not None and written.family.norm_offset != 0
    for name, weight in written.weights.items():
        error = NORM_ROUNDING if rounded and is_norm(name) else 0.0
        if not torch.allclose(found[name], weight.to(found[name]), rtol=error, atol=error):
            raise RunFailed(f"the format {format} does not keep the weight {name}; please report it")
    if format == "dense":
        _require_same_logits(artifact, model)


@torch.no_grad()
def _require_same_logits(artifact: Artifact, dense: Decoder) -> None:
    """Raise RunFailed unless a materialised model, whose plan is another, computes the logits of the model it was made of."""
    shape, model = artifact.shape, Decoder(artifact.shape, artifact.plan)
    model.load_state_dict({name: weight.float() for name, weight in artifact.weights.items()})
    length = min(shape.max_position_embeddings, COMPARED)
    rows = torch.randint(shape.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    wanted, bits = model(rows), dense.embed_tokens.weight.dtype
    error = float((deepcopy(dense).float()(rows) - wanted).norm() / wanted.norm())
    if not error <= LOGITS_ERROR.get(bits, 0.2):
        message = f"the dense form computes other logits, by {error:.2g} of them; please report it"
        raise RunFailed(f"{message}, and use the format hf")


def is_export(directory: Path) -> bool:
    """Whether a directory is an export, of any format."""
    return (directory / "sharing.yaml").is_file() and any((directory / marker).is_file() for marker in MARKERS)


def exported_files(directory: Path) -> dict[str, int]:
    """Name and bytes of an export's own files, whatever else is in the folder."""
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name in EXPORTED}


def require_free(directory: Path, overwrite: bool = False, own: frozenset[str] = frozenset()) -> None:
    """Raise UserError if the directory has entries that may not be replaced: those of anything but an export, and not `own`."""
    require_writable(directory)
    entries = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if entries - own and not overwrite and not is_export(directory):
        hint = "give an empty or a new folder, or --overwrite"
        raise UserError("the folder is not empty and is no earlier export", where=str(directory), hint=hint)


@contextmanager
def replaced_folder(directory: Path) -> Iterator[Path]:
    """A temporary folder to write into; its files move to the directory at the end, and are deleted after an error.

    A new directory appears at once. In an existing one, which may be the working directory, files are replaced one by one, the
    marker last, so that a half replaced export is not taken for a model. What an earlier export left is deleted; files of other
    names stay.
    """
    exists = directory.is_dir()
    parent = directory if exists else directory.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        if exists:
            _replace(directory, new)
        else:
            new.rename(directory.resolve())


def _replace(directory: Path, new: Path) -> None:
    written = sorted(new.iterdir(), key=lambda path: path.name in MARKERS)
    stale = [path for name in EXPORTED if (path := directory / name).is_file()] if is_export(directory) else []
    for pattern in (*MARKERS, INDEX, "model-*-of-*.safetensors"):
        for path in directory.glob(pattern):
            path.unlink()
    for path in stale:
        if not (new / path.name).exists():
            path.unlink(missing_ok=True)
    for path in written:
        path.replace(directory / path.name)
