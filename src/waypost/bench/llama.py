"""llama.cpp as a side: its own benchmarks are timed, its server says what it answers, its quantiser makes its file."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waypost.bench import rivals
from waypost.core.errors import NumericsError, WaypostError

LIMIT_S = 120.0


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp on a GGUF file."""

    where: rivals.Environment
    gguf: Path
    threads: int

    def prefill_s(self, prompt: list[int]) -> float:
        (found,) = json.loads(self._run("llama-bench", "-p", len(prompt), "-n", 0, "-r", 1, "-o", "json"))
        return float(found["avg_ns"]) / 1e9

    def decode_s(self, prompts: list[list[int]], steps: int) -> float:
        length = max(map(len, prompts))
        shape = ("-npp", length, "-ntg", steps, "-npl", len(prompts), "-c", len(prompts) * (length + steps + 8))
        out = self._run("llama-batched-bench", "-tb", self.threads, *shape, "--output-format", "jsonl")
        found = next(json.loads(line) for line in out.splitlines() if line.startswith("{"))
        if (found["pl"], found["tg"]) != (len(prompts), steps):
            raise NumericsError(f"llama-batched-bench measured {found}, asked were {steps} tokens of {len(prompts)} streams")
        return float(found["t_tg"])

    def first_tokens(self, prompts: list[list[int]]) -> list[int]:
        body = {"n_predict": 1, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        with self._server() as url:
            return [post(f"{url}/completion", {**body, "prompt": prompt})["tokens"][0] for prompt in prompts]

    def _run(self, program: str, *arguments: object) -> str:
        command = [str(self.where.program(program)), "-m", str(self.gguf), "-t", str(self.threads), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10 * LIMIT_S)
        if done.returncode != 0:
            raise WaypostError(f"`{' '.join(command)}` ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout

    @contextmanager
    def _server(self) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(self.where.program("llama-server")), "-m", str(self.gguf), "-t", str(self.threads), "--port", str(port)]
        url, began = f"http://127.0.0.1:{port}", time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                while not healthy(url):
                    if server.poll() is not None or time.monotonic() - began > LIMIT_S:
                        raise WaypostError("llama-server did not come up; run it by hand to see why: " + " ".join(command))
                    time.sleep(0.1)
                yield url
            finally:
                server.terminate()


def post(url: str, body: dict[str, Any]) -> Any:
    """The JSON answer to a JSON request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=LIMIT_S) as reply:
        return json.load(reply)


def healthy(url: str) -> bool:
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=LIMIT_S) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def gguf_files(where: rivals.Environment, model: str, scratch: Path) -> dict[str, Path]:
    """Name of a format -> the checkpoint in it: in bf16 as it is, in Q4_1 as llama.cpp's own quantiser makes it."""
    from waypost.transform.converting.exporting import export_gguf

    full, small = scratch / "bf16.gguf", scratch / "q4_1.gguf"
    export_gguf(Path(model), full, kind="bf16")
    run([str(where.program("llama-quantize")), str(full), str(small), "Q4_1"])
    return {"Q4_1": small, "bf16": full}


def run(command: Sequence[str]) -> None:
    """A command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=10 * LIMIT_S)
    if done.returncode != 0:
        raise WaypostError(f"`{' '.join(command)}` ended with status {done.returncode}:\n{done.stderr[-2000:]}")
