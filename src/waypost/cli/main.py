"""`waypost VERB ...`: finds the verb, runs it, and turns errors into a message and an exit code: 1 failed, 2 usage, 130 Ctrl-C.

Only the verb that was asked for is imported, so that `waypost --help` loads neither torch nor a library of options.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import os
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

from waypost.core.errors import WaypostError, nearest
from waypost.core.threads import wait_less

VERBS: dict[str, str] = {
    "import": "Bring a model in: a GGUF file or a Hugging Face folder becomes a Waypost checkpoint.",
    "train": "Train, continue or fine-tune from a recipe; the same command again resumes.",
    "select": "Choose the documents worth training on, by what a run's checkpoints make of them.",
    "plan": "Say what a training recipe will take in time and memory; score that after the run.",
    "transform": "Make a checkpoint out of checkpoints: merge, average, quantise; what it promises is verified.",
    "measure": "Measure a model on a text: perplexity, the distance from another model, information capacity.",
    "serve": "Serve a checkpoint over HTTP with OpenAI's API.",
    "generate": "Answer a prompt in the terminal, or a file of them.",
    "chat": "Talk with a checkpoint or a server.",
    "export": "Write the folder to publish, or a GGUF file.",
    "inspect": "Show what a checkpoint holds: tensors, sizes, roles, lineage.",
    "verify": "Check every byte of a checkpoint against its manifest.",
    "diff": "Compare two checkpoints: which tensors changed, and by how much.",
    "lineage": "Show the family tree of a checkpoint, as text, JSON or a picture.",
    "gc": "Show, or remove, what crashes and old steps left in a run folder.",
    "bench": "List the claims, or measure one again.",
    "doctor": "Show what this machine has and test the numeric contract on it.",
}
"""Verb -> what --help says of it. The code of a verb is `command` in waypost/cli/<verb>.py (import_.py for import)."""

NEEDS_NO_ARGUMENTS = ("doctor", "bench")
"""Verbs that do something when called bare; the others then show their help."""


FULL = "OSError: no space is left where the output goes, and some of it is missing there\n"

ENDS_AT_ONCE = ("chat", "generate", "serve")
"""Verbs of which nothing is left to be written when they are over, by any thread."""


def usage() -> str:
    """What `waypost --help` prints."""
    width = min(shutil.get_terminal_size().columns, 110)
    indent = 2 + max(map(len, VERBS)) + 2
    verbs = [
        textwrap.fill(f"  {verb}".ljust(indent) + text, width, subsequent_indent=" " * indent) for verb, text in VERBS.items()
    ]
    head = "One language-model checkpoint, all the way: import or train it, keep it, transform it, serve it."
    return "\n".join(
        [
            "Usage: waypost VERB [OPTIONS] ...",
            "",
            textwrap.fill(head, width, initial_indent="  ", subsequent_indent="  "),
            "",
            "Verbs:",
            *verbs,
            "",
            "Options:",
            "  -h, --help  Show this message, or with a verb what it does and takes.",
            "  --version   Show the version.",
        ]
    )


def run_verb(verb: str, args: Sequence[str]) -> None:
    """Imports the verb's file and runs its `command` with `args`; leaves by SystemExit, or with a WaypostError."""
    from waypost.cli.help import explained

    module = importlib.import_module(f"waypost.cli.{'import_' if verb == 'import' else verb}")
    within = getattr(module, "WITHIN", {}).get(args[0] if args else None)
    if within is not None:
        module, verb, args = importlib.import_module(within), f"{verb} {args[0]}", args[1:]
    _refuse_empty_paths(module.command)
    command = explained(module.command, no_args_is_help=verb not in NEEDS_NO_ARGUMENTS)
    command.main(args=list(args), prog_name=f"waypost {verb}")


def _refuse_empty_paths(command: Callable[..., None]) -> None:
    """Has every option and argument of `command` that is a path refuse the empty one: usage, so exit code 2."""
    import typer

    from waypost.core.paths import EMPTY

    def path(text: str | Path) -> Path:
        if isinstance(text, str) and not text.strip():
            raise typer.BadParameter(EMPTY)
        return Path(text)

    hints = typing.get_type_hints(command, include_extras=True)
    for hint in hints.values():
        kind, *extras = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if kind is Path or Path in typing.get_args(kind):
            for declared in extras:
                declared.parser = path
                if isinstance(declared, typer.models.OptionInfo):
                    declared.metavar = declared.metavar or "PATH"
    command.__annotations__ = hints  # what the strings of the source stand for is made anew at every look


def _run(args: Sequence[str]) -> None:
    first = args[0] if args else None
    if first in (None, "-h", "--help"):
        print(usage())
        sys.exit(0 if args else 2)
    if first == "--version":
        from waypost import __version__

        print(f"waypost {__version__}")
        sys.exit(0)
    if first not in VERBS:
        kind = "option" if first.startswith("-") else "verb"
        hint = "; see waypost --help" if kind == "option" else f".{nearest(first, VERBS)}"
        sys.stderr.write(f"waypost: no {kind} '{first}'{hint}\n")
        sys.exit(2)
    if first != "bench":  # which measures others too, as they come
        wait_less(os.environ)
    run_verb(first, args[1:])


def main(args: Sequence[str] | None = None) -> None:
    """The entry point; `args` defaults to the command line's."""
    try:
        _run(sys.argv[1:] if args is None else args)
    except WaypostError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:  # while the verb itself is imported; later its library of options answers it
        sys.stderr.write("Aborted.\n")
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout went away: `waypost inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # of a file that cannot be opened; without a name it is a mistake of ours
        if error.errno == errno.ENOSPC and error.filename is None:
            sys.stderr.write(FULL)
            sys.exit(1)
        if error.filename is None:
            raise
        from waypost.keep.disk import explain

        said = explain(error, Path(os.fsdecode(error.filename)))
        sys.stderr.write(f"{type(said).__name__}: {said}\n")
        sys.exit(1)


def entry() -> NoReturn:
    """`main` for a process of its own. Where nothing is left to be written, it ends without taking PyTorch apart, which lasts
    0.4 s and gives back what the system takes back by itself."""
    status = 0
    try:
        main()
    except SystemExit as ended:
        if not isinstance(ended.code, int):
            raise
        status = ended.code
    at_once = "torch" in sys.modules and sys.argv[1] in ENDS_AT_ONCE
    if at_once:
        atexit._run_exitfuncs()
    status = _flushed(status)
    if not at_once:
        sys.exit(status)
    os._exit(status)


def _flushed(status: int) -> int:
    """The exit code after what was printed has reached its readers, if it has."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # it was closed before this process began
                stream.flush()
        except (OSError, ValueError) as error:  # nobody reads it any more, or it cannot be held
            status = status or 1
            if isinstance(error, OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or the interpreter's end tries again
                if error.errno == errno.ENOSPC and stream is sys.stdout:
                    sys.stderr.write(FULL)
    return status


if __name__ == "__main__":
    entry()
