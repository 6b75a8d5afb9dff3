"""Trains the model of this folder by transformers' Trainer, and saves it in the folder `trained`.

    python train.py train.yaml

The YAML file has the settings of `Data` below, and any of transformers' TrainingArguments; without an accelerator, CPUs train.
Several processes: `torchrun` or `accelerate launch` in place of `python`. Needs torch and transformers.
"""

import json
import sys
from dataclasses import dataclass

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class Data:
    """JSON lines, a document a line, and how many tokens a row of the training has."""

    text: str
    column: str = "text"
    seq: int = 128


def main(file: str) -> None:
    """Train as a YAML file says."""
    with open(file, encoding="utf-8") as lines:
        given = {"use_cpu": not torch.accelerator.is_available()} | yaml.safe_load(lines)
    data, settings = HfArgumentParser((Data, TrainingArguments)).parse_dict(given)
    tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
    with open(data.text, encoding="utf-8") as lines:
        documents = [tokenizer(json.loads(line)[data.column]).input_ids for line in lines if line.strip()]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = torch.tensor([token for document in documents for token in [*document, *end]])
    if len(tokens) <= data.seq:
        sys.exit(f"error: {data.text}: {len(tokens)} tokens are too few: one row takes {data.seq + 1}")
    rows = [{"input_ids": row, "labels": row} for row in tokens.unfold(0, data.seq + 1, data.seq)]

    model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True, dtype="float32")
    trainer = Trainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(settings.output_dir)


if __name__ == "__main__":
    main(sys.argv[1])
