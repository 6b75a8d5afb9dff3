"""Laws of the supernet: a subnet is a value made of its Parameters, and shared weights learn from all their uses."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from nas.evaluate import measure_losses, window_losses
from nas.model import SLOTS, Decoder, LayerPlan, Plan
from nas.shape import ModelShape
from nas.sharing import SharingConfig
from nas.supernet import Supernet, mean_heads, standalone, weights_of
from nas.training import TrainSpec, make_optimizer

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
    window_losses(net.bank, tiny.tokens(shape)).mean().backward()
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


def untied(plan: Plan) -> Plan:
    """Every layer its own copy of each weight it uses; who reads whose KV stays."""
    layers = enumerate(plan.layers)
    return Plan(tuple(LayerPlan(tuple(None if o is None else i for o in p.owners), p.kv, p.kv_heads) for i, p in layers))


def copies(model: Decoder) -> Decoder:
    """The same function with every tie undone."""
    alone, weights = Decoder(model.shape, untied(model.plan)), weights_of(model)
    uses = {f"layers.{i}.{slot}.weight": p.owner(slot) for i, p in enumerate(model.plan.layers) for slot in SLOTS}
    state = {name: weights[_owned(name, uses.get(name))] for name in alone.state_dict()}
    alone.load_state_dict(state)
    return alone


def _owned(name: str, owner: int | None) -> str:
    return name if owner is None else ".".join(["layers", str(owner), *name.split(".")[2:]])


def grads(model: nn.Module, decoder: Decoder, rows: Tensor) -> dict[str, Tensor]:
    window_losses(decoder, rows, autocast=False).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@SHAPES
def test_a_shared_weights_gradient_is_the_sum_over_its_copies(shape: ModelShape) -> None:
    rows = tiny.tokens(shape, seq=6)
    for config in tiny.configs(shape):
        net = tiny.supernet(shape)
        subnet = net.subnet(config)
        plan, alone, apart = subnet.plan, standalone(subnet), copies(subnet)
        torch.testing.assert_close(tiny.logits(apart, rows), tiny.logits(alone, rows))
        shared, single = grads(alone, alone, rows), grads(apart, apart, rows)
        for name, grad in shared.items():
            part, slot = name.split(".")[0], ".".join(name.split(".")[2:-1])
            users = [i for i, p in enumerate(plan.layers) if part == "layers" and p.owner(slot) == int(name.split(".")[1])]
            uses = [single[f"layers.{i}.{slot}.weight"] for i in users] or [single[name]]
            torch.testing.assert_close(grad, torch.stack(uses).sum(0), rtol=1e-4, atol=1e-6)
        inherited = {name.removeprefix("bank."): grad for name, grad in grads(net, subnet, rows).items()}
        assert inherited.keys() == shared.keys()
        for name, grad in inherited.items():
            groups = len(grad) // len(shared[name])  # of a mean over heads, each gets its part
            spread = shared[name].unflatten(0, (-1, shape.head_dim)).repeat_interleave(groups, 0).flatten(0, 1) / groups
            torch.testing.assert_close(grad, shared[name] if groups == 1 else spread, rtol=1e-4, atol=1e-6)


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
    window_losses(subnet, tiny.tokens(tiny.MHA)).mean().backward()
    optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    unused = {"layers.1.mlp", "layers.1.self_attn", "layers.2.self_attn.k_proj", "layers.2.self_attn.v_proj"}
    assert moved == {name for name in before if not any(part in name for part in unused)}


def test_fewer_heads_are_the_true_mean_of_their_groups() -> None:
    weight = torch.arange(4 * 2 * 3, dtype=torch.float32).view(8, 3)  # 4 heads of 2 rows
    for heads in (1, 2, 4):
        groups = weight.view(heads, 4 // heads, 2, 3)
        assert torch.equal(mean_heads(weight, heads, 2), groups.mean(1).view(-1, 3))
    assert torch.equal(mean_heads(weight, 4, 2), weight)


def test_two_supernets_of_one_seed_are_equal() -> None:
    one, other = (Supernet(replace(tiny.GQA), torch.Generator().manual_seed(7)).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
