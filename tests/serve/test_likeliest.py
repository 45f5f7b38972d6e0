"""Requests that want the likeliest token and no more get that of all logits, without most of them being computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from once_cases import rows_of, served
from serve_cases import make_engine, prompt_of
from torch import Tensor

from waypost.core.errors import ConfigError, WaypostError
from waypost.kernels.build import available
from waypost.model.linear import at_once
from waypost.model.linear.at_once import LayersAtOnce
from waypost.serve.sampling import Sampling

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler here and no library from a wheel; naive is used")


GREEDY = Sampling(temperature=0.0, max_tokens=9, ignore_eos=True)


@pytest.mark.parametrize("variant", ["gqa", "window", "qk-norm", "bias", "panels"])
def test_the_likeliest_token_alone_is_that_of_all_logits(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the screen of the head, beside a request that wants more, and one whose prompt ends in the same step."""
    monkeypatch.setattr(at_once, "pays", lambda weight: True)
    model = served(variant)
    assert isinstance(model.at_once, LayersAtOnce)
    ends = model.at_once._ends
    assert ends is not None
    assert ends.screen is not None
    complete, rows_seen = ends.screen.complete, []

    def watched(x: torch.Tensor, *rest: Any) -> None:
        rows_seen.append(rest[4] if len(rest) > 4 else len(x))  # rows of several passes
        complete(x, *rest)

    monkeypatch.setattr(ends.screen, "complete", watched)
    prompts = [prompt_of(5 + 7 * seed, seed) for seed in range(5)]
    engine = make_engine(model, max_batch_tokens=16)
    want = [c.token_ids for c in engine.generate(prompts, replace(GREEDY, logprobs=0))]
    assert not rows_seen
    assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == want
    assert sum(rows_seen) >= 45, "nine tokens of five answers"
    mixed = [replace(GREEDY, logprobs=2 if i == 3 else None) for i in range(5)]
    assert [c.token_ids for c in engine.generate(prompts, mixed)] == want
    with torch.inference_mode():
        rows, _ = rows_of(model, [(3, 1), (20, 4), (0, 2)])
        for wanted in (None, torch.tensor([0, 4, 6])):
            logits = model.at_once.logits(rows, wanted)
            largest = model.at_once.largest(rows, wanted)
            assert logits is not None
            assert largest is not None
            assert all(torch.equal(a, b) for a, b in zip(largest, model.ops.largest(logits), strict=True))


def test_a_head_that_changes_changes_its_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_once, "pays", lambda weight: True)
    model = served("gqa")
    engine = make_engine(model)
    before = engine.generate([prompt_of(6, 1)], GREEDY)[0].token_ids
    with torch.no_grad():
        model.output_weight.copy_(model.output_weight.flip(0))
    after = engine.generate([prompt_of(6, 1)], GREEDY)[0].token_ids
    assert after != before
    assert after == engine.generate([prompt_of(6, 1)], replace(GREEDY, logprobs=0))[0].token_ids


def test_logits_that_are_not_finite_fail_the_request_with_a_screen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_once, "pays", lambda weight: True)
    model = served("gqa")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(WaypostError, match=r"not finite \(largest: nan\)"):
        make_engine(model).generate([prompt_of(6, 1)], GREEDY)


def test_only_a_tied_head_in_bfloat16_has_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untied one is there in panels alone, from which single outputs are slow to gather."""
    monkeypatch.setattr(at_once, "pays", lambda weight: True)
    for model, has in (
        (served("gqa"), True),
        (served("one-kv-head-wide"), False),
        (served("gqa", torch.float32), False),
    ):
        assert isinstance(model.at_once, LayersAtOnce)
        ends = model.at_once._ends
        assert (ends is not None and ends.screen is not None) == has


def test_a_screen_whose_kernel_is_being_compiled_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_once, "pays", lambda weight: True)
    compiling = True
    monkeypatch.setattr(at_once.build, "pending", lambda group, element: compiling)
    model = served("gqa")
    assert isinstance(model.at_once, LayersAtOnce)
    assert not model.at_once.screened
    engine = make_engine(model)
    before, table = engine.generate([prompt_of(6, 1)], GREEDY)[0].token_ids, model.at_once._table
    compiling = False
    assert model.at_once.screened
    assert model.at_once._table is table, "what the layers' weights have become stays"
    assert engine.generate([prompt_of(6, 1)], GREEDY)[0].token_ids == before


def test_without_its_kernel_all_logits_are_computed_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = make_engine(served("gqa")).generate([prompt_of(6, 1)], GREEDY)[0].token_ids

    def fail(weight: Tensor) -> None:
        raise ConfigError("no space left")

    monkeypatch.setattr(at_once, "pays", lambda weight: True)
    monkeypatch.setattr(at_once, "Screen", fail)
    model = served("gqa")
    assert model.at_once is not None
    assert not model.at_once.screened
    assert make_engine(model).generate([prompt_of(6, 1)], GREEDY)[0].token_ids == expected
    assert "no space left" in capsys.readouterr().err
