"""`waypost measure MODEL TEXT`: numbers about a model on a text, each with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from waypost.cli._shared import AsJson, CheckpointPath, print_result, technique_of


def command(
    model: CheckpointPath,
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A UTF-8 text file that the model was not trained on.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:FIELD=VALUE,...]",
            help="perplexity, logit_kl:reference=FOLDER, information_capacity, excess_kurtosis. Repeatable.",
            show_default="perplexity",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Only this many tokens from the beginning of the text.")] = 8192,
    seq_tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Length of the pieces it is cut into; each is scored alone.",
            show_default="512, or the model's context where that is shorter",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on a text: perplexity, the distance from another model, information capacity.

    The interval covers 95 per cent, with the pieces of the text as independent samples. Quantised folders are measured as they
    are served.

    Examples:
      waypost measure models/smollm2 book.txt
      waypost measure models/smollm2-int4 book.txt --metric logit_kl:reference=models/smollm2 --metric perplexity
    """
    from waypost.core.config import build
    from waypost.core.progress import track
    from waypost.keep.reader import Checkpoint
    from waypost.measure.metrics import METRICS
    from waypost.model.linear.quantized import architecture, load
    from waypost.transform.recipe import HeldOut
    from waypost.transform.run import held_out_batches

    asked = {name: technique_of(name, "metric", METRICS) for name in metric or ["perplexity"]}
    checkpoint = Checkpoint(model)
    if seq_tokens is None:
        seq_tokens = min(512, max_tokens, architecture(checkpoint.config).max_position_embeddings)
    batches = held_out_batches(
        checkpoint, build(HeldOut, {"path": str(text), "max_tokens": max_tokens, "seq_tokens": seq_tokens})
    )
    loaded = load(model)
    found = {name: technique.measure(loaded, track(batches, name, unit="batches")) for name, technique in asked.items()}
    tokens = sum(batch.num_tokens for batch in batches)
    tree = {
        "model": model,
        "text": text,
        "tokens": tokens,
        "metrics": {
            name: {"value": m.value, "low": m.low, "high": m.high, "samples": m.n} for name, m in found.items()
        },
    }  # fmt: skip
    width = max(map(len, found))
    lines = [f"{name:{width}}  {m.value:.6g}  [{m.low:.6g}, {m.high:.6g}]" for name, m in found.items()]
    print_result(tree, as_json, "\n".join([*lines, f"{tokens} tokens of {text}"]))
