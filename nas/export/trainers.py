"""What other trainers start from: their own configuration files, beside an exported model, and the line that begins the training.

Owns the table `TRAINERS`. A new trainer is one row. `nas train` needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import dump_yaml
from ..errors import UserError, did_you_mean
from ..pretrained.files import CARD
from .card import write_texts
from .train_settings import TrainSettings

TEXT = "text.jsonl"  # the file of JSON lines that trainers read where none is given, in the model's folder

RECIPE = "train.py"


@dataclass(frozen=True)
class Start:
    """How a training is to start: names of rows of `TRAINERS`, a file of JSON lines, which may be made later, and the settings of
    `nas train`, with a batch for each process."""

    names: tuple[str, ...] = ()
    text: str = TEXT
    settings: TrainSettings = field(default_factory=TrainSettings)

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings as transformers' TrainingArguments."""
        length = {"max_steps": self.settings.steps} if self.settings.steps else {"num_train_epochs": self.settings.epochs}
        return {"output_dir": "trained", **length, **self.settings.arguments}

    @property
    def recipe(self) -> dict[str, Any]:
        """What `train.py` reads."""
        return {"text": self.text, "column": self.settings.column, "seq": self.settings.seq} | self.arguments


# The layers use one another's weights: a layer is no unit that could be sharded alone.
FSDP = {"version": 2, "auto_wrap_policy": "NO_WRAP", "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"}


def _accelerate(start: Start) -> dict[str, Any]:
    launch = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": 2,
        "mixed_precision": "bf16" if start.settings.autocast else "no",
        "use_cpu": False,
        "fsdp_config": {f"fsdp_{name}": value for name, value in FSDP.items()},
    }
    return {"accelerate.yaml": launch, "train.yaml": start.recipe}


def _trl(start: Start) -> dict[str, Any]:
    column = start.settings.column
    model = {"model_name_or_path": ".", "trust_remote_code": True, "dtype": "float32"}
    rows = {"dataset_text_field": column, "max_length": start.settings.seq, "packing": True, "packing_strategy": "wrapped"}
    data = {"datasets": [{"path": "json", "data_files": start.text, "columns": [column]}]}
    return {"trl.yaml": model | data | rows | start.arguments | {"activation_checkpointing": False}}


def _axolotl(start: Start) -> dict[str, Any]:
    given = start.settings
    return {
        "axolotl.yaml": {
            "base_model": ".",
            "trust_remote_code": True,
            "datasets": [{"path": start.text, "ds_type": "json", "type": "completion", "field": given.column}],
            "val_set_size": 0.0,
            "output_dir": "trained",
            "sequence_len": given.seq,
            **({"max_steps": given.steps} if given.steps else {"num_epochs": given.epochs}),
            "micro_batch_size": given.batch,
            "gradient_accumulation_steps": given.grad_accumulation,
            "optimizer": "adamw_torch",
            "adam_beta2": 0.95,
            "learning_rate": given.learning_rate,
            "lr_scheduler": "cosine",
            "cosine_min_lr_ratio": 0.1,
            "warmup_ratio": given.warmup,
            "weight_decay": given.weight_decay,
            "max_grad_norm": given.clip,
            "bf16": "auto",
            "attn_implementation": "sdpa",
            "save_steps": given.save_steps,
            "logging_steps": 10,
            "seed": given.seed % 2**32,
        }
    }


@dataclass(frozen=True)
class Trainer:
    """A row of `TRAINERS`.

    `write` gives the files by name, YAML as plain data; `launch` is what a person types in the folder. `recipe`: `train.py` is
    one of them. `refused` says why this trainer can start from nothing here, and `instead` what to do.
    """

    name: str
    meaning: str
    write: Callable[[Start], Mapping[str, Any]] = lambda start: {}
    launch: str = ""
    recipe: bool = False
    refused: str = ""
    instead: str = ""

    def texts(self, start: Start) -> dict[str, str]:
        """Name and text of each file."""
        recipe = {RECIPE: (Path(__file__).parent / "train_recipe.py").read_text(encoding="utf-8")} if self.recipe else {}
        return {name: dump_yaml(data) for name, data in self.write(start).items()} | recipe


TRAINERS: dict[str, Trainer] = {
    row.name: row
    for row in (
        Trainer(
            "accelerate",
            "accelerate.yaml with FSDP, train.yaml, and train.py, which needs torch and transformers alone",
            _accelerate,
            "accelerate launch --config_file accelerate.yaml --num_processes 2 train.py train.yaml",
            recipe=True,
        ),
        Trainer(
            "torchrun",
            "torchrun.yaml with FSDP, and train.py",
            lambda start: {"torchrun.yaml": start.recipe | {"fsdp": True, "fsdp_config": dict(FSDP)}},
            "torchrun --nproc-per-node 2 train.py torchrun.yaml",
            recipe=True,
        ),
        Trainer("trl", "trl.yaml, for TRL's SFTTrainer", _trl, "trl sft --config trl.yaml"),
        Trainer("axolotl", "axolotl.yaml", _axolotl, "axolotl train axolotl.yaml"),
        Trainer(
            "litgpt",
            "refused: LitGPT runs its own models alone",
            refused="LitGPT builds the models of its own list, in which no layers share, and runs no code of a folder",
            instead="use trl, accelerate or torchrun; of a dense model, `litgpt convert_to_litgpt` takes the shapes of its list",
        ),
    )
}

FORMATS = ("hf", "dense")  # the formats that trainers load


def require_start(start: Start, format: str) -> None:
    """Raise UserError for trainers that are unknown, or cannot start from this format."""
    for name in start.names:
        row = TRAINERS.get(name)
        if row is None:
            raise UserError(f"unknown trainer {name!r}", where="trainer", hint=did_you_mean(name, TRAINERS))
        if row.refused:
            raise UserError(row.refused, where=f"trainer {name}", hint=row.instead)
        if format not in FORMATS:
            message = f"loads Hugging Face folders, and the format {format} is none"
            raise UserError(message, where=f"trainer {name}", hint="use the format hf")
    if start.names and (not start.text.endswith(".jsonl") or (start.text != TEXT and not Path(start.text).is_file())):
        message = "is no file of JSON lines, with a document a line, which trainers read"
        raise UserError(message, where=start.text, hint="give a .jsonl file")


def write_start(start: Start, folder: Path) -> None:
    """Write what trainers start from into an export's folder, and into its README how."""
    if not start.names:
        return
    for name in start.names:
        write_texts(folder, TRAINERS[name].texts(start))
    with (folder / CARD).open("a", encoding="utf-8") as readme:
        readme.write(_section(start))


def _section(start: Start) -> str:
    lines = "\n".join(TRAINERS[name].launch for name in start.names)
    return f"""
## Train with {", ".join(start.names)}

In this folder, with a text in `{start.text}`: JSON lines, each with a document in `{start.settings.column}`. The batch
is that of a process. The trained model is written to `trained`.

```
{lines}
```
"""
