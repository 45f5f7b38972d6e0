"""The speed beside a quality: which rounds count, in which order the sides come, what an engine is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from waypost.bench import pace
from waypost.serve.engine import Engine
from waypost.testing.tiny import tiny_checkpoint


def test_the_first_round_does_not_count_and_the_sides_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    rates = {"a": [9.0, 1.0, 2.0, 3.0], "b": [9.0, 4.0, 4.0, 8.0]}

    def fake(engine: Any, prompt: Sequence[int], new_tokens: int) -> tuple[float, float, float]:
        asked.append(engine)
        rate = rates[engine][asked.count(engine) - 1]
        return rate, 10 * rate, 5.0

    monkeypatch.setattr(pace, "pace", fake)
    rounds: list[int] = []
    found = pace.paces({"x": "a", "y": "b"}, [1], 2, 3, lambda: rounds.append(1))  # type: ignore[dict-item]
    assert asked == ["a", "b"] * 4
    assert len(rounds) == 4
    assert found == {
        "pages_x": 5.0, "pages_y": 5.0,
        "prefill_tokens_s_x": 2.0, "prefill_tokens_s_x_spread": 0.5, "decode_tokens_s_x": 20.0, "decode_tokens_s_x_spread": 0.5,
        "prefill_tokens_s_y": 4.0, "prefill_tokens_s_y_spread": 0.5, "decode_tokens_s_y": 40.0, "decode_tokens_s_y_spread": 0.5,
    }  # fmt: skip


def test_an_engine_is_asked_for_one_answer(tmp_path: Path) -> None:
    engine = Engine(str(tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)), num_pages=16, prefix_cache=False, threads=1)
    prefill, decode, pages = pace.pace(engine, list(range(20)), 8)
    assert prefill > 0
    assert decode > 0
    assert pages >= 2, "20 tokens in pages of 16"
    assert engine.idle
    assert engine.pool.held == 0
