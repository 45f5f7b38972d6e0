"""The measurements run, mean what they say, and are cached under what they depend on. No test looks at their size."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from waypost.core.errors import ConfigError
from waypost.measure import machine as machine_module
from waypost.measure.machine import (
    Machine,
    cpu_name,
    disk_bandwidth,
    machine,
    matmul_flops,
    median_seconds,
    memory_bandwidth,
    read_bandwidth,
)


def test_small_measurements(tmp_path: Path) -> None:
    assert matmul_flops(torch.float32, size=64, repeats=1) > 0
    assert matmul_flops(torch.bfloat16, size=64, repeats=1) > 0
    assert memory_bandwidth(1 << 20, repeats=1) > 0
    assert read_bandwidth(1 << 20, repeats=1) > 0
    assert disk_bandwidth(tmp_path, 1 << 20, repeats=1) > 0
    assert list(tmp_path.iterdir()) == []
    assert cpu_name() == cpu_name() != ""
    with pytest.raises(ConfigError, match="give a folder on the disk"):
        disk_bandwidth(tmp_path / "nowhere")


TWO_CORES = "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: It: one\nflags\t:\n\nmodel name\t: It 2\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (TWO_CORES, "It: one (family 26, model 2)"),
        ("processor: 0\nmodel name: It\n", "It"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "somewhere"),
        (None, "somewhere"),
    ],
)
def test_two_generations_of_one_name_are_told_apart(text: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> str:
        assert path == Path("/proc/cpuinfo")
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(machine_module.platform, "processor", lambda: "")
    monkeypatch.setattr(machine_module.platform, "machine", lambda: "somewhere")
    assert cpu_name() == name


def test_the_formulas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine_module, "best_seconds", lambda work, repeats: 0.5)
    monkeypatch.setattr(machine_module, "median_seconds", lambda work, repeats, warm_up=2: 0.5)
    assert matmul_flops(size=100) == 2 * 100**3 / 0.5
    assert memory_bandwidth(4096) == 2 * 4096 / 0.5
    assert read_bandwidth(4096) == 4096 / 0.5
    assert disk_bandwidth(tmp_path, 1 << 21) == (1 << 21) / 0.5


def test_the_median_of_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 1.0, 2.0])
    monkeypatch.setattr(machine_module, "_seconds", lambda work: next(times))
    assert median_seconds(lambda: None, repeats=3) == 2.0


def test_the_best_of_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 1.0, 2.0])
    monkeypatch.setattr(machine_module, "_seconds", lambda work: next(times))
    assert machine_module.best_seconds(lambda: None, repeats=3) == 1.0


def test_measured_once_for_the_same_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(machine_module, "matmul_flops", lambda dtype: calls.append(dtype) or 1e9 * len(calls))
    monkeypatch.setattr(machine_module, "memory_bandwidth", lambda: 7.0)
    first = machine(tmp_path / "machine.json")
    assert (first.flops_float32, first.flops_bfloat16, first.memory_bytes) == (1e9, 2e9, 7.0)
    assert machine(tmp_path / "machine.json") == first
    assert len(calls) == 2
    other = {**asdict(first), "threads": first.threads + 1}
    (tmp_path / "machine.json").write_text(json.dumps(other))
    assert machine(tmp_path / "machine.json") != first
    assert len(calls) == 4
    machine()
    assert len(calls) == 6


def test_peak() -> None:
    found = Machine("cpu", 2, "2", 1.0, 2.0, 3.0)
    assert (found.peak(torch.float32), found.peak(torch.bfloat16)) == (1.0, 2.0)
    with pytest.raises(ConfigError, match="measured are"):
        found.peak(torch.float16)
