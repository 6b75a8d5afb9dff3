"""What deep models cost before anything is trained: `nas check`, `describe` and `zoo` by depth, and samplers by decisions.

    python -m tests.benchmarks.bench_depth [--layers 6 48 80] [--decisions 50 200] [--told 100 1000] [--samplers tpe surrogate …]

Goals: 5 s for a command, from its start to its end, in a space with the choices of `search_spaces/everything.yaml`; and 1 s for
24 configs of a space of 200 decisions (keys and values, FFNs, widths and dropped parts of 51 layers) after 1,000 evaluations,
which are random configs with losses that are made up. Seconds are those of the processor.
"""

import itertools
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import yaml

from nas.config import parse_yaml
from nas.search.loop import Study
from nas.search.samplers import SAMPLERS
from nas.search.trial_file import SearchSpec
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.space import SearchSpace
from reports.page import options, show

EVERYTHING = Path(__file__).parents[2] / "search_spaces" / "everything.yaml"
COMMAND_SECONDS, ASK_SECONDS = 5.0, 1.0
ASKED = 24


def commands(layers: int) -> dict[str, float]:
    """The seconds of each command on a space of so many layers."""
    document = yaml.safe_load(EVERYTHING.read_text())
    document["model"]["num_hidden_layers"] = layers
    with tempfile.TemporaryDirectory() as folder:
        space, model = Path(folder) / "space.yaml", Path(folder) / "model.yaml"
        space.write_text(yaml.safe_dump(document))
        model.write_text(yaml.safe_dump(document["model"]))
        given = {"check": [space], "describe": ["cla-2", f"--model={model}"], "zoo": [f"--model={model}"]}
        found = {}
        for name, words in given.items():
            begun = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "nas", name, *map(str, words)], check=True, capture_output=True)
            ended = resource.getrusage(resource.RUSAGE_CHILDREN)
            found[name] = ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime
        return found


def space_of(decisions: int) -> SearchSpace:
    """The shallowest space with so many decisions, or a few more."""
    choices = {"kv": {"sources": {"window": 2}}, "ffn": {"sources": "adjacent"}, "drop": {"options": ["own", "attn", "ffn"]}}
    choices |= {"intermediate": {"options": [176, 88]}}  # type: ignore[dict-item]
    for layers in range(2, decisions):
        model = {"vocab_size": 257, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 176}
        document = {"model": model | {"num_hidden_layers": layers}, "choices": choices}
        space = SearchSpace.from_document(parse_yaml(yaml.safe_dump(document), "space"))
        if len(space.options) >= decisions:
            return space
    raise AssertionError(decisions)


def told(space: SearchSpace, count: int) -> Study:
    """A study of so many random configs near the one that shares nothing, with losses that are made up."""
    spec, rng, memory = SearchSpec(evaluations=2 * count, batch=ASKED, sampler="random"), random.Random(0), MemorySpec(1024)
    study, least = Study(space, spec, 0, memory), space.least_sharing()
    for _ in range(count):
        taken = rng.sample(list(space.options), rng.randint(1, len(space.options) // 2))
        study.enqueue([least | {name: rng.choice(space.options[name]) for name in taken}])
    dense = measure(space.shape, space.config_of(least), memory).memory_bytes
    for proposal in study.ask(count):
        found = measure(space.shape, proposal.config, memory).memory_bytes
        study.tell(proposal.number, (found, 2.0 - math.log(found / dense) * (1 + rng.random())))
    return study


def asking(study: Study, sampler: str) -> float:
    study.spec = replace(study.spec, sampler=sampler)
    begun = time.process_time()
    study.ask(ASKED)
    return time.process_time() - begun


def main(given: list[str] | None = None) -> int:
    """Print the tables; 1 if a goal is missed."""
    decided: dict[str, list[int]] = {"decisions": [25, 50, 100, 200], "told": [1000]}
    args, missed = options(__doc__, given, layers=[6, 48, 80], samplers=list(SAMPLERS), **decided), list[str]()
    rows, asked = [], []
    for layers in args.layers:
        found = commands(layers)
        missed += [f"{name} at {layers} layers" for name, seconds in found.items() if seconds > COMMAND_SECONDS]
        rows.append({"layers": f"{layers}"} | {f"{name} (s)": f"{seconds:.1f}" for name, seconds in found.items()})
    for decisions, count in itertools.product(args.decisions, args.told):
        study = told(space_of(decisions), count)
        found = {sampler: asking(study, sampler) for sampler in args.samplers}
        missed += [f"{name} at {decisions} decisions" for name, seconds in found.items() if seconds > ASK_SECONDS]
        row = {"decisions": f"{len(study.space.options)}", "evaluations": f"{count}"}
        asked.append(row | {f"{name} (s)": f"{seconds:.2f}" for name, seconds in found.items()})
    show("Deep models", __doc__, *(table for table in (rows, asked) if table), f"Missed: {', '.join(missed) or 'none'}.")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
