"""Laws of the one forward, and of the supernet.

The forward is Llama's, it is the plainly written decoder's, and the cache changes nothing. A subnet is a value made of the
supernet's Parameters, and shared weights learn from all their uses. Memory in closed form is the bytes of the tensors.
"""

import json
import random
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import reference
import tiny
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from nas.errors import UserError
from nas.model import decoder
from nas.model.attention import KVCache, attend, attend_plainly, sliding_mask
from nas.model.decoder import Decoder, init_weights
from nas.model.supernet import Supernet, standalone
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.plan import Plan, weight_shapes
from nas.sharing.shape import DTYPE_BYTES, ModelShape, RotaryScaling
from nas.sharing.sharing_config import SharingConfig
from nas.training.evaluation import measure_losses, sequence_losses
from nas.training.loop import TrainSpec, make_optimizer

SHAPES = pytest.mark.parametrize("shape", tiny.SHAPES.values(), ids=tiny.SHAPES)
TWO_SHAPES = pytest.mark.parametrize("shape", [tiny.MHA, tiny.SHAPES["six-layers-gqa"]], ids=["mha", "gqa"])


@lru_cache
def bank(shape: ModelShape) -> Supernet:
    """A supernet that no test here changes."""
    return tiny.supernet(shape)


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
REST = ("intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
TINY, PLAIN = tiny.GQA, [shape for shape in tiny.SHAPES.values() if shape != tiny.FAMILIES]
SLOW = RotaryScaling("llama3", factor=8.0, original_max_position_embeddings=16)
OF_FAMILIES = {
    **{f"llama-{n}": ("Llama", shape) for n, shape in enumerate(PLAIN)},
    "llama-3.1": ("Llama", replace(TINY, rotary_scaling=SLOW)),
    "llama-linear": ("Llama", replace(TINY, rotary_scaling=RotaryScaling("linear", factor=2.0))),
    "mistral": ("Mistral", TINY),
    "qwen2": ("Qwen2", replace(TINY, attention_bias=True)),
    "qwen3": ("Qwen3", replace(TINY, qk_norm=True, head_dim=16)),
    "llama-gelu": ("Llama", replace(TINY, hidden_act="gelu")),
    "gemma": ("Gemma", replace(tiny.MHA, num_key_value_heads=1, hidden_act="gelu_tanh", embedding_multiplier=32**0.5)),
}


def of_family(name: str, shape: ModelShape) -> PreTrainedModel:
    """Transformers' own model of a shape."""
    scaling = {} if shape.rotary_scaling is None else asdict(shape.rotary_scaling)
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta} | scaling
    sizes = {size: getattr(shape, size) for size in (*SIZES, *REST)}
    act = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[shape.hidden_act]
    config = getattr(transformers, f"{name}Config")(**sizes, hidden_act=act, rope_parameters=rope)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("case", OF_FAMILIES)
def test_the_dense_decoder_is_each_familys(case: str) -> None:
    family, shape = OF_FAMILIES[case]
    model = standalone(bank(shape).subnet(SharingConfig.make(shape, [{}] * shape.num_hidden_layers)))
    theirs = of_family(family, shape)
    state = {}
    for name, weight in model.state_dict().items():
        its = (name if name.startswith("lm_head") else f"model.{name}").replace("_bias.weight", "_proj.bias")
        state[its] = weight - 1 if family == "Gemma" and its.endswith("norm.weight") else weight
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if shape.tie_word_embeddings else [])
    rows = tiny.tokens(shape, seq=40)
    with torch.no_grad():
        torch.testing.assert_close(model(rows), theirs(rows).logits, rtol=1e-5, atol=1e-5)


def plainly(shape: ModelShape, config: SharingConfig, rows: Tensor) -> Tensor:
    choices, whole = [dict(layer) for layer in config.layers], dict(config.model_choices)
    return reference.logits(shape, choices, whole, bank(shape).bank.state_dict(), rows)


@SHAPES
def test_subnet_standalone_and_reference_agree(shape: ModelShape) -> None:
    rows = tiny.tokens(shape)
    for config in tiny.configs(shape):
        subnet = bank(shape).subnet(config)
        found = tiny.logits(subnet, rows)
        torch.testing.assert_close(tiny.logits(standalone(subnet), rows), found)
        torch.testing.assert_close(found[:1].double(), plainly(shape, config, rows[:1]), rtol=1e-4, atol=1e-4, msg=str(config))


@SHAPES
def test_every_owned_weight_is_in_the_state_dict_once_and_is_used(shape: ModelShape) -> None:
    rows = tiny.tokens(shape)
    for config in tiny.configs(shape):
        plan = config.resolve(shape)
        assert Plan.from_data(json.loads(json.dumps(plan.to_data()))) == plan
        model = standalone(bank(shape).subnet(config))
        assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == weight_shapes(shape, plan)
        assert len(list(model.named_parameters(remove_duplicate=False))) == len(weight_shapes(shape, plan))
        model(rows).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == [], config


CHUNKS = [[4, 3], [4, 1, 2], [1, 6], [2, 5], [6, 1]]


@TWO_SHAPES
def test_cached_decoding_is_the_full_forward(shape: ModelShape) -> None:
    """Token by token, and in chunks; also past the end of a window, and where layers read a later one."""
    net, rows = bank(shape), tiny.tokens(shape)
    for n, config in enumerate(tiny.configs(shape)):
        model, plan = net.subnet(config), config.resolve(shape)
        whole = tiny.logits(model, rows)
        for chunks in ([1] * 7, CHUNKS[n % len(CHUNKS)]):
            cache, parts = KVCache.of(plan), []
            for chunk in rows.split(chunks, 1):
                assert cache.length == sum(part.shape[1] for part in parts)
                with torch.no_grad():
                    parts.append(model(chunk, cache=cache))
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
            assert sorted(cache.tensors) == plan.kv_owners


def test_both_roads_to_experts_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow experts all run, with a gate of zero for most; wide ones gather their tokens."""
    net, rows = bank(tiny.MHA), tiny.tokens(tiny.MHA)
    found = [config for config in tiny.configs(tiny.MHA) if any("experts" in dict(layer) for layer in config.layers)]
    assert found
    narrow = [tiny.logits(net.subnet(config), rows) for config in found]
    monkeypatch.setattr(decoder, "SPARSE_FROM", 0)
    for config, expected in zip(found, narrow, strict=True):
        torch.testing.assert_close(tiny.logits(net.subnet(config), rows), expected, rtol=1e-4, atol=1e-4)


def test_the_two_implementations_of_attention_agree() -> None:
    for (heads, kv_heads, seq), window in product([(4, 4, 7), (4, 2, 7), (6, 2, 5), (4, 1, 1)], [None, 1, 3]):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, n, seq, 8, generator=generator, requires_grad=True) for n in (heads, kv_heads, kv_heads))
        mask = None if window is None else sliding_mask(seq, seq, window, False, q.device)
        plain, fused = attend_plainly(q, k, v, mask), attend(q, k, v, mask)
        torch.testing.assert_close(plain, fused)
        upstream = torch.randn(plain.shape, generator=generator)
        grads = [torch.autograd.grad(out, (q, k, v), upstream) for out in (plain, fused)]
        torch.testing.assert_close(*grads)


def test_training_in_bfloat16_computes_what_evaluation_does() -> None:
    """With autograd on, attention may take another road; it must lead to the same place."""
    model, rows = bank(tiny.GQA).bank, tiny.tokens(tiny.GQA, seq=40)
    with torch.autocast("cpu", torch.bfloat16):
        trained = model(rows)
        torch.testing.assert_close(trained.detach(), tiny.logits(model, rows), rtol=0.05, atol=0.15)
    assert trained.requires_grad


def test_the_deviation_of_initial_weights_follows_from_width_and_executed_depth() -> None:
    shape = ModelShape(vocab_size=64, hidden_size=128, num_hidden_layers=8, num_attention_heads=4, intermediate_size=256)
    looped = SharingConfig.make(shape, [{"tie": 0} if i else {} for i in range(8)])
    for plan in (SharingConfig.dense(shape).resolve(shape), looped.resolve(shape)):
        weights = init_weights(Decoder(shape, plan), torch.Generator().manual_seed(0)).state_dict()
        assert weights["layers.0.mlp.up_proj.weight"].std().item() == pytest.approx((2 / 640) ** 0.5, rel=0.05)
        for slot in ("self_attn.o_proj", "mlp.down_proj"):
            assert weights[f"layers.0.{slot}.weight"].std().item() == pytest.approx((2 / 640) ** 0.5 / 4, rel=0.05)
        assert all((value == 1).all() for value in weights.values() if value.ndim == 1)


def test_a_scaling_that_cannot_be_is_refused() -> None:
    yarn, zero = {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "linear", "factor": 0.0}
    for given, key in ((yarn, "rope_type"), (zero, "factor"), ({"factor": 2.0, "low_freq_factor": 4.0}, "low_freq_factor")):
        with pytest.raises(UserError) as error:
            RotaryScaling(**{"rope_type": "llama3"} | given)
        assert key in str(error.value)


def test_weights_are_initialised_by_their_name_and_the_seed_alone() -> None:
    shape = tiny.MHA
    plans = [SharingConfig.make(shape, layers).resolve(shape) for layers in ([{}] * 4, [{}, {"tie": 0}, {"ffn": 0}, {"kv": 2}])]
    each = [(Decoder(shape, plan), torch.Generator().manual_seed(seed)) for seed in (3, 4) for plan in plans]
    begun = [init_weights(model, generator).state_dict() for model, generator in each]
    for dense, shared in (begun[:2], begun[2:]):
        assert shared.keys() < dense.keys()
        assert all(torch.equal(weight, dense[name]) for name, weight in shared.items())
    matrices = [name for name, weight in begun[0].items() if weight.ndim == 2]
    assert not any(torch.equal(begun[0][name], begun[2][name]) for name in matrices)
    alike = [name for name in matrices if begun[0][name].shape == begun[0][matrices[1]].shape]
    assert len({begun[0][name].sum().item() for name in alike}) == len(alike)


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
@TWO_SHAPES
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


@TWO_SHAPES
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


@TWO_SHAPES
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


@TWO_SHAPES
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


# The closed form of memory is the bytes of the tensors, of the cache filled to its end, and of what attention reads.


def total(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def cached(shape: ModelShape, config: SharingConfig, spec: MemorySpec) -> tuple[Decoder, KVCache, Tensor]:
    """A model that has seen all tokens of a context but the last, its cache, and the last token."""
    plan = config.resolve(shape)
    model, cache = Decoder(shape, plan).to(getattr(torch, spec.dtype)), KVCache.of(plan)
    init_weights(model, torch.Generator().manual_seed(0))
    rows = torch.zeros(spec.batch, spec.context, dtype=torch.long)
    with torch.no_grad():
        model(rows[:, :1], cache=cache)
        assert cache.bytes == measure(shape, config, spec).kv_bytes_per_token * spec.batch
        model(rows[:, 1:-1], cache=cache)
    return model, cache, rows[:, -1:]


@SHAPES
def test_the_closed_form_is_the_bytes_of_the_tensors(shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights, of the cache filled to its end, and of the keys and values that the last token then sees."""
    read = counted_reads(monkeypatch)
    for n, config in enumerate(tiny.configs(shape)):
        spec = MemorySpec(context=(5, 12)[n % 2], batch=(3, 1)[n % 2], dtype=sorted(DTYPE_BYTES)[n % 3])
        model, cache, last = cached(shape, config, spec)
        read.clear()
        with torch.no_grad():
            model(last, cache=cache)
        memory, layers = measure(shape, config, spec), config.resolve(shape).layers
        assert memory.unique_params == sum(p.numel() for p in model.parameters())
        assert memory.weight_bytes == total(list(model.parameters())) == total(list(model.state_dict().values()))
        assert memory.kv_cache_bytes == cache.bytes
        assert memory.memory_bytes == memory.weight_bytes + memory.kv_cache_bytes
        # What is read of a later layer is read without the token itself.
        above = [layers[p.v] for i, p in enumerate(layers) if p.v is not None and p.reads_later_layer(i)]
        unseen = sum(p.k_heads + p.v_heads for p in above) * shape.head_dim * DTYPE_BYTES[spec.dtype]
        assert (memory.kv_read_bytes_per_token - unseen) * spec.batch == sum(read)


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the keys and values that the last query of each attention sees, from now on."""
    read: list[int] = []
    plain, look, weighed = decoder.attend, decoder.softmax_map, decoder.apply_attention_map

    def seen(x: Tensor, visible: Tensor | None) -> int:
        tokens = x.shape[2] if visible is None else int(visible[0, 0, -1].sum())
        return total([x]) // x.shape[2] * tokens

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        read.append(seen(k, mask) + seen(v, mask))
        return plain(q, k, v, mask)

    def softmax_map(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        read.append(seen(k, mask))
        return look(q, k, mask)

    def apply_attention_map(weights: Tensor, v: Tensor) -> Tensor:
        read.append(seen(v, weights > 0))
        return weighed(weights, v)

    for replaced in (attend, softmax_map, apply_attention_map):
        monkeypatch.setattr(decoder, replaced.__name__, replaced)
    return read


@SHAPES
def test_the_closed_form_is_the_operations_that_run(shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch counts the products of decoding a token. Windows are left out: the cache holds a token more while it decodes; so
    are matrices put together from parts, which is work that no token adds to."""
    monkeypatch.setattr(decoder, "SPARSE_FROM", 0)
    counted = 0
    for config in tiny.configs(shape)[::2]:
        words = [word for layer in config.layers for word in layer]
        if any(name in ("window", "factor", "heads") for name, _ in words) or {"experts", "delta"} <= {name for name, _ in words}:
            continue
        spec, counted = MemorySpec(context=9, dtype="float32"), counted + 1
        model, cache, last = cached(shape, config, spec)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(last, cache=cache)
        assert measure(shape, config, spec).flops_per_token == counter.get_total_flops(), config
    assert counted
