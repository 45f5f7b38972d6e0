"""Both drafters: what they guess from, and that whatever they guess changes no bit."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_cases import KERNELS, answers_of, make_engine, model_of

from waypost.serve.drafting import AdaptiveTrigram, NGram, Wish
from waypost.serve.sampling import Sampling

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)
LOOPING = [7, 8, 9, 10, 11] * 5


@settings(max_examples=50, deadline=None)
@given(
    tokens=TEXTS, prompt=st.integers(1, 9), window=st.integers(3, 8), increment=st.floats(0.01, 1), more=st.floats(1, 40)
)  # fmt: skip
def test_a_score_counts_the_steps_that_saw_its_trigram(
    tokens: list[int], prompt: int, window: int, increment: float, more: float
) -> None:
    """The prompt as a whole, then the last `window` tokens after every new one; at most the cap."""
    cap, counts = increment * more, Counter[tuple[int, ...]]()
    proposer = AdaptiveTrigram(increment=increment, cap=cap, window_tokens=window).build()
    for end in range(min(prompt, len(tokens)), len(tokens) + 1):
        proposer.observe(0, tokens[:end])
        first = 0 if end <= prompt else max(0, end - window)
        counts.update(tuple(tokens[at : at + 3]) for at in range(first, end - 2))
    found = {(u, v, w): score for (u, v), after in proposer._scores[0].items() for w, score in after.items()}
    assert found == pytest.approx({trigram: min(cap, increment * n) for trigram, n in counts.items()})


@given(tokens=st.lists(st.integers(0, 280), min_size=1, max_size=40, unique=True), most=st.integers(1, 9))
def test_a_text_in_which_nothing_comes_again_is_no_ground_for_a_guess(tokens: list[int], most: int) -> None:
    """The neutral setting: nothing is proposed, so that a step is one without drafts."""
    for drafter in (NGram(min_ngram=1), AdaptiveTrigram()):
        proposer = drafter.build()
        proposer.observe(0, tokens)
        assert proposer.propose([Wish(0, tokens, most)]) == [[]]


@settings(max_examples=12, deadline=None)
@given(
    drafter=st.one_of(
        st.builds(NGram, min_ngram=st.integers(1, 2), max_ngram=st.integers(2, 4), num_draft_tokens=st.integers(1, 9)),
        st.builds(AdaptiveTrigram, increment=st.floats(0.01, 3), window_tokens=st.integers(3, 30)),
    ),
    temperature=st.sampled_from([0.0, 0.6, 1.0]), seed=st.integers(0, 99),
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=3), budget=st.integers(1, 40), always=st.booleans(),
)  # fmt: skip
def test_no_drafter_changes_a_bit(
    drafter: NGram | AdaptiveTrigram, temperature: float, seed: int, lengths: list[int], budget: int, always: bool
) -> None:
    """On texts that repeat, so that there is something to guess."""
    loud = dict.fromkeys(range(7, 12), 12.0)
    few = Sampling(temperature=temperature, max_tokens=25, seed=seed, logprobs=0, ignore_eos=True, logit_bias=loud)
    prompts = [LOOPING[:n] for n in lengths]
    model = model_of("gqa", "bf16", KERNELS[-1])
    plain, engine = make_engine(model), make_engine(model, drafting=drafter, max_batch_tokens=budget)  # type: ignore[arg-type]
    engine.drafts.always = always
    assert [answers_of(c) for c in engine.generate(prompts, few)] == [answers_of(c) for c in plain.generate(prompts, few)]
