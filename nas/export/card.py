"""The README of an exported folder: what the model is, what it costs, and how it is used and was found.

Owns its text. The numbers are computed from the config, or were measured by whoever gives the card.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..evaluate import Evaluation
from ..loading import format_bytes
from ..memory import Memory, MemorySpec, measure
from ..plan import ATTENTION, ATTENTION_NORM, FFN, FFN_NORM, LayerPlan
from ..shape import ModelShape
from ..sharing import SharingConfig
from ..supernet import dense_plan


@dataclass(frozen=True)
class Card:
    """What a README says that its model cannot: how it was found, on which text, and how good it was.

    `found` is a sentence, `command` what a person types to find it again, `data` the text's source, `memory` where the bytes
    in the README are measured.
    """

    title: str = ""
    found: str = ""
    command: str = ""
    data: str = ""
    evaluation: Evaluation | None = None
    memory: MemorySpec = field(default_factory=MemorySpec)


def readme(shape: ModelShape, config: SharingConfig, card: Card, usage: str) -> str:
    """The README.md of a model in a format that is used as `usage` says; `DTYPE` in it becomes the card's."""
    sections = {
        "Memory": _memory(shape, config, card.memory),
        "Quality": _quality(card),
        "Use": usage.replace("DTYPE", card.memory.dtype),
        "What its layers share": _sharing(shape, config),
        "How it was found": _found(card),
    }
    head = f"{FRONT_MATTER}\n# {card.title or f'Decoder {config.hash}'}\n\n{_summary(shape, config)}\n"
    return head + "".join(f"\n## {title}\n\n{text.strip()}\n" for title, text in sections.items() if text.strip())


FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- neural-architecture-search
- parameter-sharing
- kv-cache-sharing
---
"""


def _summary(shape: ModelShape, config: SharingConfig) -> str:
    plan = config.resolve(shape)
    depth = len(plan.layers)
    attention = len({layer.owner(ATTENTION[0]) for layer in plan.layers})
    ffn = len({layer.owner(FFN[0]) for layer in plan.layers})
    kept = len(plan.kv_owners)
    return (
        f"A Llama-style decoder: {depth} layers of width {shape.hidden_size}, {attention} attention {_modules(attention)} and "
        f"{ffn} FFN {_modules(ffn)} between them, and {kept} of {depth} keep a KV cache. Configuration `{config.hash}`."
    )


def _modules(count: int) -> str:
    return "module" if count == 1 else "modules"


def _memory(shape: ModelShape, config: SharingConfig, spec: MemorySpec) -> str:
    dense = SharingConfig.of_plan(shape, dense_plan(shape))
    ours, theirs = measure(shape, config, spec), measure(shape, dense, spec)
    lines = [
        f"In {spec.dtype}, for a context of {spec.context:,} tokens and a batch of {spec.batch}:",
        "",
        "| | this model | the same shape, nothing shared |",
        "|---|---:|---:|",
        f"| parameters | {ours.unique_params:,} | {theirs.unique_params:,} |",
        *(f"| {words} | {_bytes(ours, name)} | {_bytes(theirs, name)} |" for words, name in MEMORY_ROWS),
    ]
    return "\n".join(lines)


MEMORY_ROWS = (
    ("weights", "weight_bytes"),
    ("KV cache", "kv_cache_bytes"),
    ("KV cache, for each token", "kv_bytes_per_token"),
    ("weights and KV cache", "memory_bytes"),
)


def _bytes(memory: Memory, name: str) -> str:
    return format_bytes(getattr(memory, name))


def _quality(card: Card) -> str:
    if card.evaluation is None:
        return ""
    losses = card.evaluation.losses
    weights = {
        "inherited": "With the weights of the search's supernet, which is how the search saw it; train it before you use it",
        "retrained": f"Trained by itself for {card.evaluation.tokens:,} tokens",
    }[card.evaluation.weights]
    return (
        f"{weights}: perplexity {losses.perplexity:.4g} a token (standard error {losses.perplexity_standard_error:.2g}), "
        f"{card.evaluation.bits_per_byte:.4g} bits a byte, on evaluation text it never saw."
    )


def _sharing(shape: ModelShape, config: SharingConfig) -> str:
    rows = [_row(i, layer) for i, layer in enumerate(config.resolve(shape).layers)]
    head = ["| layer | attention | FFN | norms | keys and values | KV heads |", "|---:|---|---|---|---|---:|"]
    return "\n".join([*head, *rows, "", "`sharing.yaml` says the same, and `plan` in `config.json` in full."])


def _row(i: int, layer: LayerPlan) -> str:
    def owner(slot: str) -> str:
        return _whose(i, layer.owner(slot))

    norms = " and ".join(dict.fromkeys([owner(ATTENTION_NORM), owner(FFN_NORM)]))
    kv = "its own" if layer.kv == i else f"reads layer {layer.kv}'s"
    return f"| {i} | {owner(ATTENTION[0])} | {owner(FFN[0])} | {norms} | {kv} | {layer.kv_heads} |"


def _whose(i: int, owner: int | None) -> str:
    return "its own" if owner == i else f"layer {owner}'s"


def _found(card: Card) -> str:
    text = f"Text: {card.data}." if card.data else ""
    command = f"```\n{card.command}\n```" if card.command else ""
    return "\n\n".join(part for part in (card.found, text, command) if part)
