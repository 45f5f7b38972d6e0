"""Traffic from a seed or a trace, and the clients that send it, against a server of the tiny model."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
from pathlib import Path

import pytest

from waypost.bench.load.claim import ServeLoad
from waypost.bench.load.client import Outcome
from waypost.bench.load.drive import Report, Target, closed_loop, open_loop
from waypost.bench.load.picture import percentiles, timeline
from waypost.bench.load.simulated import Seen, ServeSimulator, error, pieces
from waypost.bench.load.traffic import Ask, Lognormal, drawn, read_trace
from waypost.bench.receipt import Options
from waypost.core.errors import ConfigError
from waypost.testing.tiny import tiny_checkpoint


def test_traffic_follows_from_its_seed_and_its_distribution() -> None:
    prompts, answers = Lognormal(median=100, sigma=0.5, most=10_000), Lognormal(median=20, sigma=0.0)
    asks = drawn(4000, 2.0, prompts, answers, seed=3)
    assert asks == drawn(4000, 2.0, prompts, answers, seed=3) != drawn(4000, 2.0, prompts, answers, seed=4)
    logs = [math.log(a.prompt_tokens) for a in asks]
    # 4000 draws: the mean of the logs is within 4 standard errors, 4 * 0.5 / sqrt(4000) = 0.032
    assert statistics.mean(logs) == pytest.approx(math.log(100), abs=0.032)
    assert statistics.stdev(logs) == pytest.approx(0.5, abs=0.03)
    assert {a.new_tokens for a in asks} == {20}
    assert asks[-1].at_s == pytest.approx(2000, rel=0.08), "4000 arrivals at 2 a second"
    assert [a.at_s for a in asks] == sorted(a.at_s for a in asks)
    assert max(a.prompt_tokens for a in drawn(500, 1.0, Lognormal(median=50, most=60), answers, seed=1)) == 60
    assert {a.at_s for a in drawn(5, math.inf, prompts, answers, seed=1)} == {0.0}


def test_a_trace_is_read_with_its_times_or_others(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt_tokens": 5, "new_tokens": 2, "at_s": 1.5}\n\n{"prompt_tokens": 7, "new_tokens": 3}\n')
    assert read_trace(path) == [Ask(0.0, 7, 3), Ask(1.5, 5, 2)]
    timed = read_trace(path, rate_per_s=10.0, seed=1)
    assert [(a.prompt_tokens, a.new_tokens) for a in timed] == [(5, 2), (7, 3)]
    assert timed[0].at_s < timed[1].at_s


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no request"),
        ("5 2", "needs prompt_tokens"),
        ('{"prompt_tokens": 5}', "needs prompt_tokens"),
        ('{"prompt_tokens": 0, "new_tokens": 1}', "at least 1"),
        ('{"prompt_tokens": 1, "new_tokens": 1, "at_s": -1}', "not negative"),
        ("[1]", "needs prompt_tokens"),
    ],
)
def test_a_wrong_trace_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_trace(path)


def test_wrong_traffic_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="requests a second"):
        drawn(1, 0.0, Lognormal(median=1), Lognormal(median=1), 0)
    with pytest.raises(ConfigError, match="at least 1"):
        Lognormal(median=0.5)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none")
    with pytest.raises(ConfigError, match="--model"):
        ServeLoad().measure(Options())


def check(report: Report, asks: list[Ask]) -> None:
    assert sorted(len(o.token_s) for o in report.outcomes) == sorted(a.new_tokens for a in asks)
    assert {o.finish_reason for o in report.outcomes} == {"length"}
    assert all(o.token_s == sorted(o.token_s) for o in report.outcomes)
    assert report.percentile("first", 50) <= report.percentile("total", 99)
    assert report.tokens_per_s > 0


def test_both_loops_and_the_claim_on_a_tiny_server(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    claim = ServeLoad(streams=2, requests=3, long_tokens=120, long_every_s=0.05)
    receipt = claim.measure(Options(model=str(checkpoint), repeats=1, threads=1))
    assert len(receipt.ours.values) == len(receipt.baseline.values) == 1
    assert receipt.ours.values[0] > 0
    assert receipt.figure is not None
    shares, course = receipt.figure.panels
    for points in shares.lines.values():
        assert [ms for _, ms in points] == sorted(ms for _, ms in points)
        at_99 = dict(points)[2.0]
        assert at_99 in [pytest.approx(1e3 * side.values[0], rel=1e-3) for side in (receipt.ours, receipt.baseline)]
    assert [y for _, y in shares.limits["promised of the 99th: 2 times"]] == [
        pytest.approx(2e3 * receipt.baseline.values[0], rel=1e-3)
    ] * 2
    assert course.bands
    assert all(left < right for left, right in course.bands)


def test_the_picture_shows_each_gap_where_it_ended() -> None:
    def report(*token_s: list[float]) -> Report:
        return Report([Outcome(100.0 + i, 200, times, "length") for i, times in enumerate(token_s)], 1.0)

    assert timeline(report([0.1, 0.2, 0.6], [0.0, 1.5])) == [(0.0, 100.0), (0.5, 400.0), (2.5, 1500.0)]
    assert timeline(report([0.1, 0.2]), began=99.0) == [(1.0, 100.0)]
    ten = percentiles([report([0.0, *(0.001 * (i * i + i) / 2 for i in range(1, 102))])])  # gaps of 1, 2, ... 101 ms
    assert dict(ten)[1.0] == pytest.approx(91.0)
    assert dict(ten)[2.0] == pytest.approx(100.0)


def test_the_loops_see_every_token(tmp_path: Path) -> None:
    from waypost.bench.load.claim import serving

    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    asks = drawn(12, 100.0, Lognormal(median=20, most=60), Lognormal(median=8, most=30), seed=2)
    with serving(str(checkpoint), 1) as target:
        check(asyncio.run(open_loop(target, asks)), asks)
        check(asyncio.run(closed_loop(target, asks, users=3)), asks)
        unknown = Target(target.host, target.port, "other", target.vocab_size)
        refused = asyncio.run(open_loop(unknown, asks[:2]))
        assert {(o.status, o.error, o.told) for o in refused.outcomes} == {(404, "model_not_found", True)}


def test_the_simulator_s_claim_on_a_tiny_server(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    with pytest.raises(ConfigError, match="--model"):
        ServeSimulator().measure(Options())
    claim = ServeSimulator(requests=8, rate_per_s=40.0, num_pages=256, prompts=[16, 32], widths=[1, 3], parts=2)
    receipt = claim.measure(Options(model=str(checkpoint), repeats=1, threads=1))
    assert receipt.ours.values[0] >= 0
    assert receipt.extra["slowest_over_fastest"] >= 1
    assert receipt.figure is not None
    assert [panel.title for panel in receipt.figure.panels] == ["first token", "between tokens", "request"]
    for panel in receipt.figure.panels:
        for name, points in panel.lines.items():
            side = f"{panel.title.replace(' ', '_')}_p50_{name}_s"
            assert dict(points)[50] == pytest.approx(1e3 * receipt.extra[side], rel=1e-3)


def test_a_trace_in_pieces_is_the_trace() -> None:
    asks = drawn(11, 4.0, Lognormal(median=20), Lognormal(median=8), seed=1)
    for parts in (1, 3, 11):
        cut = pieces(asks, parts)
        assert [len(part) for part in cut] == [11 * (i + 1) // parts - 11 * i // parts for i in range(parts)]
        assert [(a.prompt_tokens, a.new_tokens) for part in cut for a in part] == [
            (a.prompt_tokens, a.new_tokens) for a in asks
        ]
        assert all(part[0].at_s == 0.0 for part in cut)
        gaps = [b.at_s - a.at_s for part in cut for a, b in itertools.pairwise(part)]
        assert len(gaps) == 11 - parts
        want = [b.at_s - a.at_s for a, b in itertools.pairwise(asks)]
        assert all(any(abs(gap - other) < 1e-9 for other in want) for gap in gaps)
    with pytest.raises(ConfigError, match=r"parts=9: must be in 1\.\.requests=8"):
        ServeSimulator(requests=8, parts=9)


def test_an_error_is_the_median_over_percentiles() -> None:
    seen: Seen = {"first token": [1.0] * 5, "request": [2.0] * 5}
    assert error(seen, seen) == 0
    assert error({"first token": [1.1] * 5, "request": [1.0] * 5}, seen) == pytest.approx((0.1 + 0.5) / 2)
