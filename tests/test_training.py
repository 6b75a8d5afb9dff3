"""Laws of evaluating and training: numbers that a hand can check, a stop that changes nothing, and rules that keep their word."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.data import train_batches
from nas.model.supernet import Supernet
from nas.sharing.label import label
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace
from nas.training.evaluation import PIECE, Evaluation, Losses, NotFinite, measure_losses, sequence_losses, token_losses
from nas.training.loop import Trainer, TrainSpec, learning_rate_at, make_optimizer, plain_backward
from nas.training.strategies import STRATEGIES, SubnetRandom, SupernetStep
from reports.ground_truth.training import WeightAverage

SHAPE = tiny.MHA
MEMORY = MemorySpec(context=64)
SPEC = TrainSpec(steps=6, batch=2, seq=8, learning_rate=1e-2, warmup=0.3, autocast=False)


# --- evaluating


def test_losses_by_hand() -> None:
    model, windows = tiny.supernet(SHAPE).bank, tiny.tokens(SHAPE, 5, 9)
    rows = []
    for window in windows:
        chances = tiny.logits(model, window[None, :-1])[0].double().softmax(-1)
        rows.append(sum(-math.log(chances[t, window[t + 1]].item()) for t in range(8)) / 8)
    losses = measure_losses(model, windows, batch=2, autocast=False)
    mean = sum(rows) / 5
    error = math.sqrt(sum((row - mean) ** 2 for row in rows) / 4) / math.sqrt(5)
    assert losses.loss_nats_per_token == pytest.approx(mean, rel=1e-5)
    assert losses.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert losses.perplexity_standard_error == pytest.approx(math.exp(mean) * error, rel=1e-4)

    for batch in (1, 5, 16):
        other = measure_losses(model, windows, batch, autocast=False)
        assert other.loss_nats_per_token == pytest.approx(losses.loss_nats_per_token, rel=1e-6)


def test_a_loss_that_is_not_finite_is_a_failure() -> None:
    net = tiny.supernet(SHAPE)
    for bad in (math.nan, math.inf):
        with torch.no_grad():
            net.bank.norm.weight[0] = bad
        with pytest.raises(NotFinite, match="over 2 evaluation sequences"):
            measure_losses(net.bank, tiny.tokens(SHAPE))


def test_an_evaluation_survives_json() -> None:
    for config in tiny.configs(SHAPE):
        before = Evaluation(
            config=config,
            memory=measure(SHAPE, config, MEMORY),
            losses=Losses(1.5, math.exp(1.5), 0.1),
            bits_per_byte=2.1,
            weights="inherited",
            seed=3,
            tokens=1000,
            seconds=0.25,
            number=7,
            supernet="0-1",
        )
        assert Evaluation.from_data(SHAPE, json.loads(json.dumps(before.to_data()))) == before
        assert before.point == (before.memory.memory_bytes, math.exp(1.5))
        assert (before.label, replace(before, name="cla-2").label) == (label(config), "cla-2")


# --- learning rates and settings


def test_the_learning_rate_rises_then_decays_to_a_tenth_over_the_last_part() -> None:
    whole, late, never = (TrainSpec(steps=200, learning_rate=0.5, warmup=0.1, lr_decay_fraction=part) for part in (1, 0.25, 0))
    rates = [learning_rate_at(whole, step) for step in range(200)]
    assert rates[:20] == pytest.approx([0.5 * (n + 1) / 20 for n in range(20)])
    assert rates[20] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0.5 * 0.55), "half way between all and a tenth"
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    rates = [learning_rate_at(late, step) for step in range(200)]
    assert rates[20:151] == pytest.approx([0.5] * 131)
    assert all(a > b for a, b in itertools.pairwise(rates[150:]))
    assert learning_rate_at(whole, 200) == pytest.approx(0.05) == learning_rate_at(late, 200)
    assert [learning_rate_at(never, step) for step in range(20, 200)] == pytest.approx([0.5] * 180)


def test_averages_are_the_means_of_the_weights_after_the_last_steps_before_each_point() -> None:
    model = nn.Linear(3, 2)
    averages, seen, found = WeightAverage(model, 0.5, [10, 4]), {}, {}
    for step in range(1, 13):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)))
        seen[step] = {name: weight.clone() for name, weight in model.state_dict().items()}
        mean = averages.step(step)
        if mean is not None:
            found[step] = mean
    assert found.keys() == {4, 10}
    for point, steps in {4: [3, 4], 10: [6, 7, 8, 9, 10]}.items():
        for name, mean in found[point].items():
            torch.testing.assert_close(mean, torch.stack([seen[step][name] for step in steps]).mean(0))


def test_norms_are_not_decayed() -> None:
    optimizer = make_optimizer(tiny.supernet(SHAPE), TrainSpec(steps=1, weight_decay=0.3))
    decay = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {3: 0.3, 2: 0.3, 1: 0.0}


# --- stopping and going on


def stream(generator: torch.Generator) -> Iterator[Tensor]:
    text = torch.randint(SHAPE.vocab_size, (500,), generator=torch.Generator().manual_seed(5))
    return train_batches(text, SPEC.batch, SPEC.seq, generator)


class Training:
    """A supernet, or a model alone, on its way; a second one can go on from its file."""

    def __init__(self, strategy: str | None) -> None:
        generator = torch.Generator().manual_seed(1)
        net, space = Supernet(SHAPE, generator), tiny.whole_space(SHAPE, tiny.FEW)
        self.fit = Trainer(net if strategy else net.bank, SPEC, generator)
        self.rng = SubnetRandom(2)
        draw = STRATEGIES[strategy or "uniform"](space, MEMORY)
        step = SupernetStep(net, SPEC, draw, self.rng, space.largest())
        self.backward = step if strategy else plain_backward(net.bank, SPEC)

    def until(self, step: int | None) -> list[float]:
        return [loss for _, loss in self.fit.run(stream(self.fit.generator), self.backward, step)]

    def resume(self, path: Path, strategy: str | None) -> Training:
        self.fit.save(path, rng=self.rng.getstate())
        other = Training(strategy)
        other.rng.setstate(other.fit.load(path)["rng"])
        return other


@pytest.mark.parametrize("strategy", [*STRATEGIES, None])
def test_a_training_that_was_stopped_is_bitwise_the_one_that_was_not(strategy: str | None, tmp_path: Path) -> None:
    whole, first = Training(strategy), Training(strategy)
    losses = whole.until(None)
    begun = first.until(3)
    second = first.resume(tmp_path / "deep" / "fit.pt", strategy)
    assert begun + second.until(None) == losses
    assert second.fit.step == SPEC.steps
    for one, other in ((whole.fit.model, second.fit.model), (whole.fit.optimizer, second.fit.optimizer)):
        assert_same(one.state_dict(), other.state_dict())
    assert torch.equal(whole.fit.generator.get_state(), second.fit.generator.get_state())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["fit.pt"]


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_until_is_a_step_even_if_it_is_the_first() -> None:
    training = Training(None)
    assert training.until(0) == []
    assert len(training.until(2)) == 2
    assert training.until(1) == []
    assert len(training.until(100)) == SPEC.steps - 2


def test_a_nan_stops_training_before_it_reaches_a_weight() -> None:
    net = tiny.supernet(SHAPE)
    fit = Trainer(net.bank, SPEC, torch.Generator())
    plain = plain_backward(net.bank, SPEC)

    def backward(rows: Tensor) -> float:
        loss = plain(rows)
        if fit.step == 2:
            net.bank.norm.weight.grad[0] = math.nan
        return loss

    run = fit.run(stream(torch.Generator()), backward)
    next(run)
    next(run)
    with pytest.raises(NotFinite, match="at step 2"):
        next(run)
    assert fit.step == 2
    assert all(p.isfinite().all() for p in net.parameters())


# --- sampling strategies


def small_spaces() -> list[SearchSpace]:
    rng = random.Random(0)
    return [tiny.whole_space(SHAPE, tiny.FEW), *(tiny.random_space(rng) for _ in range(10))]


def test_what_a_strategy_samples_follows_from_the_generator() -> None:
    for strategy, space in itertools.product(STRATEGIES, small_spaces()):
        one, other = (STRATEGIES[strategy](space, MEMORY) for _ in range(2))
        a, b = SubnetRandom(3), SubnetRandom(3)
        assert [one(a) for _ in range(5)] == [other(b) for _ in range(5)]
        assert all(space.encode(config) is not None for config in one(a))


def test_the_sandwich_has_both_ends() -> None:
    for space in small_spaces():
        draw, rng = STRATEGIES["sandwich"](space, MEMORY), SubnetRandom(0)
        sizes = space.size(MEMORY)
        for _ in range(5):
            drawn = draw(rng)
            assert len(drawn) == 4
            assert space.largest() in drawn
            assert min(measure(space.shape, config, MEMORY).memory_bytes for config in drawn) == sizes.least["memory_bytes"]


def test_fair_draws_every_option_as_often_as_any_other() -> None:
    for space in small_spaces():
        counts: dict[str, Counter[Any]] = defaultdict(Counter)
        watched = WatchedSpace(space.shape, space.options)
        draw, rng = STRATEGIES["fair"](watched, MEMORY), SubnetRandom(0)
        for _ in range(7):
            drawn = draw(rng)
            assert len(drawn) == max(map(len, space.options.values()), default=1)
            for name, option in watched.picked:
                counts[name][option] += 1
            watched.picked.clear()
            for name, count in counts.items():
                often = [count[option] for option in space.options[name]]
                assert max(often) - min(often) <= 1, name


class WatchedSpace(SearchSpace):
    """A space that writes down what is decided in it."""

    picked: list[tuple[str, Any]] = []  # noqa: RUF012

    def decode(self, pick: Any) -> Any:
        config, asked = super().decode(pick)
        self.picked.extend(asked.items())
        return config, asked


def test_limits_bind_what_is_drawn_at_random() -> None:
    space = tiny.whole_space(SHAPE, tiny.FEW)
    reach = space.size(MEMORY)
    limit = (reach.least["memory_bytes"] + reach.most["memory_bytes"]) // 2
    tight, rng = replace(space, limits={"memory_bytes": limit}), SubnetRandom(0)
    for strategy, few in (("uniform", slice(None)), ("sandwich", slice(1, None))):
        drawn = [config for _ in range(10) for config in STRATEGIES[strategy](tight, MEMORY)(rng)[few]]
        assert all(measure(SHAPE, config, MEMORY).memory_bytes <= limit for config in drawn)


def test_dense_biased_takes_what_shares_least_half_of_the_time() -> None:
    """Of a layer that may use any of three others, uniform draws leave its own weights a quarter of the steps."""
    space = tiny.whole_space(SHAPE, ["tie"])
    own = {}
    for strategy in ("uniform", "dense_biased"):
        draw, rng = STRATEGIES[strategy](space, MEMORY), SubnetRandom(0)
        decided = [space.encode(draw(rng)[0]) or {} for _ in range(800)]
        asked = [one["layer_3.tie"] for one in decided if "layer_3.tie" in one]
        own[strategy] = asked.count("own") / len(asked)
    assert own["uniform"] == pytest.approx(1 / 4, abs=0.06)
    assert own["dense_biased"] == pytest.approx(1 / 2 + 1 / 8, abs=0.06)


# --- one step of a supernet


def three_configs() -> list[SharingConfig]:
    some = ([{}] * 4, [{}, {"tie": 0}, {}, {}], [{}, {"kv": 0}, {}, {"kv_heads": 1}])
    return [SharingConfig.make(SHAPE, layers) for layers in some]


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_a_step_is_the_mean_of_its_subnets_with_repeats() -> None:
    configs, rows = three_configs(), tiny.tokens(SHAPE)
    for drawn in ([0, 1, 2], [1, 1, 2], [2]):
        step = SupernetStep(net := tiny.supernet(SHAPE), SPEC, lambda rng, d=drawn: [configs[n] for n in d], SubnetRandom())
        found = step(rows)
        assert step.subnets == len(set(drawn)), "one drawn twice is run once"
        other = tiny.supernet(SHAPE)
        check_step(found, net, other, [sequence_losses(other.subnet(configs[n]), rows, autocast=False).mean() for n in drawn])


def check_step(found: float, net: nn.Module, other: nn.Module, losses: list[Tensor]) -> None:
    """A step's loss and gradients are the mean's of the losses of another supernet with the same weights."""
    mean = torch.stack(losses).mean()
    mean.backward()
    assert found == pytest.approx(mean.item(), rel=1e-5)
    grads, expected = gradients(net), gradients(other)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


def test_a_teacher_learns_from_the_text_and_the_others_from_it() -> None:
    """The teacher, drawn or not and wherever it stands, learns from the text; the others from its probabilities."""
    configs, rows = three_configs(), tiny.tokens(SHAPE)
    for drawn in ([0, 1, 2], [1, 2], [2, 0, 1]):
        net, other = tiny.supernet(SHAPE), tiny.supernet(SHAPE)
        step = SupernetStep(net, SPEC, lambda rng, d=drawn: [configs[n] for n in d], SubnetRandom(), configs[0])
        logits = [other.subnet(config)(rows[:, :-1]) for config in configs]
        soft = logits[0].detach().softmax(-1)
        text = sequence_losses(other.subnet(configs[0]), rows, autocast=False).mean()
        check_step(step(rows), net, other, [text, *(-(soft * one.log_softmax(-1)).sum(-1).mean() for one in logits[1:])])


def test_a_teacher_that_is_a_model_teaches_every_subnet() -> None:
    configs, rows = three_configs(), tiny.tokens(SHAPE)
    net, other, teacher = tiny.supernet(SHAPE), tiny.supernet(SHAPE), tiny.supernet(SHAPE, seed=1).bank
    soft = tiny.logits(teacher, rows[:, :-1]).softmax(-1)
    step = SupernetStep(net, SPEC, lambda rng: configs, SubnetRandom(), teacher)
    logits = [other.subnet(config)(rows[:, :-1]) for config in configs]
    check_step(step(rows), net, other, [-(soft * one.log_softmax(-1)).sum(-1).mean() for one in logits])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
def test_the_loss_in_pieces_is_the_plain_cross_entropy(dtype: torch.dtype, soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient, too, which is rounded to the logits' dtype once."""
    monkeypatch.setitem(PIECE, "cpu", 100)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 5, 30, generator=generator)).to(dtype)
    target = torch.randn(3, 5, 30, generator=generator).softmax(-1) if soft else torch.randint(30, (3, 5), generator=generator)
    upstream = torch.rand(3, 5, generator=generator)
    found, plain = (logits.clone().requires_grad_() for _ in range(2))
    ours = token_losses(found, target)
    theirs = F.cross_entropy(plain.float().flatten(0, 1), target.flatten(0, 1), reduction="none").view(3, 5)
    torch.testing.assert_close(ours, theirs)
    (ours * upstream).sum().backward()
    (theirs * upstream).sum().backward()
    torch.testing.assert_close(found.grad, plain.grad, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)
    assert (found.grad != plain.grad).float().mean() < (1 if dtype == torch.float32 else 0.01)
