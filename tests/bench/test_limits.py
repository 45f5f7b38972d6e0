"""Profiles of a step: their parts are the whole of it, their counts those of the model, and the page says what follows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from waypost.bench import peaks
from waypost.bench.limits import profile
from waypost.bench.limits.page import page
from waypost.bench.limits.profile import Part, Profile, Work, measure
from waypost.bench.peaks import Peaks
from waypost.core.errors import ConfigError
from waypost.kernels.linear import compact
from waypost.kernels.linear.compact import FEW_ROWS
from waypost.measure.flops import decode_flops, prefill_flops
from waypost.model.linear.at_once import LayersAtOnce
from waypost.serve.engine import Engine
from waypost.serve.request import Delta
from waypost.testing.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]
FACTS = {"cpu": "it", "threads": 2, "cores": 4, "torch": "0", "model": "tiny", "when": "today", "commit": "abc"}
PEAKS = Peaks(flops=1e9, read_bytes=1e6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("limits") / "tiny", dtype=torch.bfloat16)


@pytest.mark.parametrize("work", [Work("a prompt", (), 40), Work("two streams", (), 8, 2)])
def test_a_step_is_its_parts(checkpoint: Path, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "measure", lambda: Peaks(3e15, 2e9))
    engine = Engine(str(checkpoint), threads=2, num_pages=64, prefix_cache=False)
    plain = engine.model.ops
    found = measure(engine, work, rounds=1)
    assert engine.model.ops is plain
    assert engine.idle
    config = engine.model.config
    asked = work.streams * decode_flops(config, 8 + 16) if work.streams else prefill_flops(config, 40)
    assert sum(part.flops for part in found.parts) == pytest.approx(asked)
    matrices = {name: p.numel() for name, p in engine.model.model.layers.named_parameters() if p.ndim == 2}
    last = f"{len(config.layers) - 1}."
    rows = {  # nobody reads what the last layer makes of a prompt's other rows
        name: 1 if not work.streams and name.startswith(last) and "k_proj" not in name and "v_proj" not in name else work.rows
        for name in matrices
    }
    products = found.parts[0]
    assert isinstance(engine.model.at_once, LayersAtOnce)
    assert products.moved_bytes == engine.model.at_once.weight_bytes(work.rows)
    few = work.rows <= FEW_ROWS and compact.pays()  # in panels of 48 outputs, and 12 bits in groups of 4 pairs of inputs
    fused = [product.weight for product in engine.model.at_once._table.products]
    bits = [(12 if few else 16) * -(-p.outputs // 48) * 48 * (-(-p.inputs // 8) * 8 if few else p.inputs) for p in fused]
    assert products.moved_bytes == sum(bits) / 8
    assert products.flops == pytest.approx(sum(2 * count * rows[name] for name, count in matrices.items()))
    assert found.peaks == Peaks(3e15, 2e9)
    assert all(part.seconds > 0 for part in found.parts[:4])


def test_only_steps_of_all_streams_count(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "measure", lambda: Peaks(3e15, 2e9))
    engine = Engine(str(checkpoint), threads=2, num_pages=64, prefix_cache=False, max_batch_tokens=12)
    drew: list[int] = []
    now, step = 0.0, engine.step

    def timed() -> list[Delta]:
        nonlocal now
        deltas = step()
        drew.append(len(deltas))
        now += 1.0 if drew[-2:] == [3, 3] else 0.25
        return deltas

    monkeypatch.setattr(engine, "step", timed)
    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(profile, "QUICKEST", 1.0)
    found = measure(engine, Work("three streams", (), 8, 3), rounds=1)
    assert {1, 2} <= set(drew), "they begin and end one after the other"
    assert found.seconds == pytest.approx(1.0)


def test_operators_one_by_one_cannot_be_told_apart(checkpoint: Path) -> None:
    engine = Engine(str(checkpoint), threads=2, num_pages=64, kernel="naive")
    with pytest.raises(ConfigError, match="all layers run in one call"):
        measure(engine, Work("it", (), 8), rounds=1)


def test_the_page_says_what_a_promise_would_need() -> None:
    parts = [Part("products", 0.020, flops=1e7, moved_bytes=100.0), Part("attention", 0.010, 1e6, 5e3), Part("rest", 0.010)]
    told = Profile(Work("16 streams", ("near", "edge", "far", "never"), 64, 16), parts, PEAKS)
    assert told.seconds == pytest.approx(0.040)
    assert told.least_s == pytest.approx(0.010 + 0.005), "products by operations, attention by bytes"
    in_bytes = Part("head", 0.001, flops=1e7, moved_bytes=100.0, pace=2.0)
    assert in_bytes.least_s(PEAKS) == pytest.approx(parts[0].least_s(PEAKS) / 2)
    receipts: dict[str, dict[str, Any]] = {
        name: {"baseline": {"median": median}, "floor": 2.0, "ratio": 1.5, "when": "then", "commit": f"of-{name}",
               "roofline": {"peak_flops": peak}, "machine": {**FACTS, "cpu": cpu}}
        for name, median, peak, cpu in (("near", 400.0, 1e9, "it"), ("edge", 560.0, 1.25e9, "it"), ("far", 800.0, 9e9, "other"))
    }  # fmt: skip
    receipts["near"]["extra"] = {"allowed_ratio": 1.9, "allowed_ratio_least": 1.7, "allowed_ratio_most": 2.1}
    text = page([told], receipts, FACTS)
    assert (
        "commit of-near). At the peaks measured between its rounds, bytes and operations alone would have allowed 1.90 " in text
    )
    assert text.count("between its rounds") == 1
    assert "## 16 streams: 40.00 ms, 400 tokens/s" in text
    assert "| products | 20.00 | 50% | 0.01 G | 0 GFLOP/s | 0 MB | 0.0 GB/s | 10.00 |" in text
    assert "| rest | 10.00 | 25% |  |  |  |  |  |" in text
    assert "`near` promises 2 times 400 tokens/s, which is a step of 20.00 ms; measured was 1.50 (receipt of then, " in text
    assert "which leaves 5.00 ms" in text
    assert "takes 75% of our step" in text
    assert "`far` promises 2 times 800 tokens/s, which is a step of 10.00 ms" in text
    assert (
        "a step of 14.29 ms; measured was 1.50 (receipt of then, commit of-edge). The operations and bytes alone take" in text
    )
    slack = (
        "15.00 ms at these peaks, and 13.00 ms at the best that were measured on this machine (1 GFLOP/s, 0.0 GB/s), so it is"
    )
    assert text.count(f"{slack} at the limit, within the spread of the measured peaks.") == 1
    assert text.count(f"{slack} out of reach in bfloat16 on this machine.") == 1
    assert "`never`" not in text


def test_what_the_page_quotes_of_a_receipt_was_measured() -> None:
    """Not that it is the newest: the page is measured when the machine is quiet, and says of which receipts it speaks."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    quoted = re.findall(
        r"`([\w.]+)` promises ([\d.]+) times .*? measured was ([\d.]+) \(receipt of ([\d-]+), commit (\w+\+?)\)", text
    )
    assert len(quoted) == text.count("` promises ") > 0
    for claim, floor, ratio, when, commit in quoted:
        lines = (ROOT / "benchmarks" / "receipts" / f"{claim}.jsonl").read_text(encoding="utf-8").splitlines()
        known = [
            (f"{receipt['floor']:g}", f"{receipt['ratio']:.2f}", receipt["when"], receipt["commit"])
            for receipt in map(json.loads, lines)
        ]
        assert (floor, ratio, when, commit) in known, claim
