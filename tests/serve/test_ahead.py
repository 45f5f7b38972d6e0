"""What begins before PyTorch is imported: the same engine, the same errors, and room only for what is packed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from waypost.core.errors import CheckpointError, WaypostError
from waypost.keep import image
from waypost.kernels import memory
from waypost.serve import loading
from waypost.serve.ahead import Ahead, packed_bytes
from waypost.serve.engine import Engine
from waypost.serve.sampling import Sampling
from waypost.testing.tiny import tiny_checkpoint

SAMPLING = Sampling(max_tokens=5, seed=2, logprobs=0, ignore_eos=True)


@pytest.fixture
def bf16_folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)


def test_an_engine_that_began_ahead_is_the_same(bf16_folder: Path) -> None:
    engines = [Engine(model, num_pages=4) for model in (Ahead(bf16_folder, packs=True), bf16_folder)]
    one, other = (engine.generate(["the bat"], SAMPLING)[0].choices for engine in engines)
    assert one == other


def test_damage_is_raised_where_the_engine_is_made(bf16_folder: Path) -> None:
    weights = bf16_folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    ahead = Ahead(bf16_folder, packs=True)
    with pytest.raises(CheckpointError, match="does not match its digest"):
        Engine(ahead, num_pages=4)
    missing = Ahead(bf16_folder / "none", packs=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        Engine(missing, num_pages=4)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to the memory at hand, in order."""
    seen: list[str] = []

    def watch(owner: ModuleType, name: str) -> None:
        real = getattr(owner, name)

        def watched(*given: int) -> Any:
            seen.append(name)
            return real(*given)

        monkeypatch.setattr(owner, name, watched)

    watch(memory, "reserve")
    watch(memory, "settle")
    watch(loading, "available_bytes")
    return seen


def test_the_cache_is_sized_when_what_the_weights_left_is_given_back(bf16_folder: Path, events: list[str]) -> None:
    Engine(Ahead(bf16_folder, packs=True))
    assert events == ["reserve", "settle", "available_bytes"]


@pytest.mark.parametrize("wrong", [{"max_seq_len": 10**9}, {"threads": 0}, {"num_pages": 0}, {"kernel": "naif"}])
def test_an_engine_that_is_refused_keeps_no_room(wrong: dict[str, Any], bf16_folder: Path, events: list[str]) -> None:
    with pytest.raises(WaypostError):
        Engine(Ahead(bf16_folder, packs=True), **wrong)
    assert events == ["reserve", "settle"]


def test_room_is_for_weights_that_are_packed(bf16_folder: Path, tmp_path: Path) -> None:
    files = sum(path.stat().st_size for path in bf16_folder.glob("*.safetensors"))
    assert packed_bytes(bf16_folder) == files + memory.CACHE_STRIP_BYTES
    assert packed_bytes(tiny_checkpoint(tmp_path / "float32")) == 0
    before = packed_bytes(bf16_folder)
    shutil.copy(bf16_folder / "model.safetensors", bf16_folder / "consolidated.safetensors")  # as some folders are published
    assert packed_bytes(bf16_folder) == before, "weights that are there twice are read once"


@pytest.mark.parametrize(("over", "taken"), [(-1, False), (0, True), (None, True)])
def test_no_more_room_is_taken_than_the_system_has(
    over: int | None, taken: bool, bf16_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(memory, "reserve", asked.append)
    monkeypatch.setattr(image, "available_bytes", lambda: None if over is None else packed_bytes(bf16_folder) + over)
    Ahead(bf16_folder, packs=True).checkpoint()
    assert asked == ([packed_bytes(bf16_folder)] if taken else [])


@pytest.mark.parametrize("layers", [-3, -(10**30)])
def test_what_is_wrong_with_a_config_is_said_by_who_reads_it(layers: int, bf16_folder: Path) -> None:
    (bf16_folder / "waypost.json").unlink()
    config = bf16_folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": layers}))
    ahead = Ahead(bf16_folder, packs=True)
    with pytest.raises(WaypostError, match="num_hidden_layers"):
        Engine(ahead, num_pages=4)


def test_it_begins_without_pytorch(bf16_folder: Path) -> None:
    code = f"import sys; from waypost.serve.ahead import Ahead; Ahead({str(bf16_folder)!r}, packs=True).checkpoint(); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
