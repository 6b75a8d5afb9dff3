"""Laws of converting a dense model: exact where nothing is lost, of the size that was asked for, and fine-tuned by training."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import tiny
import torch
from commands import refused, said, told
from torch import Tensor

from nas.data import DataSpec, eval_sequences, load_corpus, train_batches
from nas.data.tokenizer import bytes_json
from nas.errors import UserError
from nas.export import ModelCard, export, load_export
from nas.model.decoder import Decoder, init_weights
from nas.model.supernet import standalone
from nas.presets import preset
from nas.pretrained.conversions import (
    METHODS,
    PretrainedModel,
    align_heads,
    choose,
    convert,
    find,
    fine_tune,
    require_dense,
    spell,
)
from nas.pretrained.conversions import layers as of_layers
from nas.pretrained.conversions.calibration import cosines, last_hidden, passes, residual_stream
from nas.pretrained.conversions.heads import fusing_order, head_distance, matches, reordered
from nas.pretrained.conversions.initialise import STARTS, low_rank, shared_basis, start_from, users
from nas.pretrained.conversions.layers import dissimilar_pairs
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.plan import ATTENTION, DOWN_PROJ, K_PROJ, MATRICES, O_PROJ, Q_PROJ, V_PROJ
from nas.sharing.shape import ModelShape, RotaryScaling
from nas.sharing.sharing_config import SharingConfig
from nas.training.evaluation import measure_losses
from nas.training.loop import Trainer, TrainSpec, plain_backward

MHA = ModelShape(vocab_size=257, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
SHAPES = {
    "mha": MHA,
    "gqa-untied": replace(MHA, num_key_value_heads=2, tie_word_embeddings=False),
    "all-families": replace(
        MHA, attention_bias=True, qk_norm=True, hidden_act="gelu_tanh", rotary_scaling=RotaryScaling("linear", factor=2.0)
    ),
    "six-layers-wide-heads": replace(MHA, num_hidden_layers=6, head_dim=12, vocab_size=300),
}
FAMILIES_FIRST = [name if name == "all-families" else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
QUICK_SHAPES = pytest.mark.parametrize("shape_name", FAMILIES_FIRST)
FINE_TUNE = TrainSpec(steps=40, batch=8, seq=32, learning_rate=2e-3, autocast=False)


@pytest.fixture(scope="module")
def text() -> tuple[Tensor, Tensor]:
    """Real text to train on, and windows of its end to measure on."""
    corpus = load_corpus(DataSpec(text="python", max_bytes=200_000), 257, Path())
    return corpus.train, eval_sequences(corpus.eval, 32, 48)


@pytest.fixture(scope="module")
def trained(text: tuple[Tensor, Tensor]) -> Callable[[str], PretrainedModel]:
    """`trained(shape)`: a dense model of that shape, each trained once, a few steps, so that its weights matter."""
    made: dict[str, PretrainedModel] = {}

    def train(name: str) -> PretrainedModel:
        if name not in made:
            generator = torch.Generator().manual_seed(0)
            model = init_weights(Decoder(SHAPES[name], SharingConfig.dense(SHAPES[name]).resolve(SHAPES[name])), generator)
            spec = TrainSpec(steps=80, batch=8, seq=32, learning_rate=1e-2, autocast=False)
            for _ in Trainer(model, spec, generator).run(train_batches(text[0], 8, 32, generator), plain_backward(model, spec)):
                pass
            made[name] = PretrainedModel(model.requires_grad_(False), calibration(text))
        return made[name]

    return train


def calibration(text: tuple[Tensor, Tensor]) -> Tensor:
    return next(train_batches(text[0], 12, 32, torch.Generator().manual_seed(1)))[:, :-1]


def perplexity(model: Decoder, windows: Tensor) -> float:
    return measure_losses(model, windows, autocast=False).perplexity


def bold(shape: ModelShape = MHA) -> PretrainedModel:
    """A dense model whose every weight tells."""
    generator = torch.Generator().manual_seed(4)
    model = Decoder(shape, SharingConfig.dense(shape).resolve(shape)).requires_grad_(False)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + noise / 3 if weight.ndim == 1 else noise / weight.shape[1] ** 0.5)
    return PretrainedModel(model, tiny.tokens(shape, 6, 16))


def changed(dense: PretrainedModel, **weights: Tensor) -> PretrainedModel:
    return dense.with_weights(dense.weights | weights)


def name_of(i: int, slot: str) -> str:
    return f"layers.{i}.{slot}.weight"


def made(name: str, dense: PretrainedModel, size: str | None = None, start: str | None = None) -> tuple[SharingConfig, Decoder]:
    """A method's config and model; of the usual size and start by default."""
    method = find(name)
    config = choose(method, dense, method.read_size(dense.shape, size))
    return config, convert(method, dense, config, method.read_start(start))


def same_logits(one: Decoder, other: Decoder, tolerance: float = 1e-4) -> bool:
    rows = tiny.tokens(one.shape, 3, 13, seed=5)
    expected = tiny.logits(one, rows)
    return torch.allclose(tiny.logits(other, rows), expected, atol=tolerance * expected.abs().max().item(), rtol=0)


# --- nothing lost where nothing is to lose


@QUICK_SHAPES
def test_deltas_of_full_rank_make_up_for_everything_shared(shape_name, trained):
    dense = trained(shape_name)
    model = made("relaxed-recursive", dense, f"2x{dense.shape.hidden_size}", "lower")[1]
    assert same_logits(dense.model, model)
    assert not same_logits(dense.model, made("relaxed-recursive", dense, "2x1", "lower")[1])


def test_a_basis_of_full_rank_loses_nothing(trained):
    dense = trained("all-families")
    for groups in (1, 2, 3, 4):
        assert same_logits(dense.model, made("basis", dense, f"{groups}x{MHA.hidden_size}")[1])
        assert not same_logits(dense.model, made("basis", dense, f"{groups}x2")[1])


def equal_heads(dense: PretrainedModel, like: list[int]) -> PretrainedModel:
    """The model with KV head h a copy of head `like[h]` in every layer."""
    found = {}
    for i in range(dense.shape.num_hidden_layers):
        for slot in (K_PROJ, V_PROJ):
            heads = dense.matrix(i, slot).unflatten(0, (dense.shape.num_key_value_heads, -1))
            found[name_of(i, slot)] = heads[like].flatten(0, 1)
    return changed(dense, **found)


def test_groups_of_equal_heads_become_one_exactly():
    dense = equal_heads(bold(), [0, 0, 2, 2])
    assert same_logits(dense.model, made("gqa", dense, "2")[1])
    assert not same_logits(dense.model, made("gqa", dense, "1")[1])


def test_equal_heads_find_one_another_wherever_they_are():
    dense = equal_heads(bold(), [0, 1, 0, 1])
    assert same_logits(dense.model, made("dha", dense, "2x2")[1])
    assert not same_logits(dense.model, made("gqa", dense, "2")[1])


@QUICK_SHAPES
def test_the_order_of_heads_changes_no_logit(shape_name, trained):
    dense = trained(shape_name)
    count, generator = dense.shape.num_key_value_heads, torch.Generator().manual_seed(2)
    orders = [torch.randperm(count, generator=generator).tolist() for _ in range(dense.shape.num_hidden_layers)]
    model = dense.with_weights(reordered(dense.weights, dense.shape, orders)).model
    assert any(order != sorted(order) for order in orders)
    assert same_logits(dense.model, model)


def test_the_order_of_heads_is_the_one_that_loses_least():
    flat = torch.tensor([[0.0, 0], [9, 9], [0, 1], [9, 8], [0, 5], [9, 5]]).double()
    order = fusing_order([(flat, 2)], 6)
    assert {frozenset(order[:3]), frozenset(order[3:])} == {frozenset({0, 2, 4}), frozenset({1, 3, 5})}
    assert fusing_order([(flat, 6), (flat, 1)], 6) == [0, 1, 2, 3, 4, 5]


def test_a_head_that_is_another_is_the_one_that_is_tied():
    dense = bold()
    dim, copies = MHA.head_dim, {}
    for slot in ATTENTION:
        mine, theirs = dense.matrix(3, slot).clone(), dense.matrix(1, slot)
        if slot == O_PROJ:
            mine[:, 2 * dim : 3 * dim] = theirs[:, :dim]
        else:
            mine[2 * dim : 3 * dim] = theirs[:dim]
        copies[name_of(3, slot)] = mine
    for head, slot in ((0, Q_PROJ), (3, K_PROJ)):  # and two that are equal in one half only
        copies[name_of(3, slot)][head * dim : (head + 1) * dim] = dense.matrix(2, slot)[:dim]
    dense = changed(dense, **copies)
    assert [match.cosine > 0.999 for match in matches(dense)] == [True] + [False] * 11
    config, model = made("headwise-direct", dense, "6")  # 6% of 16 heads is one
    assert config == SharingConfig.make(MHA, [{}, {}, {}, {"heads": "2=1.0"}])
    assert same_logits(dense.model, model)


def idle(dense: PretrainedModel, *layers: int) -> PretrainedModel:
    """The model with layers that add nothing to the residual stream."""
    return changed(dense, **{name_of(i, slot): dense.matrix(i, slot) * 0 for i in layers for slot in (O_PROJ, DOWN_PROJ)})


def test_layers_that_do_nothing_are_the_ones_that_go():
    for name, layers in product(["drop", "merge-layers"], [(1,), (3,), (1, 2)]):
        dense = idle(bold(), *layers)
        config, model = made(name, dense, str(len(layers)))
        assert config == SharingConfig.make(MHA, [{"drop": "both"} if i in layers else {} for i in range(4)])
        assert same_logits(dense.model, model)


def test_folding_is_exact_where_a_layer_is_idle_and_a_pair_alike():
    dense = idle(bold(), 2)
    dense = changed(dense, **{name_of(1, slot): dense.matrix(0, slot) for slot in MATRICES})
    config, model = made("foldgpt", dense, "1")
    assert config == SharingConfig.make(MHA, [{}, {"tie": 0}, {"drop": "both"}, {}])
    assert same_logits(dense.model, model)


def test_a_layer_whose_attention_says_nothing_can_read_any_other():
    dense = bold()
    loud = {name_of(3, slot): dense.matrix(3, slot) * 30 for slot in (K_PROJ, V_PROJ)}
    dense = changed(dense, **loud, **{name_of(3, O_PROJ): dense.matrix(3, O_PROJ) * 0})
    config, model = made("kvsharer", dense, "1")
    assert dict(config.layers[3]).keys() == {"kv"}
    assert same_logits(dense.model, model)


def test_layers_that_differ_in_their_norms_alone_tie_exactly():
    for name, start in product(["sequence", "cycle", "relaxed-recursive"], STARTS):
        dense = bold()
        first = {"sequence": [0, 0, 2, 2]}.get(name, [0, 1, 0, 1])
        first = [0, 0, 0, 0] if start == "stepwise" else first  # it takes other layers than those that use the block
        dense = changed(dense, **{name_of(i, slot): dense.matrix(first[i], slot) for i in range(4) for slot in MATRICES})
        size = "2x1" if name == "relaxed-recursive" else "2"
        assert same_logits(dense.model, made(name, dense, size, start)[1])


# --- how sharing is chosen, and shared weights are initialised


def test_a_mean_counts_all_layers_and_heads_alike():
    dense = bold()
    config, model = made("mlkv", dense, "1x2")
    assert users(config.resolve(MHA), 0, K_PROJ) == [0, 1, 2, 3]
    for slot in (K_PROJ, V_PROJ):
        heads = torch.stack([dense.matrix(i, slot).unflatten(0, (4, -1)) for i in range(4)])  # layer, head, dim, hidden
        expected = torch.stack([heads[:, :2].mean((0, 1)), heads[:, 2:].mean((0, 1))]).flatten(0, 1)
        assert torch.allclose(model.state_dict()[name_of(0, slot)], expected, atol=1e-6)


def test_starts_are_the_lowest_layer_those_spread_over_the_depth_and_the_mean():
    dense, config = bold(replace(MHA, num_hidden_layers=6)), preset("cycle-2", replace(MHA, num_hidden_layers=6))
    found = {start: [start_from(dense, config, start)[name_of(i, Q_PROJ)] for i in (0, 1)] for start in STARTS}
    wanted = [dense.matrix(i, Q_PROJ) for i in range(6)]
    assert torch.equal(found["lower"][1], wanted[1])
    assert torch.equal(found["stepwise"][0], wanted[0])
    assert torch.equal(found["stepwise"][1], wanted[5])
    assert torch.allclose(found["average"][1], (wanted[1] + wanted[3] + wanted[5]) / 3, atol=1e-6)


def test_a_correction_is_the_nearest_of_its_rank():
    matrix = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    lost = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 7, 9):
        b, a = low_rank(matrix, rank)
        assert (b.shape, a.shape) == ((12, rank), (rank, 7))
        assert (matrix - b @ a).norm().item() == pytest.approx(lost[rank:].norm().item(), abs=1e-5)


def test_a_basis_is_the_best_for_the_text_it_is_weighed_by(trained):
    dense = trained("mha")
    moment = dense.moments[1, Q_PROJ]
    matrices = [dense.matrix(i, Q_PROJ) for i in (0, 1)]

    def lost(moment_used: Tensor) -> float:
        """Mean square of what the outputs lose on the calibration text."""
        coefficients, basis = shared_basis(matrices, moment_used, 8)
        apart = [(w - c @ basis).double() for w, c in zip(matrices, coefficients, strict=True)]
        return sum(torch.einsum("oi,ij,oj->", d, moment, d).item() for d in apart)

    assert lost(moment) < 0.9 * lost(torch.eye(len(moment)).double())


def test_what_is_measured_is_the_models_own_stream_and_inputs(trained):
    dense = trained("all-families")
    stream = residual_stream(dense.model, dense.calibration)[0]
    assert torch.equal(dense.model.norm(stream[-1]), dense.model.hidden(dense.model.embed(dense.calibration)))
    found = cosines(passes(dense.model, dense.calibration))
    assert torch.allclose(found.diagonal(), torch.ones(5).double())
    assert found[1, 3].item() == pytest.approx(torch.cosine_similarity(stream[1], stream[3], dim=-1).mean().item(), rel=1e-5)
    inputs = dense.model.part(2, "input_layernorm")(stream[2]).flatten(0, 1).double()
    moments = dense.moments
    assert torch.allclose(moments[2, Q_PROJ], inputs.T @ inputs / len(inputs), atol=1e-6)


def test_kv_is_shared_between_the_most_unlike_layers_that_bear_it(trained):
    dense = trained("mha")
    pairs = dissimilar_pairs(dense)
    assert sorted(pairs) == [(later, earlier) for later in range(4) for earlier in range(later)]
    config, model = made("kvsharer", dense, "1")
    borne = next(pair for pair in pairs if last_cosine(dense, tie_kv(dense, *pair)) > 0.5)
    assert config == SharingConfig.make(MHA, [{"kv": borne[1]} if i == borne[0] else {} for i in range(4)])
    assert last_cosine(dense, model) > 0.5


def last_cosine(dense: PretrainedModel, model: Decoder) -> float:
    states = (last_hidden(one, passes(one, dense.calibration)) for one in (dense.model, model))
    return torch.cosine_similarity(*states).mean().item()


def again(dense: PretrainedModel) -> PretrainedModel:
    return PretrainedModel(dense.model, dense.calibration)


def test_few_pairs_are_tried_and_the_message_says_how_many(trained, monkeypatch):
    dense, made_passes = again(trained("mha")), []
    monkeypatch.setattr(of_layers, "LEAST_COSINE", 2.0)
    monkeypatch.setattr(of_layers, "TRIES", 2)
    monkeypatch.setattr(of_layers, "passes", lambda *given: made_passes.append(given) or passes(*given))
    for _ in range(2):  # the second time it is known
        refused(lambda: made("kvsharer", dense, "1"), "only 0 layers can ", " (2 of 6 pairs were tried); use another method")
    assert len(made_passes) == 1 + 2


def test_sizes_of_a_method_share_what_they_find(trained, monkeypatch):
    """The first layers to go are the same for all sizes, and each is found once."""
    dense, made_passes = again(trained("mha")), []
    monkeypatch.setattr(of_layers, "passes", lambda *given: made_passes.append(given) or passes(*given))
    for size in ("1", "3", "2"):
        made("drop", dense, size)
    assert len(made_passes) == 3
    for size in ("2", "1"):
        made("merge-layers", dense, size)
    assert len(made_passes) == 3 + 2


def test_only_what_is_above_a_change_runs_again(trained):
    dense = trained("six-layers-wide-heads")
    tied = dense.subnet(SharingConfig.make(dense.shape, [{}, {}, {}, {"kv": 1}, {}, {}]))
    known, ran = passes(dense.model, dense.calibration), []
    handles = [tied.part(i, "input_layernorm").register_forward_pre_hook(lambda *given, i=i: ran.append(i)) for i in range(6)]
    found = passes(tied, dense.calibration, known, 3)
    for handle in handles:
        handle.remove()
    assert sorted(set(ran)) == [3, 4, 5]
    for (stream, state), (whole, its) in zip(found, passes(tied, dense.calibration), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(stream, whole, strict=True))
        assert all(torch.equal(state.values[i], its.values[i]) for i in its.values)


def tie_kv(dense: PretrainedModel, later: int, earlier: int) -> Decoder:
    layers = [{"kv": earlier} if i == later else {} for i in range(dense.shape.num_hidden_layers)]
    return dense.subnet(SharingConfig.make(dense.shape, layers))


def test_a_hidden_state_that_no_reader_bears_is_said_with_what_can_be():
    with pytest.raises(UserError, match=r"kvsharer 3: only \d layers can read.*; use"):
        made("kvsharer", bold(), "3")


def test_pairs_that_will_be_tied_are_drawn_together(trained, text):
    dense, method = trained("mha"), find("headwise-post")
    plan = choose(method, dense, (25,)).resolve(MHA)
    model = Decoder(MHA, dense.model.plan)
    model.load_state_dict(dense.weights)
    before = head_distance(model, plan).item()
    for _ in align_heads(model, lambda m: head_distance(m, plan), FINE_TUNE, text[0], torch.Generator()):
        pass
    assert head_distance(model, plan).item() < 0.8 * before


# --- of the size that was asked for


def tied_heads(config: SharingConfig) -> int:
    return sum(len(dict(layer).get("heads", "").split()) for layer in config.layers)


def having(config: SharingConfig, primitive: str) -> int:
    """The number of layers that use a primitive."""
    return sum(primitive in dict(layer) for layer in config.layers)


def is_of_size(name: str, shape: ModelShape, config: SharingConfig, numbers: tuple[int, ...]) -> bool:
    """Whether a method's config shares as much as its size says; the preset of its name and size does, where there is one."""
    depth, size = shape.num_hidden_layers, numbers[0]
    if name.startswith("headwise"):
        return tied_heads(config) == max(1, size * depth * shape.num_attention_heads // 100)
    if name == "kvsharer":
        return having(config, "kv") == size
    if name in ("drop", "merge-layers", "foldgpt"):
        return having(config, "drop") == size and having(config, "tie") == (depth - size) // 2 * (name == "foldgpt")
    return config == preset(f"{name}-{spell(numbers)}", shape)


def usual(name: str, shape: ModelShape) -> tuple[int, ...]:
    """The usual size, or the one that fits where the usual ones do not: two KV heads become one."""
    try:
        return METHODS[name].usual(shape)
    except UserError:
        return (1,)


@QUICK_SHAPES
def test_a_conversion_shares_what_its_size_says_and_leaves_the_dense_model_alone(shape_name, trained, text):
    dense = trained(shape_name)
    shape, before = dense.shape, {name: weight.clone() for name, weight in dense.model.state_dict().items()}
    for name in METHODS:
        if name.startswith("headwise") and "gqa" in shape_name:
            continue
        numbers = usual(name, shape)
        (config, model), again = made(name, dense, spell(numbers)), made(name, dense, spell(numbers))
        assert config == again[0]
        assert all(torch.equal(model.state_dict()[key], weight) for key, weight in again[1].state_dict().items())
        memory = measure(shape, config, MemorySpec(dtype="float32"))
        assert sum(p.numel() * 4 for p in model.parameters()) == memory.weight_bytes
        assert is_of_size(name, shape, config, numbers), name
        assert perplexity(model, text[1]) < 256, name  # that of knowing nothing
        assert not {w.data_ptr() for w in standalone(model).parameters()} & {w.data_ptr() for w in dense.model.parameters()}
    assert all(torch.equal(before[key], weight) for key, weight in dense.model.state_dict().items())


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "gqa" else pytest.mark.slow) for n in METHODS])
def test_fine_tuning_lowers_perplexity(name, trained, text):
    model = made(name, trained("mha"))[1]
    before = perplexity(model, text[1])
    for _ in fine_tune(model, FINE_TUNE, text[0], torch.Generator().manual_seed(3)):
        pass
    assert perplexity(model, text[1]) < before


def test_distillation_brings_the_model_nearer_to_the_dense_one(trained, text):
    dense = trained("mha")
    model = made("gqa", dense, "1")[1]

    def apart() -> float:
        with torch.no_grad():
            ours, theirs = (m(text[1][:, :-1]).log_softmax(-1) for m in (model, dense.model))
        return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean").item()

    before = apart()
    for _ in fine_tune(model, FINE_TUNE, text[0], torch.Generator().manual_seed(3), dense.model):
        pass
    assert apart() < 0.7 * before


# --- from folder to folder


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    """A dense model's export."""
    dense = trained("mha")
    config = SharingConfig.of_plan(MHA, dense.model.plan)
    return export(dense.model, config, bytes_json(), tmp_path_factory.mktemp("exports") / "dense", ModelCard())


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A text file of lines of one length, of which the last tenth is for evaluation."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("".join(f"line {n:5d} of the text\n" for n in range(3000)))
    return path


QUICK = ("--fine-tune", 4, "--batch", 4, "--seq", 32, "--windows", 16, "--calibration", 4)


def test_the_command_writes_a_model_and_prints_the_losses_of_each_stage(folder, written, tmp_path):
    words = ("convert", folder, "--method", "gqa", "--size", 2, "--text", written, *QUICK, "--distill")
    found = told(*words, "--to", tmp_path / "gqa")
    assert [stage["stage"] for stage in found["stages"]] == ["dense", "converted", "fine_tuned"]
    loaded = load_export(tmp_path / "gqa")
    assert loaded.config == preset("gqa-2", MHA)
    assert loaded.config.hash == found["hash"]
    corpus = load_corpus(DataSpec(text=str(written)), 257, Path())
    windows = eval_sequences(corpus.eval, 32, 16)
    assert measure_losses(loaded.model, windows).perplexity == pytest.approx(found["stages"][2]["perplexity"], rel=1e-3)
    assert found["stages"][2]["perplexity"] < found["stages"][1]["perplexity"]
    assert found["stages"][1]["kv_cache_bytes"] * 2 == found["stages"][0]["kv_cache_bytes"]
    assert "gqa" in (tmp_path / "gqa" / "README.md").read_text()
    table = said(*words, "--to", tmp_path / "again")
    assert all(f"{stage['perplexity']:.3f}" in table for stage in found["stages"])


@pytest.mark.parametrize("name", [pytest.param("basis", marks=pytest.mark.slow), "kvsharer", "headwise-post"])
def test_the_evaluation_text_is_used_for_nothing_else(name, folder, written, tmp_path):
    lines = written.read_text().splitlines(keepends=True)
    other = tmp_path / "other.txt"
    other.write_text("".join([*lines[:2700], *(line.upper() for line in lines[2700:])]))
    weights = []
    for text in (written, other):
        to = tmp_path / text.stem
        said("convert", folder, "--method", name, "--text", text, "--to", to, *QUICK, *(["--align", 3] * name.endswith("post")))
        weights.append(load_export(to).model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_model_in_half_precision_is_converted_in_float32(trained, written, tmp_path):
    dense = trained("gqa-untied")
    half = Decoder(dense.shape, dense.model.plan)
    half.load_state_dict(dense.weights)
    config = SharingConfig.of_plan(dense.shape, half.plan)
    folder = export(half.to(torch.bfloat16), config, bytes_json(), tmp_path / "half", ModelCard())
    said("convert", folder, "--method", "drop", "--text", written, "--to", tmp_path / "drop", *QUICK, "--fine-tune", 0)
    loaded = load_export(tmp_path / "drop")
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    assert loaded.config.layers.count((("drop", "both"),)) == 1


def test_the_list_names_every_method():
    out = said("convert", "--methods")
    assert all(row.name in out and row.paper in out and row.meaning in out for row in METHODS.values())


BAD = [
    (["--method", "gqaa"], "did you mean gqa"),
    (["--size", "two"], "such as 2"),
    (["--size", "2x2"], "give g"),
    (["--size", "9"], "use 1 to 4"),
    (["--size", "3"], "use 1, 2 or 4"),
    (["--method", "drop", "--size", "4"], "use 1 to 3"),
    (["--method", "basis", "--size", "2x33"], "use 1 to 32"),
    (["--method", "headwise-direct", "--size", "90"], "use 1 to 56"),
    (["--method", "cycle", "--init", "averge"], "did you mean average"),
    (["--init", "lower"], "leave it out"),
    (["--align", "3"], "headwise-post"),
    (["--learning-rate", "0"], "learning_rate"),
    (["--fine-tune", "-1"], "fine_tune"),
    (["--seq", "100000"], "use a longer text"),
    (["--seed", "-1"], "seed: -1 is too small"),
    (["--seed", str(10**22)], "seed: 10000000000000000000000 is too large"),
    (["--text", "nowhere.txt"], "nowhere.txt"),
    (["--learning-rate", "1e30"], "use a lower learning rate"),
]


def test_a_mistake_is_one_line_and_nothing_is_written(folder, written, tmp_path):
    for words, says in BAD:
        options = {"--method": "gqa", "--text": written, "--to": tmp_path / "to", "--fine-tune": 4, "--batch": 4, "--windows": 4}
        options |= dict(zip(words[::2], words[1::2], strict=True))
        refused(lambda options=options: said("convert", folder, *(word for pair in options.items() for word in pair)), says)
        assert list(tmp_path.iterdir()) == []


def test_a_model_that_shares_already_is_refused(folder, written, tmp_path):
    said("convert", folder, "--method", "gqa", "--text", written, "--to", tmp_path / "gqa", *QUICK, "--fine-tune", 0)
    words = ("convert", tmp_path / "gqa", "--method", "drop", "--text", written, "--to", tmp_path / "again", *QUICK)
    refused(lambda: said(*words), "it shares already")


def test_only_a_config_that_shares_nothing_is_dense():
    require_dense(SharingConfig.make(MHA, [{}] * 4), "")
    for shared in ({"norms": "tied", "layers": [{}, {"ffn": 0}, {}, {}]}, {"embedding_rank": 4}, {"step_embedding": True}):
        layers = shared.pop("layers", [{}] * 4)
        with pytest.raises(UserError, match="shares already"):
            require_dense(SharingConfig.make(MHA, layers, **shared), "")


def test_no_folder_is_written_over(folder, written, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    before = (folder / "config.json").read_bytes()
    for to in (folder, tmp_path):
        with pytest.raises(UserError, match=r"another folder|not empty"):
            said("convert", folder, "--method", "gqa", "--text", written, "--to", to, *QUICK)
    assert (folder / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_single_heads_of_grouped_ones_cannot_be_tied(trained):
    refused(lambda: made("headwise-direct", trained("gqa-untied")), "single heads cannot be tied")
