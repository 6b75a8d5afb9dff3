"""What models write after prompts of the test text, for people: the text of a folded section.

Owns `Sample` and how samples are set. They are made where models are trained (`nas.search.jobs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

SAID = "What each model writes after three prompts of the test text, greedily; ⏎ is a new line"


@dataclass(frozen=True)
class Sample:
    """A prompt, what follows it in the text, and what a model writes after it."""

    prompt: str
    text: str
    written: str

    @staticmethod
    def read(row: Mapping[str, Any], tokenizer: Tokenizer) -> Sample:
        """The sample in a row of a training's result, which has tokens."""
        return Sample(*(tokenizer.decode(list(row[name]), skip_special_tokens=False) for name in ("prompt", "text", "written")))


Samples = Mapping[str, Sequence[Sample]]  # the samples of each model, by its label: the same prompts


def samples_text(samples: Samples) -> str:
    """A block for each prompt: the prompt, how the text goes on, and a line a model. Empty without samples."""
    models = {label: found for label, found in samples.items() if found}
    first = next(iter(models.values()), ())
    blocks = []
    for n, sample in enumerate(first):
        lines = {"prompt": sample.prompt, "the text": sample.text} | {label: found[n].written for label, found in models.items()}
        width = max(map(len, lines))
        blocks.append("\n".join(f"{name:<{width}}  {_line(text)}" for name, text in lines.items()))
    return "\n\n".join(blocks)


def _line(text: str) -> str:
    """A text in one line of what can be seen."""
    return "".join(c if c.isprintable() else "·" for c in text.replace("\n", "⏎").replace("\t", "⇥"))
