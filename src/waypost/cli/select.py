"""`waypost select RUN --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from waypost.cli._shared import AsJson, Settings, print_result, technique_of
from waypost.core.errors import ConfigError


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder; all the checkpoints that it keeps are asked.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the chosen documents go, as JSON lines.")],
    keep: Annotated[float, typer.Option(metavar="SHARE", help="Share of each source's tokens that stays, e.g. 0.3.")] = 0.5,
    by: Annotated[
        str, typer.Option(metavar="NAME[:FIELD=VALUE,...]", help="What scores a document: cld, or cld:skip=2.")
    ] = "cld",
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Texts like those that matter, in no training set.", show_default="the run's held-out split"
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="The data to choose from.", show_default="the run's own recipe.yaml")
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Choose the documents worth training on: the losses of every document under a run's checkpoints say which.

    The run may be a small, cheap one (save.every_steps, save.keep_last: 10 checkpoints or more); the choice is then trained
    on by a larger model: the last line says how. Held-out documents come along, and stay held out. The same command again
    computes no loss twice.

    Examples:
      waypost select runs/tiny --out runs/tiny/selected --keep 0.3
      waypost select runs/tiny --out picked --by cld:skip=2 --reference wanted.txt
      waypost select runs/tiny --out picked --set data.sources.0.path=corpus.jsonl
    """
    from waypost.data.selectors import SELECTORS
    from waypost.train.recipe import resolve
    from waypost.train.selection import select

    if recipe is None and not (run / "recipe.yaml").is_file():
        raise ConfigError(
            f"{run}: holds no recipe.yaml, so it is no run's folder; give the --out of a training run, or --recipe"
        )
    chosen = resolve(recipe if recipe is not None else run / "recipe.yaml", settings or [])
    found = select(chosen, run, out, technique_of(by, "by", SELECTORS), keep, None if reference is None else str(reference))
    print_result({"out": out, **vars(found)}, as_json, f"{out}: {found.summary()}")
