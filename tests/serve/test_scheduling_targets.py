"""The costs of steps, the policies that use them or the prefix cache, and simulation against the engine itself."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_cases import make_engine, model_of, prompt_of

from waypost.core.errors import CapacityError, ConfigError
from waypost.serve.answer import Answer
from waypost.serve.costs import Sample, StepCosts, attended, fit, measure
from waypost.serve.ledger import LiveSequence
from waypost.serve.pages import PagePool
from waypost.serve.request import Request
from waypost.serve.sampling import Sampling
from waypost.serve.scheduler import Scheduler, advance
from waypost.serve.scheduling import Chunked, Latency, LongestPrefix, Policy
from waypost.serve.simulator import Arrival, Simulation, simulate

COSTS = StepCosts(base_s=0.02, token_s=0.001, key_s=0.0)


def sequence(arrival: int, tokens: list[int]) -> LiveSequence:
    answer = Answer(f"r{arrival}", 0, tokens, Sampling(), seed=0, max_tokens=99, eos_ids=[], detokenizer=None)
    return LiveSequence(arrival, tokens, len(tokens), answer)


def scheduler(policy: Policy, budget: int = 512, sequences: int = 8, prefix_cache: bool = False) -> Scheduler:
    return Scheduler(
        policy, PagePool(200), num_layers=1, max_batch_tokens=budget, max_sequences=sequences, prefix_cache=prefix_cache
    )


def turn(made: Scheduler) -> list[tuple[int, int]]:
    spans = made.plan()
    seen = [(s.sequence.arrival, s.num_tokens) for s in spans]
    advance(spans, 1)
    made.index(spans)
    for span in spans:
        if span.sequence.remaining == 0:
            span.sequence.tokens.append(7)
    made.check()
    return seen


# Costs


@given(st.floats(0.001, 0.1), st.floats(1e-5, 1e-2), st.floats(0, 1e-6))
def test_costs_come_back_from_their_own_steps(base: float, token: float, key: float) -> None:
    truth = StepCosts(base_s=base, token_s=token, key_s=key)
    shapes = [(1, 8.0), (16, 200.0), (64, 3000.0), (256, 33000.0), (512, 131000.0), (4, 4000.0)]
    found = fit([Sample(n, keys, base + token * n + key * keys) for n, keys in shapes])
    for n, keys in shapes:
        want = truth.base_s + truth.token_s * n + truth.key_s * keys
        assert found.base_s + found.token_s * n + found.key_s * keys == pytest.approx(want, rel=1e-6)


def test_no_cost_is_negative() -> None:
    found = fit([Sample(1, 1, 0.01), Sample(10, 55, 0.02), Sample(100, 5050, 0.05), Sample(200, 20100, 0.06)])
    assert min(found.base_s, found.token_s, found.key_s) >= 0
    with pytest.raises(ConfigError, match="three unknowns"):
        fit([Sample(1, 1, 1.0)])
    with pytest.raises(ConfigError, match="must not be negative"):
        StepCosts(token_s=-1.0)


@given(st.floats(0, 2), st.integers(0, 5000), st.sampled_from([0.0, 1e-6, 3e-5]))
def test_the_most_tokens_are_the_most(seconds: float, context: int, key: float) -> None:
    costs = StepCosts(base_s=0.0, token_s=0.001, key_s=key)
    most = costs.most_tokens(seconds, context)
    assert costs.rows(most, context) <= seconds * (1 + 1e-9) + 1e-12
    assert costs.rows(most + 1, context) >= seconds * (1 - 1e-9)


def test_attended_keys_are_counted_row_by_row() -> None:
    for n, context in itertools.product((1, 2, 7), (0, 3, 20)):
        assert attended(n, context) == sum(context + row + 1 for row in range(n))


def test_an_engine_is_measured_and_left_as_it_was() -> None:
    engine = make_engine(model_of("gqa", "fp32"), max_batch_tokens=32)
    costs = measure(engine, repeats=1)
    assert costs.base_s + costs.token_s > 0
    assert engine.idle
    assert engine.pool.held == 0
    engine.scheduler.check()
    engine.submit(Request(prompt_of(3)))
    with pytest.raises(ConfigError, match="idle engine"):
        measure(engine)


# Latency


def test_a_chunk_beside_decodes_keeps_the_time_between_tokens() -> None:
    made = scheduler(Latency(time_between_tokens_s=0.1, costs=COSTS))
    made.add(sequence(1, [1] * 300))
    assert turn(made) == [(1, 300)], "nobody waits between two tokens: the whole budget"
    made.add(sequence(2, [1] * 300))
    made.add(sequence(3, [1] * 300))
    assert turn(made) == [(1, 1), (2, 79)], "20 ms for the step, 1 for the decode: 79 are left of 100"
    for _ in range(8):
        before = turn(made)
        assert sum(n for _, n in before) <= 80


def test_the_time_to_the_first_token_goes_before_the_time_between_tokens() -> None:
    for target, chunk in ((None, 79), (0.5, 79), (0.36, 158), (0.3, 300)):
        made = scheduler(Latency(time_between_tokens_s=0.1, time_to_first_token_s=target, costs=COSTS))
        made.add(sequence(1, [1] * 3))
        turn(made)
        made.add(sequence(2, [1] * 300))
        assert turn(made) == [(1, 1), (2, chunk)], target


def test_a_target_that_decodes_alone_miss_starves_nobody() -> None:
    made = scheduler(Latency(time_between_tokens_s=0.001, costs=COSTS))
    made.add(sequence(1, [1] * 3))
    turn(made)
    made.add(sequence(2, [1] * 40))
    assert [turn(made) for _ in range(3)] == [[(1, 1), (2, 16)], [(1, 1), (2, 16)], [(1, 1), (2, 8)]]


def test_keys_cost_too() -> None:
    costs = StepCosts(base_s=0.0, token_s=1e-3, key_s=1e-5)
    made = scheduler(Latency(time_between_tokens_s=0.05, costs=costs))
    made.add(sequence(1, [1] * 3))
    turn(made)
    made.add(sequence(2, [1] * 300))
    chunks = [dict(turn(made))[2] for _ in range(5)]
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] > chunks[-1], "the longer the context, the shorter the piece"


def test_a_target_that_no_step_misses_is_chunked() -> None:
    trace = [Arrival(0.01 * i, 5 + 37 * i % 90, 4) for i in range(30)]

    def tokens(policy: Policy) -> list[list[float]]:
        return [s.token_s for s in simulate(trace, policy=policy, costs=COSTS, max_batch_tokens=40).served]

    assert tokens(Latency(time_between_tokens_s=1e9, costs=COSTS)) == tokens(Chunked())
    assert tokens(Latency(time_between_tokens_s=0.03, costs=COSTS)) != tokens(Chunked())


@pytest.mark.parametrize("fields", [{"time_between_tokens_s": 0.0}, {"time_to_first_token_s": -1.0}])
def test_a_target_of_no_time_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="more than 0 seconds"):
        Latency(**fields)


# Longest prefix first


def test_known_prefixes_go_first_and_none_is_overtaken_for_ever() -> None:
    shared = list(range(40))
    for patience, want in ((64, [3, 4, 2, 5]), (1, [3, 2, 4, 5]), (0, [2, 3, 4, 5])):
        made = scheduler(LongestPrefix(patience=patience), sequences=1, prefix_cache=True)
        first = sequence(1, shared)
        made.add(first)
        turn(made)
        for arrival, tokens in ((2, [9] * 20), (3, [*shared, 1]), (4, [*shared[:16], 2]), (5, [8] * 20)):
            made.add(sequence(arrival, tokens))
        made.finish(first)
        order = []
        while made.ledger.waiting or made.ledger.running:
            turn(made)
            (running,) = made.ledger.running
            order.append(running.arrival)
            made.finish(running)
        assert order == want, patience


def test_a_policy_that_knows_the_cache_computes_less() -> None:
    heads = [[100 + h] * 64 for h in range(4)]
    trace = [Arrival(0.0, 70, 2, tokens=[*heads[i * 7 % 4], *range(i, i + 6)]) for i in range(40)]
    results = {
        type(policy).__name__: simulate(
            trace, policy=policy, costs=COSTS, num_pages=14, max_sequences=2, prefix_cache=True, max_batch_tokens=80
        )
        for policy in (Chunked(), LongestPrefix())
    }
    assert results["LongestPrefix"].prefix_hits > results["Chunked"].prefix_hits
    assert results["LongestPrefix"].total_s < results["Chunked"].total_s


# Simulation


def real(trace: list[Arrival], policy: Policy, **options: int) -> list[list[float]]:
    """The steps in which the engine itself draws each token, one unit a step, requests arriving between steps."""
    engine = make_engine(model_of("gqa", "fp32"), policy=policy, drafting=None, **options)
    tokens: dict[str, list[float]] = {str(i): [] for i in range(len(trace))}
    now, arrived = 0.0, 0
    while arrived < len(trace) or not engine.idle:
        while arrived < len(trace) and trace[arrived].at_s <= now:
            a = trace[arrived]
            sampling = Sampling(max_tokens=a.new_tokens, ignore_eos=True, temperature=0.0)
            prompt = list(a.tokens) if a.tokens is not None else prompt_of(a.prompt_tokens, arrived)
            engine.submit(Request(prompt, sampling, id=str(arrived), user=a.user, priority=a.priority))
            arrived += 1
        if engine.idle:
            now = trace[arrived].at_s
            continue
        now += 1.0
        for delta in engine.step():
            tokens[delta.request_id] += [now] * len(delta.tokens)
    return list(tokens.values())


POLICIES: list[Policy] = [Chunked(), Chunked(max_chunk_tokens=5), Latency(costs=StepCosts(base_s=0.09)), LongestPrefix()]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("pages", [64, 5])
def test_the_simulation_is_the_engine_step_for_step(policy: Policy, pages: int) -> None:
    trace = [
        Arrival(float(3 * i // 2), 1 + (23 * i) % 50, 1 + (7 * i) % 31, user="ab"[i % 3 == 0], priority=i % 5 == 0)
        for i in range(14)
    ]
    trace = [Arrival(a.at_s, a.prompt_tokens, a.new_tokens, a.user, int(a.priority), prompt_of(a.prompt_tokens, i % 4))
             for i, a in enumerate(trace)]  # fmt: skip
    unit = StepCosts(base_s=1.0, token_s=0.0, key_s=0.0)
    options = {"num_pages": pages, "max_batch_tokens": 24, "max_sequences": 4}
    got = simulate(trace, policy=policy, costs=unit, prefix_cache=True, **options)  # type: ignore[arg-type]
    assert [s.token_s for s in got.served] == real(trace, policy, **options)
    assert pages > 5 or got.num_preemptions > 0, "the small pool must run short, or the test shows little"


def test_percentiles_are_those_of_the_trace() -> None:
    costs = StepCosts(base_s=1.0, token_s=0.0, key_s=0.0)
    got = simulate([Arrival(0.0, 4, 3), Arrival(0.5, 4, 2)], policy=Chunked(), costs=costs)
    assert [s.token_s for s in got.served] == [[1.0, 2.0, 3.0], [2.0, 3.0]]
    assert got.percentiles()["time_to_first_token_s"][50] == pytest.approx(1.25)
    assert got.percentiles()["inter_token_s"] == {50: 1.0, 90: 1.0, 99: 1.0}
    assert got.percentiles()["request_s"][99] == pytest.approx(2.995)
    assert Simulation([], 0, 0, 0.0).percentiles() == {}
    with pytest.raises(CapacityError, match="needs 7 pages of 4"):
        simulate([Arrival(0.0, 100, 3)], policy=Chunked(), costs=costs, num_pages=4)
