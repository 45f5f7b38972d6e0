"""`waypost chat`: a conversation in the terminal, with a checkpoint or with a server."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from waypost.cli._adapters import LoraPath, the_adapter
from waypost.cli._answer import decide, run, tokenizer_of
from waypost.cli._remote import Message, Remote
from waypost.cli._shared import Arithmetic, Dtype, Kernel, Numerics, Threads, read_ahead, torch_dtype
from waypost.core.errors import CapacityError, ConfigError, WaypostError, counted, nearest
from waypost.core.progress import say

if TYPE_CHECKING:
    from waypost.model.tokenizer import Tokenizer
    from waypost.serve.engine import Engine
    from waypost.serve.sampling import Sampling

LONGEST = 512
"""Tokens of an answer where nobody says how many."""
COMMANDS = {
    "/reset": "forgets what was said",
    "/save": "FILE writes the conversation as JSON",
    "/help": "shows this",
    "/quit": "ends (so does Ctrl-D)",
}


def command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|URL", help="A checkpoint, a run folder, a plain Hugging Face folder, or a server's URL."
        ),
    ],
    system: Annotated[str | None, typer.Option(help="A system message before everything.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest answer, in tokens.", show_default=f"{LONGEST}, or what fits; with a URL the server's"
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 samples as the model says.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.", show_default="a new one")] = None,
    model: Annotated[
        str | None, typer.Option(help="With a URL: the model's name there.", show_default="the first that it lists")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="WAYPOST_API_KEY", help="With a URL: the key to show.")] = None,
    lora: LoraPath = None,
    dtype: Dtype = None,
    arithmetic: Arithmetic = None,
    numerics: Numerics = "exact",
    kernel: Kernel = "auto",
    threads: Threads = None,
) -> None:
    """Talk with a checkpoint, or with a server of OpenAI's protocol.

    Answers go to standard output as they come, everything else to standard error. Lines are read from standard input,
    so that a conversation can also come from a file.

    Examples:
      waypost chat runs/smollm2
      waypost chat http://127.0.0.1:8000 --temperature 0.8
    """
    if checkpoint.startswith(("http://", "https://")):
        if lora is not None:
            raise ConfigError("--lora belongs to a checkpoint; a server names its adapters itself, and --model chooses one")
        computed = {"dtype": dtype, "arithmetic": arithmetic, "threads": threads, "numerics": numerics, "kernel": kernel}
        for name, value in computed.items():
            if value not in (None, "exact", "auto"):
                raise ConfigError(f"--{name} {value} belongs to a checkpoint; a server computes as it was started")
        wishes = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        talk(Remote(checkpoint, model, api_key, wishes), opening(system))
        return
    if model is not None:
        raise ConfigError("--model belongs to a URL; a checkpoint is one model")
    _check_folder(checkpoint)
    with read_ahead(Path(checkpoint), kernel, dtype) as ahead:
        from waypost.serve.engine import Engine
        from waypost.serve.sampling import Sampling

        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens)
        engine = Engine(
            ahead, numerics=numerics, kernel=kernel, dtype=torch_dtype(dtype), arithmetic=torch_dtype(arithmetic),
            max_sequences=1 if lora is None else 2, threads=threads,
        )  # fmt: skip
    tokenizer = tokenizer_of(engine, checkpoint)
    decide(tokenizer, None, system, talking=True)
    talk(Local(engine, tokenizer, sampling, the_adapter(engine, lora)), opening(system))


def _check_folder(checkpoint: str) -> None:
    """ConfigError for what looks like a server's address, but is no URL that chat speaks. The rest is said by who opens it, for
    a checkpoint may lie in an object store too."""
    if Path(checkpoint).exists():
        return
    if re.match(r"(https?|ftps?|wss?|tcp|grpc):", checkpoint):
        raise ConfigError(f"{checkpoint}: there is no such folder; servers are spoken with over http:// or https://")
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", checkpoint):
        raise ConfigError(f"{checkpoint}: there is no such folder; did you mean http://{checkpoint}?")


def opening(system: str | None) -> list[Message]:
    """What stands before the first turn."""
    return [{"role": "system", "content": system}] if system is not None else []


class Partner(Protocol):
    """Answers a conversation: text goes to `show` as it comes; returns the whole of it and a line about it."""

    def answer(self, messages: list[Message], show: Callable[[str], None]) -> tuple[str, str]: ...


class Local:
    """A model of this process, or its adapter `adapter`. Without `max_tokens` an answer has LONGEST, or what fits."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, sampling: Sampling, adapter: str | None = None) -> None:
        self._engine, self._tokenizer, self._sampling, self._adapter = engine, tokenizer, sampling, adapter

    def answer(self, messages: list[Message], show: Callable[[str], None]) -> tuple[str, str]:
        ids, sampling = self._tokenizer.chat(messages), self._sampling
        if sampling.max_tokens is None:
            sampling = replace(sampling, max_tokens=max(1, min(LONGEST, self._engine.max_seq_len - len(ids))))
        answer = run(self._engine, ids, sampling, show, self._adapter)
        return answer.choice.text, answer.summary


def talk(partner: Partner, history: list[Message]) -> None:
    """Reads a line, answers it, and remembers both, until the end of the input. What gets no answer is said and forgotten;
    where nobody is there to read that, WaypostError at the end."""
    say("Say something. Ctrl-C ends an answer, Ctrl-D the conversation; /help shows what else there is.")
    first, unanswered = list(history), 0
    while True:
        sys.stderr.write("\n> ")
        sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:  # meant for an answer that had just ended
            if not sys.stdin.isatty():
                raise
            say("\nCtrl-D or /quit ends the conversation")
            continue
        if not line or line.strip() == "/quit":
            say("")
            break
        if not line.strip():
            continue
        if line.startswith("/") and not line.startswith("//"):
            obey(line.split(), history, first)
            continue
        turn = [*history, {"role": "user", "content": line.rstrip("\n").removeprefix("/")}]
        try:
            text, summary = partner.answer(turn, write)
        except WaypostError as error:  # the conversation has outgrown the context, for one; it can go on with less
            way_out = (
                "; or /reset, which forgets what was said" if isinstance(error, CapacityError) and history != first else ""
            )
            say(f"{type(error).__name__}: {error}{way_out}")
            unanswered += 1
            continue
        write("\n")
        say(summary)
        history[:] = [*turn, {"role": "assistant", "content": text}]
    if unanswered and not sys.stdin.isatty():
        raise WaypostError(f"{counted(unanswered, 'turn')} of this conversation got no answer; the reasons stand above")


def obey(words: list[str], history: list[Message], first: list[Message]) -> None:
    """Does what a line with a slash says; a line that begins with two of them is said to the model."""
    verb, rest = words[0], " ".join(words[1:])
    if verb == "/reset":
        history[:] = first
        say("forgotten")
    elif verb == "/save" and rest:
        try:
            Path(rest).write_text(json.dumps({"messages": history}, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            say(f"{len(history)} messages written to {rest}")
        except OSError as error:
            say(f"{rest}: {error.strerror}")
    elif verb == "/help":
        say("\n".join(f"  {name:<8}{text}" for name, text in COMMANDS.items()))
    else:
        say("/save needs a file" if verb == "/save" else f"no command '{verb}'.{nearest(verb, COMMANDS)}")


def write(text: str) -> None:
    """Text of an answer, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
