"""Measuring claims: which are chosen, what happens to those that fail, what a reader is told of ceilings and promises."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from waypost import load
from waypost.bench import CLAIMS, roofline, run
from waypost.bench.figure import Figure, Panel
from waypost.bench.peaks import Peaks
from waypost.bench.receipt import Options, Receipt, append, latest, series
from waypost.bench.table import claims_table, comparison, markdown, promised, receipt_table, roofline_shares
from waypost.core.config import technique
from waypost.core.errors import ConfigError
from waypost.measure.flops import decode_flops, prefill_flops
from waypost.model.hf import config_from_hf
from waypost.testing.tiny import tiny_checkpoint

MACHINE = Peaks(flops=4e9, read_bytes=1e6)
RECEIPT = Receipt(
    claim="a.claim",
    statement="one against two",
    numerics="exact",
    ours=series("waypost", "tokens/s", [20.0, 22.0, 21.0]),
    baseline=series("llama.cpp", "tokens/s", [10.0, 10.0, 10.0]),
    higher_is_better=True,
    floor=2.0,
    agreement="equal",
    command="waypost bench a.claim",
    versions={"llama.cpp": "7"},
    roofline=roofline.roofline(10, 8e9, 5e6, MACHINE),
)


@technique
class Good:
    def measure(self, options: Options) -> Receipt:
        return replace(RECEIPT, claim="a.good")


@technique
class Crash:
    def measure(self, options: Options) -> Receipt:
        raise OSError("the rival fell over")


def test_a_family_is_its_claims() -> None:
    assert run.chosen("serve.stream") == ["serve.stream.llama", "serve.stream.vllm"]
    assert run.chosen("serve.start") == ["serve.start", "serve.start.torch"]
    assert run.chosen("merge.linear") == ["merge.linear"]
    assert run.chosen(None) == list(CLAIMS)
    with pytest.raises(ConfigError, match=r"Did you mean 'merge\.linear'"):
        run.chosen("merge.liner")


def test_one_that_fails_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "CLAIMS", {"a.crash": Crash, "a.good": Good})
    outcome = run.measure_all(run.chosen(None), Options(), tmp_path)
    assert [receipt.claim for receipt in outcome.receipts] == ["a.good"]
    assert outcome.failed == {"a.crash": "OSError: the rival fell over"}
    assert list(latest(tmp_path)) == ["a.good"], "written as soon as it is there"
    assert "1 of 2 claims were not measured:\n  a.crash: OSError" in str(run.outcome_error(outcome))
    seen = capsys.readouterr().err
    assert "[1/2] a.crash" in seen
    assert "a.good: ratio 2.10, kept" in seen
    with pytest.raises(OSError, match="fell over"):
        run.measure_all(["a.crash"], Options(), None)


def test_the_command_goes_on_and_exits_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from waypost.cli.main import main

    monkeypatch.setattr(run, "CLAIMS", {"a.crash": Crash, "a.good": Good})
    with pytest.raises(SystemExit) as left:
        main(["bench", "--all", "--json"])
    assert left.value.code == 1
    printed = json.loads(capsys.readouterr().out)
    assert [receipt["claim"] for receipt in printed["receipts"]] == ["a.good"]
    assert set(printed["failed"]) == {"a.crash"}
    with pytest.raises(SystemExit) as usage:
        main(["bench", "a.good", "--all"])
    assert usage.value.code == 2


def test_a_promise_may_be_a_ratio_or_a_bound_or_both() -> None:
    assert RECEIPT.ratio == pytest.approx(2.1)
    assert (RECEIPT.kept, RECEIPT.promised) == (True, "2")
    assert not replace(RECEIPT, floor=2.2).kept
    assert (replace(RECEIPT, floor=None).kept, replace(RECEIPT, floor=None).promised) == (None, "")
    bound = replace(RECEIPT, limit=22.0)
    assert (bound.kept, bound.promised) == (False, "2 and at least 22 tokens/s")
    assert replace(bound, limit=21.0).kept
    fast = replace(RECEIPT, floor=None, limit=21.0, higher_is_better=False)
    assert (fast.kept, fast.promised) == (True, "at most 21 tokens/s")
    assert not replace(fast, limit=20.0).kept
    worst = replace(RECEIPT, extra={"lowest": 0.98}, least={"lowest": 0.97})
    assert (worst.kept, worst.promised) == (True, "2 and lowest at least 0.97")
    assert not replace(worst, extra={"lowest": 0.96}).kept
    assert not replace(worst, floor=None, least={"lowest": 0.99}).kept


def test_a_reader_sees_ceiling_versions_and_misses(tmp_path: Path) -> None:
    text = receipt_table(RECEIPT)
    assert "memory: 5 MB at 0.0 GB/s); ours is above it, so that this peak was measured too low" in text
    assert "llama.cpp 7" in text
    assert "  2.10  (2.00 to 2.20)  (promised 2: kept)" in text
    assert "but:" not in text
    assert "\n  but: a hair\n" in receipt_table(replace(RECEIPT, caveat="a hair"))
    append(tmp_path, replace(RECEIPT, floor=3.0))
    table = markdown(latest(tmp_path))
    assert "| llama.cpp 7: 10 tokens/s +-0% | **2.10** (2.00 to 2.20) | 3, missed | - | - |" in table
    assert "3, missed" in claims_table({"a.claim": ""}, latest(tmp_path))
    assert "Measured on" not in table, "nothing is said of a machine that is not known"
    append(tmp_path, replace(RECEIPT, machine={"cpu": "it", "threads": 2, "cores": 4, "torch": "2"}))
    assert "Measured on it, 2 threads of 4 cores, torch 2." in markdown(latest(tmp_path))
    for name, cpu in (("b.claim", "it"), ("c.claim", "other")):
        append(tmp_path, replace(RECEIPT, claim=name, machine={"cpu": cpu, "threads": 2, "cores": 4, "torch": "2"}))
    table = markdown(latest(tmp_path))
    assert "Measured on it, 2 threads of 4 cores, torch 2, where nothing else is said." in table
    assert "On other, 2 threads of 4 cores, torch 2: `c.claim`." in table


def test_the_ceiling_is_the_best_that_any_row_measured(tmp_path: Path) -> None:
    facts = {"cpu": "it", "threads": 2, "cores": 4, "torch": "2"}
    top = roofline.roofline(10, 8e9, 5e6, MACHINE)  # 2 tokens/s by memory, 5 by arithmetic
    quick = roofline.roofline(10, 8e9, 5e6, replace(MACHINE, read_bytes=1e7))  # a quieter minute: 5 by arithmetic
    slow = replace(RECEIPT, ours=series("it", "tokens/s", [1.0]), baseline=series("x", "tokens/s", [1.0]), machine=facts)
    for name, ceiling, machine in (("a", top, facts), ("b", quick, facts), ("c", top, {**facts, "cpu": "other"})):
        append(tmp_path, replace(slow, claim=name, roofline=ceiling, machine=machine))
    assert roofline_shares(latest(tmp_path)) == {"a": "20% (arithmetic)", "b": "20% (arithmetic)", "c": "50% (memory)"}
    append(tmp_path, replace(slow, claim="d", roofline=top, ours=series("it", "tokens/s", [6.0])))
    append(tmp_path, replace(slow, claim="e", roofline=None))
    assert {name: share for name, share in roofline_shares(latest(tmp_path)).items() if share == "-"} == {"d": "-", "e": "-"}


def test_a_promise_that_the_rounds_disagree_on_is_within_noise(tmp_path: Path) -> None:
    def said(**changes: Any) -> str:
        return promised(json.loads(replace(RECEIPT, **changes).line()))

    assert said(floor=1.9) == "1.9, kept"
    assert said(floor=2.05) == "2.05, kept within noise"
    assert said(floor=2.15) == "2.15, missed within noise"
    assert said(floor=2.15, over="lengths") == "2.15, missed", "lengths are not the same thing measured again"
    assert said(floor=None, limit=21.0) == "at least 21 tokens/s, kept within noise"
    assert said(floor=None, limit=19.0) == "at least 19 tokens/s, kept"
    assert said(floor=None) == "-"


@pytest.mark.parametrize("table", [comparison, markdown])
def test_a_missed_promise_and_a_caveat_stand_in_either_table(table: Callable[..., str], tmp_path: Path) -> None:
    receipt = replace(RECEIPT, floor=3.0, caveat="it was raining", command=f"{RECEIPT.command} -n 3 --threads 1",
                      machine={"cpu": "it", "threads": 1, "cores": 4, "torch": "2"})  # fmt: skip
    append(tmp_path, receipt)
    (row,) = (line for line in table(latest(tmp_path)).splitlines() if line.startswith("| `a.claim`"))
    assert "| 3, missed |" in row
    assert "one against two. *But: it was raining.* |" in row
    assert row.endswith("| `-n 3 --threads 1` |")


def test_what_is_no_repetition_has_a_range_and_no_spread(tmp_path: Path) -> None:
    append(tmp_path, replace(RECEIPT, over="lengths"))
    text = comparison(latest(tmp_path))
    assert "waypost: 21 tokens/s (20 to 22 over 3 lengths); llama.cpp: 10 tokens/s (10 to 10 over 3 lengths)" in text
    assert "| better in 3 of 3 lengths |" in text


def test_old_receipts_are_still_read(tmp_path: Path) -> None:
    tree = json.loads(RECEIPT.line())
    for name in ("kept", "promised", "roofline", "versions", "limit"):
        del tree[name]
    (tmp_path / "a.claim.jsonl").write_text(json.dumps(tree) + "\n")
    assert "| **2.10** (2.00 to 2.20) | 2, kept | - | - |" in markdown(latest(tmp_path))


def test_the_lower_ceiling_binds() -> None:
    memory = roofline.roofline(10, 8e9, 5e6, MACHINE)  # 2 s of arithmetic, 5 s of memory
    assert (memory.rate, memory.bound) == (2.0, "memory")
    assert roofline.roofline(10, 8e9, 1e6, MACHINE).bound == "arithmetic"
    assert roofline.roofline(10, 8e9, 1e6, MACHINE).rate == 5.0


def test_ceilings_count_weights_cache_and_the_head_once(tmp_path: Path) -> None:
    model = str(tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16))
    config = config_from_hf(json.loads((tmp_path / "tiny" / "config.json").read_text()))
    one, four, nine = (roofline.decode(model, streams, 10, MACHINE) for streams in (1, 4, 9))
    cached = sum(2 * 2 * layer.mixer.num_key_value_heads * layer.mixer.head_dim for layer in config.layers)
    assert four.moved_bytes - one.moved_bytes == 3 * 10 * cached
    assert four.flops == 4 * one.flops == 4 * decode_flops(config, 10)
    numbers = {name: p.numel() for name, p in load(model).named_parameters()}
    matrices = sum(n for name, n in numbers.items() if name.endswith("_proj.weight"))
    head, norms = numbers["model.embed_tokens.weight"], sum(n for name, n in numbers.items() if "norm" in name)
    assert sum(numbers.values()) == matrices + head + norms
    assert nine.moved_bytes - 90 * cached == 2 * matrices + head + 2 * norms, "of the head, which is the embedding, a byte each"
    assert one.moved_bytes - 10 * cached == 1.5 * matrices + head + 2 * norms
    assert roofline.weight_bytes(model) == 2 * sum(numbers.values())
    prompt = roofline.prefill(model, 8, MACHINE)
    assert prompt.flops == prefill_flops(config, 8)
    assert prompt.moved_bytes == roofline.weight_bytes(model)


def test_a_receipt_with_a_figure_is_drawn_beside_it_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    panel = Panel("seconds", "x", "y", {"ours": [(0, 1.0), (1, 2.0)]}, {"promised": [(0, 3.0), (1, 3.0)]}, [(0.2, 0.4)], "busy",
                  {"first": 0, "last": 1}, log_y=True)  # fmt: skip
    receipt = replace(RECEIPT, figure=Figure("a claim", [panel, replace(panel, title="others")]))
    first = append(tmp_path / "a", receipt).with_suffix(".svg").read_text()
    assert append(tmp_path / "b", receipt).with_suffix(".svg").read_text() == first
    for text in ("a claim", "seconds", "others", "ours", "promised", "busy", "first", "last"):
        assert f">{text}</text>" in first, text
    assert json.loads((tmp_path / "a" / "a.claim.jsonl").read_text())["figure"]["panels"][0]["lines"] == {
        "ours": [[0, 1.0], [1, 2.0]]
    }
    assert append(tmp_path / "c", RECEIPT).with_suffix(".svg").exists() is False
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    append(tmp_path / "d", receipt)
    assert not list((tmp_path / "d").glob("*.svg"))
    assert "waypost[plots]" in capsys.readouterr().err
