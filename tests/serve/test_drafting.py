"""Guesses: what they are, that they change no token, and that who loses stops."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_cases import KERNELS, Told, answers_of, by_hand, make_engine, model_of, prompt_of
from test_serving_adapters import run, saved

from waypost.core.errors import ConfigError
from waypost.serve.costs import measure
from waypost.serve.draft_worth import OPENING, SHARE
from waypost.serve.drafting import AdaptiveTrigram, NGram, Wish
from waypost.serve.drafting.ngram import copied
from waypost.serve.drafting.trigram import likeliest, strengthen
from waypost.serve.engine import Engine
from waypost.serve.request import Request
from waypost.serve.sampling import Sampling
from waypost.serve.scheduling import Span
from waypost.testing.tiny import tiny_tokenizer

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)
LOOPING = [7, 8, 9, 10, 11] * 5


def told(prompts: Sequence[list[int]], wishes: Sequence[Sampling], model: object, lie: int = 5) -> Told:
    said = [p + by_hand(model, p, s)[0] for p, s in zip(prompts, wishes, strict=True)]  # type: ignore[arg-type]
    return Told({text[0]: text for text in said}, lie)


def drafting_engine(drafter: object, variant: str = "gqa", dtype: str = "bf16", **more: int) -> Engine:
    engine = make_engine(model_of(variant, dtype, KERNELS[-1]), drafting=drafter, **more)  # type: ignore[arg-type]
    engine.drafts.always = True
    return engine


def lookup(tokens: list[int], spec: NGram, most: int) -> list[int]:
    proposer = spec.build()
    for end in range(1, len(tokens) + 1):
        proposer.observe(0, tokens[:end])
    return proposer.propose([Wish(0, tokens, most)])[0]


@settings(max_examples=100, deadline=None)
@given(tokens=TEXTS, low=st.integers(1, 2), more=st.integers(0, 2), most=st.integers(1, 6))
def test_ngram_by_hand(tokens: list[int], low: int, more: int, most: int) -> None:
    want: list[int] = []
    for size in range(low + more, low - 1, -1):
        ends = [i for i in range(size, len(tokens)) if tokens[i - size : i] == tokens[-size:]] if size < len(tokens) else []
        if ends:
            text = list(tokens)
            for j in range(most):
                text.append(text[ends[-1] + j])
            want = text[len(tokens) :]
            break
    assert lookup(tokens, NGram(min_ngram=low, max_ngram=low + more, num_draft_tokens=6), most) == want


@settings(max_examples=50, deadline=None)
@given(tokens=TEXTS, at=st.integers(1, 30))
def test_ngram_sees_the_text_whole_or_in_pieces(tokens: list[int], at: int) -> None:
    proposer = NGram().build()
    proposer.observe(0, tokens[:at])
    proposer.observe(0, tokens)
    assert proposer.propose([Wish(0, tokens, 8)])[0] == lookup(tokens, NGram(), 8)


def test_a_copy_goes_on_with_itself() -> None:
    assert copied([1, 2, 3, 1, 2, 3], 3, 7) == [1, 2, 3, 1, 2, 3, 1]
    assert lookup([4, *LOOPING], NGram(), 8) == [7, 8, 9, 10, 11, 7, 8, 9][:8]


def test_trigram_by_hand() -> None:
    """Scores of a prompt, then of a window of four tokens at each of two steps, capped."""
    text = [1, 2, 3, 1, 2, 4, 1, 2]
    proposer = AdaptiveTrigram(increment=0.25, cap=0.6, window_tokens=4, num_draft_tokens=3).build()
    proposer.observe(0, text)
    assert proposer._scores[0] == {
        (1, 2): {3: 0.25, 4: 0.25}, (2, 3): {1: 0.25}, (3, 1): {2: 0.25}, (2, 4): {1: 0.25}, (4, 1): {2: 0.25},
    }  # fmt: skip
    for token in (3, 1):
        text = [*text, token]
        proposer.observe(0, text)
    assert proposer._scores[0][1, 2] == {3: 0.6, 4: 0.25}
    assert proposer._scores[0][4, 1] == {2: 0.5}
    assert proposer.propose([Wish(0, text, 9)]) == [[2, 3, 1]]
    assert proposer.propose([Wish(0, text, 2)]) == [[2, 3]]


@settings(max_examples=50, deadline=None)
@given(tokens=TEXTS, most=st.integers(1, 6))
def test_a_chain_follows_pairs_that_were_seen(tokens: list[int], most: int) -> None:
    scores: dict[tuple[int, int], dict[int, float]] = {}
    strengthen(scores, tokens, 0.04, 3.0)
    chain = likeliest(scores, tokens, most)
    text = tokens + chain
    for at in range(len(tokens), len(text)):
        after = scores[text[at - 2], text[at - 1]]
        assert after[text[at]] == max(after.values())


@pytest.mark.parametrize("variant", ["gqa", "window", "moe"])
@pytest.mark.parametrize("drafter", [NGram(min_ngram=1), AdaptiveTrigram()], ids=lambda d: type(d).__name__)
def test_texts_that_repeat(variant: str, drafter: object) -> None:
    few = Sampling(
        temperature=0.6, max_tokens=60, seed=4, logprobs=0, ignore_eos=True, logit_bias=dict.fromkeys(range(7, 12), 12.0)
    )  # fmt: skip
    engine = drafting_engine(drafter, variant)
    plain = make_engine(model_of(variant, "bf16", KERNELS[-1]))
    prompts = [LOOPING, [3, *LOOPING[:7]], [12, 13]]
    assert [answers_of(c) for c in engine.generate(prompts, few)] == [answers_of(c) for c in plain.generate(prompts, few)]
    stats = engine.stats()
    assert 0 < stats.accepted_tokens <= stats.draft_tokens
    assert stats.num_steps < plain.stats().num_steps


def test_beside_adapters(tmp_path: Path) -> None:
    model = model_of("gqa", "bf16", KERNELS[-1])
    few = Sampling(temperature=0.6, max_tokens=40, seed=4, logprobs=0, logit_bias=dict.fromkeys(range(7, 12), 12.0))
    requests = [Request(LOOPING, few, adapter=name) for name in ("one", None, "seven", "one")]
    answers = []
    for drafter in (None, NGram(min_ngram=1)):
        engine = make_engine(copy.deepcopy(model), num_pages=400, drafting=drafter)
        engine.drafts.always = True
        for name in ("one", "seven"):
            engine.adapters.add(name, saved(model, name, tmp_path / str(drafter is None)))
        answers.append([answers_of(c) for c in run(engine, *requests)])
    assert answers[0] == answers[1]
    assert engine.stats().accepted_tokens > 0


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_guesses_change_no_bit(data: st.DataObject) -> None:
    """Whatever is asked of the sampler, however much room there is, with guesses that are right in part."""
    wish = st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.7, 1.2]), top_p=st.sampled_from([1.0, 0.8]), seed=st.integers(0, 9),
        repetition_penalty=st.sampled_from([1.0, 1.4]), frequency_penalty=st.sampled_from([0.0, 0.5]),
        max_tokens=st.integers(1, 24), min_tokens=st.sampled_from([0, 1]), logprobs=st.just(0), ignore_eos=st.booleans(),
        stop_token_ids=st.lists(st.integers(3, 280), max_size=40, unique=True),
    )  # fmt: skip
    wishes = data.draw(st.lists(wish, min_size=1, max_size=4))
    prompts = [[20 + i, *prompt_of(3 + 9 * i, i)] for i in range(len(wishes))]
    model = model_of("gqa", "fp32", KERNELS[-1])
    want = [by_hand(model, p, s) for p, s in zip(prompts, wishes, strict=True)] if not any(
        s.stop_token_ids for s in wishes
    ) else [answers_of(c)[0] for c in make_engine(model).generate(prompts, wishes)]  # fmt: skip
    said = {p[0]: p + w[0] for p, w in zip(prompts, want, strict=True)}
    engine = drafting_engine(
        Told(said, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))), dtype="fp32",
        num_pages=data.draw(st.integers(5, 20)), max_batch_tokens=data.draw(st.integers(1, 40)),
    )  # fmt: skip
    engine.drafts.always = data.draw(st.booleans())
    assert [answers_of(c)[0] for c in engine.generate(prompts, wishes)] == want
    engine.scheduler.check()
    assert engine.pool.held == 0
    for account in (engine.drafts.steps, engine.drafts.strides):
        assert (account._known, account._met) == ({}, set()), "what is known of a text goes with it"


def test_right_guesses_save_steps_and_wrong_ones_are_taken_back() -> None:
    sampling = Sampling(temperature=0.9, max_tokens=40, seed=2, logprobs=0, ignore_eos=True)
    prompt = prompt_of(14, 3)
    model = model_of("gqa", "bf16", KERNELS[-1])
    for lie, steps in ((1000, 1 + 8), (1, 40)):  # 1 + 39 / 5, or one token a step
        engine = drafting_engine(told([prompt], [sampling], model, lie))
        engine.submit(Request(prompt, sampling))
        while not engine.idle:
            engine.step()
            engine.scheduler.check()
            for s in engine.scheduler.ledger.running:
                assert s.num_computed == len(s.tokens) - 1
        stats = engine.stats()
        assert stats.num_steps == steps
        assert stats.accepted_tokens == (0 if lie == 1 else 40 - steps)


def test_a_text_with_stop_strings_and_choices() -> None:
    model, tokenizer = model_of("gqa", "fp32"), tiny_tokenizer()
    sampling = Sampling(temperature=0.8, max_tokens=40, seed=1, n=3, stop=["a", "e"], logprobs=2, min_tokens=4)
    answers = []
    for drafter in (None, NGram(min_ngram=1, max_ngram=1), AdaptiveTrigram()):
        engine = Engine(model, num_pages=40, tokenizer=tokenizer, drafting=drafter)
        engine.drafts.always = True
        (done,) = engine.generate(["the cat and the hat and the cat and the"], sampling)
        answers.append([(c.text, c.tokens, c.finish_reason, c.stopped_by) for c in done.choices])
    assert answers == [answers[0]] * 3


@dataclass
class Following(Told):
    """Told, that counts how often it had to follow a text."""

    followed: int = 0

    def observe(self, key: int, tokens: Sequence[int]) -> None:
        self.followed += 1


def priced(drafter: object, seconds: Callable[[int], float], guessing_s: float = 0.0, **more: int) -> Engine:
    """An engine that believes that a step of n rows takes `seconds(n)`, and guessing `guessing_s`, whatever the clock says."""
    engine = make_engine(model_of("gqa", "fp32", KERNELS[-1]), num_pages=200, drafting=drafter, **more)  # type: ignore[arg-type]
    observe, now = engine.drafts.observe, itertools.count()
    engine.drafts.clock = lambda: next(now) * guessing_s

    def told_the_price(spans: Sequence[Span], took_s: float) -> None:
        observe(spans, seconds(sum(s.num_rows for s in spans)) + engine.drafts._guessing_s)

    engine.drafts.observe = told_the_price  # type: ignore[method-assign]
    return engine


def test_who_loses_is_switched_off_and_tried_again_when_texts_repeat() -> None:
    """One engine, where a tile more costs half a step: its drafter is always wrong, then right."""
    prompts = [[20 + i, *prompt_of(9, i)] for i in range(8)]
    sampling = Sampling(temperature=0.9, max_tokens=150, seed=2, logprobs=0, ignore_eos=True)
    plain = make_engine(model_of("gqa", "fp32", KERNELS[-1]), num_pages=200)
    want = [answers_of(done) for done in plain.generate(prompts, sampling)]
    said = {p[0]: p + answer[0][0] for p, answer in zip(prompts, want, strict=True)}
    drafter = Following(said, lie=1)
    engine = priced(drafter, lambda rows: 1.0 + -(-rows // 8), guessing_s=0.01)
    assert [answers_of(done) for done in engine.generate(prompts, sampling)] == want
    lost, steps = engine.stats().num_drafts / 8, engine.stats().num_steps
    assert 0 < lost <= (OPENING + SHARE * steps) / 0.5 + 1
    assert drafter.followed <= 8 * 0.35 * steps, "the texts were followed although nothing was guessed"
    for turn in range(3):  # the last trial knows
        drafter.lie, before = 1000, engine.stats()
        assert [answers_of(done) for done in engine.generate(prompts, sampling)] == want
        after = engine.stats()
        if turn == 2:
            assert after.num_steps - before.num_steps < 0.5 * steps
            assert after.accepted_tokens - before.accepted_tokens > 0.5 * 8 * 150


def test_a_drafter_that_costs_more_than_it_gains_is_switched_off() -> None:
    """All guesses come true and rows are free, but guessing takes longer than the steps that it saves."""
    prompt = prompt_of(10, 2)
    sampling = Sampling(temperature=0.9, max_tokens=200, seed=2, logprobs=0, ignore_eos=True)
    drafter = told([prompt], [sampling], model_of("gqa", "fp32", KERNELS[-1]), lie=1000)
    for guessing_s, drafted in ((0.0, range(100, 200)), (9.0, range(1, 20))):
        engine = priced(drafter, lambda rows: 1.0, guessing_s)
        assert answers_of(engine.generate([prompt], sampling)[0])[0][0] == drafter.said[prompt[0]][10:]
        assert engine.stats().draft_tokens in drafted, guessing_s


def test_guesses_that_do_not_pay_for_the_larger_step_are_left_out() -> None:
    """Guesses that mostly come true, of eight sequences that fill a tile: what a second tile was found to cost decides."""
    prompts = [prompt_of(10, i) for i in range(8)]
    sampling = Sampling(temperature=0.9, max_tokens=30, seed=3, logprobs=0, ignore_eos=True)
    drafter = told(prompts, [sampling] * 8, model_of("gqa", "fp32", KERNELS[-1]))
    drafted = []
    for tile_s in (0.01, 3.0):
        engine = priced(drafter, lambda rows, tile_s=tile_s: 1.0 + tile_s * (-(-rows // 8)), max_sequences=8)  # type: ignore[misc]
        done = engine.generate(prompts, sampling)
        assert [answers_of(answer)[0][0] for answer in done] == [drafter.said[p[0]][10:] for p in prompts]
        drafted.append(engine.stats().num_drafts / 8)
    assert drafted[0] > 6.0
    assert 0 < drafted[1] < 4.0, "tries, and steps of fewer sequences when others have ended"


def test_a_step_that_computes_prompts_has_no_guesses() -> None:
    prompts = [prompt_of(10, i) for i in range(2)]
    sampling = Sampling(temperature=0.0, max_tokens=40, seed=0, logprobs=0, ignore_eos=True)
    engine = priced(told(prompts, [sampling] * 2, model_of("gqa", "fp32", KERNELS[-1])), lambda rows: 1.0)
    engine.submit(Request(prompts[0], sampling))
    while not engine.stats().num_drafts:
        engine.step()
    before = engine.stats().num_drafts
    engine.submit(Request(prompts[1], sampling))
    engine.step()
    assert engine.stats().num_drafts == before
    while not engine.idle:
        engine.step()
    assert engine.stats().num_drafts > before


def test_costs_of_steps_are_measured_without_guesses() -> None:
    engine = drafting_engine(NGram(min_ngram=1, max_ngram=1))
    measure(engine, repeats=1)
    assert engine.stats().num_drafts == 0


@pytest.mark.parametrize("fields", [{"min_ngram": 0}, {"min_ngram": 4}, {"num_draft_tokens": 0}])
def test_impossible_ngrams_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        NGram(**fields)


@pytest.mark.parametrize("fields", [{"increment": 0.0}, {"increment": 4.0}, {"window_tokens": 2}, {"num_draft_tokens": 0}])
def test_impossible_trigrams_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        AdaptiveTrigram(**fields)  # type: ignore[arg-type]
