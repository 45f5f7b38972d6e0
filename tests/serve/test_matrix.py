"""The promise as a table: every numeric kind in every situation, against the trainer's forward over the whole sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_cases import KERNELS, Answered, Told, answers_of, by_hand, finish, poison, prompt_of
from test_serving_quantized import folder

from waypost.kernels import select
from waypost.model import hf
from waypost.model.decoder import Decoder
from waypost.model.linear.layercast import widen_arithmetic
from waypost.serve.engine import Engine
from waypost.serve.kv import H2O
from waypost.serve.request import Completion, Request
from waypost.serve.sampling import Sampling
from waypost.testing.tiny import tiny_checkpoint, tiny_config

KERNEL = KERNELS[-1]
SAMPLING = Sampling(temperature=0.9, max_tokens=7, seed=5, logprobs=0, ignore_eos=True)
PROMPT = prompt_of(37, 1)
STRANGER = Sampling(max_tokens=9, seed=8, ignore_eos=True)


@dataclass
class Kind:
    """A checkpoint, how the server opens it, and the trainer's model with the same weights."""

    path: Path
    model: Decoder
    other: Path
    """Other weights of the same architecture."""
    options: dict[str, Any] = field(default_factory=dict)

    def engine(self, **more: Any) -> Engine:
        engine = Engine(self.path, kernel=KERNEL, **{"num_pages": 48, "max_batch_tokens": 64, **self.options, **more})  # type: ignore[arg-type]
        poison(engine)
        return engine

    @functools.cached_property
    def want(self) -> list[Answered]:
        return [by_hand(self.model, PROMPT, SAMPLING)]


def plain(root: Path, dtype: torch.dtype, **changes: Any) -> Kind:
    config = tiny_config(**changes)
    path = tiny_checkpoint(root / "first", config, dtype=dtype)
    other = tiny_checkpoint(root / "other", config, seed=1, dtype=dtype)
    return Kind(path, hf.load(path, ops=select(kernel=KERNEL)), other)  # type: ignore[arg-type]


def layer_cast(root: Path) -> Kind:
    kind = plain(root, torch.bfloat16)
    return Kind(kind.path, widen_arithmetic(kind.model), kind.other, {"arithmetic": torch.float32})


def integers(root: Path, bits: int) -> Kind:
    path = folder(root / "first", "gqa", bits, 8, head=True)
    model = hf.load(path, ops=select(kernel=KERNEL))  # type: ignore[arg-type]
    return Kind(path, model, tiny_checkpoint(root / "other", seed=1, dtype=torch.bfloat16))


KINDS: dict[str, Callable[[Path], Kind]] = {
    "fp32": lambda root: plain(root, torch.float32),
    "bf16": lambda root: plain(root, torch.bfloat16),
    "projected": lambda root: plain(root, torch.bfloat16, norm_gain="scalar", embedding_projection=True),
    "layer-cast": layer_cast,
    "int8": lambda root: integers(root, 8),
    "int4": lambda root: integers(root, 4),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


def submit(engine: Engine, *prompts: list[int], sampling: Sampling = STRANGER) -> list[str]:
    return [engine.submit(Request(prompt, sampling)) for prompt in prompts]


def answer(engine: Engine, between: Callable[[int], object] = lambda step: None) -> Completion:
    """The answer to PROMPT; `between` may do anything before each step."""
    ready = engine.prepare(Request(PROMPT, SAMPLING))
    engine.submit(ready)
    return finish(engine, ready.completion(), between)


def alone(kind: Kind) -> list[Completion]:
    return [answer(kind.engine())]


def with_strangers(kind: Kind) -> list[Completion]:
    engine = kind.engine()
    submit(engine, prompt_of(5, 2), prompt_of(20, 3), PROMPT[:20])
    late = [lambda: submit(engine, prompt_of(33, 4)), lambda: submit(engine, PROMPT)]
    return [answer(engine, lambda step: late[step]() if step < len(late) else None)]


def every_chunk_size(kind: Kind) -> list[Completion]:
    return [answer(kind.engine(max_batch_tokens=size)) for size in (1, 2, 3, 7, 15, 16, 17, 31, 36, 37, 38)]


def prefix_hit_and_miss(kind: Kind) -> list[Completion]:
    engine, off = kind.engine(), kind.engine(prefix_cache=False)
    miss, hit = answer(engine), answer(engine)
    assert (miss.cached_tokens, hit.cached_tokens) == (0, 32)
    engine.generate([PROMPT[:20] + [9] * 30], STRANGER)
    return [miss, hit, answer(engine), answer(off), answer(off)]


def preempted(kind: Kind) -> list[Completion]:
    done = []
    for at in (1, 2, 4, 6):
        engine = kind.engine(max_batch_tokens=16, prefix_cache=at % 4 != 0)

        def take_away(step: int, engine: Engine = engine, at: int = at) -> None:
            if step == at and engine.scheduler.ledger.running:
                engine.scheduler.preempt(engine.scheduler.ledger.running[0])

        done.append(answer(engine, take_away))
        assert engine.stats().num_preemptions == 1
    return done


def cancelled_neighbours(kind: Kind) -> list[Completion]:
    engine = kind.engine(num_pages=9)
    doomed = submit(engine, prompt_of(20, 2), PROMPT, prompt_of(30, 3))
    return [answer(engine, lambda step: engine.cancel(doomed[step]) if step < len(doomed) else None)]


def after_a_swap_and_back(kind: Kind) -> list[Completion]:
    engine = kind.engine()
    before = answer(engine)
    engine.swap(kind.other)
    assert answers_of(answer(engine)) != kind.want, "other weights answer otherwise"
    engine.swap(kind.path)
    after = answer(engine)
    assert after.cached_tokens == 0
    return [before, after, answer(engine)]


def several_choices(kind: Kind) -> list[Completion]:
    engine = kind.engine(max_batch_tokens=16)
    submit(engine, PROMPT, sampling=Sampling(max_tokens=9, n=3, seed=1, ignore_eos=True))
    return [answer(engine)]


def with_guesses(kind: Kind) -> list[Completion]:
    text = PROMPT + kind.want[0][0]
    done = []
    for lie, size in ((1000, 64), (3, 64), (2, 6), (1, 16)):
        engine = kind.engine(drafting=Told({text[0]: text}, lie), max_batch_tokens=size, num_pages=12)
        engine.drafts.always = True
        submit(engine, prompt_of(20, 3), PROMPT)

        def take_away(step: int, engine: Engine = engine) -> None:
            if step == 9 and engine.scheduler.ledger.running:
                engine.scheduler.preempt(engine.scheduler.ledger.running[-1])

        done += [answer(engine, take_away), answer(engine)]
        assert engine.stats().draft_tokens > 0
        assert lie == 1 or engine.stats().accepted_tokens > 0
    return done


SITUATIONS = (
    alone, with_strangers, every_chunk_size, prefix_hit_and_miss, preempted, cancelled_neighbours, after_a_swap_and_back,
    several_choices, with_guesses,
)  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_the_bits_are_the_trainers(kind: Kind, situation: Callable[[Kind], list[Completion]]) -> None:
    for completion in situation(kind):
        assert answers_of(completion) == kind.want


@pytest.mark.parametrize(
    "situation",
    [with_strangers, every_chunk_size, preempted, cancelled_neighbours, several_choices],
    ids=lambda situation: situation.__name__,
)
def test_under_a_policy_that_drops_keys_too(kind: Kind, situation: Callable[[Kind], list[Completion]]) -> None:
    """The promise is then relative to the policy: the bits are those that the request has alone."""
    dropping = replace(kind, options={**kind.options, "kv_policy": H2O(budget=0.3, stride_tokens=3)})
    (want,) = answers_of(answer(dropping.engine()))
    assert want != kind.want[0]
    for completion in situation(dropping):
        assert answers_of(completion) == [want]


def test_scores_of_the_prompt_too(kind: Kind) -> None:
    engine = kind.engine(max_batch_tokens=16)
    submit(engine, PROMPT)
    ask = Sampling(max_tokens=0, prompt_logprobs=0)
    rows = torch.log_softmax(hf.logits(kind.model, PROMPT).detach().double(), -1)
    (done,) = engine.generate([PROMPT], ask)
    (again,) = engine.generate([PROMPT], ask)
    assert done.prompt_scores == again.prompt_scores
    for t, scored in enumerate(done.prompt_scores):
        assert abs(scored.logprob - rows[t, PROMPT[t + 1]].item()) < 1e-5  # float32 sums of 288 terms


@pytest.mark.parametrize("threads", [1, 2])
def test_on_one_thread_and_on_two(kind: Kind, threads: int) -> None:
    torch.set_num_threads(threads)
    done = [answer(kind.engine()), *with_strangers(kind)]
    assert [answers_of(c) for c in done] == [[by_hand(kind.model, PROMPT, SAMPLING)]] * 2
