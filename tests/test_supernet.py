"""Laws of the supernet: a subnet is a value made of its Parameters, and shared weights learn from all their uses."""

from __future__ import annotations

import random

import numpy as np
import pytest
import reference
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.model.supernet import Supernet, mean_heads, standalone
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.training.evaluation import measure_losses, sequence_losses
from nas.training.loop import TrainSpec, make_optimizer

SHAPES = pytest.mark.parametrize("shape", [tiny.MHA, tiny.SHAPES["six-layers-gqa"]], ids=["mha", "gqa"])


def everything(net: Supernet) -> dict[str, object]:
    """All that an evaluation could disturb."""
    python, numbers = random.getstate(), np.random.get_state()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return {
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "grads": grads,
        "modules": [name for name, _ in net.named_modules(remove_duplicate=False)],
        "modes": [module.training for module in net.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()],
        "torch": torch.get_rng_state(),
        "random": (python, [part.tolist() if isinstance(part, np.ndarray) else part for part in numbers]),
    }


@pytest.mark.parametrize("autocast", [True, False])
@SHAPES
def test_evaluating_leaves_the_supernet_bitwise_unchanged(shape: ModelShape, autocast: bool) -> None:
    net = tiny.supernet(shape)
    sequence_losses(net.bank, tiny.tokens(shape)).mean().backward()
    before = everything(net)
    for config in tiny.configs(shape):
        measure_losses(net.subnet(config), tiny.tokens(shape, 3), batch=2, autocast=autocast)
    after = everything(net)
    for kind in ("weights", "grads"):
        assert before[kind].keys() == after[kind].keys()
        assert all(torch.equal(before[kind][name], after[kind][name]) for name in before[kind])
    assert torch.equal(before["torch"], after["torch"])
    assert all(before[kind] == after[kind] for kind in ("modules", "modes", "hooks", "random"))


@SHAPES
def test_a_subnet_holds_the_supernets_own_parameters(shape: ModelShape) -> None:
    net = tiny.supernet(shape)
    own = {id(p) for p in net.parameters()}
    for config in tiny.configs(shape):
        subnet = net.subnet(config)
        assert {id(p) for p in subnet.parameters()} <= own
        assert not own & {id(p) for p in standalone(subnet).parameters()}
        assert not list(subnet.buffers())


def plain_gradients(net: Supernet, config: SharingConfig, rows: Tensor) -> dict[str, Tensor]:
    """Of the bank's weights, by the plain decoder, which computes with a copy of a weight for each use of it."""
    bank = {name: p.detach().double().requires_grad_() for name, p in net.bank.named_parameters()}
    choices = [dict(layer) for layer in config.layers]
    logits = reference.logits(net.shape, choices, dict(config.model_choices), bank, rows[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    grads = torch.autograd.grad(loss, list(bank.values()), allow_unused=True)
    return {name: grad for name, grad in zip(bank, grads, strict=True) if grad is not None}


@SHAPES
def test_a_shared_weights_gradient_is_the_sum_over_its_copies(shape: ModelShape) -> None:
    """Where layers read a later one, of two tokens: the passes that have gradients reach back no further."""
    net = tiny.supernet(shape)
    for config in tiny.configs(shape)[:: 1 if shape == tiny.MHA else 2]:
        subnet = net.subnet(config)
        rows = tiny.tokens(shape, 1, 3 if subnet.plan.fixed_point_layers else 6)
        net.zero_grad()
        sequence_losses(subnet, rows, autocast=False).mean().backward()
        found = {name: p.grad for name, p in net.bank.named_parameters() if p.grad is not None}
        expected = plain_gradients(net, config, rows)
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name].double(), grad, rtol=1e-3, atol=1e-5, msg=f"{name} in {config}")


@SHAPES
def test_clipping_and_the_optimizer_see_each_parameter_once(shape: ModelShape) -> None:
    net = tiny.supernet(shape)
    for config in tiny.configs(shape):
        subnet = net.subnet(config)
        optimizer = make_optimizer(subnet, TrainSpec(steps=1))
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len({id(p) for p in held}) == len(list(subnet.parameters()))
        for p in held:
            p.grad = torch.ones_like(p)
        norm = nn.utils.clip_grad_norm_(subnet.parameters(), 1.0)
        assert norm.item() == pytest.approx(sum(p.numel() for p in held) ** 0.5, rel=1e-5)
        assert sum(p.grad.square().sum() for p in held).item() == pytest.approx(1.0, rel=1e-3)


def test_training_a_subnet_trains_the_supernet() -> None:
    net = tiny.supernet(tiny.MHA)
    subnet = net.subnet(SharingConfig.make(tiny.MHA, [{"kv_heads": 2}, {"tie": 0}, {"kv": 0}, {}]))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = make_optimizer(subnet, TrainSpec(steps=1))
    sequence_losses(subnet, tiny.tokens(tiny.MHA)).mean().backward()
    optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    dense = {name for name, _ in Supernet(tiny.MHA, torch.Generator()).named_parameters()}
    unused = {"layers.1.mlp", "layers.1.self_attn", "layers.2.self_attn.k_proj", "layers.2.self_attn.v_proj"}
    assert moved == {name for name in dense if not any(part in name for part in unused)}


def test_fewer_heads_are_the_true_mean_of_their_groups() -> None:
    weight = torch.arange(4 * 2 * 3, dtype=torch.float32).view(8, 3)  # 4 heads of 2 rows
    for heads in (1, 2, 4):
        groups = weight.view(heads, 4 // heads, 2, 3)
        assert torch.equal(mean_heads(weight, heads, 2), groups.mean(1).view(-1, 3))
    assert torch.equal(mean_heads(weight, 4, 2), weight)
