"""Laws of memory: the closed form is the bytes of the tensors, of the cache filled to its end, and of what attention reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nas.errors import UserError
from nas.model import decoder
from nas.model.attention import KVCache
from nas.model.decoder import Decoder, init_weights
from nas.presets import preset
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.shape import DTYPE_BYTES, ModelShape
from nas.sharing.sharing_config import SharingConfig


def total(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


CASES = pytest.mark.parametrize("shape", tiny.SHAPES.values(), ids=tiny.SHAPES)


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


@CASES
def test_the_closed_form_is_the_bytes_of_the_file(shape: ModelShape, tmp_path: Path) -> None:
    for config in tiny.configs(shape)[::3]:
        model = Decoder(shape, config.resolve(shape))
        save_file(init_weights(model, torch.Generator().manual_seed(0)).state_dict(), tmp_path / "model.safetensors")
        content = (tmp_path / "model.safetensors").read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        assert len(content) - header == measure(shape, config, MemorySpec(dtype="float32")).weight_bytes


@CASES
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
        above = [
            layers[p.v] for i, p in enumerate(layers) if p.v is not None and p.reads_later_layer(i)
        ]  # read without the token itself
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


@CASES
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


def test_sharing_kv_halves_the_cache_and_not_the_reads() -> None:
    dense, shared = (measure(tiny.MHA, preset(name, tiny.MHA), MemorySpec()) for name in ("dense", "cla-2"))
    assert shared.kv_cache_bytes * 2 == dense.kv_cache_bytes
    assert shared.kv_read_bytes_per_token == dense.kv_read_bytes_per_token


def test_tying_layers_saves_weights_and_no_cache() -> None:
    dense, tied = (measure(tiny.MHA, preset(name, tiny.MHA), MemorySpec()) for name in ("dense", "recurrent-stacking"))
    assert tied.weight_bytes < dense.weight_bytes
    assert tied.kv_cache_bytes == dense.kv_cache_bytes


def test_a_config_of_two_layers_by_hand() -> None:
    """Width 32, 4 heads of 8, FFN 48, vocabulary 64: layer 1 has its own q and o and norms, layer 0's FFN, K and V."""
    shape = replace(tiny.MHA, num_hidden_layers=2)
    config = SharingConfig.make(shape, [{"kv_heads": 2}, {"ffn": 0, "kv": 0}])
    memory = measure(shape, config, MemorySpec(context=10, batch=3, dtype="float32"))
    outside = 64 * 32 + 32
    first = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    second = 2 * 32 * 32 + 2 * 32
    assert memory.unique_params == outside + first + second
    assert memory.kv_bytes_per_token == 2 * 2 * 8 * 4
    assert memory.kv_cache_bytes == 128 * 10 * 3
    assert memory.kv_read_bytes_per_token == 2 * 128 * 10


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"context": 0}, "context: 0 is too small; use 1 or more"),
        ({"batch": -1}, "batch: -1 is too small; use 1 or more"),
        ({"dtype": "int4"}, "dtype: 'int4' will not do; use bfloat16, float16 or float32"),
    ],
)
def test_where_memory_cannot_be_measured(given: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as caught:
        MemorySpec(**given)
    assert str(caught.value) == says
