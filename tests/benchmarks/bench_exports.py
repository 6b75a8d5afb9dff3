"""What an exported folder costs to load and to run in transformers, beside transformers' own Llama of the same shape.

- A shared model's exported folder decodes about as fast as transformers' own Llama of the same shape: 0.72 to 1.36 times
  its speed.
- The machine was busy: the dense model, which is the same as Llama, spreads from 0.72 to 1.22, so differences below that
  are noise.
- Weights and cache are as small as predicted: at width 768 one shared layer takes 60 of 236 MiB, two KV heads of twelve a
  sixth of the cache.
- With 1,536 tokens of context smaller caches begin to pay: gqa-2 decodes 1.14 to 1.36 times as fast.
- Loading takes about as long as Llama's, a third longer for gqa-2.

    python -m tests.benchmarks.bench_exports [--repeats 3] [--only "width 256"]

Random weights, saved in bfloat16, loaded by `AutoModelForCausalLM.from_pretrained`. Loading is measured in a process of its own,
after its imports: seconds, and by how much resident memory grew at its peak (Linux's VmHWM); that is little, for weights stay in
the file's pages until they are first used. Decoding is 16 tokens one after the other with a KV cache behind a context, in
bfloat16, one thread, by the processor's clock. All folders of a shape take turns, so that they meet the same noise: `vs Llama` is
the median ratio of the speeds over the turns, ± half of its interquartile range. The bytes of weights and cache are counted on
the loaded model's tensors and on the cache it filled.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nas.config import format_bytes
from nas.data.tokenizer import bytes_json
from nas.export import ModelCard, export
from nas.model.decoder import Decoder, init_weights
from nas.presets import preset
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.shape import ModelShape
from reports.page import options, show
from tests.benchmarks import Ratio, llama

SHAPES = {
    "width 256": ModelShape(4096, 256, 6, 8, 704),
    "width 512": ModelShape(16384, 512, 12, 8, 1408),
    "width 768": ModelShape(32000, 768, 14, 12, 2048),
}
SCHEMES = ("dense", "gqa-2", "cla-2", "mobilellm-ls", "recurrent-stacking", "kv-sandwich-bottom-4")
LLAMA = "Llama (transformers)"
CONTEXTS = (128, 512, 1536)
DECODED = 16

LOAD = r"""
import os, re, sys, time
os.environ["HF_HUB_OFFLINE"] = "1"
import torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
torch.set_num_threads(1)
def resident(name):
    return 1024 * int(re.search(name + r":\s+(\d+) kB", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak so far, that of the imports, is forgotten
before, start = resident("VmRSS"), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.bfloat16)
seconds = time.perf_counter() - start
print(seconds, resident("VmHWM") - before)
"""


def folders(shape: ModelShape, root: Path) -> dict[str, Path]:
    """Llama's own folder, and an export of each scheme."""
    made = {LLAMA: root / "llama"}
    llama(shape).to(torch.bfloat16).save_pretrained(made[LLAMA])
    for name in SCHEMES:
        config = preset(name, shape)
        model = init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(0)).to(torch.bfloat16)
        made[name] = export(model, config, bytes_json(), root / name, ModelCard())
    return made


def loaded(folder: Path) -> tuple[float, int]:
    """Seconds and peak bytes of loading, in a process of its own."""
    found = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    seconds, peak = found.stdout.split()[-2:]
    return float(seconds), int(peak)


def open_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()


@torch.no_grad()
def decode(model: Any, context: int) -> tuple[float, int]:
    """Seconds of decoding behind a context, and the bytes of the cache at the end."""
    tokens = torch.randint(256, (1, context + DECODED), generator=torch.Generator().manual_seed(0))
    cache = model(tokens[:, :context], use_cache=True, logits_to_keep=1).past_key_values
    start = time.process_time()
    for n in range(context, context + DECODED):
        model(tokens[:, n : n + 1], past_key_values=cache)
    seconds = time.process_time() - start
    kept = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
    return seconds, sum(t.numel() * t.element_size() for t in kept)


def rows_of(name: str, repeats: int) -> list[dict[str, str]]:
    """One row a folder of a shape, Llama's first."""
    with tempfile.TemporaryDirectory() as root:
        made = folders(SHAPES[name], Path(root))
        loads = [{scheme: loaded(folder) for scheme, folder in made.items()} for _ in range(repeats)]
        models = {scheme: open_model(folder) for scheme, folder in made.items()}
        count = repeats + 1
        turns = {c: [{scheme: decode(model, c) for scheme, model in models.items()} for _ in range(count)][1:] for c in CONTEXTS}
    rows = []
    for scheme, model in models.items():
        distinct = {weight.data_ptr(): weight for weight in model.parameters()}.values()
        row = {"name": scheme, "weights": format_bytes(sum(weight.numel() * weight.element_size() for weight in distinct))}
        mine, theirs = ([turn[key][0] for turn in loads] for key in (scheme, LLAMA))
        row |= {"loading, s": f"{statistics.median(mine):.2f}", "loading vs Llama": f"{Ratio.of(mine, theirs)}"}
        row["peak of loading"] = format_bytes(int(statistics.median(turn[scheme][1] for turn in loads)))
        for c in CONTEXTS:
            mine, theirs = ([turn[key][0] for turn in turns[c]] for key in (scheme, LLAMA))
            row[f"cache at {c:,}"] = format_bytes(turns[c][0][scheme][1])
            row[f"tokens/s at {c:,}"] = f"{DECODED / statistics.median(mine):.1f}"
            row[f"vs Llama at {c:,}"] = f"{Ratio.of(mine, theirs)}"
        rows.append(row)
    return rows


def main(given: list[str] | None = None) -> int:
    """Print the tables, one a shape."""
    import transformers

    args = options(__doc__, given, repeats=3, only=list(SHAPES))
    parts: list[Any] = [f"torch {torch.__version__}, transformers {transformers.__version__}."]
    for name in args.only:
        shape = SHAPES[name]
        sizes = f"{shape.num_hidden_layers} layers, {shape.num_attention_heads} heads, FFN width {shape.intermediate_size}"
        weights = measure(shape, preset("dense", shape), MemorySpec()).unique_params
        words = f"{sizes}, vocabulary {shape.vocab_size:,}; {weights:,} parameters in Llama."
        parts += [f"## {name}", words, rows_of(name, args.repeats)]
    show("Speed and size of exported folders", __doc__, *parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
