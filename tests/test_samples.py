"""What models write after prompts of the test text: greedy, the same each time, stored with a run and folded on its page."""

import json
import re
from html import unescape
from pathlib import Path

import torch
from exports import CONFIGS, COVERING, SHAPE, greedy, supernet, tokens
from tokenizers import Tokenizer

from nas.data import load_corpus
from nas.report.page import front_page
from nas.report.tables import Sample, samples_text
from nas.search.context import test_windows as windows_of
from nas.search.jobs import PROMPT, PROMPTS, read_model, write_samples
from nas.search.run import Run


@torch.no_grad()
def test_a_model_writes_its_likeliest_tokens_after_prompts_of_the_text() -> None:
    for name in COVERING:
        model = supernet(SHAPE, CONFIGS[name]).subnet(CONFIGS[name])
        for windows in (tokens(9, 13), tokens(1, 5), tokens(2, 80)):
            found = write_samples(model, windows)
            assert found == write_samples(model, windows)
            assert len(found) == PROMPTS
            for row, window in zip(found, windows[[0, (len(windows) - 1) // 2, -1]], strict=True):
                length = len(row["prompt"])
                assert length == min(PROMPT, windows.shape[1] // 2)
                assert row["prompt"] + row["text"] == window[: length + len(row["text"])].tolist()
                assert row["written"] == greedy(model, window[:length], len(row["written"])).tolist(), name
                assert 0 < len(row["text"]) <= len(row["written"]) < max(windows.shape[1], 2)


def test_a_run_keeps_samples_of_each_model_of_its_front_and_its_page_folds_them(supernet_run: Run) -> None:
    trial, front, page = supernet_run.trial(), supernet_run.front(), (supernet_run.folder / "front.html").read_text()
    corpus = load_corpus(trial.file.data, trial.space.shape.vocab_size, trial.base)
    windows, tokenizer = windows_of(trial, corpus), Tokenizer.from_str(corpus.tokenizer_json)
    folded = re.findall(r"<details><summary>.*?</summary><pre>(.*?)</pre></details>", page, re.DOTALL)
    samples = {m.label: supernet_run.samples(m.first) for m in front.configs}
    assert [unescape(text) for text in folded] == [samples_text(samples)]
    for m in front.configs:
        model = read_model(trial.space.shape, m.first.config, supernet_run.weights(m.first)).float()
        assert samples[m.label] == tuple(Sample.read(row, tokenizer) for row in write_samples(model, windows))
        assert f"\n{m.label}  " in unescape(folded[0])


def test_a_run_without_samples_has_a_page_without_them(supernet_run: Run, tmp_path: Path) -> None:
    evaluation = supernet_run.front().evaluations[0]
    run = Run(tmp_path)
    result = run.weights(evaluation).parent / "result.json"
    result.parent.mkdir(parents=True)
    (tmp_path / "tokenizer.json").write_text((supernet_run.folder / "tokenizer.json").read_text())
    assert run.samples(evaluation) == ()
    result.write_text(json.dumps({"perplexity": 3.0}))
    assert run.samples(evaluation) == ()
    for samples in (None, {}, {"dense": ()}):
        assert "<details>" not in front_page([evaluation], samples=samples)


def test_what_is_written_is_a_line_and_no_markup() -> None:
    text = samples_text({"a": [Sample("x\n\ty", "z", "<b>\x00\x1b[1m")], "longer": [Sample("x\n\ty", "z", "é\r\n")], "none": []})
    assert text == "prompt    x⏎⇥y\nthe text  z\na         <b>··[1m\nlonger    é·⏎"
    page = front_page([], samples={"a<": [Sample("<p>", "</pre>", "<script>")]})
    assert page.count("<details>") == 1
    assert "&lt;script&gt;" in page
    assert "&lt;/pre&gt;" in page
