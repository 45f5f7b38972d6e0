"""`waypost generate`: an answer, or a conversation, in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from waypost.cli._adapters import LoraPath, the_adapter
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
from waypost.core.errors import ConfigError, WaypostError, counted
from waypost.core.progress import say

if TYPE_CHECKING:
    from waypost.model.tokenizer import Tokenizer
    from waypost.serve.engine import Engine
    from waypost.serve.request import Choice
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
        Path | None, typer.Option(metavar="FILE", help="With --batch: the answers; what they hold already is kept.")
    ] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="With --batch: most answers in progress at once.")] = 64,
    lora: LoraPath = None,
    dtype: Dtype = None,
    arithmetic: Arithmetic = None,
    numerics: Numerics = "exact",
    kernel: Kernel = "auto",
    threads: Threads = None,
    kv: KvPolicyName = None,
    drafting: DraftingName = None,
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
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it, or name a file in another one")
    if prompt == "-":
        prompt = sys.stdin.read()
    if prompt is None and batch is None and (as_json or not sys.stdin.isatty()):
        raise typer.BadParameter("a conversation needs a terminal; give a prompt, or - to read it from standard input")
    if prompt is not None and not prompt:
        raise ConfigError("the prompt is empty; give at least one character")
    ahead = read_ahead(checkpoint, kernel, dtype)
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


@dataclass(frozen=True)
class Answer:
    """One finished, or interrupted, answer and how long it took."""

    choice: Choice
    prompt_tokens: int
    seed: int
    first_token_s: float
    total_s: float
    interrupted: bool

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first, whose time is the prompt's."""
        later, span = len(self.choice.tokens) - 1, self.total_s - self.first_token_s
        return later / span if later > 0 and span > 0 else 0.0

    @property
    def summary(self) -> str:
        """The line for stderr: prompt, time to the first token, speed, why it ended, and the seed that repeats it."""
        speed = f", then {self.tokens_per_s:.1f} tokens/s" if self.tokens_per_s else ""
        how = {"stop": "it ended by itself", "length": "it was cut at --max-tokens or the context"}
        why = "interrupted" if self.interrupted else how.get(str(self.choice.finish_reason), "")
        return (
            f"[{counted(self.prompt_tokens, 'prompt token')}, first token after {self.first_token_s:.2f} s{speed}; "
            f"{counted(len(self.choice.tokens), 'token')}, {why}; seed {self.seed}]"
        )

    @property
    def tree(self) -> dict[str, Any]:
        return {
            "text": self.choice.text,
            "token_ids": self.choice.token_ids,
            "finish_reason": "interrupted" if self.interrupted else self.choice.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.choice.tokens),
            "seed": self.seed,
            "first_token_s": self.first_token_s,
            "total_s": self.total_s,
            "tokens_per_s": self.tokens_per_s,
        }


def run(
    engine: Engine, ids: Sequence[int], sampling: Sampling, show: Callable[[str], None] | None, adapter: str | None = None
) -> Answer:
    """Answers the prompt `ids`, giving text to `show` as it becomes certain. Ctrl-C ends the answer, not the program."""
    from waypost.serve.request import Request

    began = time.monotonic()
    ready = engine.prepare(Request(ids, sampling, adapter=adapter))
    completion = ready.completion()
    first_token_s, interrupted = 0.0, False
    engine.submit(ready)
    while not completion.done:
        try:
            for delta in engine.step():
                if delta.error is not None:
                    raise WaypostError(f"the answer failed: {delta.error}")
                first_token_s = first_token_s or time.monotonic() - began
                completion.add(delta)
                if show is not None and delta.text:
                    show(delta.text)
        except KeyboardInterrupt:
            interrupted = True
            engine.cancel(ready.id)
    return Answer(completion.choices[0], len(ids), ready.seed, first_token_s, time.monotonic() - began, interrupted)


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


def tokenizer_of(engine: Engine, where: str) -> Tokenizer:
    """The engine's tokenizer; ConfigError where there is none."""
    from waypost.model.tokenizer import Tokenizer

    if not isinstance(engine.tokenizer, Tokenizer):
        raise ConfigError(f"{where}: has no tokenizer.json; copy it from the model that the weights come from")
    return engine.tokenizer


def decide(tokenizer: Tokenizer, chat: bool | None, system: str | None, talking: bool) -> bool:
    """Whether the chat template is used; ConfigError where something needs it and it cannot be."""
    wanted = tokenizer.has_chat_template if chat is None else chat
    if not wanted and (system is not None or talking):
        what = "--system" if system is not None else "a conversation"
        why = "--no-chat turns it off" if chat is False else "this checkpoint has none"
        raise ConfigError(f"{what} needs a chat template, and {why}; give a PROMPT alone, or a checkpoint that has one")
    return wanted
