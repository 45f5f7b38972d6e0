"""Guesses inside of several steps in one go: what is guessed, that no token changes, and that who loses stops."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from once_cases import served
from serve_cases import make_engine, prompt_of
from test_stride import GREEDY, asked, drive

from waypost.kernels.build import available
from waypost.kernels.layers.ops import Guessing, Passed, Text
from waypost.model.decoder import Decoder
from waypost.model.linear import at_once
from waypost.model.linear.at_once import LayersAtOnce
from waypost.serve import stride
from waypost.serve.drafting import AdaptiveTrigram, NGram, Wish
from waypost.serve.engine import Engine
from waypost.serve.kv import H2O
from waypost.serve.request import Request
from waypost.serve.speculation import FEW

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler here and no library from a wheel; naive is used")

LONG = replace(GREEDY, max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module", params=["gqa", "window", "panels"])
def model(request: pytest.FixtureRequest) -> Decoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at_once, "pays", lambda weight: True)
        return served(request.param)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Text], int, Guessing, Passed]]:
    """What strides asked for and got."""
    seen: list[tuple[list[Text], int, Guessing, Passed]] = []
    passes = LayersAtOnce.passes

    def watched(
        self: LayersAtOnce, rows: Any, texts: list[Text], positions: Any, count: int, guessing: Guessing
    ) -> Passed | None:
        found = passes(self, rows, texts, positions, count, guessing)
        if found is not None:
            seen.append((texts, count, guessing, found))
        return found

    monkeypatch.setattr(LayersAtOnce, "passes", watched)
    return seen


def drafting(model: Decoder, spec: NGram | None = None, always: bool = True, **more: Any) -> Engine:
    engine = make_engine(model, drafting=spec if spec is not None else NGram(min_ngram=1), **more)
    engine.drafts.always = always
    return engine


def tokens_of(found: Passed, i: int) -> list[int]:
    tokens: list[int] = found.tokens[i, : found.counts[i]].tolist()
    return tokens


def passed_with(guessed: torch.Tensor, accepted: torch.Tensor, seconds: torch.Tensor) -> Passed:
    return Passed([], torch.empty(0), torch.empty(0), guessed, accepted, seconds)


def by_hand(text: Text, found: list[int], guessing: Guessing, passes: int, guesses: list[bool]) -> tuple[list[int], list[int]]:
    """What each pass guesses and how much of it comes true, of a sequence that is given the tokens `found`."""
    spec = NGram(max_ngram=guessing.longest, min_ngram=guessing.shortest, num_draft_tokens=max(text.guesses, 1))
    known, room, guessed, accepted = list(text.tokens), text.room, list[int](), list[int]()
    for number in range(passes):
        most = min(text.guesses, room - 1)
        proposer = spec.build()
        proposer.observe(0, known)
        chain = proposer.propose([Wish(0, known, most)])[0] if most > 0 and guesses[number] else []
        true = 0
        while true < len(chain) and chain[true] == found[len(known) - len(text.tokens) + true]:
            true += 1
        guessed.append(len(chain))
        accepted.append(true)
        known += found[len(known) - len(text.tokens) :][: true + 1]
        room -= true + 1
    assert known == [*text.tokens, *found]
    return guessed, accepted


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    tokens=st.lists(st.integers(1, 60), min_size=5, max_size=5),
    spec=st.builds(NGram, max_ngram=st.integers(2, 4), min_ngram=st.integers(1, 2), num_draft_tokens=st.integers(1, 9)),
    most=st.sampled_from([2, 8, 50]),
    num_pages=st.sampled_from([8, 24, 64]),
    stops=st.booleans(),
    always=st.booleans(),
)
def test_tokens_and_ends_are_those_of_single_steps(
    model: Decoder, lengths: list[int], tokens: list[int], spec: NGram, most: int, num_pages: int, stops: bool, always: bool
) -> None:
    """Answers of unequal lengths, some of which end of themselves, on more pages than they need and on fewer."""
    plain = drive(make_engine(model, drafting=None), asked([replace(LONG, max_tokens=n) for n in tokens], [9] * 5), 1)[0]
    ends = sorted({found[len(found) // 2] for found, _ in plain.values()}) if stops else []
    samplings = [replace(GREEDY, max_tokens=n, stop_token_ids=ends) for n in tokens[: len(lengths)]]
    requests = asked(samplings, lengths)
    want = drive(make_engine(model, num_pages=num_pages, drafting=None), requests, 1)[0]
    engine = drafting(model, spec, always, num_pages=num_pages)
    assert drive(engine, requests, most)[0] == want
    assert engine.pool.held == 0
    assert engine.stats().generated_tokens == sum(len(found) for found, _ in want.values())


def test_what_is_guessed_is_what_the_drafter_guesses(
    model: Decoder, passed: list[tuple[list[Text], int, Guessing, Passed]]
) -> None:
    """Each pass, against the drafter's own words about the text that is then known; a text that repeats takes fewer passes."""
    engine = drafting(model)
    drive(engine, asked([LONG] * 3, [4, 20, 33]), 50)
    for texts, _, guessing, found in passed:
        for i, text in enumerate(texts):
            count = len(found.seconds)
            want = by_hand(text, tokens_of(found, i), guessing, count, [True] * count)
            assert want == (found.guessed[i].tolist(), found.accepted[i].tolist())
    stats = engine.stats()
    assert stats.draft_tokens == sum(int(found.guessed.sum()) for *_, found in passed)
    assert stats.accepted_tokens == sum(int(found.accepted.sum()) for *_, found in passed) > 10
    assert stats.num_drafts == sum(int((found.guessed > 0).sum()) for *_, found in passed)
    assert stats.num_steps < 60


def test_a_guess_that_reaches_the_end_goes_on_with_itself(
    model: Decoder, passed: list[tuple[list[Text], int, Guessing, Passed]]
) -> None:
    """A text of one token over and over: each pass guesses as much as it may, up to the last token that was asked for."""
    engine = drafting(model, NGram(num_draft_tokens=4))
    drive(engine, [Request([7] * 30, replace(LONG, max_tokens=29), id="r0")], 50)
    for (text,), _, _, found in passed:
        room = text.room
        for guessed, accepted in zip(found.guessed[0].tolist(), found.accepted[0].tolist(), strict=True):
            assert guessed <= min(4, room - 1)
            room -= accepted + 1
    assert any(guessed == 4 for *_, found in passed for guessed in found.guessed[0].tolist())
    assert sum(found.counts[0] for *_, found in passed) == 27, "of 29 one was drawn of the prompt, one behind it"


@pytest.mark.parametrize(
    ("guessing", "allowed"),
    [
        (Guessing(credit=9.0), [True] * 12),
        (Guessing(credit=9.0, plain=3), [False] * 3 + [True] * 9),
        (Guessing(credit=0.0), [False] * 12),
    ],
)
def test_when_passes_guess(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, passed: list[tuple[list[Text], int, Guessing, Passed]], guessing: Guessing,
    allowed: list[bool],
) -> None:  # fmt: skip
    engine = drafting(model, NGram())
    monkeypatch.setattr(engine.drafts, "guessing", lambda spans, passes: ([3] * len(spans), guessing))
    drive(engine, [Request([*range(5, 12)] * 4, LONG, id="r0")], 12)
    for (text,), _, _, found in passed:
        count = len(found.seconds)
        want = by_hand(text, tokens_of(found, 0), guessing, count, allowed)
        assert want == (found.guessed[0].tolist(), found.accepted[0].tolist())
    stats = engine.stats()
    assert stats.step_tokens.total == 28 + (stats.num_steps - 1) + stats.draft_tokens, "the prompt, then a row a step and guess"


def test_guesses_that_lose_end_with_their_credit(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, passed: list[tuple[list[Text], int, Guessing, Passed]]
) -> None:
    """Where each pass with guesses takes longer than all of them can gain, there are as many as the credit pays for."""
    engine = drafting(model, NGram(min_ngram=1))
    guessing = Guessing(3, 1, credit=5.0, gain=1.0, plain_s=1e-9)
    monkeypatch.setattr(engine.drafts, "guessing", lambda spans, passes: ([3], guessing))
    drive(engine, [Request([7, 8] * 9, LONG, id="r0")], 30)
    assert any(found.guessed.any() for *_, found in passed)
    for *_, found in passed:
        assert int((found.guessed[0] > 0).sum()) <= 1, "a thousand passes are lost with the first"


@pytest.mark.parametrize("missing", [{0}, {3}, {5, 6}, set(range(40))])
def test_what_a_pass_does_not_know_is_computed_before_its_guesses_are_judged(model: Decoder, missing: set[int]) -> None:
    requests = asked([LONG] * 2, [4, 30])
    want = drive(make_engine(model, drafting=None), requests, 1)[0]
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
    known, before = screen.function, screen._unknown
    whole = signature(known)

    def forgetful(x: int, rows: int, data: int, peaks: Any, places: Any, threads: int) -> int:
        assert whole(x, rows, data, peaks, places, threads) == 0
        call = next(calls)
        lost = range(call % 2, rows) if call in missing else []
        for row in lost:
            places[row], peaks[row] = -1, 0.0
        return len(lost)

    callback = signature(forgetful)
    screen.function = ctypes.cast(callback, ctypes.c_void_p).value
    try:
        assert drive(drafting(model), requests, 30)[0] == want
    finally:
        screen.function, screen._unknown = known, before


def test_a_first_pass_that_is_slow_with_guesses_is_the_last(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The account of strides, of passes with guesses that are said to take eight times as long: they are given up, and tried
    again by its share."""
    engine = drafting(model, always=False)
    passes = LayersAtOnce.passes

    def slow(self: LayersAtOnce, rows: Any, texts: list[Text], *rest: Any) -> Passed | None:
        found = passes(self, rows, texts, *rest)
        assert found is not None
        return replace(found, seconds=1.0 + 7.0 * (found.guessed.sum(0) > 0).double())

    monkeypatch.setattr(LayersAtOnce, "passes", slow)
    drive(engine, [Request([7, 8, 9] * 9, replace(LONG, max_tokens=200), id="r0")], 8)
    regime = engine.drafts.strides.regimes[1]
    assert not regime.on
    assert engine.drafts.strides.regimes[1].trials <= 5


def test_what_a_stride_may_guess() -> None:
    """By what was measured: nothing before three passes without are known, then as many as pay, and no more than the credit."""
    engine = make_engine(served("gqa"), drafting=NGram(num_draft_tokens=5))
    spans: Any = [SimpleNamespace(sequence=SimpleNamespace(arrival=3))]
    counts, guessing = engine.drafts.guessing(spans, 4)
    assert (counts, guessing.plain, guessing.plain_s, guessing.gain) == ([5], 3, 0.0, 1.0)
    seconds, none = torch.ones(4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.int32)
    engine.drafts.book(spans, passed_with(none, none, seconds))
    regime = engine.drafts.strides.regimes[1]
    assert engine.drafts.guessing(spans, 4)[1] == replace(guessing, plain=0, plain_s=1.0, credit=regime.credit)
    wrong = torch.full((1, 4), 5, dtype=torch.int32)
    engine.drafts.book(spans, passed_with(wrong, none, 1.5 * seconds))
    assert engine.drafts.guessing(spans, 4) == ([0], replace(guessing, plain=0, plain_s=1.0, credit=regime.credit))
    assert not regime.on
    assert engine.stats().draft_tokens == 20


def test_a_text_that_is_not_worth_a_guess_is_tried_again_after_as_many_passes_as_steps() -> None:
    engine = make_engine(served("gqa"), drafting=NGram(num_draft_tokens=5))
    spans: Any = [SimpleNamespace(sequence=SimpleNamespace(arrival=3))]
    seconds, none = torch.ones(20, dtype=torch.float64), torch.zeros(1, 20, dtype=torch.int32)
    engine.drafts.book(spans, passed_with(none, none, seconds))
    regime = engine.drafts.strides.regimes[1]
    engine.drafts.strides.acceptance(3, regime.trials).learn(40, 0)
    for _ in range(20):
        engine.drafts.strides.acceptance(3, regime.trials).learn(1, 0)
    assert engine.drafts.guessing(spans, 20)[0] == [0]
    assert regime.on
    engine.drafts.book(spans, passed_with(none, none, seconds))
    assert not regime.on, "twenty passes are more than DECLINED steps"
    for _ in range(3):
        engine.drafts.book(spans, passed_with(none, none, seconds))
    assert (regime.on, regime.trials) == (True, 2)
    assert engine.drafts.guessing(spans, 20)[0] == [5], "and what it had learnt is forgotten"


def test_who_guesses_where_nobody_has_chosen(model: Decoder, passed: list[tuple[list[Text], int, Guessing, Passed]]) -> None:
    """One or two answers have guesses, of more none; never beside a policy that counts attention."""
    for answers in (1, FEW, FEW + 1):
        engine = make_engine(model)
        engine.drafts.always = True
        drive(engine, asked([LONG] * answers, [20] * answers), 30)
        assert (engine.stats().num_drafts > 0) == (answers <= FEW)
        assert any(len(texts) == answers for texts, *_ in passed), "in several steps at a time, with guesses and without"
        assert all((text.guesses > 0) == (len(texts) <= FEW) for texts, *_ in passed for text in texts)
    assert make_engine(model, drafting=None).drafts.drafter is None
    assert make_engine(served("gqa"), kv_policy=H2O()).drafts.drafter is None
    assert Engine(model, num_pages=8, drafting="auto").drafts.drafter == NGram()


def test_a_drafter_that_the_kernel_does_not_know_guesses_step_by_step(model: Decoder) -> None:
    engine = make_engine(model, drafting=AdaptiveTrigram())
    requests = asked([LONG], [12])
    assert drive(engine, requests, 30)[0] == drive(make_engine(model, drafting=None), requests, 1)[0]
    assert not engine.drafts.strides_with(1)
    assert engine.drafts.steps.regimes[1]._plain_s, "its steps are measured one by one"


def test_a_long_text_is_looked_at_as_far_back_as_it_says(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, passed: list[tuple[list[Text], int, Guessing, Passed]]
) -> None:
    monkeypatch.setattr(stride, "LOOKED_BACK", 10)
    prompt = prompt_of(40, 3)
    assert drive(drafting(model), [Request(prompt, LONG, id="r0")], 30)[0] == drive(
        make_engine(model, drafting=None), [Request(prompt, LONG, id="r0")], 1
    )[0]  # fmt: skip
    assert {len(text.tokens) for (text,), *_ in passed} == {10}
