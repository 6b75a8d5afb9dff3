"""How fast a dense model trains at several widths, beside transformers' Llama of the same shape.

    python -m tests.benchmarks.bench_training [--repeats 8] [--only 64x6 …] [--supernets 256x8 …] [--together 256x8 …]

One thread, timed by the processor's clock. A step is forward, loss, backward and AdamW's step on 4 rows of 128 tokens in bfloat16
autocast. The two take turns, so that both meet the same noise; `times as fast` is the median ratio over the turns ± half of its
interquartile range. The goal is 1.2 at every width; what misses it is named at the end, and the exit code is 1.

A supernet's step is of the largest and three random subnets of a space of ties, KV, FFNs and heads. Beside it stand the same four
as models of their own, whose seconds are added up: without the optimizer's steps, of which the supernet makes one and they make
four, and with them. The goal is 1.05 × without.

Two processes of one thread that train one model together, each on its half of every batch, take turns with one of them that
trains it alone, by the clock on the wall, on 4 rows and on 32: 2 would be ideal.
"""

import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F

from nas.config import Document
from nas.model.decoder import Decoder, init_weights
from nas.model.supernet import Supernet, standalone
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace
from nas.training.loop import Trainer, TrainSpec, make_optimizer, plain_backward
from nas.training.ranks import ALONE, Ranks, joined
from nas.training.strategies import SubnetRandom, SupernetStep
from reports.page import options, show
from tests.benchmarks import Ratio, llama
from tests.benchmarks.bench_presets import ROWS, SEQ

GOAL, SUPERNET_GOAL = 1.2, 1.05
SIZES = {"64x6": (64, 6, 4, 1024), "256x8": (256, 8, 8, 1024), "512x8": (512, 8, 8, 4096), "576x12": (576, 12, 9, 16_384)}
"""Width, layers, heads and vocabulary."""


def shape_of(size: str) -> ModelShape:
    """A dense shape whose FFN is 8/3 as wide as the model."""
    width, layers, heads, vocabulary = SIZES[size]
    ffn = round(width * 8 / 3 / 32) * 32
    return ModelShape(vocabulary, width, layers, heads, ffn, max_position_embeddings=256)


def step_of(model: nn.Module, backward: Callable[[Tensor], object], rows: Tensor) -> Callable[[], float]:
    """A function that trains a step and says how many seconds it took."""
    optimizer = make_optimizer(model, TrainSpec(steps=1))

    def step() -> float:
        start = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        backward(rows)
        optimizer.step()
        return time.process_time() - start

    return step


def batch_of(shape: ModelShape, rows: int = ROWS) -> Tensor:
    return torch.randint(shape.vocab_size, (rows, SEQ + 1), generator=torch.Generator().manual_seed(0))


def dense(shape: ModelShape) -> Decoder:
    return init_weights(Decoder(shape, SharingConfig.dense(shape).resolve(shape)), torch.Generator().manual_seed(0))


def contestants(size: str) -> tuple[Callable[[], float], Callable[[], float]]:
    """This project's step, and Llama's."""
    shape = shape_of(size)
    rows, ours, theirs = batch_of(shape), dense(shape), llama(shape)

    def theirs_backward(rows: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = theirs(rows[:, :-1], use_cache=False).logits
        F.cross_entropy(out.float().flatten(0, 1), rows[:, 1:].flatten()).backward()

    return step_of(ours, plain_backward(ours, TrainSpec(steps=1)), rows), step_of(theirs, theirs_backward, rows)


CHOICES = """
tie: {sources: adjacent}
kv: {sources: {window: 2}}
ffn: {sources: adjacent}
kv_heads: {}
"""


def supernet_turns(size: str, repeats: int) -> list[tuple[float, float, float, float]]:
    """Of each turn: the supernet's seconds without and with the optimizer's step, and those of its subnets."""
    shape, spec, rng = shape_of(size), TrainSpec(steps=1), random.Random(0)
    space = SearchSpace.from_document(Document({"choices": yaml.safe_load(CHOICES)}), shape)
    configs = [space.largest(), *(space.sample(rng) for _ in range(3))]
    supernet = Supernet(shape, torch.Generator().manual_seed(0), space.extra_parameters())
    alone, rows = [standalone(supernet.subnet(config)) for config in configs], batch_of(shape)
    steps = [(supernet, SupernetStep(supernet, spec, lambda rng: configs, SubnetRandom("0")))]
    steps += [(model, plain_backward(model, spec)) for model in alone]
    optimizers = [make_optimizer(model, spec) for model, _ in steps]

    def turn() -> tuple[float, float, float, float]:
        found = []
        for (_, backward), optimizer in zip(steps, optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            begun = time.process_time()
            backward(rows)
            before = time.process_time()
            optimizer.step()
            found.append((before - begun, time.process_time() - begun))
        (mine, mine_all), *theirs = found
        return mine, mine_all, sum(one for one, _ in theirs), sum(one for _, one in theirs)

    return [turn() for _ in range(repeats + 1)][1:]


STEPS = 4  # of a turn of one process, or of two
TOGETHER = (ROWS, 8 * ROWS)  # rows of a batch


def together_turns(size: str, rows: int, repeats: int) -> list[tuple[float, float]]:
    """Of each turn: the seconds of one process alone, and of two together."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_take_turns, (folder, size, rows, repeats), nprocs=2)
        return [(float(one), float(two)) for one, two in map(str.split, (Path(folder) / "turns").read_text().splitlines())]


def _take_turns(rank: int, folder: str, size: str, rows: int, repeats: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with joined(distributed.FileStore(f"{folder}/store", 2), Ranks(rank, 2)) as both:
        runs = []
        for ranks in (ALONE, both):
            model, spec = dense(shape_of(size)), TrainSpec(STEPS * (repeats + 1), rows, SEQ)
            trainer = Trainer(model, spec, torch.Generator(), ranks)
            runs.append(trainer.run(itertools.repeat(batch_of(shape_of(size), rows)), plain_backward(model, spec)))
        turns = []
        for _ in range(repeats + 1):
            found = []
            for run in runs if rank == 0 else runs[1:]:
                if run is runs[1]:
                    distributed.barrier()
                begun = time.perf_counter()
                list(itertools.islice(run, STEPS))
                found.append(time.perf_counter() - begun)
            turns.append(" ".join(map(str, found)))
        if rank == 0:
            Path(folder, "turns").write_text("\n".join(turns[1:]))


def main(given: list[str] | None = None) -> int:
    """Print the tables; 1 if a goal is missed."""
    args = options(
        __doc__, given, repeats=8, only=list(SIZES), supernets=["64x6", "256x8", "576x12"], together=["256x8", "576x12"]
    )
    rows, nets, pairs, missed, slow = [], [], [], [], []
    for size in args.only:
        steps = contestants(size)
        turns = [[step() for step in steps] for _ in range(args.repeats + 1)][1:]
        ours, theirs = (list(column) for column in zip(*turns, strict=True))
        ratio, rate = Ratio.of(ours, theirs), ROWS * SEQ / statistics.median(ours)
        shape = shape_of(size)
        work = 3 * measure(shape, SharingConfig.dense(shape), MemorySpec(context=SEQ // 2)).flops_per_token
        row = {"width × layers": size, "tokens/s": f"{rate:,.0f}", "GFLOP/s": f"{rate * work / 1e9:.0f}"}
        rows.append(row | {"times as fast": f"{ratio}"})
        missed += [size] * (ratio.times < GOAL)
    for size in args.supernets:
        mine, mine_all, theirs, theirs_all = (list(column) for column in zip(*supernet_turns(size, args.repeats), strict=True))
        ratio = Ratio.of(theirs, mine)
        row = {"width × layers": size, "supernet's step by its subnets'": f"{ratio}"}
        nets.append(row | {"with the optimizer": f"{Ratio.of(theirs_all, mine_all)}"})
        slow += [size] * (ratio.times > SUPERNET_GOAL)
    for size, count in itertools.product(args.together, TOGETHER):
        alone, both = (list(column) for column in zip(*together_turns(size, count, args.repeats), strict=True))
        pairs.append(
            {"width × layers": size, "rows": f"{count}", "two processes, times as fast as one": f"{Ratio.of(both, alone)}"}
        )
    said = f"Below {GOAL}: {', '.join(missed) or 'none'}. Supernets beyond {SUPERNET_GOAL}: {', '.join(slow) or 'none'}."
    show("Training beside transformers' Llama", __doc__, *(table for table in (rows, nets, pairs) if table), said)
    return int(bool(missed or slow))


if __name__ == "__main__":
    sys.exit(main())
