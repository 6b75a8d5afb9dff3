"""Laws of the one forward: it is Llama's, it is the plainly written decoder's, and the cache changes nothing."""

from __future__ import annotations

import itertools

import pytest
import reference
import tiny
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from nas.model import SLOTS, Decoder, KVCache, Plan, attend, attend_plainly, causal_mask, init_weights, weight_shapes
from nas.shape import ModelShape
from nas.sharing import SharingConfig
from nas.supernet import dense_plan, standalone, weights_of

CASES = [
    pytest.param(shape, config, id=f"{name}-{config.hash}")
    for name, shape in tiny.SHAPES.items()
    for config in tiny.configs(shape)
]


@pytest.mark.parametrize("shape", tiny.SHAPES.values(), ids=tiny.SHAPES)
def test_the_dense_decoder_is_a_llama(shape: ModelShape) -> None:
    model = tiny.supernet(shape).bank
    llama = LlamaForCausalLM(
        LlamaConfig(
            **{name: getattr(shape, name) for name in ModelShape.__dataclass_fields__ if name != "rope_theta"},
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        )
    ).eval()
    state = {name if name.startswith("lm_head") else f"model.{name}": value for name, value in model.state_dict().items()}
    missing = llama.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if shape.tie_word_embeddings else [])
    rows = tiny.tokens(shape, seq=40)
    with torch.no_grad():
        torch.testing.assert_close(model(rows), llama(rows).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "config"), CASES)
def test_subnet_standalone_and_reference_agree(shape: ModelShape, config: SharingConfig) -> None:
    net, rows = tiny.supernet(shape), tiny.tokens(shape)
    subnet = net.subnet(config)
    found = tiny.logits(subnet, rows)
    torch.testing.assert_close(tiny.logits(standalone(subnet), rows), found)
    choices = [dict(layer) for layer in config.layers]
    expected = reference.logits(shape, choices, config.norms, net.bank.state_dict(), rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "config"), CASES)
def test_a_state_dict_has_each_owned_weight_once(shape: ModelShape, config: SharingConfig) -> None:
    plan = config.resolve(shape)
    model = Decoder(shape, plan)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == weight_shapes(shape, plan)
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == list(weight_shapes(shape, plan))
    used = {f"layers.{owner}.{slot}.weight" for p in plan.layers for slot in SLOTS if (owner := p.owner(slot)) is not None}
    assert used == {name for name in weight_shapes(shape, plan) if name.startswith("layers.")}


@pytest.mark.parametrize(("shape", "config"), CASES)
def test_a_plan_survives_json_data(shape: ModelShape, config: SharingConfig) -> None:
    plan = config.resolve(shape)
    assert Plan.from_data(plan.to_data()) == plan


@pytest.mark.parametrize("chunks", [[1] * 7, [4, 3], [4, 1, 2]], ids=str)
@pytest.mark.parametrize("shape", [tiny.MHA, tiny.SHAPES["six-layers-gqa"]], ids=["mha", "gqa"])
def test_cached_decoding_is_the_full_forward(shape: ModelShape, chunks: list[int]) -> None:
    net, rows = tiny.supernet(shape), tiny.tokens(shape)
    ends = list(itertools.accumulate(chunks))
    for config in tiny.configs(shape):
        model, cache = net.subnet(config), KVCache()
        parts = []
        for start, end in zip([0, *ends], ends, strict=False):
            assert cache.length == start
            with torch.no_grad():
                parts.append(model(rows[:, start:end], cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), tiny.logits(model, rows), rtol=1e-4, atol=1e-4)
        assert sorted(cache.tensors) == config.resolve(shape).kv_owners


@pytest.mark.parametrize("shape", [tiny.MHA, tiny.GQA], ids=["mha", "gqa"])
def test_left_padding_changes_nothing(shape: ModelShape) -> None:
    """Two prompts of different lengths in one batch, padded on the left, then one more token of each from the cache."""
    net, pad = tiny.supernet(shape), 3
    long, short = tiny.tokens(shape, 1, 8), tiny.tokens(shape, 1, 8 - pad, seed=1)
    rows = torch.cat([long, F.pad(short, (pad, 0))])
    real = torch.tensor([[True] * 8, [False] * pad + [True] * (8 - pad)])
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    mask = causal_mask(8, 8, rows.device)[None, None] & (real[:, None, None, :] | torch.eye(8, dtype=torch.bool))
    for config in tiny.configs(shape):
        model, cache = net.subnet(config), KVCache()
        with torch.no_grad():
            padded = model(rows[:, :7], positions[:, :7], mask[:, :, :7, :7], cache)
            last = model(rows[:, 7:], positions[:, 7:], mask[:, :, 7:], cache)
        both = torch.cat([padded, last], 1)
        torch.testing.assert_close(both[:1], tiny.logits(model, long), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both[1:, pad:], tiny.logits(model, short), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads", "seq"), [(4, 4, 7), (4, 2, 7), (6, 2, 5), (4, 1, 1)])
def test_plain_and_fused_attention_agree(heads: int, kv_heads: int, seq: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, seq, 8, generator=generator, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    plain, fused = attend_plainly(q, k, v), attend(q, k, v, None)
    torch.testing.assert_close(plain, fused)
    upstream = torch.randn(plain.shape, generator=generator)
    grads = [torch.autograd.grad(out, (q, k, v), upstream) for out in (plain, fused)]
    torch.testing.assert_close(*grads)


def test_training_in_bfloat16_computes_what_evaluation_does() -> None:
    """With autograd on, attention may take another road; it must lead to the same place."""
    model, rows = tiny.supernet(tiny.GQA).bank, tiny.tokens(tiny.GQA, seq=40)
    with torch.autocast("cpu", torch.bfloat16):
        trained = model(rows)
        torch.testing.assert_close(trained.detach(), tiny.logits(model, rows), rtol=0.05, atol=0.15)
    assert trained.requires_grad


def test_residual_projections_start_smaller_by_the_executed_depth() -> None:
    shape = ModelShape(vocab_size=64, hidden_size=128, num_hidden_layers=8, num_attention_heads=4, intermediate_size=256)
    looped = SharingConfig.make(shape, [{"tie": 0} if i else {} for i in range(8)])
    for plan in (dense_plan(shape), looped.resolve(shape)):
        weights = init_weights(Decoder(shape, plan), torch.Generator().manual_seed(0)).state_dict()
        assert weights["layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
        for slot in ("self_attn.o_proj", "mlp.down_proj"):
            assert weights[f"layers.0.{slot}.weight"].std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05)
        assert all((value == 1).all() for value in weights.values() if value.ndim == 1)


def test_a_view_is_copied_as_the_weight_it_computes() -> None:
    shape = tiny.MHA
    net = tiny.supernet(shape)
    subnet = net.subnet(SharingConfig.make(shape, [{"kv_heads": 1}] * 4))
    copied = weights_of(subnet)
    assert set(copied) == set(weight_shapes(shape, subnet.plan))
    full = net.bank.state_dict()["layers.2.self_attn.k_proj.weight"]
    torch.testing.assert_close(copied["layers.2.self_attn.k_proj.weight"], sum(full.split(8)) / 4)
