"""The stage that trains a search's base model, in a trial with `dense:`.

Owns the folder `dense` in the run's: the training, and `checkpoint`, the export from which the search starts as from any other.
"""

from __future__ import annotations

from ..errors import RunFailed
from ..export import ModelCard, export, load_export
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Losses
from ..workers import Failure
from .base_model import BaseModel, fingerprint
from .context import Context
from .jobs import StandaloneTraining, read_model, train_standalone


def train_base_model(ctx: Context) -> BaseModel:
    """Train the model that shares nothing, or take it from the run's folder if that is done. Raises RunFailed."""
    file, shape, folder = ctx.trial.file, ctx.trial.space.shape, ctx.run.folder / "dense"
    assert file.dense is not None
    config, key = SharingConfig.dense(shape), f"seed-{file.seed}"
    windows, test = ctx.windows(file.evaluate.final_windows).numpy(), ctx.test_windows.numpy()
    job = StandaloneTraining(
        shape, config, file.dense, file.seed, ctx.train_tokens, windows, bos=ctx.corpus.bos, test_windows=test
    )
    result = ctx.train("dense", {key: job}, train_standalone, {key: file.dense.steps})[key]
    if isinstance(result, Failure):
        raise RunFailed(f"the dense model could not be trained: {result.reason}")
    checkpoint, weights = folder / "checkpoint", folder / key / "model.safetensors"
    if not checkpoint.exists():
        card = ModelCard(
            title=f"{ctx.run.name}: the dense model",
            found=f"Trained for {result['tokens']:,} tokens by the search `{ctx.run.name}`, which starts from it.",
            command=ctx.run.provenance()["command"],
            data=ctx.corpus.source,
            memory=file.memory,
        )
        export(read_model(shape, config, weights), config, ctx.corpus.tokenizer_json, checkpoint, card)
    weights.unlink(missing_ok=True)
    loaded = load_export(checkpoint)
    model = loaded.model.float().requires_grad_(False).eval()
    losses = Losses.of(result["test"])
    found = BaseModel(
        checkpoint, model, fingerprint(model), losses, loaded.model.embed_tokens.weight.dtype, tokens=result["tokens"]
    )
    ctx.progress.say(f"from    {found.summary}")
    return found
