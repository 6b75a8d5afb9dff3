"""What only a GPU can show, prepared as one command of less than 8 minutes; on a CPU the same in small shapes.

    python -m tests.gpu [--device auto] [--small] [--json FILE]

The laws of a model and a supernet, in float32 and in bfloat16 against float32 on the CPU; a search of the quickstart; at 135 M
and 1 B weights, tokens a second, model FLOPs utilisation and peak memory (predicted and measured) of steps of a dense model
and of a supernet; and the measured objectives of a model at work. Utilisation is the operations of forward and backward (three
times the forward's, at half of the context) over those that a bfloat16 matrix product reaches in the same run. Exit code 1: a
law does not hold, or a part failed; the goals of speeds are no laws.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from nas.config import format_bytes
from nas.model.attention import KVCache
from nas.model.decoder import Decoder
from nas.model.supernet import Supernet, standalone
from nas.search.launch import Launch, start
from nas.search.progress import Silent
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.objectives import OBJECTIVES, SPREAD
from nas.sharing.primitives import OWN
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace
from nas.training.device import describe_device, find_device
from nas.training.evaluation import sequence_losses, token_losses
from nas.training.loop import Trainer, TrainSpec, plain_backward
from nas.training.measured import measure_objectives
from nas.training.strategies import STRATEGIES, SubnetRandom, SupernetStep

from . import tiny

QUICKSTART = Path(__file__).parents[1] / "trials" / "quickstart.yaml"
FLOAT32, BFLOAT16 = 2e-3, 0.05
"""The most that logits and gradients may be off, as a part of their norm; in bfloat16 the median over configs, since a rounded
score can choose another expert."""

GOAL = 0.4
"""Of the model FLOPs utilisation on a GPU."""


@dataclass(frozen=True)
class Row:
    """One line of the table; `holds` is None where there is a goal, and no law."""

    what: str
    bound: str
    measured: str
    holds: bool | None = None

    def __str__(self) -> str:
        return f"| {self.what} | {self.bound} | {self.measured}{': **no**' if self.holds is False else ''} |"


def covering(configs: Iterable[SharingConfig]) -> Iterator[SharingConfig]:
    """Some of the configs, in which every primitive that any of them chooses is chosen."""
    seen: set[str] = set()
    for config in configs:
        names = {name for layer in (*config.layers, config.model_choices) for name, _ in layer}
        if not names <= seen:
            seen |= names
            yield config


# ---- laws


def off(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a part of the expected one's."""
    return ((found.cpu().float() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def gradient(model: Decoder, net: Supernet, rows: Tensor, autocast: bool) -> Tensor:
    """The gradient of all of a supernet's weights, flat."""
    net.zero_grad(set_to_none=True)
    sequence_losses(model, rows, autocast).mean().backward()
    return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in net.parameters()]).cpu()


def laws_of(shape: ModelShape, configs: Iterable[SharingConfig], device: torch.device) -> dict[str, list[float]]:
    """How much each law is off by, for each config."""
    here, there, rows = tiny.supernet(shape), tiny.supernet(shape).to(device), tiny.tokens(shape)
    moved, found = rows.to(device), dict[str, list[float]]()

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for config in configs:
        expected, model = here.subnet(config), there.subnet(config)
        with torch.no_grad():
            logits, alone = expected(rows), standalone(model)
            for name, autocast in (("float32", False), ("bfloat16", True)):
                with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
                    whole, cache = model(moved), KVCache.of(model.plan)
                    parts = torch.cat([model(part, cache=cache) for part in moved.split(3, 1)], 1)
                    note("a subnet is its stand-alone model, bitwise", float(not torch.equal(whole, alone(moved))))
                note(f"logits, {name}", off(whole, logits))
                note(f"cached decoding, {name}", off(parts, whole.cpu().float()))
        exact = gradient(expected, here, rows, False)
        for name, autocast in (("float32", False), ("bfloat16", True)):
            note(f"a supernet's gradients, {name}", off(gradient(model, there, moved, autocast), exact))
    return found


def laws(device: torch.device, small: bool) -> Iterator[Row]:
    """The laws over shapes, presets, random configs and all primitives."""
    found = dict[str, list[float]]()
    for shape in [tiny.MHA] if small else tiny.SHAPES.values():
        every = covering(tiny.configs(shape)) if small or shape != tiny.MHA else tiny.configs(shape)
        for name, values in laws_of(shape, every, device).items():
            found.setdefault(name, []).extend(values)
    for name, values in found.items():
        loose = name.endswith("bfloat16")
        worst = sorted(values)[len(values) // 2] if loose else max(values)
        bound = BFLOAT16 if loose else FLOAT32 if name.endswith("float32") else 0.0
        words = f"{'median' if loose else 'worst'} of {len(values)} configs: {worst:.2g}"
        yield Row(name, f"≤ {bound:g}", words, worst <= bound)


# ---- a search


class Said(Silent):
    """Keeps what a search says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def search(device: torch.device, small: bool) -> Iterator[Row]:
    """The quickstart's search from start to front; in small, of a tenth of its budget on the shortest text."""
    trial = yaml.safe_load(QUICKSTART.read_text()) | {"space": str(QUICKSTART.parent / "../search_spaces/quickstart.yaml")}
    trial |= {"tracking": {"enabled": False}}
    if small:
        trial["data"] |= {"max_bytes": 60_000}
        trial |= {"evaluate": {"windows": 2, "final_windows": 2}}
        trial |= {stage: trial[stage] | {"steps": 2, "batch": 2, "seq": 16} for stage in ("dense", "supernet")}
        trial["split"] |= {"batches": 1, "batch": 1}
        trial |= {"search": {"evaluations": 8, "presets": False}, "run": {"workers": 0}}
        trial |= {"final": {"steps": 1, "batch": 2, "seq": 16, "candidates": 1, "presets": False}}
    said, began = Said(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trial.yaml"
        path.write_text(yaml.safe_dump(trial))
        _, front = start(Launch(path, Path(folder) / "runs"), said)
    where = next(line for line in said.lines if line.startswith("run "))
    right = device.type == "cpu" or "GPU" in where or "cuda" in where
    words = f"{time.monotonic() - began:.0f} s, {len(front.evaluations)} models trained; {where.removeprefix('run').strip()}"
    yield Row("the quickstart's search", "has a front, on the device", words, bool(front.evaluations) and right)


# ---- speed and memory

M135 = ModelShape(
    vocab_size=49_152,
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    max_position_embeddings=8192,
)
B1 = replace(
    M135,
    hidden_size=2048,
    num_hidden_layers=20,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=5632,
)
SMALL = replace(tiny.GQA, vocab_size=257, hidden_size=64, intermediate_size=160)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(act: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of one call, over some after two that warm up."""
    for _ in range(2):
        act()
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        act()
    wait(device)
    return (time.perf_counter() - began) / times


def peak_flops(device: torch.device, small: bool) -> float:
    """Operations a second of a square bfloat16 matrix product."""
    width = 512 if small else 8192
    a = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    return 2 * width**3 / seconds_of(lambda: a @ a, device, 10)


@torch.no_grad()
def _meta(shape: ModelShape) -> Decoder:
    with torch.device("meta"):
        return Decoder(shape, SharingConfig.dense(shape).resolve(shape)).bfloat16()


def predicted_bytes(shape: ModelShape, spec: TrainSpec) -> int:
    """Peak memory of training a dense model by AdamW in bfloat16 autocast: weights, gradients and two moments in float32, weights
    in bfloat16, and what the forward saves for the backward pass, counted on `meta`."""
    model, saved = _meta(shape), dict[int, Tensor]()
    weights = sum(w.numel() for w in model.parameters())
    own = {id(w) for w in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            saved[id(tensor)] = tensor
        return tensor

    rows = torch.zeros(spec.batch, spec.seq + 1, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(rows[:, :-1])
        token_losses(logits, rows[:, 1:])
    return weights * (4 * 4 + 2) + sum(t.numel() * t.element_size() for t in saved.values())


def space_of(shape: ModelShape) -> SearchSpace:
    """The choices of the quickstart at this shape: ties, FFNs and KV of the layer below."""
    choices = {f"layer_{i}.{name}": (OWN, i - 1) for i in range(1, shape.num_hidden_layers) for name in ("tie", "ffn", "kv")}
    return SearchSpace(shape, choices)


def steps_of(shape: ModelShape, spec: TrainSpec, device: torch.device) -> Iterator[tuple[str, Callable[[], int]]]:
    """Steps of training by name; each returns the tokens that it trained on, those of each subnet counted."""
    rows = torch.randint(shape.vocab_size, (spec.batch, spec.seq + 1), generator=torch.Generator().manual_seed(0)).to(device)
    forever = iter(lambda: rows, None)
    net = Supernet(shape, torch.Generator().manual_seed(0), space_of(shape).extra_parameters()).to(device)

    def step(model: nn.Module, backward: Any, subnets: Callable[[], int] = lambda: 1) -> Callable[[], int]:
        run = Trainer(model, spec, torch.Generator()).run(forever, backward)

        def once() -> int:
            next(run)
            return subnets() * spec.tokens // spec.steps

        return once

    yield "dense", step(net.bank, plain_backward(net.bank, spec))
    if device.type == "cuda" and shape == M135:  # compiling takes a minute
        yield "dense, compiled", step(net.bank, plain_backward(torch.compile(net.bank), spec))  # type: ignore[arg-type]
    draw = STRATEGIES["dense_biased"](space_of(shape), MemorySpec())
    backward = SupernetStep(net, spec, draw, SubnetRandom(0), SharingConfig.dense(shape))
    yield "supernet", step(net, backward, lambda: backward.subnets)


def speed(device: torch.device, small: bool) -> Iterator[Row]:
    """Tokens a second, utilisation and memory of each kind of step."""
    peak = peak_flops(device, small)
    yield Row("bfloat16 matrix product", "", f"{peak / 1e12:.3g} TFLOP/s")
    batches = {"small": (SMALL, 2, 32)} if small else {"135 M": (M135, 32, 1024), "1 B": (B1, 8, 1024)}
    for size, (shape, batch, seq) in batches.items():
        spec = TrainSpec(steps=10_000, batch=batch, seq=seq)
        work = 3 * measure(shape, SharingConfig.dense(shape), MemorySpec(context=seq // 2)).flops_per_token
        for name, step in steps_of(shape, spec, device):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            counted: list[int] = []
            seconds = seconds_of(lambda step=step, counted=counted: counted.append(step()), device, 3 if small else 8)  # type: ignore[misc]
            rate = sum(counted[2:]) / len(counted[2:]) / seconds
            goal = f"utilisation ≥ {GOAL:.0%}" if device.type == "cuda" else ""
            yield Row(f"{size}, {name} step", goal, f"{rate:,.0f} tokens/s, utilisation {rate * work / peak:.0%}")
            if name == "dense":
                predicted = predicted_bytes(shape, spec)
                cuda = device.type == "cuda"
                found = format_bytes(torch.cuda.max_memory_allocated(device)) if cuda else "not measured on a CPU"
                yield Row(f"{size}, peak memory of a dense step", f"predicted {format_bytes(predicted)}", found)


def at_work(device: torch.device, small: bool) -> Iterator[Row]:
    """Measured objectives of a model at work, dense and with one KV head."""
    shape, spec = (SMALL, MemorySpec(context=64, batch=2)) if small else (M135, MemorySpec(context=8192, batch=8))
    names = [name for name, row in OBJECTIVES.items() if row.measure]
    for label, choices in {"dense": {}, "one KV head": {"kv_heads": 1}}.items():
        config = SharingConfig.make(shape, [choices] * shape.num_hidden_layers)
        found, memory = measure_objectives(shape, config, spec, names), measure(shape, config, spec).memory_bytes
        for row in map(OBJECTIVES.__getitem__, names):
            least = memory if row.name == "peak_memory_bytes" else 0
            shown = f"{row.show(found[row.name])} ± {row.show(found[row.name + SPREAD])}"
            yield Row(f"{label}, {row.words}", f"at least {row.show(least)}", shown, found[row.name] >= least)


Part = Callable[[torch.device, bool], Iterator[Row]]
PARTS: dict[str, Part] = {"laws": laws, "search": search, "speed": speed, "at_work": at_work}


def main(given: list[str] | None = None) -> int:
    """Run all parts and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="small shapes, as on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    args = parser.parse_args(given)
    device = find_device(args.device)
    print(f"{describe_device(device)}, torch {torch.__version__}\n\n| what | bound | measured |\n| --- | --- | --- |")
    rows: list[Row] = []
    for name in args.parts:
        try:
            for row in PARTS[name](device, args.small or device.type == "cpu"):
                rows.append(row)
                print(row, flush=True)
        except Exception as error:  # the next part may still show something
            rows.append(Row(name, "", f"{type(error).__name__}: {error}", holds=False))
            print(rows[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
