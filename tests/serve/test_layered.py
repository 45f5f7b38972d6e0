"""Layered prefill: its groups against a search, its bits against the trainer's, and how often experts are read for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_cases import KERNELS, answers_of, by_hand, finish, make_engine, model_of, prompt_of

from waypost.core.batch import Batch
from waypost.core.errors import ConfigError
from waypost.measure.expert_loads import ExpertLoads
from waypost.model.ffn.moe import MoeFfn
from waypost.model.rows import Rows
from waypost.serve.answer import Answer
from waypost.serve.costs import StepCosts
from waypost.serve.engine import Engine
from waypost.serve.kv import H2O
from waypost.serve.ledger import LiveSequence
from waypost.serve.pages import PagePool
from waypost.serve.request import Request
from waypost.serve.sampling import Sampling
from waypost.serve.scheduler import Scheduler, advance
from waypost.serve.scheduling import Chunked, Layered, Policy
from waypost.serve.scheduling.layered import group_layers
from waypost.serve.simulator import Arrival, simulate
from waypost.testing.tiny import tiny_config, tiny_model

POLICIES = (Layered(), Chunked())
SAMPLING = Sampling(temperature=0.9, max_tokens=5, seed=5, logprobs=0, ignore_eos=True)


def scheduler(policy: Policy, budget: int, layers: int) -> Scheduler:
    return Scheduler(policy, PagePool(200), num_layers=layers, max_batch_tokens=budget, max_sequences=8)


def sequence(arrival: int, length: int) -> LiveSequence:
    tokens = list(range(length))
    answer = Answer(f"r{arrival}", 0, tokens, Sampling(), seed=0, max_tokens=99, eos_ids=[], detokenizer=None)
    return LiveSequence(arrival, tokens, len(tokens), answer)


def turn(made: Scheduler) -> list[tuple[int, int, int, int]]:
    spans = made.plan()
    seen = [(s.sequence.arrival, s.num_tokens, s.first_layer, s.stop_layer) for s in spans]
    assert made.ledger.tokens(spans) <= made.max_batch_tokens
    advance(spans, made.ledger.num_layers)
    for span in spans:
        if span.sequence.remaining == 0:
            span.sequence.tokens.append(7)
    made.check()
    return seen


def eight_layers(dtype: torch.dtype = torch.float32) -> Engine:
    config = tiny_config(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=8)
    return make_engine(tiny_model(config, dtype=dtype, kernel=KERNELS[-1]), max_batch_tokens=16, policy=Layered())  # type: ignore[arg-type]


# The groups


@given(st.integers(1, 60), st.integers(1, 3000), st.integers(0, 20000))
def test_groups_are_as_few_as_fit_and_even(left: int, tokens: int, room: int) -> None:
    """Against a search over all numbers of groups, each split as numpy does it."""
    splits = (np.array_split(np.arange(left), groups) for groups in range(1, left + 1))
    sizes = ([len(part) for part in split] for split in splits)
    want = next((each[0] for each in sizes if max(each) * tokens <= room), 0)
    assert group_layers(left, tokens, room) == want


def test_a_prompt_goes_down_the_model_while_decodes_go_on() -> None:
    made = scheduler(Layered(), budget=17, layers=8)
    made.add(sequence(1, 3))
    assert turn(made) == [(1, 3, 0, 8)]
    made.add(sequence(2, 40))
    made.add(sequence(3, 24))
    for first in (0, 2, 4, 6):
        want = [(1, 1, 0, 8), (2, 40, first, first + 2), (3, 24, first, first + 2)]
        assert turn(made) == want, "64 tokens through a quarter of the layers are 16 through all"
    assert turn(made) == [(1, 1, 0, 8), (2, 1, 0, 8), (3, 1, 0, 8)]


def test_what_comes_meanwhile_begins_after_it_and_what_is_too_long_is_cut() -> None:
    made = scheduler(Layered(max_groups=2), budget=16, layers=8)
    made.add(sequence(1, 40))
    assert turn(made) == [(1, 32, 0, 4)], "two groups of what half of the layers may hold"
    made.add(sequence(2, 5))
    assert turn(made) == [(1, 32, 4, 8)]
    assert turn(made) == [(1, 8, 0, 8), (2, 5, 0, 8)], "13 fit through all layers"
    made = scheduler(Layered(max_prompt_tokens=20), budget=16, layers=8)
    made.add(sequence(1, 40))
    assert [turn(made) for _ in range(4)] == [[(1, 20, 0, 4)], [(1, 20, 4, 8)]] * 2


def test_its_fields_are_refused_where_they_say_nothing() -> None:
    for name in ("max_groups", "max_prompt_tokens"):
        with pytest.raises(ConfigError, match=f"Layered.{name}=0"):
            Layered(**{name: 0})


@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=12), st.integers(60, 99)
)
def test_prompts_within_the_budget_are_chunked(trace: list[tuple[float, int, int]], budget: int) -> None:
    """The neutral setting: one prompt at a time, each of which fits, goes step by step as it does under `chunked`."""
    apart = [Arrival(100.0 * i + at, n, new) for i, (at, n, new) in enumerate(trace)]
    costs = StepCosts(base_s=0.02, token_s=0.001)
    sides = [simulate(apart, policy=p, costs=costs, max_batch_tokens=budget, num_layers=6) for p in (Layered(), Chunked())]
    assert sides[0] == sides[1]


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 400), st.integers(1, 9)), min_size=1, max_size=10),
    st.integers(1, 64), st.integers(1, 9), st.integers(1, 12), st.integers(20, 80),
)  # fmt: skip
def test_every_request_ends_within_the_budget(
    trace: list[tuple[float, int, int]], budget: int, layers: int, groups: int, pages: int
) -> None:
    """The scheduler asserts the work of each step; steps cost what chunks of as much work cost."""
    arrivals = [Arrival(at, min(n, 16 * pages - new), new) for at, n, new in trace]
    costs = StepCosts(base_s=0.0, token_s=0.001, key_s=0.0)
    done = simulate(
        arrivals, policy=Layered(max_groups=groups), costs=costs, max_batch_tokens=budget, num_layers=layers, num_pages=pages
    )
    assert [len(s.token_s) for s in done.served] == [s.arrival.new_tokens for s in done.served]
    if not done.num_preemptions:
        rows = sum(a.prompt_tokens + a.new_tokens - 1 for a in arrivals)
        busy = done.total_s - min(s.arrival.at_s for s in done.served)
        assert busy >= 0.001 * rows - 1e-9, "no row goes through a layer for nothing"


# The bits


def test_the_bits_are_the_trainers_whatever_happens_between_two_groups() -> None:
    want = None
    for at in (None, 1, 2, 3, 5):
        engine = eight_layers()
        want = want or by_hand(engine.model, prompt_of(60), SAMPLING)
        engine.submit(Request(prompt_of(9, 3), Sampling(max_tokens=20, seed=1, ignore_eos=True)))
        engine.step()
        ready = engine.prepare(Request(prompt_of(60), SAMPLING))
        doomed = engine.submit(Request(prompt_of(30, 4), SAMPLING))
        engine.submit(ready)

        def disturb(step: int, engine: Engine = engine, at: int | None = at, doomed: str = doomed) -> None:
            if step == at:
                assert engine.scheduler.ledger.running[-1].layer or step == 5
                engine.cancel(doomed)
                engine.scheduler.preempt(engine.scheduler.ledger.running[-1])

        completion = finish(engine, ready.completion(), disturb)
        assert answers_of(completion) == [want]
        assert engine.stats().prompt_tokens >= 60


def test_prompts_are_counted_once_and_nothing_is_left() -> None:
    engine = eight_layers(torch.bfloat16)
    prompts = [prompt_of(60), prompt_of(33, 2), prompt_of(60)]
    done = engine.generate(prompts, SAMPLING)
    assert [answers_of(c) for c in done] == [[by_hand(engine.model, p, SAMPLING)] for p in prompts]
    stats = engine.stats()
    assert stats.prompt_tokens == 153
    assert stats.step_tokens.total == 153 + 3 * 4
    assert engine.pool.held == 0


def test_a_policy_that_drops_keys_drops_the_same_ones() -> None:
    """Attention is counted layer by layer, and acted on when the last layer has run."""
    model = eight_layers().model
    sides = [make_engine(model, max_batch_tokens=16, policy=p, kv_policy=H2O(budget=0.3, stride_tokens=3)) for p in POLICIES]  # type: ignore[arg-type]
    answers = [[answers_of(c) for c in engine.generate([prompt_of(60), prompt_of(33, 2)], SAMPLING)] for engine in sides]
    assert answers[0] == answers[1]
    assert answers[0][0] != [by_hand(model, prompt_of(60), SAMPLING)], "keys were dropped"


# The loads


def chosen(engine: Engine, prompt: list[int], patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """(T, k) of every layer: the experts of each row, from one whole pass."""
    found: list[torch.Tensor] = []
    plain = MoeFfn.route

    def route(self: MoeFfn, h: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        weight, choice = plain(self, h, rows)
        found.append(choice)
        return weight, choice

    with patch.context() as inside, torch.no_grad():
        inside.setattr(MoeFfn, "route", route)
        engine.model(Batch.of([prompt]))
    return found


def test_an_expert_is_loaded_once_a_prompt_instead_of_once_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(64)
    engine = eight_layers()
    choices = chosen(engine, prompt, monkeypatch)
    size = 3 * 32 * 64 * 4
    for policy, pieces in ((Layered(), 1), (Chunked(), 4)):
        engine = eight_layers()
        engine.scheduler.policy = policy
        with ExpertLoads(engine.model) as loads:
            engine.generate([prompt], Sampling(temperature=0.0, max_tokens=1))
        assert engine.stats().num_steps == 4, "four chunks of 16 tokens, or four groups of two layers"
        want = sum(len(part.unique()) for layer in choices for part in layer.chunk(pieces))
        assert (loads.num_loads, loads.num_bytes) == (want, want * size)
    with ExpertLoads(model_of("gqa", "fp32")) as loads:
        make_engine(model_of("gqa", "fp32")).generate([prompt], Sampling(max_tokens=1))
    assert loads.num_loads == 0, "a dense model has no experts"
