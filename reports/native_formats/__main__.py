"""Which architectures of transformers could hold a shared decoder natively: what each does that the decoder does not.

    python -m reports.native_formats > reports/native_formats/README.md       # half a minute

Found by searching `transformers/models` for kv_shared, shared_kv, kv_sharing_modes, kv_source_layers, share_kv, cla, loop,
recurrent, cycles, repeat, reuse, shared_transformer, num_hidden_groups and ties of one layer's weights to another's in
`_tied_weights_keys`. A candidate is tiny, with random weights far from zero, and every part that can be switched off is off. Then
one kind of weight is doubled. A pre-norm decoder's logits change by that. Where the candidate's do not, a norm stands behind that
weight: what it adds to the residual stream (or its values) has one size at every token, which a decoder's has not, and no choice
of weights takes the norm away, for its epsilon is that of all norms of the model.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from nas.export.hugging_face import hf_name
from nas.model.decoder import Decoder, init_weights
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig

FOUND = """\
- Of the architectures in transformers 5.24 none holds a config that shares anything exactly, so `nas export` has no native
  format.
- Formats that exist instead: `hf` carries its own modelling code, `torch` needs no transformers, `dense` materialises what
  plain Llama weights can express.
- Nearest are gemma3n and gemma4 (layers that read the last KV owner) and dory (loops over layers): each puts norms where a
  pre-norm decoder has none, and no choice of weights removes them.
- Exact, for sliding windows of one width alone, is ministral; it shares nothing.
- A weight under several names (`_tied_weights_keys`) is an attribute of a class and cannot be stated by a folder's
  config.json.
"""
"""What was found: the first lines of the page."""

SHAPE = ModelShape(64, 32, 4, 4, 48, num_key_value_heads=2, max_position_embeddings=64)
SIZES = {name: asdict(SHAPE)[name] for name in list(asdict(SHAPE))[:8]} | {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL = ["full_attention"] * 4
ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
LAYER_INPUT = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 2, "layer_types": FULL}
HYBRID = {"num_mem_blocks": 1, "attention_head_dim": 16, "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16}


@dataclass(frozen=True)
class Candidate:
    """A `model_type`, what of it could share, its settings, and the weights whose doubling changes nothing."""

    name: str
    shares: str
    verdict: str
    settings: dict[str, Any] = field(default_factory=dict)
    doubled: tuple[str, ...] = ()


CANDIDATES = (
    Candidate("llama", "nothing: the control", "what the decoder is without sharing", {}, ("o_proj", "v_proj", "down_proj")),
    Candidate(
        "gemma4_text",
        "`num_kv_shared_layers`: the last layers read the last owner below (`gemma3n`), `attention_k_eq_v`",
        "no: norms behind o_proj, down_proj and v_proj (`post_attention_layernorm`, `post_feedforward_layernorm`, `v_norm`)",
        LAYER_INPUT | {"rope_parameters": ROPE, "global_head_dim": 8, "hidden_activation": "silu"},
        ("o_proj", "v_proj", "down_proj"),
    ),
    Candidate(
        "gemma3n_text",
        "`num_kv_shared_layers`, as above",
        "no: the same norms; AltUp and Laurel besides",
        LAYER_INPUT | {"altup_num_inputs": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},
        ("o_proj", "v_proj", "down_proj"),
    ),
    Candidate(
        "dory",
        "`n_recurrent_loops` over a span of layers (`cycle`), one cache a loop or the last loop's alone",
        "no: the residual stream itself is normed (nGPT), and goes towards a normed update instead of adding it",
        {"layer_types": FULL, "rope_parameters": ROPE, "n_input_layers": 1, "n_output_layers": 1},
        ("o_proj", "down_proj", "embed_tokens"),
    ),
)


def made(candidate: Candidate) -> Any:
    """A tiny model with random weights."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(candidate.name, **SIZES | candidate.settings)).eval()
    return shaken(model)


def shaken(model: Any) -> Any:
    """The model, its weights moved far from where they begin."""
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return model


def change(model: Any, x: Tensor, weights: str, by: float = 2.0) -> float:
    """The largest change of the logits, beside the largest logit, when weights of that name are multiplied."""
    before = model(x).logits
    for name, weight in model.named_parameters():
        if name.endswith(f"{weights}.weight"):
            weight.data *= by
    return float((model(x).logits - before).abs().max() / before.abs().max())


def hrm(x: Tensor) -> str:
    """The state that comes out of each cycle has a root mean square of one."""
    model = made(Candidate("hrm_text", "", "", {"L_cycles": 1, "H_cycles": 2, "prefix_lm": False}))
    seen: list[Tensor] = []
    model.model.H_module.register_forward_hook(lambda _, __, out: seen.append(out))
    model(x)
    sizes = [state.pow(2).mean(-1).sqrt() for state in seen]
    return ", ".join(f"{size.min():.4f} to {size.max():.4f}" for size in sizes)


def zamba(x: Tensor) -> float:
    """What the shared block changes once the Mamba layers give nothing."""
    layers = {"layers_block_type": ["hybrid"] * 4, "mamba_ngroups": 1, "attention_hidden_size": 64}
    model = made(Candidate("zamba2", "", "", HYBRID | layers))
    change(model, x, "out_proj", 0.0)
    return change(model, x, "o_proj", 3.0)


def albert(x: Tensor) -> float:
    """How much the first token's logits change with the last token."""
    config = AutoConfig.for_model("albert", **SIZES | {"embedding_size": 16})
    return _by_last_token(shaken(AutoModelForMaskedLM.from_config(config).eval()), x)


def _by_last_token(model: Any, x: Tensor) -> float:
    before, other = model(x).logits[:, 0], x.clone()
    other[:, -1] = (other[:, -1] + 1) % SHAPE.vocab_size
    return float((model(other).logits[:, 0] - before).abs().max())


def ministral(x: Tensor) -> float:
    """The largest difference of a windowed decoder's logits from Ministral's with its weights."""
    config = SharingConfig.make(SHAPE, [{"window": 4}, {}, {"window": 4}, {}])
    model = shaken(init_weights(Decoder(SHAPE, config.resolve(SHAPE)), torch.Generator().manual_seed(0)))
    types = ["sliding_attention", "full_attention"] * 2
    rope = {"rope_type": "default", "rope_theta": SHAPE.rope_theta}
    settings = {"sliding_window": 4, "layer_types": types, "rms_norm_eps": SHAPE.rms_norm_eps, "rope_parameters": rope}
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("ministral", **SIZES | settings, tie_word_embeddings=True)
    ).eval()
    theirs.load_state_dict({hf_name(name): weight for name, weight in model.state_dict().items()}, strict=False)
    return float((theirs(x).logits - model(x)).abs().max())


def rows(x: Tensor) -> list[list[str]]:
    """The table."""
    found = []
    for candidate in CANDIDATES:
        effects = [f"{weights} {change(made(candidate), x, weights):.0e}" for weights in candidate.doubled]
        found.append([candidate.name, candidate.shares, f"logits change by (× 2): {', '.join(effects)}", candidate.verdict])
    measured: list[tuple[str, str, Callable[[Tensor], Any], str, str]] = [
        (
            "hrm_text",
            "two stacks run in cycles",
            hrm,
            "root mean square of the state after each cycle: {}",
            "no: each cycle ends in a norm of the residual stream, so the next does not go on from what it left",
        ),
        (
            "zamba2",
            "`num_mem_blocks` attention blocks, tied over hybrid layers (`zamba-shared`)",
            zamba,
            "logits change by (o_proj × 3, the Mamba layers giving nothing): {}",
            "no: what the shared block computes reaches the residual stream through Mamba alone; `zamba` likewise",
        ),
        (
            "albert",
            "`num_hidden_groups` of layers (`albert`)",
            albert,
            "the first token's logits change with the last token by {:.2f}",
            "no: attention is bidirectional, norms come after, there is no rotation",
        ),
        (
            "ministral",
            "nothing; `layer_types` with windows of one width",
            ministral,
            "largest difference from the decoder, which shares nothing and has the same windows: {:.0e}",
            "exact, for windows alone: sharing would be written out",
        ),
    ]
    for name, shares, probe, says, verdict in measured:
        found.append([name, shares, says.format(probe(x)), verdict])
    return found + READ


READ = [
    [
        "mistral_large4",
        "`kv_source_layers`: any layer reads an earlier owner's latent KV (`cla`)",
        "read: `kv_a_layernorm` stands between the projections of keys and values, one rotated key serves all heads",
        "no: the decoder's keys are rotated head by head, its values are not normed",
    ],
    [
        "inkling2_loop",
        "`loop_num_passes` over a span of layers",
        "read: each pass begins again from the state before the span, with messages of the pass before",
        "no: a looped decoder goes on from where it is; attention is by relative distance, not rotation",
    ],
    [
        "diffusion_gemma, gemma4_unified, gemma4_assistant",
        "`num_kv_shared_layers` of `gemma4_text`",
        "read: its layers and its norms",
        "no",
    ],
    [
        "any, by `per_layer_config`",
        "other numbers of KV heads, widths, windows, or a part skipped, by layer",
        "read: of text decoders, gemma4, step3p7, dots3_note and neomme build layers by it; Llama, Qwen and Mistral do not",
        "no: nothing is shared by it",
    ],
    [
        "any, by `_tied_weights_keys`",
        "one Parameter under several names",
        "read: an attribute of the class; a folder's config.json states none but `tie_word_embeddings`",
        "no, without code of its own in the folder, which `hf` has",
    ],
]


@torch.no_grad()
def main(argv: list[str]) -> int:
    """Print the page."""
    x = torch.randint(3, SHAPE.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    heading = "# Architectures of transformers that could hold a shared decoder natively\n\n" + FOUND
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}."
    table = rows(x)
    print(heading, (__doc__ or "").strip(), "", versions, "", sep="\n")
    print(CONCLUSION)
    print("| architecture | what it shares | what was seen | exact? |\n|---|---|---|---|")
    for row in table:
        print(f"| {' | '.join(row)} |")
    return 0


CONCLUSION = """**None is exact for a config that shares anything.** So `nas export` has no native format: `hf` carries its own
code, `torch` needs no transformers. A change in about 1e-6 is rounding, that is, none.
"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
