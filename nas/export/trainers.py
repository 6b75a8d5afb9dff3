"""What an exported folder is trained with: the settings of `nas train`, and what other trainers start from.

Owns `TrainSettings`, `Trained`, what several processes (`torchrun`) decide together, and the table `TRAINERS`: configuration
files beside a model, and the line that begins the training. A new trainer is one row. Nothing here imports `transformers`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ..config import Fraction, NonNegativeFloat, OneOf, PositiveFloat, PositiveInt, Seed, Strict, dump_yaml
from ..errors import UserError, did_you_mean
from ..pretrained.files import CARD
from ..sharing.shape import DTYPE_BYTES
from ..training.evaluation import Losses
from .card import write_texts

T = TypeVar("T")

CHECKPOINTS = "checkpoints"  # the folder of a training's checkpoints, in the folder that it will write


def world_size() -> int:
    """The number of processes that train together; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process evaluates, writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def broadcast_from_main(compute: Callable[[], T]) -> T:
    """What the main process computes, in all processes; its UserError is raised in all, so that none waits for ever."""
    result: list[Any] = [None]
    if is_main_process():
        try:
            result = [compute()]
        except UserError as error:
            result = [error]
    if world_size() > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


@dataclass(frozen=True)
class TrainSettings(Strict):
    """How a folder is trained: AdamW (betas 0.9, 0.95), linear warm-up, cosine to a tenth of the learning rate, as in a search.

    batch: rows per step, divided over the processes and over `grad_accumulation` parts; the result does not depend on how.
    steps: by default as many as make `epochs`. column: of JSON lines or a dataset, what holds the text. eval_text: text to
    evaluate on; by default the last `eval_fraction` of the training text, which is not trained on. eval_steps: evaluate
    every so many steps, besides before and after. save_steps: write a checkpoint every so many steps, from which `resume`
    continues. from_scratch: start from new weights. distill_from: a folder whose model's probabilities are learned with
    `distill_weight` of the loss, the text with the rest (Hinton et al., 1503.02531, at temperature 1). dtype: of the
    weights that are written, by default unchanged; training is in float32. device: as `find_device` reads it; of several
    processes each has the GPU of its rank.
    """

    epochs: PositiveFloat = 1.0
    steps: PositiveInt | None = None
    batch: PositiveInt = 16
    grad_accumulation: PositiveInt = 1
    seq: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    warmup: Fraction = 0.05
    weight_decay: NonNegativeFloat = 0.1
    clip: PositiveFloat = 1.0
    autocast: bool = True
    device: str = "auto"
    gradient_checkpointing: bool = False
    column: str = "text"
    eval_text: str | None = None
    eval_fraction: float = 0.1
    eval_steps: PositiveInt | None = None
    save_steps: PositiveInt = 500
    seed: Seed = 0
    from_scratch: bool = False
    distill_from: str | None = None
    distill_weight: Fraction = 1.0
    dtype: Annotated[str, OneOf(DTYPE_BYTES)] | None = None
    resume: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings as transformers' TrainingArguments, without the length."""
        return {
            **{"per_device_train_batch_size": self.batch, "gradient_accumulation_steps": self.grad_accumulation},
            "learning_rate": self.learning_rate,
            **{"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            **{"warmup_steps": self.warmup, "weight_decay": self.weight_decay, "adam_beta2": 0.95, "max_grad_norm": self.clip},
            "bf16": self.autocast,
            "ddp_find_unused_parameters": False,  # every owned weight is used
            **{"logging_steps": 10, "save_steps": self.save_steps, "report_to": "none"},
            "seed": self.seed % 2**32,  # numpy takes no larger one
        }

    def rows_per_process(self) -> int:
        """Rows that a process computes at once. Raises UserError if the batch does not divide."""
        parts = world_size() * self.grad_accumulation
        if self.batch % parts:
            message = f"{self.batch} rows do not divide into {world_size()} processes × {self.grad_accumulation} parts"
            raise UserError(message, where="batch", hint=f"use {-(-self.batch // parts) * parts}")
        return self.batch // parts


@dataclass(frozen=True)
class Trained:
    """A finished training: its folder, and the losses on the evaluation text before and after. `notes` say how the folder was
    read."""

    directory: Path
    steps: int
    tokens: int
    seconds: float
    before: Losses
    after: Losses
    bits_per_byte_before: float
    bits_per_byte_after: float
    dtype: str
    notes: tuple[str, ...] = ()

    def to_data(self) -> dict[str, Any]:
        head = {"directory": str(self.directory), "steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}
        head |= {"dtype": self.dtype}
        losses = {f"{name}_{when}": v for when in ("before", "after") for name, v in asdict(getattr(self, when)).items()}
        bits = {name: getattr(self, name) for name in ("bits_per_byte_before", "bits_per_byte_after")}
        return head | losses | bits | {"notes": list(self.notes)}


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
        length = {"max_steps": self.settings.steps} if self.settings.steps else {"num_train_epochs": self.settings.epochs}
        return {"output_dir": "trained", **length, **self.settings.arguments}

    @property
    def recipe(self) -> dict[str, Any]:
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
