"""What every export writes, whatever its format: the model, its tokenizer, its README for people, `provenance.json` for programs.

Owns `Artifact` and the files that all formats have in common. Numbers in the README are computed from the config, or were
measured by whoever gives the card.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from safetensors.torch import save_file
from torch import Tensor

from ..config import Document, Strict, build, dump_yaml, format_bytes, read_json
from ..pretrained import Family, FolderMetadata
from ..pretrained.files import CARD, LICENCES, WEIGHTS
from ..sharing.label import label
from ..sharing.memory import MemorySpec, measure
from ..sharing.picture import Picture, picture
from ..sharing.plan import MATRICES, Plan
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation, Part

CONFIG_JSON, MODEL_YAML = MARKERS = "config.json", "model.yaml"
"""A folder with a `sharing.yaml` and one of these is an export. They are the last to be written and the first to be removed."""

PROVENANCE = "provenance.json"
FIGURE = "front.png"  # the name of the card's figure in the folder


@dataclass(frozen=True)
class Provenance(Strict):
    """The search that found a model: its run and trial by name, and in MLflow the experiment, the search's run, the server's
    address and the model's own run. Empty where unknown."""

    run: str
    trial: str
    experiment: str = ""
    run_id: str = ""
    tracking_uri: str = ""
    model_run_id: str = ""

    @property
    def server(self) -> str:
        """MLflow's address without a password, if other machines can reach it; else empty."""
        return _without_password(self.tracking_uri) if self.tracking_uri.startswith(("http:", "https:")) else ""

    def save(self, folder: Path) -> None:
        """Write `provenance.json`. The folder is given to other people, so an address loses its user and password."""
        data = asdict(self) | {"tracking_uri": _without_password(self.tracking_uri)}
        (folder / PROVENANCE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Provenance | None:
        path = folder / PROVENANCE
        if not path.exists():
            return None
        return build(Provenance, Document(read_json(path, "delete it, or export the model again"), str(path)))


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


@dataclass(frozen=True)
class ModelCard:
    """What a README says beyond the config: how the model was found, on which text, and how good it is.

    `found` is a sentence, `command` what a person types to find the model again, `data` the text's source, `memory` the setting
    in which bytes are computed, `figure` a picture of what the model was chosen from, copied into the folder.
    """

    title: str = ""
    found: str = ""
    command: str = ""
    data: str = ""
    evaluation: Evaluation | None = None
    memory: MemorySpec = field(default_factory=MemorySpec)
    figure: Path | None = None
    provenance: Provenance | None = None


def readme(artifact: Artifact, usage: str, library: str) -> str:
    """The text of a README.md; the arguments are those of `common_texts`."""
    shape, config, card, licence = artifact.head_shape, artifact.config, artifact.card, artifact.metadata.licence
    has_weights = bool(artifact.weights)
    sections = {
        "Memory": _memory(shape, config, card.memory),
        "Quality": _quality(card, has_weights),
        "Use": usage.replace("DTYPE", card.memory.dtype),
        "What its layers share": _sharing(picture(shape, config, card.memory)),
        "How it was found": _found(card),
        "Licence": _licence(licence),
    }
    title = card.title or f"Decoder {label(config)}"
    front_matter: dict[str, Any] = {"library_name": library} if library else {}
    front_matter |= {**licence, "pipeline_tag": "text-generation", "tags": TAGS}
    front_matter |= _results(card, title) if has_weights else {}
    head = f"---\n{dump_yaml(front_matter)}---\n\n# {title}\n\n{_summary(shape, artifact.plan)} "
    head += f"Configuration `{label(config)}` (hash `{config.hash}`).\n"
    return head + "".join(f"\n## {title}\n\n{text.strip()}\n" for title, text in sections.items() if text.strip())


TAGS = ["neural-architecture-search", "parameter-sharing", "kv-cache-sharing"]


def _results(card: ModelCard, title: str) -> dict[str, Any]:
    """The evaluation in the Hub's form, unrounded; the last key of a front matter."""
    if card.evaluation is None:
        return {}
    losses, hub = card.evaluation.losses, re.search(r"\bhf:([\w.-]+/[\w.-]+)", card.data)
    metrics = {
        "perplexity": ("perplexity per token", losses.perplexity),
        "perplexity_standard_error": ("its standard error over the evaluation windows", losses.perplexity_standard_error),
        "bits_per_byte": ("bits per byte", card.evaluation.bits_per_byte),
    }
    dataset = {"type": hub[1] if hub else "text", "name": card.data or "text", "split": card.evaluation.part or "evaluation"}
    result = {
        "task": {"type": "text-generation", "name": "language modelling"},
        "dataset": dataset,
        "metrics": [{"type": kind, "name": name, "value": value} for kind, (name, value) in metrics.items()],
    }
    return {"model-index": [{"name": title, "results": [result]}]}


def _licence(licence: Mapping[str, str]) -> str:
    words = " ".join(f"`{value}`" for key, value in licence.items() if key != "license" or value != "other")
    return f"That of the model that it is made of: {words}." if words else ""


def without_results(text: str) -> str:
    """A README without the figures for programs: those of weights that are no more."""
    return re.sub(r"\A(---\n(?:.*\n)*?)model-index:\n(?:[ -].*\n)*?---\n", r"\1---\n", text)


def _summary(shape: ModelShape, plan: Plan) -> str:
    owners = [(n, owner, layer) for layer in plan.layers for n, owner in enumerate(layer.owners[: len(MATRICES)])]
    used = {(n, owner): layer for n, owner, layer in owners if owner is not None}
    projections = sum(owner is not None for _, owner, _ in owners)
    composed = sum(layer.factors[n] is not None for (n, _), layer in used.items())
    return (
        f"A Llama-style decoder: {len(plan.layers)} layers of width {shape.hidden_size}, whose {projections} projections use "
        f"{len(used)} matrices{f', {composed} of them composed of shared parts' if composed else ''}; {len(plan.kv_owners)} of "
        f"{len(plan.layers)} layers keep a KV cache."
    )


MEMORY_ROWS = {
    "weights": "weight_bytes",
    "KV cache": "kv_cache_bytes",
    "KV cache, for each token": "kv_bytes_per_token",
    "weights and KV cache": "memory_bytes",
}


def _memory(shape: ModelShape, config: SharingConfig, spec: MemorySpec) -> str:
    ours, dense = measure(shape, config, spec), measure(shape, SharingConfig.dense(shape), spec)
    rows = [
        f"| {words} | {format_bytes(getattr(ours, name))} | {format_bytes(getattr(dense, name))} |"
        for words, name in MEMORY_ROWS.items()
    ]
    lines = [
        f"In {spec.dtype}, for a context of {spec.context:,} tokens and a batch of {spec.batch}:",
        "",
        "| | this model | the same shape, nothing shared |",
        "|---|---:|---:|",
        f"| parameters | {ours.unique_params:,} | {dense.unique_params:,} |",
        *rows,
    ]
    return "\n".join(lines)


TRAINED = {
    "inherited": "With the weights of the search's supernet, not trained since; train it before you use it",
    "converted": "As converted from a checkpoint, not trained since",
    "retrained": "Trained from scratch for {tokens:,} tokens",
    "fine_tuned": "Initialised from a trained model, and trained for {tokens:,} tokens since",
    "zero_shot": "Initialised from a trained model, not trained since; train it before you use it",
}
"""What a README says of each kind of weights."""

HELD_OUT: dict[Part, str] = {
    "": "held-out evaluation text",
    "validation": "the validation part of the text, by which the search chose",
    "test": "the test part of the text, which was neither trained on nor chosen by",
}
"""What it says of each part of the text."""


def _quality(card: ModelCard, has_weights: bool) -> str:
    if card.evaluation is None:
        return ""
    losses, weights = card.evaluation.losses, TRAINED[card.evaluation.weights].format(tokens=card.evaluation.tokens)
    return (
        f"{weights}: perplexity {losses.perplexity:.4g} per token (standard error {losses.perplexity_standard_error:.2g}), "
        f"{card.evaluation.bits_per_byte:.4g} bits per byte, on {HELD_OUT[card.evaluation.part]}."
        + " These weights are not in this folder."
        * (not has_weights)
    )


def _sharing(content: Picture) -> str:
    rows = [["layer", "attention", "FFN", "KV cache", "also"], ["---:", *["---"] * 4]]
    for row in content.rows:
        tied = [segment for segment in row.attention if segment.how == "tied" and segment.detail.startswith("heads")]
        heads = (segment.detail.replace("its", f"layer {segment.owner}'s") for segment in tied)
        also = " · ".join(filter(None, (row.also, *heads)))
        rows.append([str(row.layer), row.block_words(0), row.block_words(1), row.reads, also])
    columns = 5 if any(row[-1] for row in rows[2:]) else 4
    table = [f"| {' | '.join(row[:columns])} |" for row in rows]
    embedding, head = content.ends
    words = f"`= layer 0` is layer 0's, kept once; all else is the layer's own. {embedding.capitalize()}; {head}."
    return "\n".join([*table, "", f"{words} `sharing.yaml` says the same."])


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
        f"`nas ui {shlex.quote(found.run)}` opens it."
    )


@dataclass(frozen=True, eq=False)
class Artifact:
    """A model to export.

    `weights` has the names and values of `Decoder(shape, plan)`'s state dict; a format without weights has none. `metadata` is
    carried on from the folder that the model comes from. `family` is the family of checkpoints in whose layout a dense model is
    written.
    """

    shape: ModelShape
    config: SharingConfig
    weights: Mapping[str, Tensor]
    tokenizer_json: str
    card: ModelCard
    metadata: FolderMetadata = field(default_factory=FolderMetadata)
    family: Family | None = None

    @cached_property
    def plan(self) -> Plan:
        return self.config.resolve(self.shape)

    @property
    def head_shape(self) -> ModelShape:
        """The shape with the plan's output head: a config may tie or untie it, whatever the shape says."""
        return replace(self.shape, tie_word_embeddings=self.plan.outside.tie_word_embeddings)

    @property
    def dtype(self) -> str:
        """The weights' dtype, by torch's name."""
        return str(next(iter(self.weights.values())).dtype).removeprefix("torch.")


def common_texts(artifact: Artifact, usage: str, library: str = "") -> dict[str, str]:
    """Name and text of the files that every format has. `usage` is the README's section on use, in which `DTYPE` becomes the
    card's; `library` loads the folder by itself."""
    licences = {name: text for name, text in artifact.metadata.texts.items() if name in LICENCES}
    own = {"sharing.yaml": artifact.config.to_yaml(), "tokenizer.json": artifact.tokenizer_json}
    return licences | {CARD: readme(artifact, usage, library)} | own


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write text files into a folder."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` into a folder that has a `sharing.yaml`, with the same permissions."""
    path = folder / WEIGHTS
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, path, {"format": "pt"})
    # safetensors creates the file without read permission for others.
    path.chmod((folder / "sharing.yaml").stat().st_mode)
