"""The README of an exported folder: what the model is, what it costs, and how it is used and was found.

Owns its text. The numbers are computed from the config, or were measured by whoever gives the card.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..config import format_bytes
from ..model.supernet import dense_config
from ..sharing.memory import Memory, MemorySpec, measure
from ..sharing.plan import ATTENTION, ATTENTION_NORM, FFN, FFN_NORM, MATRICES, ROUTER, EmbeddingPlan, LayerPlan
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation
from .provenance import Provenance


@dataclass(frozen=True)
class ModelCard:
    """What a README says that its model cannot: how it was found, on which text, and how good it was.

    `found` is a sentence, `command` what a person types to find it again, `data` the text's source, `memory` where the bytes
    in the README are measured, `figure` a picture of what it was chosen from, of which the folder gets a copy, `provenance` where
    it comes from for programs.
    """

    title: str = ""
    found: str = ""
    command: str = ""
    data: str = ""
    evaluation: Evaluation | None = None
    memory: MemorySpec = field(default_factory=MemorySpec)
    figure: Path | None = None
    provenance: Provenance | None = None


FIGURE = "front.png"
"""The figure's name in the folder."""


@dataclass(frozen=True)
class Usage:
    """What a format's README says of use: `text`, in which `DTYPE` becomes the card's; what `loads_it`, a library that does so by
    itself, if one does; whether the folder has `weights`."""

    text: str
    loads_it: str = ""
    weights: bool = True


def readme(shape: ModelShape, config: SharingConfig, card: ModelCard, usage: Usage) -> str:
    """The README.md of a model in a format that is used as `usage` says."""
    sections = {
        "Memory": _memory(shape, config, card.memory),
        "Quality": _quality(card, usage.weights),
        "Use": usage.text.replace("DTYPE", card.memory.dtype),
        "What its layers share": _sharing(shape, config),
        "How it was found": _found(card),
    }
    library = f"library_name: {usage.loads_it}\n" if usage.loads_it else ""
    head = f"---\n{library}{FRONT_MATTER}\n# {card.title or f'Decoder {config.hash}'}\n\n{_summary(shape, config)}\n"
    return head + "".join(f"\n## {title}\n\n{text.strip()}\n" for title, text in sections.items() if text.strip())


FRONT_MATTER = """pipeline_tag: text-generation
tags:
- neural-architecture-search
- parameter-sharing
- kv-cache-sharing
---
"""


def _summary(shape: ModelShape, config: SharingConfig) -> str:
    plan = config.resolve(shape)
    used = {
        (n, owner): layer for layer in plan.layers for n, owner in enumerate(layer.owners[: len(MATRICES)]) if owner is not None
    }
    projections = sum(owner is not None for layer in plan.layers for owner in layer.owners[: len(MATRICES)])
    composed = sum(layer.factors[n] is not None for (n, _), layer in used.items())
    return (
        f"A Llama-style decoder: {len(plan.layers)} layers of width {shape.hidden_size}, whose {projections} projections use "
        f"{len(used)} matrices{f', {composed} of them composed of shared parts' if composed else ''}; {len(plan.kv_owners)} of "
        f"{len(plan.layers)} layers keep a KV cache. Configuration `{config.hash}`."
    )


def _memory(shape: ModelShape, config: SharingConfig, spec: MemorySpec) -> str:
    dense = dense_config(shape)
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


def _quality(card: ModelCard, weights_are_here: bool) -> str:
    if card.evaluation is None:
        return ""
    losses = card.evaluation.losses
    weights = {
        "inherited": "With the weights of the search's supernet, which is how the search saw it; train it before you use it",
        "converted": "As converted from a checkpoint, without a step of training since",
        "retrained": f"Trained by itself for {card.evaluation.tokens:,} tokens",
        "fine_tuned": f"Begun with weights of a trained model, and trained for {card.evaluation.tokens:,} tokens since",
        "zero_shot": "Begun with weights of a trained model, and not trained since; train it before you use it",
    }[card.evaluation.weights]
    absent = "" if weights_are_here else " These weights are not in this folder."
    return (
        f"{weights}: perplexity {losses.perplexity:.4g} a token (standard error {losses.perplexity_standard_error:.2g}), "
        f"{card.evaluation.bits_per_byte:.4g} bits a byte, on evaluation text it never saw.{absent}"
    )


def _sharing(shape: ModelShape, config: SharingConfig) -> str:
    plan = config.resolve(shape)
    rows = [["layer", "attention", "FFN", "norms", "keys and values", "besides"], ["---:", *["---"] * 5]]
    for i, layer in enumerate(plan.layers):
        rows.append([str(i), _attention(i, layer), _ffn(shape, i, layer), _norms(i, layer), _read(i, layer), _besides(i, layer)])
    columns = 6 if any(row[-1] for row in rows[2:]) else 5
    table = [f"| {' | '.join(row[:columns])} |" for row in rows]
    whole = f"{_outside(plan.outside)} `sharing.yaml` says the same."
    return "\n".join([*table, "", whole])


def _outside(outside: EmbeddingPlan) -> str:
    rank = f"Tokens are embedded in {outside.embedding_rank} numbers and projected from there. " * bool(outside.embedding_rank)
    step = "A learned vector is added before each layer. " * outside.step_embedding
    return rank + step + ("The output head is the embedding." if outside.tie_word_embeddings else "The output head is its own.")


def _attention(i: int, layer: LayerPlan) -> str:
    """Whose projections: `its own`, or where they are of several layers `q layer 0's, v and o its own`."""
    owners: dict[int, list[str]] = {}
    for slot in ATTENTION:
        owner = layer.owner(slot)
        if owner is not None:
            owners.setdefault(owner, []).append(_short(slot))
    if len(owners) < 2:
        return next((_whose(i, owner) for owner in owners), "none")
    return ", ".join(f"{_list(names)} {_whose(i, owner)}" for owner, names in owners.items())


def _ffn(shape: ModelShape, i: int, layer: LayerPlan) -> str:
    owner = layer.owner(FFN[0])
    if owner is None:
        return "none"
    words = [_whose(i, owner)]
    if owner == i and layer.width != shape.intermediate_size:
        words.append(f"{layer.width} wide")
    if layer.experts:
        words.append(f"{layer.active_experts} of {layer.experts} experts, router {_whose(i, layer.owner(ROUTER))}")
    return ", ".join(words)


def _norms(i: int, layer: LayerPlan) -> str:
    owners = [layer.owner(ATTENTION_NORM), layer.owner(FFN_NORM)]
    return " and ".join(dict.fromkeys(_whose(i, owner) for owner in owners if owner is not None)) or "none"


def _read(i: int, layer: LayerPlan) -> str:
    """Whose keys and values the layer attends to, how many heads of its own they have, and how far back."""
    if layer.v is None:
        return "none"
    keys, values = _side(i, layer.k, layer.k_heads), _side(i, layer.v, layer.v_heads)
    if layer.attn_map is not None:
        text = f"softmax map layer {layer.attn_map}'s, values {values}"
    elif keys == values:
        text = keys + ", of earlier tokens" * layer.cyclic(i)
    else:
        text = f"keys {keys}, values {values}"
    return text + (f", the latest {layer.window:,} tokens" if layer.window else "")


def _side(i: int, owner: int | None, heads: int) -> str:
    return _whose(i, owner) + (f" ({heads} {'head' if heads == 1 else 'heads'})" if owner == i else "")


def _besides(i: int, layer: LayerPlan) -> str:
    """What its matrices are made of, what is added to them, and what its keys and values are made of."""
    groups: dict[tuple[str, int, int], list[str]] = {}
    for slot, factor in zip(MATRICES, layer.factors, strict=True):
        if factor is not None and layer.owner(slot) == i:
            groups.setdefault((factor.kind, factor.size, factor.at), []).append(_short(slot))
    words = [f"{_list(names)} composed of {_whose(i, at)} {kind} of {size}" for (kind, size, at), names in groups.items()]
    if layer.owner(ATTENTION[0]) == i:
        tied = [f"{head} ({at}.{of})" for head, (at, of) in enumerate(layer.heads) if at != i]
        words += [f"heads of other layers (layer.head): {', '.join(tied)}"] * bool(tied)
    words += [f"a correction of rank {layer.delta} to what is not its own"] * bool(layer.delta)
    made = _list(["keys"] * (layer.k == i) + ["values"] * (layer.v == i))
    words += [f"{made} made of layer {layer.kv_input}'s output"] * (layer.kv_input is not None)
    words += [f"{layer.value_residual:g} of layer 0's values in its own"] * bool(layer.value_residual)
    return "; ".join(words)


def _short(slot: str) -> str:
    return slot.rpartition(".")[2].removesuffix("_proj")


def _list(names: list[str]) -> str:
    """`q`, `q and k`, or `q, k and v`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _whose(i: int, owner: int | None) -> str:
    return "its own" if owner == i else f"layer {owner}'s"


def _found(card: ModelCard) -> str:
    text = f"Text: {card.data}." if card.data else ""
    command = f"```\n{card.command}\n```" if card.command else ""
    figure = f"![Memory against perplexity: what this model was chosen from]({FIGURE})" if card.figure else ""
    tracked = _tracked(card.provenance) if card.provenance and card.provenance.run_id else ""
    return "\n\n".join(part for part in (card.found, tracked, text, command, figure) if part)


def _tracked(found: Provenance) -> str:
    """Where MLflow has the search and this model."""
    server = f" of {found.server}" * bool(found.server)
    ours = f", run `{found.model_run_id}` of this model" * bool(found.model_run_id)
    return (
        f"In MLflow{server}: experiment `{found.experiment}`, run `{found.run_id}` of the search{ours}. "
        f"`nas ui {found.run}` opens it."
    )
