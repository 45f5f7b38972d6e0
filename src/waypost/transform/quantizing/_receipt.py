"""How far a quantised folder is from its source: bytes, steps, KL and losses, measured on what was written."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from waypost.keep.format import num_bytes
from waypost.transform import invariant

if TYPE_CHECKING:
    from waypost.keep.streaming import StreamingWriter
    from waypost.transform.quantize import Linear, Work


def receipt_of(work: Work, writer: StreamingWriter) -> dict[str, Any]:
    """Bytes, and the distance from the source on the probe and on the held-out text; of what was written."""
    facts = {
        "linears": len(work.linears),
        "kept_linears": work.plain,
        "bytes_source": sum(num_bytes(work.checkpoint.specs["weight", name]) for name in work.checkpoint.names),
        "bytes_output": sum(map(num_bytes, work.specs())),
    }
    if not work.chosen.verify:
        return {**invariant.unverified("lossy", "verification was turned off"), **facts}
    writer.sync()
    facts["largest_error_steps"] = max(_error_steps(work, writer, linear) for linear in work.linears)
    names = [spec.name for spec in work.specs()]
    output = invariant.PackedWeights(writer.folder, work.config(), names, writer.tensor, writer.release)
    found = invariant.measure(work.checkpoint, output, "lossy", work.chosen.probe_tokens)
    found["perplexity_ratio"] = math.exp(found["loss_output"] - found["loss_reference"])
    return {**found, **facts, **_held_out(work, output)}


def _error_steps(work: Work, writer: StreamingWriter, linear: Linear) -> float:
    """Largest |w - q s| / s over a linear: at most a half where every weight was rounded to the nearest."""
    import torch

    made, name = linear.read_back(writer), f"{linear.stem}.weight"
    stored = work.weights[name if name in work.weights else "model.embed_tokens.weight"]
    largest = 0.0
    for rows in torch.arange(linear.shape[0]).split(max(1, (1 << 22) // linear.shape[1])):
        part = replace(made, words=made.words[rows], scale=made.scale[rows])
        scale = part.scale.float()[:, :, None]
        wide = stored[rows].float().unflatten(1, (-1, part.group_size)) / scale
        largest = max(largest, float((wide - part.q.unflatten(1, (-1, part.group_size)).float()).abs().max()))
    return largest


def _held_out(work: Work, output: invariant.PackedWeights) -> dict[str, Any]:
    """Both losses on the recipe's text; nothing where it names none."""
    from waypost.measure.perplexity import evaluate
    from waypost.model import hf
    from waypost.model.linear.quantized import with_rounded_rows

    if work.chosen.held_out.path is None:
        return {}
    batches = work.texts["held_out"]
    config = work.model.config
    untied = replace(config, tie_word_embeddings=False) if work.has_head else config
    one = evaluate(hf.assemble(config, work.weights, copy=False), batches)
    dense = output.dense()
    other = evaluate(with_rounded_rows(hf.assemble(untied, dense, copy=False), dense), batches)
    return {"held_out": {
        "path": work.chosen.held_out.path, "tokens": one.tokens, "loss_reference": one.loss, "stderr_reference": one.stderr,
        "loss_output": other.loss, "perplexity_reference": one.perplexity, "perplexity_output": other.perplexity,
    }}  # fmt: skip
