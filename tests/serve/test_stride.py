"""Several decoding steps in one go give the tokens, the ends and the books of single steps."""

from __future__ import annotations

import ctypes
import queue
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from once_cases import served
from serve_cases import make_engine, prompt_of

from waypost.core.errors import WaypostError
from waypost.kernels.build import available
from waypost.kernels.layers.ops import Passed
from waypost.model.decoder import Decoder
from waypost.model.linear import at_once
from waypost.model.linear.at_once import LayersAtOnce
from waypost.serve import stride
from waypost.serve.drafting import NGram
from waypost.serve.engine import Engine
from waypost.serve.request import Delta, Request
from waypost.serve.sampling import Sampling

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler here and no library from a wheel; naive is used")

GREEDY = Sampling(temperature=0.0, max_tokens=21)


@pytest.fixture(scope="module", params=["gqa", "window", "panels"])
def model(request: pytest.FixtureRequest) -> Decoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at_once, "pays", lambda weight: True)
        return served(request.param)


Ended = dict[str, tuple[list[int], str | None]]


def drive(engine: Engine, requests: list[Request], most: int) -> tuple[Ended, int]:
    """What each request came to, and the number of calls."""
    for request in requests:
        engine.submit(request)
    tokens: dict[str, list[int]] = {str(request.id): [] for request in requests}
    reasons: dict[str, str | None] = {}
    calls = 0
    while not engine.idle:
        deltas: list[Delta] = engine.step(most)
        calls += 1
        for delta in deltas:
            tokens[delta.request_id] += [draw.token_id for draw in delta.tokens]
            if delta.finish_reason is not None:
                assert delta.request_id not in reasons
                reasons[delta.request_id] = delta.finish_reason
        engine.scheduler.check()
    return {name: (found, reasons[name]) for name, found in tokens.items()}, calls


def asked(samplings: list[Sampling], lengths: list[int]) -> list[Request]:
    return [Request(prompt_of(n, i), s, id=f"r{i}") for i, (s, n) in enumerate(zip(samplings, lengths, strict=True))]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    tokens=st.lists(st.integers(1, 40), min_size=6, max_size=6),
    most=st.sampled_from([2, 3, 8, 50]),
    num_pages=st.sampled_from([8, 24, 64]),
    stops=st.booleans(),
)
def test_tokens_and_ends_are_those_of_single_steps(
    model: Decoder, lengths: list[int], tokens: list[int], most: int, num_pages: int, stops: bool
) -> None:
    """Answers of unequal lengths, some of which end of themselves, on more pages than they need and on fewer."""
    plain = drive(make_engine(model), asked([replace(GREEDY, max_tokens=n, ignore_eos=True) for n in tokens], [9] * 6), 1)[0]
    ends = sorted({found[len(found) // 2] for found, _ in plain.values()}) if stops else []
    samplings = [replace(GREEDY, max_tokens=n, stop_token_ids=ends) for n in tokens[: len(lengths)]]
    requests = asked(samplings, lengths)
    one, many = make_engine(model, num_pages=num_pages), make_engine(model, num_pages=num_pages)
    want, calls = drive(one, requests, 1)
    got, fewer = drive(many, requests, most)
    assert got == want
    assert fewer <= calls
    for engine in (one, many):
        assert engine.pool.held == 0
    assert many.stats().generated_tokens == one.stats().generated_tokens


@pytest.mark.parametrize(("num_pages", "lengths"), [(4, [18, 8]), (5, [14, 16]), (7, [30, 32])])
def test_pages_for_some_of_them_alone_go_back(model: Decoder, num_pages: int, lengths: list[int]) -> None:
    """Where a stride lacks pages for one sequence, the others do not keep theirs: `drive` checks the scheduler."""
    requests = asked([replace(GREEDY, max_tokens=20, ignore_eos=True)] * 2, lengths)
    want = drive(make_engine(model), requests, 1)[0]
    assert drive(make_engine(model, num_pages=num_pages), requests, 8)[0] == want


def test_it_takes_as_many_steps_at_a_time_as_it_may(model: Decoder) -> None:
    requests = asked([replace(GREEDY, ignore_eos=True)] * 3, [4, 5, 6])
    assert drive(make_engine(model), requests, 1)[1] == 21
    assert drive(make_engine(model), requests, 8)[1] == 6, "1 of the prompt, 1, 2, 4, 8 and 5 that are left"
    engine = make_engine(model)
    drive(engine, requests, 8)
    stats = engine.stats()
    assert (stats.num_steps, stats.step_s.count, stats.step_tokens.count, stats.generated_tokens) == (21, 21, 21, 63)


@pytest.mark.parametrize(
    "changes", [{"temperature": 1.0, "seed": 3}, {"logprobs": 0}, {"repetition_penalty": 1.5}, {"min_tokens": 20}]
)
def test_who_wants_more_than_the_likeliest_token_gets_single_steps(model: Decoder, changes: dict[str, float]) -> None:
    wish = replace(GREEDY, ignore_eos=True, **changes)  # type: ignore[arg-type]
    assert drive(make_engine(model), asked([GREEDY, wish], [4, 5]), 8)[1] >= 18


def test_deadlines_are_looked_at_between_single_steps(model: Decoder) -> None:
    engine = make_engine(model)
    request = replace(asked([replace(GREEDY, ignore_eos=True)], [4])[0], deadline_s=1000.0)
    assert drive(engine, [request], 8)[1] == 21


def test_a_second_request_finds_the_pages_of_the_first(model: Decoder) -> None:
    """What was computed in one go is in the prefix cache as what was computed step by step."""
    wish = replace(GREEDY, ignore_eos=True, max_tokens=40)
    one, many = make_engine(model), make_engine(model)
    answers = []
    for engine, most in ((one, 1), (many, 8)):
        first = drive(engine, asked([wish], [20]), most)[0]["r0"][0]
        again = [Request([*prompt_of(20, 0), *first, 5], wish, id="again")]
        answers.append((first, drive(engine, again, most)[0]["again"]))
        assert engine.scheduler.prefix_hits == 48
    assert answers[0] == answers[1]


def test_what_fails_on_the_way_fails_its_request(model: Decoder) -> None:
    """One of two sequences meets a token whose embedding is not a number."""
    prompts = [prompt_of(6, 1), prompt_of(6, 2)]
    wish = replace(GREEDY, ignore_eos=True)
    found = [c.token_ids for c in make_engine(model).generate(prompts, wish)]
    bad = next(t for t in found[0] if t not in (*found[1], *prompts[0], *prompts[1]))
    weight, kept = model.model.embed_tokens.weight, model.model.embed_tokens.weight.detach().clone()
    engine = make_engine(model)
    try:
        with torch.no_grad():
            weight[bad] = float("nan")
        with pytest.raises(WaypostError, match="not finite"):
            engine.generate(prompts, wish)
        engine.scheduler.check()
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_without_a_screen_every_step_is_a_single_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_once, "pays", lambda weight: False)
    plain = served("gqa")
    assert isinstance(plain.at_once, LayersAtOnce)
    requests = asked([replace(GREEDY, ignore_eos=True)] * 2, [4, 20])
    got, calls = drive(make_engine(plain), requests, 8)
    assert calls == 21
    assert got == drive(make_engine(plain), requests, 1)[0]


def test_generate_takes_several_at_a_time(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = stride.run

    def watched(*args: Any) -> list[float]:
        rows = run(*args)
        seen.append(len(rows))
        return rows

    monkeypatch.setattr(stride, "run", watched)
    monkeypatch.setattr(stride, "UNHEARD_S", 1e9)
    monkeypatch.setattr(stride, "MOST", 8)
    make_engine(model, drafting=None).generate([prompt_of(5, 1)], replace(GREEDY, ignore_eos=True))
    assert seen == [0, 0, 2, 4, 8, 5]


@pytest.mark.parametrize("missing", [{3}, {5, 6}, {7}, set(range(40))])
def test_what_a_pass_does_not_know_is_computed_before_the_next(model: Decoder, missing: set[int]) -> None:
    """Passes of a stride after which a screen says that it does not know the tokens of some sequences, or of all."""
    requests = asked([replace(GREEDY, ignore_eos=True)] * 3, [4, 5, 6])
    want = drive(make_engine(model), requests, 1)[0]
    assert isinstance(model.at_once, LayersAtOnce)
    ends = model.at_once._ends
    assert ends is not None
    assert ends.screen is not None
    screen, calls = ends.screen, iter(range(1000))
    signature = ctypes.CFUNCTYPE(
        ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.POINTER(ctypes.c_float),
        ctypes.POINTER(ctypes.c_int64), ctypes.c_int,
    )  # fmt: skip
    assert screen.function is not None
    known, unscathed = screen.function, screen._unknown
    whole = signature(known)

    def forgetful(x: int, rows: int, data: int, peaks: Any, places: Any, threads: int) -> int:
        assert whole(x, rows, data, peaks, places, threads) == 0
        call = next(calls)
        lost = range(call % 3, rows) if call in missing else []
        for row in lost:
            places[row], peaks[row] = -1, 0.0
        return len(lost)

    callback = signature(forgetful)
    screen.function = ctypes.cast(callback, ctypes.c_void_p).value
    try:
        assert drive(make_engine(model), requests, 8)[0] == want
        assert next(calls) == 21, "each pass once"
        lost = sum(3 - call % 3 for call in missing if call < 21)
        assert (screen._unknown > unscathed) == (lost > 0)
    finally:
        screen.function, screen._unknown = known, unscathed


def test_passes_that_take_long_are_few_at_a_time(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [stride.in_time(s, 0.1) for s in (0.0, 1e-9, 0.0101, 0.034, 0.06, 5.0)]
    assert found == [stride.MOST, stride.MOST, 9, 2, 1, 1]
    monkeypatch.setattr(stride, "UNHEARD_S", 0.0)
    steps: list[int] = []
    engine = make_engine(model)
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda most: steps.append(most) or step(most))
    engine.generate([prompt_of(5, 1)], replace(GREEDY, ignore_eos=True))
    assert steps == [stride.MOST] + [1] * 20, "of the first nothing is known"


def test_what_was_told_before_a_failure_is_told(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer ends in a pass before the one in which the books of the other cannot be kept."""
    wish = replace(GREEDY, ignore_eos=True)
    engine = make_engine(model)
    index, calls = engine.scheduler.index, iter(range(100))

    def failing(spans: Any) -> None:
        if next(calls) == 15:
            raise RuntimeError("as if a page were lost")
        index(spans)

    monkeypatch.setattr(engine.scheduler, "index", failing)
    requests = asked([wish, wish], [4, 5])
    first = drive(make_engine(model), requests, 1)[0]["r0"][0]
    ends = replace(wish, stop_token_ids=[first[9]])
    short, long = drive(engine, [replace(requests[0], sampling=ends), requests[1]], 8)[0].values()
    assert short == (first[: first.index(first[9]) + 1], "stop")
    assert long[1] == "error"
    assert engine.pool.held == 0


def test_turns_are_charged_as_by_single_steps(model: Decoder) -> None:
    wish = replace(GREEDY, ignore_eos=True)
    charged = []
    for most in (1, 8):
        engine = make_engine(model)
        for request in asked([wish, replace(wish, max_tokens=9)], [4, 5]):
            engine.submit(replace(request, user=str(request.id)))
        while len(engine._live) == 2:
            engine.step(most)
        charged.append(engine.scheduler.turns.served)
    assert charged[0] == charged[1]


def test_a_server_runs_ahead_while_nobody_waits_for_single_tokens(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in one go from the moment at which the last answer has ended of which somebody reads every token."""
    monkeypatch.setattr(stride, "in_time", lambda pass_s, most_s: {stride.UNHEEDED_S: 7}[most_s])
    engine = make_engine(model, drafting=None)
    want = drive(make_engine(model, drafting=None), asked([replace(GREEDY, ignore_eos=True, max_tokens=60)], [5]), 1)[0]["r0"][
        0
    ]
    step, seen = engine.step, list[int]()
    monkeypatch.setattr(engine, "step", lambda most: seen.append(most) or step(most))
    arrived: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    thread = engine.background()
    try:
        thread.submit(Request(prompt_of(9, 3), replace(GREEDY, ignore_eos=True, max_tokens=4), id="heard"), lambda delta: None)
        thread.submit(asked([replace(GREEDY, ignore_eos=True, max_tokens=60)], [5])[0], arrived.put, heeded=False)
        got: list[int] = []
        while len(got) < 60:
            got += [draw.token_id for draw in arrived.get(timeout=60).tokens]
        assert got == want
        assert not thread._heeded
    finally:
        engine.close()
    alone = seen.index(7)
    assert seen[:alone] == [1] * alone
    assert alone >= 4, "a step for each token of the other"
    assert set(seen[alone:]) == {7}
    assert len(seen) < 40


@pytest.mark.parametrize("drafting", [None, NGram(min_ngram=1)])
def test_a_token_has_the_time_of_its_pass(model: Decoder, monkeypatch: pytest.MonkeyPatch, drafting: NGram | None) -> None:
    """As operators see it in the time between tokens, though all tokens of a stride are told together; tokens of one pass
    have one time."""
    engine = make_engine(model, drafting=drafting)
    engine.drafts.always = True
    take, times, begun = engine._take, list[list[float]](), list[float]()
    passes, ran = LayersAtOnce.passes, dict[int, Passed]()

    def passing(self: LayersAtOnce, *given: Any) -> Passed | None:
        found = passes(self, *given)
        assert found is not None
        ran[len(times) - 1] = found
        return found

    def watched(sequence: Any, draw: Any, now: float) -> Delta:
        times[-1].append(now)
        return take(sequence, draw, now)

    monkeypatch.setattr(engine, "_take", watched)
    monkeypatch.setattr(LayersAtOnce, "passes", passing)
    engine.submit(Request([7] * 30, replace(GREEDY, ignore_eos=True), id="r0"))
    while not engine.idle:
        begun.append(time.monotonic())
        times.append([])
        engine.step(8)
    begun.append(time.monotonic())
    assert sum(map(len, times)) == GREEDY.max_tokens
    if drafting is None:
        assert [len(each) for each in times] == [1, 1, 2, 4, 8, 5]
    else:
        assert engine.stats().accepted_tokens > 0
    for found, begin, end in zip(times, begun, begun[1:], strict=False):
        assert begin <= found[0]
        assert found[-1] <= end
    assert ran, "some of them in one go"
    for step, passed in ran.items():
        took = passed.seconds.cumsum(0).repeat_interleave(1 + passed.accepted[0]).tolist()
        assert [at - times[step][0] for at in times[step]] == pytest.approx([s - took[0] for s in took], abs=1e-9)
