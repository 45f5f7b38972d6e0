"""Each step of the sampler against transformers' logits processors, and the draw against its distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waypost.core.config import build, to_tree
from waypost.core.errors import ConfigError
from waypost.core.rng import uniform_at
from waypost.kernels import select
from waypost.kernels.build import available
from waypost.serve.answer import Answer
from waypost.serve.sampling import Ask, Draw, Sampling, penalties, sample

V = 300
OPS = select(kernel="naive")


def rows(n: int = 6, vocab: int = V, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers.generation import logits_process as hf

    logits, ids = rows(1), torch.tensor([[5, 9, 9, 200, 5, 17]])
    want = hf.RepetitionPenaltyLogitsProcessor(1.4)(ids, logits.clone())
    assert torch.equal(penalties.repeat(logits[0], ids[0].unique(), 1.4), want[0])


def test_presence_and_frequency_follow_the_equation() -> None:
    logits, counts = rows(1)[0], {3: 1, 40: 5, 299: 2}
    want = [x - 0.5 * counts.get(j, 0) - (0.25 if j in counts else 0.0) for j, x in enumerate(logits.tolist())]
    got = penalties.presence_and_frequency(logits, counts, presence=0.25, frequency=0.5)
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-6, atol=1e-6)  # float32 against float64
    untouched = [j for j in range(V) if j not in counts]
    assert torch.equal(got[untouched], logits[untouched])


def test_minimum_length_and_bias_are_those_of_transformers() -> None:
    from transformers.generation import logits_process as hf

    logits, prompt = rows(1), [7, 8]
    processor = hf.MinNewTokensLengthLogitsProcessor(2, 3, [4, 6])
    bias = hf.SequenceBiasLogitsProcessor([[[11], 2.5], [[12], -100.0]])
    sampling = Sampling(temperature=1.0, min_tokens=3, stop_token_ids=[6], logit_bias={11: 2.5, 12: -100.0}, seed=0)
    answer = Answer("r", 0, prompt, sampling, seed=0, max_tokens=9, eos_ids=[4], detokenizer=None)
    for step in range(5):
        ids = torch.tensor([[*prompt, *range(50, 50 + step)]])
        want = processor(ids, bias(ids, logits.clone()))[0]
        ask = answer.ask(2 + step)
        edited = penalties.add_bias(logits[0], ask.sampling.logit_bias)
        edited = penalties.forbid(edited, list(ask.forbidden)) if ask.forbidden else edited
        assert torch.equal(edited, want), step
        assert answer.take(Draw(50 + step)).finish_reason is None


def test_a_draw_is_a_function_of_seed_choice_and_position() -> None:
    logits = rows(1)
    sampling = Sampling(temperature=1.0)

    def draw(seed: int, choice: int, position: int) -> int:
        return sample(logits, [Ask(sampling, seed, choice, position)], OPS)[0].token_id

    assert draw(1, 0, 5) == draw(1, 0, 5)
    for varied in ([draw(s, 0, 5) for s in range(40)], [draw(1, c, 5) for c in range(40)], [draw(1, 0, p) for p in range(40)]):
        assert len(set(varied)) > 5
    mass = torch.softmax(logits[0].double(), -1).cumsum(-1)
    for position in range(20):
        want = int((mass <= uniform_at(3, 1, position)).sum())
        assert draw(3, 1, position) == want


WISHES = (
    Sampling(temperature=0.0, logprobs=3),
    Sampling(temperature=0.0),
    Sampling(temperature=1.0, logprobs=0),
    Sampling(temperature=0.5, top_k=3, logprobs=2),
    Sampling(temperature=2.0, top_p=0.5),
    Sampling(temperature=0.8, min_p=0.1, top_k=40, top_p=0.9),
    Sampling(temperature=0.0, repetition_penalty=2.0, presence_penalty=1.0),
    Sampling(temperature=1.1, frequency_penalty=-0.5, logit_bias={4: 3.0}, logprobs=1),
)


@settings(max_examples=40, deadline=None)
@given(
    order=st.lists(st.sampled_from(range(len(WISHES))), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_does_not_depend_on_the_rows_beside_it(order: list[int], dtype: torch.dtype) -> None:
    logits = rows(len(WISHES), seed=4).to(dtype)
    asks = [Ask(s, i, 0, 9, {2: 1, 250: 3}, torch.tensor([1, 2]), (7,) if i % 3 == 0 else ()) for i, s in enumerate(WISHES)]
    together = sample(logits[order], [asks[i] for i in order], OPS)
    alone = [sample(logits[i : i + 1], [asks[i]], OPS)[0] for i in order]
    assert together == alone


def test_logprobs_before_and_after() -> None:
    logits = rows(1, seed=2)
    model = torch.log_softmax(logits[0].double(), -1)
    draw = sample(logits, [Ask(Sampling(temperature=0.5, top_k=4, logprobs=5), 1, 0, 0)], OPS)[0]
    four = (logits[0].double() / 0.5).topk(4)
    after = dict(zip(four.indices.tolist(), torch.log_softmax(four.values, -1).tolist(), strict=True))
    assert draw.logprob == pytest.approx(float(model[draw.token_id]), abs=1e-5)  # float32 against float64
    assert draw.drawn_logprob == pytest.approx(after[draw.token_id], abs=1e-5)
    assert [t for t, _ in draw.top] == model.topk(5).indices.tolist()
    assert [x for _, x in draw.top] == pytest.approx(model.topk(5).values.tolist(), abs=1e-5)
    greedy = sample(logits, [Ask(Sampling(temperature=0.0, logprobs=0), 1, 0, 0)], OPS)[0]
    assert (greedy.token_id, greedy.drawn_logprob, greedy.top) == (int(model.argmax()), 0.0, ())
    plain = sample(logits, [Ask(Sampling(temperature=1.0, logprobs=0), 1, 0, 0)], OPS)[0]
    assert plain.drawn_logprob == pytest.approx(plain.logprob, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_their_row_alone(value: float) -> None:
    logits = rows(2)
    logits[0, 7] = value
    draws = sample(logits, [Ask(Sampling(temperature=t, logprobs=1), 0, 0, 0) for t in (1.0, 1.0)], OPS)
    assert draws[0].failure is not None
    assert "not finite" in draws[0].failure
    assert draws[1].failure is None


@pytest.mark.parametrize("kernel", ["naive", "cpu"] if available() else ["naive"])
def test_what_a_request_leaves_nothing_of_fails_it_alone(kernel: Any) -> None:
    """All forbidden; or so much added to a token that it is infinite."""
    logits, free = rows(3), Sampling(temperature=1.0)
    much = Sampling(temperature=1.0, logit_bias={5: 1e39})
    none = Ask(free, 0, 0, 0, allowed=torch.zeros(V, dtype=torch.bool))
    ops = select(kernel=kernel)
    draws = sample(logits, [none, Ask(much, 0, 0, 0), Ask(free, 0, 0, 0)], ops)
    for draw in draws[:2]:
        assert draw.failure is not None
        assert "what the request forbids or adds leaves logits that are not finite" in draw.failure
    assert draws[2] == sample(logits[2:], [Ask(free, 0, 0, 0)], ops)[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.inf), ("temperature", 1e-50), ("seed", 2**63),
        ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", 1e-310), ("repetition_penalty", 101.0),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("max_tokens", 0),
        ("min_tokens", -1), ("stop", [""]), ("n", 0), ("logprobs", -1), ("logprobs", 129), ("logit_bias", {1: math.nan}),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{field}.*(must|finite)"):
        build(Sampling, {field: value})


def test_min_tokens_above_max_tokens_is_refused_and_unknown_keys_too() -> None:
    with pytest.raises(ConfigError, match=r"min_tokens=9: must be in 0\.\.max_tokens"):
        Sampling(max_tokens=8, min_tokens=9)
    with pytest.raises(ConfigError, match="Did you mean 'temperature'"):
        build(Sampling, {"temprature": 1.0})


def test_sampling_comes_back_from_its_tree() -> None:
    for sampling in (
        *WISHES,
        Sampling(stop=["a"], stop_token_ids=[1], seed=4, n=3, max_tokens=7, min_tokens=2, ignore_eos=True),
    ):
        assert build(Sampling, to_tree(sampling)) == sampling


@given(ties=st.lists(st.integers(0, V - 1), min_size=2, max_size=6, unique=True), at=st.integers(0, 5))
def test_greedy_takes_the_lowest_of_equals(ties: list[int], at: int) -> None:
    logits = rows().bfloat16()
    logits[at, ties] = 50.0
    draws = sample(logits, [Ask(Sampling(temperature=0.0), 0, 0, 0)] * 6, OPS)
    assert draws[at].token_id == min(ties)
