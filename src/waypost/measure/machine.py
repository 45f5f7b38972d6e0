"""What this machine can do at best, measured: matrix products and memory (the best of n repeats), disk (the median)."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from waypost.core.errors import ConfigError
from waypost.keep.disk import replace_file
from waypost.kernels import memory

MIN_SECONDS = 0.02
"""A repeat lasts at least this long, so that the clock and the first call do not count."""


@dataclass(frozen=True)
class Machine:
    """The measured peaks of a machine under the current number of threads; all of them a second."""

    cpu: str
    threads: int
    torch_version: str
    flops_float32: float
    flops_bfloat16: float
    memory_bytes: float
    """Bytes read plus bytes written."""

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of the best matrix product in `dtype`."""
        peaks = {torch.float32: self.flops_float32, torch.bfloat16: self.flops_bfloat16}
        if dtype not in peaks:
            raise ConfigError(f"Machine.peak({dtype}): measured are {', '.join(str(d) for d in peaks)}")
        return peaks[dtype]


def machine(cache: str | Path | None = None) -> Machine:
    """Measures this machine, in about a second. `cache` names a JSON file that is read back while cpu, threads and torch
    are those it was measured under, and written otherwise; so a run measures once.
    """
    here = (cpu_name(), torch.get_num_threads(), torch.__version__)
    path = None if cache is None else Path(cache)
    if path is not None and path.exists():
        known = Machine(**json.loads(path.read_bytes()))
        if (known.cpu, known.threads, known.torch_version) == here:
            return known
    found = Machine(*here, matmul_flops(torch.float32), matmul_flops(torch.bfloat16), memory_bandwidth())
    if path is not None:
        replace_file(path, json.dumps(asdict(found), indent=1).encode())
    return found


def matmul_flops(dtype: torch.dtype = torch.float32, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of (size, size) @ (size, size)."""
    a, b = (torch.ones(size, size).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * size**3 / best_seconds(lambda: torch.mm(a, b, out=out), repeats)


def memory_bandwidth(num_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes a second, read plus written, of copying `num_bytes`, which must exceed the caches."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    return 2.0 * num_bytes / best_seconds(lambda: target.copy_(source), repeats)


def read_bandwidth(num_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes a second of reading `num_bytes`, which must exceed the caches, from huge pages where the system has them."""
    source = memory.empty((num_bytes // 4,), torch.float32).fill_(1.0)
    return num_bytes / best_seconds(source.max, repeats)


def disk_bandwidth(folder: str | Path, num_bytes: int = 1 << 26, repeats: int = 3) -> float:
    """Bytes a second of writing a file of `num_bytes` in `folder` and flushing it to the disk (fsync)."""
    content = os.urandom(1 << 20)

    def write() -> None:
        with tempfile.TemporaryFile(dir=folder) as stream:
            for _ in range(max(1, num_bytes // len(content))):
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    try:
        return max(num_bytes, len(content)) / median_seconds(write, repeats, warm_up=0)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); give a folder on the disk to measure") from error


def best_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds that one call of `work` takes at best: the least of `repeats` runs of MIN_SECONDS each, since whatever else
    runs on the machine only ever adds. After two calls that do not count."""
    work(), work()
    return min(_seconds(work) for _ in range(repeats))


def median_seconds(work: Callable[[], object], repeats: int = 5, warm_up: int = 2) -> float:
    """Seconds that one call of `work` takes: the median of `repeats` runs of MIN_SECONDS each."""
    for _ in range(warm_up):
        work()
    return statistics.median(_seconds(work) for _ in range(repeats))


def _seconds(work: Callable[[], object]) -> float:
    began, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - began < MIN_SECONDS:
        work()
        calls += 1
    return (time.perf_counter() - began) / calls


def cpu_name() -> str:
    """The processor as it names itself, with family and model where it says them: virtual machines often name no more than the
    maker, and two generations differ by a factor of two."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        first = ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if {"cpu family", "model"} <= set(facts) else name
