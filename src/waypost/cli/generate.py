"""`waypost generate`: an answer, or a conversation, in the terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waypost.cli._adapters import LoraPath, the_adapter
from waypost.cli._answer import decide, run, tokenizer_of
from waypost.cli._shared import (
    Arithmetic,
    AsJson,
    CheckpointPath,
    DraftingName,
    Dtype,
    Kernel,
    KvPolicyName,
    Numerics,
    Threads,
    print_result,
    read_ahead,
    serving_techniques,
    torch_dtype,
)
from waypost.cli.chat import Local, opening, talk, write
from waypost.core.errors import ConfigError, WaypostError
from waypost.core.progress import say

if TYPE_CHECKING:
    from waypost.model.tokenizer import Tokenizer
    from waypost.serve.engine import Engine
    from waypost.serve.sampling import Sampling


def command(
    checkpoint: CheckpointPath,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPT]",
            help="What to answer; - reads it from standard input. Without it you talk with the model.",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt into the checkpoint's chat template, or let the text go on as it stands.",
            show_default="--chat, if it has one",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the prompt; needs --chat.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 samples as the model says.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(help="Sample among this many of the likeliest tokens.", show_default="all")
    ] = None,
    min_p: Annotated[float, typer.Option(help="Sample among tokens at least this likely, relative to the first.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens that were said already lose weight.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same answer.", show_default="a new one, which is shown")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.", show_default=False)
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Answer every line of this JSONL file: OpenAI's batch format, or a body with prompt or messages. "
            "The options fill what a line leaves out.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --batch: the answers; what it answers already is not asked again."),
    ] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="With --batch: most answers in progress at once.")] = 64,
    lora: LoraPath = None,
    dtype: Dtype = None,
    arithmetic: Arithmetic = None,
    numerics: Numerics = "exact",
    kernel: Kernel = "auto",
    threads: Threads = None,
    kv: KvPolicyName = None,
    drafting: DraftingName = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer a prompt in the terminal, or hold a conversation.

    The answer goes to standard output as it comes, everything else to standard error.

    Examples:
      waypost generate runs/smollm2 "What is a waypost?"
      echo "Once upon a time" | waypost generate runs/tiny - --no-chat
      waypost generate models/it "Which invoice?" --lora runs/support
      waypost generate runs/smollm2 --batch requests.jsonl --out answers.jsonl
    """
    if (batch is None) != (out is None) or (batch is not None and (prompt is not None or system is not None)):
        raise typer.BadParameter("a batch needs --batch FILE and --out FILE, and takes neither a prompt nor --system")
    if batch is not None and not batch.is_file():
        raise ConfigError(f"--batch {batch}: there is no such file; give one with a request in JSON on every line")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it, or name a file in another one")
    if prompt == "-":
        prompt = sys.stdin.read()
    if prompt is None and batch is None and (as_json or not sys.stdin.isatty()):
        raise typer.BadParameter("a conversation needs a terminal; give a prompt, or - to read it from standard input")
    if prompt is not None and not prompt:
        raise ConfigError("the prompt is empty; give at least one character")
    with read_ahead(checkpoint, kernel, dtype) as ahead:
        from waypost.serve.engine import Engine
        from waypost.serve.sampling import Sampling

        sampling = Sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed,
            stop=stop or [], max_tokens=max_tokens,
        )  # fmt: skip
        width = (max_sequences if batch is not None else 1) + (lora is not None)  # room for the adapter beside the answers
        engine = Engine(
            ahead, numerics=numerics, kernel=kernel, dtype=torch_dtype(dtype), arithmetic=torch_dtype(arithmetic),
            max_sequences=width, threads=threads, **serving_techniques(kv, drafting),
        )  # fmt: skip
    tokenizer, adapter = tokenizer_of(engine, str(checkpoint)), the_adapter(engine, lora)
    if batch is not None and out is not None:
        _batch(engine, tokenizer, checkpoint.resolve().name, sampling, batch, out, as_json, adapter)
        return
    chat = decide(tokenizer, chat, system, talking=prompt is None)
    history = opening(system)
    if prompt is None:
        talk(Local(engine, tokenizer, sampling, adapter), history)
        return
    ids = tokenizer.chat([*history, {"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt, special=True)
    answer = run(engine, ids, sampling, None if as_json else write, adapter)
    if not as_json:
        write("\n")
    say(answer.summary)
    print_result(answer.tree, as_json)
    if answer.interrupted:
        raise KeyboardInterrupt


def _batch(
    engine: Engine, tokenizer: Tokenizer, name: str, sampling: Sampling, source: Path, out: Path, as_json: bool,
    adapter: str | None,
) -> None:  # fmt: skip
    from waypost.serve.api.batch import Batch

    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens", "stop")
    defaults = {name: value for name in fields if (value := getattr(sampling, name)) not in (None, [])}
    began = time.monotonic()
    tally = Batch(engine, tokenizer, name, defaults, adapter).run(source, out)
    seconds = time.monotonic() - began
    text = f"{out}: {tally.answered} answered, {tally.failed} failed, {tally.kept} kept of {tally.total}, in {seconds:.1f} s"
    print_result({"out": str(out), **vars(tally), "seconds": seconds}, as_json, text)
    if tally.failed:
        raise WaypostError(f"{tally.failed} of {tally.total} requests failed; {out} says why, and the same command tries again")
