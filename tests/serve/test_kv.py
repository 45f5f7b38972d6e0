"""H2O against attention with masks over a whole sequence; what it keeps; and the engine that moves it."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from once_cases import served
from serve_cases import KERNELS, answers_of, make_engine, model_of, poison, prompt_of
from test_serving_adapters import run, saved
from torch import Tensor

from waypost.core.batch import Batch
from waypost.core.errors import ConfigError
from waypost.model.linear import at_once
from waypost.model.rows import Rows
from waypost.serve.drafting import NGram
from waypost.serve.engine import Engine
from waypost.serve.eviction import cached_positions
from waypost.serve.kv import H2O, Cached, Full
from waypost.serve.kv.h2o import heavy_and_recent
from waypost.serve.pages import PagedKv, pages_for
from waypost.serve.request import Request
from waypost.serve.sampling import Sampling

PROMPT = prompt_of(37, 1)
SAMPLING = Sampling(temperature=0.9, max_tokens=30, seed=5, logprobs=0, ignore_eos=True)
POLICY = H2O(budget=0.4, recent=0.4, stride_tokens=8)


class Masked:
    """A KvStore without a cache: one query after the other over the keys that are alive, in float64."""

    def __init__(self, prompt_tokens: int, budget: float, recent: float, stride: int) -> None:
        self.prompt, self.budget, self.recent, self.stride = prompt_tokens, budget, recent, stride
        self.pages = None
        self.alive: dict[tuple[int, int], list[int]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, rows: Rows) -> Tensor:
        out = torch.empty(q.shape, dtype=torch.float64)
        share = q.shape[1] // k.shape[1]
        for g in range(k.shape[1]):
            alive, received = [], {}
            for i in range(len(q)):
                alive, received[i] = [*alive, i], 0.0
                for head in range(g * share, (g + 1) * share):
                    p = torch.softmax(scale * (k[alive, g].double() @ q[i, head].double()), 0)
                    out[i, head] = p @ v[alive, g].double()
                    for j, weight in zip(alive, p.tolist(), strict=True):
                        received[j] += weight
                if i + 1 >= self.prompt and (i + 1 - self.prompt) % self.stride == 0:
                    size = max(1, math.ceil(self.budget * (i + 1)))
                    last = max(1, round(self.recent * size))
                    if size < len(alive):
                        heavy = sorted(alive[:-last], key=lambda j: -received[j])[: size - last]
                        alive = sorted(heavy) + alive[-last:]
            self.alive[layer, g] = alive
        return out.to(q.dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_golden(kernel: str) -> None:
    model = model_of("gqa", "fp32", kernel)
    engine = make_engine(model, kv_policy=POLICY)
    (choice,) = engine.generate([PROMPT], SAMPLING)[0].choices
    full = make_engine(model).generate([PROMPT], SAMPLING)[0]
    assert full.choices[0].logprobs != choice.logprobs, "a budget of 40 % drops something"
    tokens = PROMPT + choice.token_ids
    rows = Rows(Batch.of([tokens]), model.ops, Masked(len(PROMPT), 0.4, 0.4, 8))
    with torch.no_grad():
        logits = model.head(model.run(model.embed(rows.batch), range(2), rows), rows).double()
    want = torch.log_softmax(logits, -1)[range(len(PROMPT) - 1, len(tokens) - 1), choice.token_ids]
    assert (torch.tensor(choice.logprobs, dtype=torch.float64) - want).abs().max() < 1e-4  # float32 against float64


def test_positions_are_the_masks() -> None:
    model = model_of("gqa", "fp32")
    engine = make_engine(model, kv_policy=POLICY)
    engine.submit(Request(PROMPT, SAMPLING))
    for _ in range(21):
        engine.step()
    (sequence,) = engine.scheduler.ledger.running
    assert sequence.num_computed == len(PROMPT) + 20
    assert len(sequence.pages) == pages_for(sequence.num_slots + 0) == pages_for(math.ceil(0.4 * 53) + 4)
    masked = Masked(len(PROMPT), 0.4, 0.4, 8)
    rows = Rows(Batch.of([sequence.tokens[: sequence.num_computed]]), model.ops, masked)
    with torch.no_grad():
        model.run(model.embed(rows.batch), range(2), rows)
    for layer in range(2):
        assert cached_positions(sequence, layer, 2).tolist() == [masked.alive[layer, g] for g in range(2)]


@settings(max_examples=30, deadline=None)
@given(
    sums=st.lists(st.lists(st.integers(0, 9), min_size=12, max_size=12), min_size=1, max_size=3),
    heavy=st.integers(0, 6),
    recent=st.integers(1, 6),
)
def test_heavy_hitters_by_hand(sums: list[list[int]], heavy: int, recent: int) -> None:
    got = heavy_and_recent(torch.tensor(sums, dtype=torch.float32), heavy, recent)
    for row, kept in zip(sums, got.tolist(), strict=True):
        older = sorted(range(12 - recent), key=lambda j: (-row[j], j))[:heavy]
        assert kept == sorted(older) + list(range(12 - recent, 12))


@settings(max_examples=8, deadline=None)
@given(length=st.integers(1, 60), stride=st.integers(1, 40), chunk=st.integers(1, 64), kernel=st.sampled_from(KERNELS))
def test_a_full_budget_is_full_attention(length: int, stride: int, chunk: int, kernel: str) -> None:
    model, prompt = model_of("gqa", "bf16", kernel), prompt_of(length, 2)
    want = answers_of(make_engine(model, kv_policy=Full()).generate([prompt], SAMPLING)[0])
    policy = H2O(budget=1.0, stride_tokens=stride)
    assert answers_of(make_engine(model, kv_policy=policy, max_batch_tokens=chunk).generate([prompt], SAMPLING)[0]) == want


@settings(max_examples=60, deadline=None)
@given(after=st.integers(0, 300), prompt=st.integers(1, 100), stride=st.integers(1, 50))
def test_places_are_the_prompts_end_and_strides(after: int, prompt: int, stride: int) -> None:
    places = [prompt + n * stride for n in range(400)]
    assert H2O(stride_tokens=stride).next(after, prompt) == next(p for p in places if p > after)


def test_choices_and_neighbours_keep_their_own() -> None:
    model = model_of("gqa", "bf16", KERNELS[-1])
    three = Sampling(temperature=0.9, max_tokens=20, seed=5, logprobs=0, ignore_eos=True, n=3)
    alone = answers_of(make_engine(model, kv_policy=POLICY).generate([PROMPT], three)[0])
    crowd = make_engine(model, kv_policy=POLICY, num_pages=9, max_batch_tokens=20)
    done = crowd.generate([prompt_of(50, 3), PROMPT, prompt_of(60, 4)], [SAMPLING, three, SAMPLING])
    assert answers_of(done[1]) == alone
    assert crowd.stats().num_preemptions > 0
    assert (crowd.pool.held, crowd.pool.cached) == (0, 0), "what a policy changes is not for the prefix cache"


def test_beside_adapters(tmp_path: Path) -> None:
    model = model_of("gqa", "bf16", KERNELS[-1])

    def engine(**more: int) -> Engine:
        made = make_engine(copy.deepcopy(model), kv_policy=POLICY, **more)
        for name in ("one", "seven"):
            made.adapters.add(name, tmp_path / name)
        return made

    for name in ("one", "seven"):
        saved(model, name, tmp_path)
    requests = [Request(prompt_of(30 + i, i), SAMPLING, adapter=name) for i, name in enumerate(("one", None, "seven", "one"))]
    together = run(engine(num_pages=400, max_batch_tokens=20), *requests)
    for request, completion in zip(requests, together, strict=True):
        assert answers_of(completion) == answers_of(run(engine(num_pages=400), request)[0])


def test_memory_follows_the_budget() -> None:
    engine = make_engine(model_of("gqa", "fp32", KERNELS[-1]), kv_policy=H2O(budget=0.25, stride_tokens=16))
    engine.submit(Request(prompt_of(200), Sampling(max_tokens=40, seed=1, ignore_eos=True)))
    held = []
    while not engine.idle:
        engine.step()
        engine.scheduler.check()
        held.append(engine.pool.held)
        used = {page for s in engine.scheduler.ledger.running for page in s.pages}
        poison(engine, sorted(set(range(64)) - used))
    assert max(held[:3]) == pages_for(200)
    assert max(held[5:]) <= pages_for(math.ceil(0.25 * 240) + 16)


@pytest.mark.parametrize(("variant", "more", "why"), [("window", {}, "window"), ("gqa", {"drafting": NGram()}, "drafts")])
def test_what_cannot_hold_is_refused(variant: str, more: dict[str, NGram], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        make_engine(model_of(variant, "fp32"), kv_policy=POLICY, **more)


class FirstAndLast:
    """Keeps two keys and the last sixteen, every 24 tokens: a policy that looks at no attention, which may go with drafts."""

    counts_attention = False

    def next(self, after: int, prompt_tokens: int) -> int | None:
        return -(-max(after + 1, prompt_tokens) // 24) * 24

    def keep(self, cached: Cached) -> list[Tensor] | None:
        count = cached.positions[0].shape[1]
        chosen = torch.tensor(sorted({0, 1, *range(max(2, count - 16), count)}))
        return [chosen.expand(len(positions), -1) for positions in cached.positions]


@pytest.mark.parametrize("most", [1, 8])
def test_a_policy_acts_where_guesses_came_true(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Also at a place that is reached in the middle of a step, by a guess."""
    monkeypatch.setattr(at_once, "pays", lambda weight: True)
    model, acted, held = served("gqa"), 0, []
    move = PagedKv.move

    def watched(self: PagedKv, layer: int, pages: list[int], chosen: Tensor) -> None:
        nonlocal acted
        acted += layer == 0
        move(self, layer, pages, chosen)

    monkeypatch.setattr(PagedKv, "move", watched)
    for drafting in (None, NGram(min_ngram=1)):
        engine = make_engine(model, kv_policy=FirstAndLast(), drafting=drafting)
        engine.drafts.always = True
        greedy = Sampling(temperature=0.0, max_tokens=90, seed=0, ignore_eos=True)
        for i in range(6):
            prompt = [5 + i, 100 - i, 7] * 8
            engine.submit(Request(prompt, greedy, id=f"{i}"))
        tokens: dict[str, list[int]] = {}
        while not engine.idle:
            for delta in engine.step(most):
                tokens.setdefault(delta.request_id, []).extend(token.token_id for token in delta.tokens)
            engine.scheduler.check()
        held.append((tokens, acted))
        acted = 0
    assert held[0] == held[1]
    assert held[0][1] == 6 * 4, "24, 48, 72 and 96 tokens of each"
    assert engine.stats().accepted_tokens > 60


@pytest.mark.parametrize("fields", [{"budget": 0.0}, {"budget": 1.1}, {"recent": -0.1}, {"stride_tokens": 0}])
def test_impossible_budgets_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        H2O(**fields)  # type: ignore[arg-type]
