"""A side of a comparison runs in a process of its own: its memory is its own, and rounds can alternate.

The child runs `serve(functions)`: one JSON line {"call": name, "args": {...}} in, one JSON line out. Everything else that
the child prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from waypost.core.errors import WaypostError
from waypost.core.threads import wait_less

CLOSING_S = 30.0
"""How long a child may take to end by itself."""


class Worker:
    """A child process that answers calls; `python` may be the interpreter of another environment."""

    def __init__(self, script: Path, args: Mapping[str, Any], threads: int, python: str | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the worker
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if python is None:  # ours, as the command line runs it
            wait_less(environment)
        self._process = subprocess.Popen(
            [python or sys.executable, str(script), json.dumps({**args, "threads": threads})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip

    def call(self, name: str, **args: Any) -> Any:
        """The child's answer; its own error output where it died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"call": name, "args": args}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise WaypostError(f"the measured process ended during '{name}':\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def kill(self) -> None:
        """Ends the child as a crash would."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._log.close()

    def close(self) -> None:
        """Lets the child end; one that does not is killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=CLOSING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def take_stdout() -> TextIO:
    """The child's stdout, for answers alone: what libraries print from now on goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(functions: Mapping[str, Callable[..., Any]], answers: TextIO | None = None) -> None:
    """The child's loop, until stdin closes. A child whose libraries print when they are imported takes stdout before."""
    answers = take_stdout() if answers is None else answers
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(functions[request["call"]](**request["args"])) + "\n")
        answers.flush()


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
