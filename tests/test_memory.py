"""Laws of memory: the closed form is the bytes of the tensors, of the cache filled to its end, and of what attention reads."""

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nas.model import decoder
from nas.model.attention import KVCache
from nas.model.decoder import Decoder, init_weights
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
