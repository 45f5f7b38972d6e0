"""`waypost plan RECIPE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from waypost.cli._shared import AsJson, RecipePath, Settings, print_result


def command(
    recipe: RecipePath,
    settings: Settings = None,
    score: Annotated[
        Path | None, typer.Option("--score", metavar="RUN", help="Compare with what the run in this folder measured.")
    ] = None,
    law: Annotated[
        list[str] | None, typer.Option("--law", metavar="NAME", help="Ask this law alone; can be repeated. All by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a training recipe will take before it runs: time and memory on one process of this machine, and what
    laws of a run's size say of it, such as the learning rate and the batch.

    Time comes from trying one and two layers for a few seconds, memory from shapes alone. No data is read.

    Examples:
      waypost plan recipes/tiny-cpu.yaml
      waypost plan recipes/tiny-cpu.yaml --set memory=stream_bp --set data.seq_len=8192
      waypost plan recipes/tiny-cpu.yaml --score runs/tiny
    """
    from waypost.plan.planning import plan, scores_text
    from waypost.plan.planning import score as scored
    from waypost.train.recipe import resolve

    planned = plan(resolve(recipe, settings or []), *([law] if law else []))
    scores = [] if score is None else scored(planned, score)
    facts = planned.facts()
    if score is not None:
        facts["scores"] = {s.what: {"predicted": s.predicted, "measured": s.measured, "error": s.error} for s in scores}
    print_result(facts, as_json, "\n".join([planned.text(), *([scores_text(scores)] if scores else [])]))
