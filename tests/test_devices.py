"""Laws of where things are computed, tried without a GPU.

On torch's `meta` device a tensor that was made elsewhere is an error, and so is every stop at which the host waits for a value.
The one known stop is the test of the fixed-point pass whether keys and values still change, in evaluation and prefill alone.
What needs values (choosing a conversion, distances) is run on the CPU with `meta` as the default device: a tensor that is made
without naming the device of those it meets is an error then.
"""

import json
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nas.errors import UserError
from nas.model import decoder
from nas.model.attention import KVCache
from nas.model.decoder import Decoder
from nas.model.supernet import standalone
from nas.pretrained.conversions import METHODS, PretrainedModel, choose, convert, init_from_pretrained
from nas.pretrained.conversions.methods import align_heads, fine_tune
from nas.search.jobs import new_supernet
from nas.sharing.memory import MemorySpec
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace
from nas.splitting.gradients import gradient_of, inner_products
from nas.training.device import find_device
from nas.training.evaluation import losses_by_sequence, measure_losses
from nas.training.loop import Trainer, TrainSpec, distillation_backward, plain_backward
from nas.training.measured import filled_cache
from nas.training.strategies import STRATEGIES, SubnetRandom, SupernetStep
from nas.workers import executor
from nas.workers.cluster import share_gpus, share_trainings
from nas.workers.work import RunSpec

from . import gpu, tiny
from .gpu import covering

META = torch.device("meta")
SPEC = TrainSpec(steps=1, batch=2, seq=6, autocast=False)
SPACES = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_converged", lambda before, after: False)
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: nullcontext())  # it does not know `meta`


@contextmanager
def stray_tensors_on_meta() -> Iterator[None]:
    """A tensor that is made without a device is useless here."""
    with META:
        yield


def load_space(path: Path) -> SearchSpace:
    return SearchSpace.load(path, tiny.MHA)


def check_model(model: Decoder, rows: Tensor) -> None:
    """Forward, backward, cached decoding and evaluation."""
    assert plain_backward(model, SPEC)(rows).device == rows.device
    assert losses_by_sequence(model, rows, autocast=False).device == rows.device
    with torch.no_grad():
        cache = KVCache.of(model.plan)
        whole = torch.cat([model(part, cache=cache) for part in rows.split(3, 1)], 1)
        filled_cache(model, 12, 2)
    assert whole.device == rows.device


# ---- a model and a supernet


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("shapes", [[tiny.MHA, tiny.FAMILIES], pytest.param(list(tiny.SHAPES.values()), marks=pytest.mark.slow)])
def test_no_tensor_is_on_another_device_and_nothing_waits(shapes: list[ModelShape]) -> None:
    """Whatever the primitives; the longer list of shapes, of every config."""
    for shape in shapes:
        net, rows = tiny.supernet(shape).to(META), tiny.tokens(shape).to(META)
        every = len(shapes) > 2
        for config in tiny.configs(shape) if every else covering(tiny.configs(shape)):
            check_model(net.subnet(config), rows)
            if every:
                check_model(standalone(net.subnet(config)), rows)


@pytest.mark.usefixtures("on_meta")
def test_steps_and_splits_stay_on_the_device() -> None:
    check_steps(tiny.whole_space(tiny.MHA), ["dense_biased"])


@pytest.mark.slow
@pytest.mark.usefixtures("on_meta")
def test_steps_and_splits_of_every_space_stay_on_the_device() -> None:
    for path in SPACES:
        check_steps(load_space(path), STRATEGIES)


def check_steps(space: SearchSpace, strategies: Iterable[str]) -> None:
    """Steps of a supernet by all teachers, a distilled step of a model, and what splits compare."""
    net, rows = new_supernet(space, torch.Generator()).to(META), tiny.tokens(space.shape).to(META)
    teacher = Decoder(space.shape, SharingConfig.dense(space.shape).resolve(space.shape)).to(META)
    for strategy in strategies:
        draw, rng = STRATEGIES[strategy](space, MemorySpec()), SubnetRandom(0)
        for learned in (None, space.largest(), teacher):
            assert SupernetStep(net, SPEC, draw, rng, learned)(rows).device == META
    assert distillation_backward(net.bank, teacher, SPEC)(rows).device == META
    one, other = (gradient_of(net, config, rows) for config in (space.largest(), space.sample(random.Random(1))))
    assert inner_products(one, other).device == META


def test_a_stop_in_the_hot_loop_is_an_error_there() -> None:
    """The law can fail: its means are errors."""
    x = torch.ones(2, device=META)
    for stop in (lambda: x.sum().item(), lambda: torch.equal(x, x), lambda: x + torch.ones(2), lambda: bool(x[0] > 0)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            stop()
    with stray_tensors_on_meta(), pytest.raises(RuntimeError):
        torch.ones(2, device="cpu") + torch.zeros(2)


# ---- what needs values


@pytest.fixture(scope="module")
def dense() -> PretrainedModel:
    model = standalone(tiny.supernet(tiny.MHA).subnet(SharingConfig.dense(tiny.MHA)))
    return PretrainedModel(model.requires_grad_(False), tiny.tokens(tiny.MHA, batch=9))


@pytest.mark.parametrize("name", METHODS)
def test_conversions_are_made_where_the_model_lies(name: str, dense: PretrainedModel) -> None:
    method, generator = METHODS[name], torch.Generator().manual_seed(0)
    text = tiny.tokens(tiny.MHA, 1, 100)[0]
    with stray_tensors_on_meta():
        config = choose(method, dense, method.usual(dense.shape))
        for start in method.starts or ("",):
            model = convert(method, dense, config, start)
            assert {weight.device.type for weight in model.parameters()} == {"cpu"}
            assert measure_losses(model, dense.calibration, autocast=False).perplexity > 1
        list(fine_tune(standalone(model), SPEC, text, generator, dense.model))
        if method.penalty is not None:
            penalty, plan = method.penalty, config.resolve(dense.shape)
            trained = standalone(dense.model)
            list(align_heads(trained, lambda model: penalty(model, plan), SPEC, text, generator))


def test_conversions_whose_choice_needs_no_values_run_on_meta(dense: PretrainedModel) -> None:
    model = Decoder(dense.shape, dense.model.plan).to(META)
    there, made = PretrainedModel(model, dense.calibration), []
    for method in METHODS.values():
        try:
            config = choose(method, there, method.usual(dense.shape))
            converted = convert(method, there, config, method.read_start(None))
        except (NotImplementedError, RuntimeError):  # it has looked at a value
            continue
        assert {weight.device for weight in converted.parameters()} == {META}
        made.append(method.name)
    assert {"gqa", "mlkv", "basis", "sequence", "cycle", "relaxed-recursive"} <= set(made)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_supernets_start_where_they_lie(path: Path) -> None:
    space, rng = load_space(path), random.Random(0)
    net, rows = new_supernet(space, torch.Generator()), tiny.tokens(space.shape)
    dense = PretrainedModel(standalone(net.subnet(SharingConfig.dense(space.shape))).requires_grad_(False), rows)
    with stray_tensors_on_meta():
        init_from_pretrained(net, dense, narrow=True)
        losses = measure_losses(net.subnet(space.sample(rng)), rows, autocast=False)
    assert losses.perplexity > 1


def test_a_training_takes_its_batches_to_the_models_device(dense: PretrainedModel) -> None:
    model = standalone(dense.model)
    seen: list[torch.device] = []

    def backward(rows: Tensor) -> Tensor:
        seen.append(rows.device)
        return torch.zeros((), device=rows.device)

    list(Trainer(model, SPEC, torch.Generator()).run(iter([tiny.tokens(tiny.MHA)]), backward))
    trainer = Trainer(model, SPEC, torch.Generator())
    model.to(META)
    with pytest.raises(RuntimeError):  # the loop itself waits for the loss
        list(trainer.run(iter([tiny.tokens(tiny.MHA)]), backward))
    assert seen == [torch.device("cpu"), META]


# ---- which device


def test_a_device_is_found_or_refused_in_one_line() -> None:
    assert find_device("cpu") == torch.device("cpu")
    gpu = torch.cuda.is_available()
    assert find_device().type == ("cuda" if gpu else "cpu")
    wrong = {"gpu": "is no device", "cuda:x": "is no device", "CPU": "is no device", "cuda:99": "is not there"}
    for name, message in wrong.items():
        with pytest.raises(UserError, match=message) as error:
            find_device(name)
        assert error.value.where == "device"


def test_workers_share_the_gpus_that_there_are() -> None:
    for workers, nodes, share in (
        (2, [{"CPU": 4.0}], 0),
        (2, [{"CPU": 4.0, "GPU": 2.0}], 1),
        (2, [{"CPU": 4.0, "GPU": 8.0}], 1),
        (4, [{"CPU": 8.0, "GPU": 1.0}], 0.25),
        (3, [{"CPU": 8.0, "GPU": 1.0}], 0.3333),
        (5, [{"CPU": 8.0, "GPU": 2.0}], 0.3333),
        (4, [{"CPU": 8.0}, {"CPU": 2.0, "GPU": 2.0}], 1),  # two processors beside the GPUs: two workers, whatever the part
        (2, [{"GPU": 1.0}], 0),  # no processor beside it
    ):
        assert share_gpus(RunSpec(workers=workers), nodes) == share
        assert share_gpus(RunSpec(workers=workers, gpus_per_worker=0.5), nodes) == 0.5


def test_workers_share_a_training_where_gpus_would_be_idle() -> None:
    there = [{"CPU": 16.0, "GPU": 8.0}] * 2
    for workers, trainings, batch, size in (
        (16, 1, 32, 16),
        (16, 3, 60, 5),
        (16, 3, 32, 4),  # 5 do not divide it
        (16, 40, 32, 1),
        (64, 1, 64, 16),  # no worker has a part of a GPU
        (2, 1, 32, 2),
        (16, 1, 1, 1),
    ):
        spec = RunSpec(workers=workers, workers_per_training="auto")
        found = share_trainings(spec, there, trainings, batch)
        assert found == size
        placed = spec.for_trainings(trainings, found)
        assert share_gpus(placed, there) == 1 or found == 1
        assert placed.together == found
    auto = RunSpec(workers=16, workers_per_training="auto")
    assert share_trainings(auto, [{"CPU": 64.0}], 1, 32) == 1
    assert share_trainings(replace(auto, gpus_per_worker=0.5), there, 1, 32) == 1
    assert share_trainings(replace(auto, gpus_per_worker=4.0), there, 1, 32) == 4
    assert share_trainings(replace(auto, workers_per_training=2), [{"CPU": 64.0}], 1, 32) == 2
    with executor(replace(auto, workers=0)) as work:
        assert work.together(1, 32) == 1


def test_the_script_for_gpus_runs_on_a_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == len(capsys.readouterr().out.splitlines()) - 4
    assert sum(row["holds"] is True for row in rows) >= 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "off", lambda found, expected: 1.0)
        patch.setattr(gpu, "covering", lambda configs: configs[:1])
        assert gpu.main(["--device", "cpu", "--parts", "laws"]) == 1, "a law that does not hold is told"
