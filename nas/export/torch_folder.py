"""The format `torch`: one Python file, which is the whole model, and its weights; it needs torch and safetensors alone.

Owns how that file is assembled from this package's own sources, so that there is one forward.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..data.tokenizer import bytes_json
from ..model import attention, decoder
from ..sharing import plan, shape
from .card import CONFIG_JSON, Artifact, common_texts, write_texts, write_weights
from .hugging_face import config_json, special_ids

USAGE = """
With torch and safetensors, and `tokenizers` if `tokenizer.json` is not of bytes. `model.py` is the whole model: read it, change
it, copy it to where you need it.

```
python model.py "The " --tokens 100
```

```python
import torch

from model import end_tokens, generate, load, tokenizer

folder = "."  # where this file is
model = load(folder)  # a torch.nn.Module: model(tokens) gives logits (batch, seq, vocab) of tokens (batch, seq)
encode, decode = tokenizer(folder)
tokens = torch.tensor([encode("The ")])
print(decode(generate(model, tokens, 100, temperature=0.8, ends=end_tokens(folder))[0].tolist()))
```

It trains like any other module:

```python
import torch
from torch.nn import functional as F

from model import load, save, tokenizer

folder = "."  # where this file is
model = load(folder).float()
encode, decode = tokenizer(folder)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
text = torch.tensor(encode("In the beginning there was the text that you put here. " * 200))
for step in range(10):
    starts = torch.randint(len(text) - 65, (8,))
    rows = torch.stack([text[start : start + 65] for start in starts])  # (batch, seq + 1)
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
save(model, "trained", folder)  # a folder like this one
```

The project that made it can evaluate it:

```
nas eval . --text FILE
```
"""

HEADER = '''"""A decoder whose layers share weights and what attention computes, in one file, on torch and safetensors.

`load(folder)` returns the model in a folder, `python model.py "prompt"` continues a text. `config.json` holds the model's shape
and its `Plan`: which layer owns each weight, and whose keys and values each layer reads.
"""
'''


def write_torch(artifact: Artifact, folder: Path) -> Artifact:
    """Fill an empty folder with `model.py`, which loads it, and what it loads; the weights have the decoder's own names."""
    bytewise = any(json.loads(artifact.tokenizer_json) == json.loads(bytes_json(end)) for end in (True, False))
    head = {"format": "torch", "tokenizer": "bytes" if bytewise else "tokenizer.json"}
    config = config_json(artifact, head, special_ids(artifact.tokenizer_json, artifact.metadata))
    texts = {"model.py": one_file(), CONFIG_JSON: config}
    write_texts(folder, texts | common_texts(artifact, USAGE))
    write_weights(folder, artifact.weights)
    return artifact


def one_file() -> str:
    """The text of `model.py`: the shape's fields, the plan, the decoder and `standalone_nas`, without imports of one another."""
    parts = [_Source(Path(str(file))) for file in (shape.__file__, plan.__file__, attention.__file__, decoder.__file__)]
    parts.append(_Source(Path(__file__).parent / "standalone_nas.py"))
    bodies = ["\n\n\n".join(parts[0].data_classes()), *(part.body() for part in parts[1:])]
    imports = _imports([("dataclasses", "dataclass"), *(pair for part in parts[1:] for pair in part.imported())])
    text = "\n\n\n".join([f"{HEADER}\n{imports}", *bodies]) + "\n"
    return text


class _Source:
    """A source file, and the parts of it that are copied."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self.nodes, self.lines = ast.parse(text).body, text.splitlines()

    def imported(self) -> Iterator[tuple[str, str]]:
        """Module and name of its imports from other packages; no name where the module itself is imported."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((ast.unparse(alias), "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module != "__future__":
                yield from ((str(node.module), ast.unparse(alias)) for alias in node.names if alias.name != "TYPE_CHECKING")

    def body(self) -> str:
        """The text without its docstring and its imports."""
        dropped: set[int] = set()
        for n, node in enumerate(self.nodes):
            imports = isinstance(node, ast.Import | ast.ImportFrom)
            if imports or (n == 0 and isinstance(node, ast.Expr)) or _for_type_checkers(node):
                dropped.update(range(node.lineno - 1, node.end_lineno or 0))
        return "\n".join(line for n, line in enumerate(self.lines) if n not in dropped).strip("\n")

    def data_classes(self) -> Iterator[str]:
        """Its data classes with their fields. Defaults and checks are left out: `config.json` states every field, and was
        checked when it was written."""
        for node in self.nodes:
            if isinstance(node, ast.ClassDef):
                says = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", "\n    ")
                fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
                lines = [f"    {ast.unparse(n.target)}: {_unbounded(n.annotation)}" for n in fields]
                yield "\n".join(["@dataclass(frozen=True)", f"class {node.name}:", f'    """{says}"""', "", *lines])


def _unbounded(annotation: ast.expr) -> str:
    """The text of an annotation without the bounds that `nas.config` checks."""
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
        annotation = annotation.slice.elts[0]
    return re.sub(r"(Positive|NonNegative)(Int|Float)", lambda match: match[2].lower(), ast.unparse(annotation))


def _for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports(pairs: Iterable[tuple[str, str]]) -> str:
    """The import statements in the order of linters: the standard library's first, whole modules before names of them."""
    names: dict[str, set[str]] = {}
    for module, name in pairs:
        names.setdefault(module if name else f"import {module}", set()).add(name)
    lines: dict[bool, list[tuple[bool, str, str]]] = {True: [], False: []}
    for module, found in names.items():
        plain = module.removeprefix("import ")
        ordered = sorted(found, key=lambda name: (not name.isupper(), not name[:1].isupper(), name))  # constants, then classes
        line = module if module != plain else f"from {module} import {', '.join(ordered)}"
        lines[plain.partition(".")[0] in sys.stdlib_module_names].append((module == plain, plain, line))
    blocks = ["\n".join(line for _, _, line in sorted(lines[stdlib])) for stdlib in (True, False)]
    return "\n\n".join(["from __future__ import annotations", *blocks])
