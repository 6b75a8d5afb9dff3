"""Trainings that several workers do together: the same numbers as of one, also after one of them was killed."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from commands import refused
from searches import FROM, SHAPE, SUPERNET, search
from torch import Tensor

from nas.config import parse_yaml, plain
from nas.search.launch import check_unread
from nas.search.run import Run
from nas.search.trial import Trial
from nas.sharing.memory import MemorySpec
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace
from nas.training.loop import Trainer, TrainSpec, plain_backward
from nas.training.ranks import Ranks
from nas.training.strategies import STRATEGIES, SubnetRandom, SupernetStep
from nas.workers import Failure, Job, RunSpec, Session, train_all
from nas.workers.cluster import ray

pytestmark = pytest.mark.service
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

TOGETHER = RunSpec(workers=2, workers_per_training=2, retries=2)


def regression(settings: dict[str, Any], session: Session) -> dict[str, Any]:
    """A regression of 12 steps, saved after 6; a worker beside the one that leads dies at step 9, once."""
    model, spec = torch.nn.Linear(4, 2, bias=False), TrainSpec(12, batch=4, learning_rate=0.1)
    unused = torch.nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(torch.arange(8.0).view(2, 4) / 8)
    generator = torch.Generator().manual_seed(1)
    trainer = Trainer(torch.nn.ModuleList([model, unused]), spec, generator, session.ranks)
    begun = trainer.load(session.checkpoint / "fit.pt")["at"] if session.checkpoint else 0

    def backward(rows: Tensor) -> Tensor:
        loss = (model(rows[:, :4]) - rows[:, 4:]).square().mean()
        loss.backward()
        return loss.detach()

    batches = (torch.randn(4, 6, generator=generator) for _ in range(spec.steps))
    losses = []
    for step, loss in trainer.run(batches, backward):
        losses.append(loss)
        if step == 6 and session.leads:
            part = session.folder / "part"
            part.mkdir()
            trainer.write(part / "fit.pt", at=step)
            session.keep(part)
        if step == 9 and settings.get("fails") == session.ranks.rank:
            raise MemoryError(f"of rank {session.ranks.rank}")
        once = session.folder / "died"
        if step == 9 and settings["kill"] and not session.leads and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return {"begun": begun, "loss": losses[-1], "weights": model.weight.tolist(), "bias": unused.bias.sum().item()}


def test_a_training_goes_on_from_its_checkpoint_when_one_of_its_workers_is_killed(tmp_path: Path) -> None:
    failing = [Job(f"fails-{rank}", {"kill": False, "fails": rank}) for rank in (0, 1)]
    jobs = [Job("whole", {"kill": False}), Job("killed", {"kill": True}), *failing]
    done = train_all(jobs, regression, tmp_path / "together", TOGETHER)
    alone = train_all(jobs[:1], regression, tmp_path / "alone", RunSpec(workers=0))["whole"]
    assert not isinstance(alone, Failure)
    for key, begun in (("whole", 0), ("killed", 6)):
        one = done[key]
        assert not isinstance(one, Failure), one
        assert one["begun"] == begun
        assert one["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        torch.testing.assert_close(torch.tensor(one["weights"]), torch.tensor(alone["weights"]), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "together" / "killed" / "died").exists()
    for rank in (0, 1):  # whoever failed says why, and not whoever waited for it
        failed = done[f"fails-{rank}"]
        assert isinstance(failed, Failure)
        assert failed.reason == f"out of memory: of rank {rank}"


def gradients(settings: dict[str, Any], session: Session) -> dict[str, Any]:
    """Of two steps: of a dense model on the text, and of a supernet that is distilled from one."""
    net, teacher, rows, space = (settings[name] for name in ("net", "teacher", "rows", "space"))
    spec, found = TrainSpec(1, batch=4, seq=8, autocast=False), dict[str, Any]()
    draw = STRATEGIES["sandwich"](space, MemorySpec(64))
    steps = {
        "dense": plain_backward(net.subnet(SharingConfig.dense(net.shape)), spec),
        "supernet": SupernetStep(net, spec, draw, SubnetRandom("0"), teacher),
    }
    for name, backward in steps.items():
        net.zero_grad(set_to_none=True)
        loss = session.ranks.average(net, backward(session.ranks.part(rows)))
        grads = {key: p.grad.flatten().tolist() for key, p in net.named_parameters() if p.grad is not None}
        found[name] = {"loss": [loss.item()], **grads}
    return found


def test_two_workers_at_half_of_the_batch_have_the_gradients_of_one(tmp_path: Path) -> None:
    space = SearchSpace.from_document(parse_yaml(str({"choices": {"tie": {"sources": "previous"}}}), "space"), SHAPE)
    teacher = tiny.supernet(SHAPE, seed=1).subnet(SharingConfig.dense(SHAPE))
    net, rows = tiny.supernet(SHAPE).requires_grad_(True), tiny.tokens(SHAPE, 4, 9)
    job = [Job("gradients", {"net": net, "teacher": teacher, "rows": rows, "space": space})]
    both = train_all(job, gradients, tmp_path / "both", TOGETHER)["gradients"]
    alone = train_all(job, gradients, tmp_path / "alone", RunSpec(workers=0))["gradients"]
    assert not isinstance(alone, Failure)
    assert not isinstance(both, Failure), both
    for name, found in alone.items():
        assert both[name].keys() == found.keys()
        assert len(found) > 10
        for key, values in found.items():
            torch.testing.assert_close(torch.tensor(both[name][key]), torch.tensor(values), rtol=1e-4, atol=1e-6)


FLOAT32 = {"autocast": False}
TRIAL = FROM | {
    "from": None,
    "dense": {"steps": 6, "batch": 4, "seq": 16, **FLOAT32},
    "space": {"model": plain(SHAPE), **FROM["space"]},
    "supernet": {**SUPERNET["supernet"], "batch": 4, "strategy": "sandwich", **FLOAT32},
    "final": {**SUPERNET["final"], "batch": 4, "presets": False, **FLOAT32},
    "search": {"evaluations": 12, "batch": 6},
}


def cuts(run: Run) -> list[Any]:
    """Where the supernet was split, and how."""
    split = run.read_json("split-1.json")["tree"]["split"]
    return [split["decision"], split["groups"]]


@pytest.mark.slow
def test_every_stage_of_a_search_is_trained_by_two_workers_together(tmp_path: Path) -> None:
    """The dense model, a supernet that is distilled from it, before and after it is split, and the models of the front. Their
    losses are those of one worker but for rounding, which the optimizer enlarges where gradients are near zero."""
    alone, front = search(tmp_path, TRIAL, name="alone")
    both, other = search(tmp_path, TRIAL, name="both", run=plain(TOGETHER))
    assert cuts(both) == cuts(alone)
    found = {e.config: e.losses.loss_nats_per_token for e in other.evaluations}
    for e in front.evaluations:
        assert found[e.config] == pytest.approx(e.losses.loss_nats_per_token, rel=1e-2)


def test_batches_that_cannot_be_divided_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "trial.yaml"
    path.write_text(yaml.safe_dump(TRIAL | {"run": plain(RunSpec(workers=3, workers_per_training=3))}))
    refused(lambda: check_unread(Trial.load(path)), "batch of 4 is not divisible among 3 workers")
    refused(lambda: RunSpec(workers=1, workers_per_training=2), "2 are more than the 1 workers")
    with pytest.raises(ValueError, match="not divisible"):
        Ranks(0, 2).part(torch.zeros(3, 2))
