"""What others run on an exported folder: FSDP, and trainers that an export has files for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from exports import Exports, copied

from nas.data.tokenizer import bytes_json
from nas.export import ModelCard, Start, export
from nas.export.load import load_export
from nas.export.measure import EvalSettings, eval_export
from nas.export.trainers import TrainSettings

pytestmark = [pytest.mark.slow, pytest.mark.service, pytest.mark.filterwarnings("ignore")]

TEXT = "the round moon"


FSDP = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

def trained(model, rows):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in rows:
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model

def model():
    return AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True, dtype=torch.float32).train()

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
rows = torch.randint(256, (4, 2, 15), generator=torch.Generator().manual_seed(0))
alone = trained(model(), rows)
sharded = trained(fully_shard(model(), mesh=init_device_mesh("cpu", (2,))), rows[:, rank, None])
held = sum(weight.to_local().numel() for weight in sharded.parameters())
assert held < 0.6 * sum(weight.numel() for weight in alone.parameters())
for (name, weight), found in zip(alone.named_parameters(), sharded.parameters(), strict=True):
    torch.testing.assert_close(found.full_tensor(), weight, rtol=1e-4, atol=1e-5, msg=name)
torch.distributed.destroy_process_group()
"""


def test_two_processes_of_fsdp_train_to_the_weights_of_one(exports: Exports, tmp_path: Path) -> None:
    """Shared weights are stored, sharded and reduced once."""
    for name in ("everything", "albert"):
        copied(exports(name).folder, tmp_path / name / "DIR")
        (tmp_path / name / "train.py").write_text(FSDP)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
        done = subprocess.run(command, cwd=tmp_path / name, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


LAUNCHED = {
    "accelerate": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", "train.yaml"],
    "trl": ["trl.cli.main", "sft", "--config", "trl.yaml", "--use_cpu"],
}
"""What begins a training on CPUs. FSDP needs GPUs."""


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_a_trainer_starts_from_trains(name: str, exports: Exports, tmp_path: Path) -> None:
    if name == "trl":
        pytest.importorskip("trl")
    made, folder = exports("everything"), tmp_path / "DIR"
    start = Start((name,), settings=TrainSettings(steps=20, batch=2, seq=16, learning_rate=1e-2))
    export(made.subnet, made.config, bytes_json(), folder, ModelCard(), start=start)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(40)))
    (tmp_path / "held.txt").write_text(TEXT * 20)
    done = subprocess.run([sys.executable, "-m", *LAUNCHED[name]], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert load_export(folder / "trained").config == made.config
    before, after = (eval_export(f, tmp_path / "held.txt", EvalSettings(seq=16)).losses for f in (folder, folder / "trained"))
    assert after.loss_nats_per_token < before.loss_nats_per_token / 2
