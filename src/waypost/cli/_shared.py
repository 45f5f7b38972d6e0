"""What the verbs share: the options --json, --set and --dry-run, and the one way a result reaches stdout.

    def command(recipe: RecipePath, settings: Settings = None, as_json: AsJson = False) -> None:
        tree = override(read_yaml(recipe), settings or [])
        ...
        print_result({"out": str(out), "loss": loss}, as_json, f"{out}: held-out loss {loss:.4f}")

A verb raises WaypostError and never exits by itself: `main` prints the message on stderr and exits 1. Wrong usage
(`typer.BadParameter`, an unknown option) exits 2.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from waypost.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

    from waypost.serve.ahead import Ahead

AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object on stdout; everything else goes to stderr.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Put VALUE (read as YAML) in the recipe's field PATH, e.g. --set optimizer.lr=3e-4. Repeatable.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe as YAML and stop.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe; recipes/ holds commented examples.")]

CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help="A checkpoint, a run folder (its latest checkpoint) or a plain Hugging Face folder."
    ),
]
DtypeName = Literal["float32", "bfloat16", "float16"]
Dtype = Annotated[DtypeName | None, typer.Option(help="What to compute in.", show_default="as the checkpoint is stored")]
Numerics = Annotated[
    Literal["exact", "fast"],
    typer.Option(help="exact: a token's bits do not depend on what runs beside it. fast: the fastest operators, no promise."),
]
Kernel = Annotated[
    Literal["auto", "naive", "cpu"],
    typer.Option(help="Operators of exact numerics: compiled for this processor (cpu), or the plain ones (naive)."),
]
Arithmetic = Annotated[
    Literal["float32"] | None,
    typer.Option(
        help="float32: compute in it over weights that stay in 16 bits; slower, and nearly free of rounding.",
        show_default="as --dtype",
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads that compute.", show_default="PyTorch's: the cores it may use")
]


KvPolicyName = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="NAME[:FIELD=VALUE,...]",
        help="Which cached keys and values stay: full, or h2o:budget=0.2,recent=0.5,stride_tokens=32.",
        show_default="full",
    ),
]
DraftingName = Annotated[
    str,
    typer.Option(
        metavar="NAME[:FIELD=VALUE,...]",
        help="Guess tokens ahead and verify several at a time: ngram, trigram, none, or auto: ngram while at most two answers "
        "are being made. The answers are the same bits.",
    ),
]


SchedulingName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:FIELD=VALUE,...]",
        help="What runs in the next step: chunked, longest_prefix, latency, or layered (prompts go through the layers a group "
        "a step: for mixtures of experts). The answers are the same bits.",
        show_default="chunked",
    ),
]


def technique_of(text: str | None, what: str, rows: Mapping[str, Any]) -> Any:
    """The technique that `name:field=value,field=value` or package.module:Name gives; None for None. ConfigError, with the
    nearest name, where a name or a field is none."""
    from waypost.core.config import Table, build, override

    if text is None:
        return None
    name, _, fields = text.rpartition(":") if "=" in text else (text, "", "")
    if "=" in text and not name:
        raise ConfigError(f"--{what} {text}: write NAME:FIELD=VALUE,FIELD=VALUE, e.g. {next(iter(rows))}:{text}")
    tree = override({}, fields.split(",") if fields else [])
    return build(Table(what, rows).resolve(name), tree, f"--{what} {name}")


def serving_techniques(kv: str | None, drafting: str, scheduling: str | None = None) -> dict[str, Any]:
    """What --kv, --drafting and --scheduling name, as the engine takes it."""
    from waypost.serve import kv as caching
    from waypost.serve import scheduling as policies
    from waypost.serve.drafting import DRAFTERS

    return {
        "kv_policy": technique_of(kv, "kv", caching.POLICIES),
        "drafting": _drafting(drafting, DRAFTERS),
        "policy": technique_of(scheduling, "scheduling", policies.POLICIES),
    }


def _drafting(text: str, rows: Mapping[str, Any]) -> Any:
    words = {"auto": "auto", "none": None}
    if text in words:
        return words[text]
    name = text.partition(":")[0]
    if name in words:
        raise ConfigError(f"--drafting {text}: {name} has no fields; write --drafting {name}, or {' or '.join(rows)} with them")
    if not (name in rows or "=" in name or "." in name):  # which is a field without a name, or a technique of somebody else's
        raise ConfigError(f"--drafting {text}: there is no '{name}'.{nearest(name, [*rows, *words])}")
    return technique_of(text, "drafting", rows)


@contextlib.contextmanager
def read_ahead(checkpoint: Path, kernel: str, dtype: DtypeName | None) -> Iterator[Ahead]:
    """What can begin before PyTorch is imported; for an engine with these options.

    Within, Ctrl-C ends the process at once, for the import would lose a KeyboardInterrupt now and then; and SIGTERM or
    SIGHUP, also afterwards, end the compilers that may run and take away what they wrote. What somebody else made of a
    signal stays.
    """
    from waypost.serve.ahead import Ahead

    main = threading.current_thread() is threading.main_thread()
    for number in (signal.SIGTERM, signal.SIGHUP) if main else ():
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _on_signal)
    interrupts = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not those of a script's `... &`
    if interrupts:
        signal.signal(signal.SIGINT, _on_signal)
    try:
        yield Ahead(checkpoint, packs=kernel != "naive" and dtype in (None, "bfloat16"))
    finally:
        if interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def end_at_once(number: int) -> None:
    """What the signal does by itself, after the compilers that may run have ended. For the main thread."""
    from waypost.kernels import build

    for each in (signal.SIGINT, signal.SIGTERM, signal.Signals(number)):  # a second one waits for nothing
        signal.signal(each, signal.SIG_DFL)
    build.leave()
    os.kill(os.getpid(), number)


def _on_signal(number: int, _: object) -> None:
    end_at_once(number)


def torch_dtype(name: DtypeName | None) -> torch.dtype | None:
    """The dtype that --dtype or --arithmetic names."""
    import torch

    return None if name is None else {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def require_extra(extra: str, *modules: str) -> None:
    """Imports `modules`; ConfigError naming the extra to install where one is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ConfigError(f'{module} is not installed: pip install "waypost[{extra}]"') from error


def print_result(result: Mapping[str, Any], as_json: bool, text: str | None = None) -> None:
    """Writes `result` to stdout as one JSON line, or `text` for a person (nothing where it is None)."""
    if as_json:
        typer.echo(json.dumps(_plain(result), ensure_ascii=False, allow_nan=False))
    elif text is not None:
        typer.echo(text)


def print_recipe(tree: Mapping[str, Any], as_json: bool) -> None:
    """Writes a resolved recipe to stdout, as YAML or as one JSON line: what --dry-run answers."""
    from waypost.core.config import dump_yaml

    print_result(tree, as_json, dump_yaml(dict(tree)).rstrip("\n"))


def _plain(value: Any) -> Any:
    """Only what JSON knows: paths and other objects as text, a non-finite number as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | bool | int) else str(value)
