"""Logit KL against loops, and against itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waypost.core.errors import ConfigError
from waypost.measure.metrics.logit_kl import LogitKl, kl_of_logits
from waypost.measure.perplexity import text_batches
from waypost.model import hf
from waypost.testing.tiny import tiny_checkpoint, tiny_config

DOCUMENTS = [[3 + (7 * i + n) % 250 for i in range(n)] for n in (30, 9, 75, 12)]


def test_equals_the_sum_over_tokens_and_words(tmp_path: Path) -> None:
    paths = [tiny_checkpoint(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    models = [hf.load(path) for path in paths]
    per_document, tokens = [], []
    for ids in DOCUMENTS:
        p, q = (hf.logits(model, ids[:-1]).double().softmax(-1).tolist() for model in models)
        per_document.append(
            math.fsum(a * math.log(a / b) for x, y in zip(p, q, strict=True) for a, b in zip(x, y, strict=True))
        )
        tokens.append(len(ids) - 1)
    want = math.fsum(per_document) / sum(tokens)
    spread = math.fsum((s - want * n) ** 2 for s, n in zip(per_document, tokens, strict=True))
    stderr = math.sqrt(4 / 3 * spread) / sum(tokens)
    got = LogitKl(reference=str(paths[0]), z=2.0).measure(models[1], text_batches(DOCUMENTS, 80))
    assert got.value == pytest.approx(want, rel=1e-4)  # float32 logits of other kernels
    assert got.high - got.value == pytest.approx(2.0 * stderr, rel=1e-3)
    assert got.value - got.low == pytest.approx(got.high - got.value)
    assert got.n == 4


def test_a_model_against_itself(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "it")
    from waypost.model.linear.quantized import load

    got = LogitKl(reference=str(path)).measure(load(path), text_batches(DOCUMENTS, 64))
    assert (got.value, got.low, got.high) == (0.0, 0.0, 0.0)


@given(st.integers(0, 2**31), st.floats(-50, 50))
def test_never_negative_and_blind_to_a_constant(seed: int, constant: float) -> None:
    source = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(3, 11, generator=source, dtype=torch.float64) for _ in range(2))
    assert bool((kl_of_logits(p, q) > 0).all())
    torch.testing.assert_close(kl_of_logits(p + constant, q), kl_of_logits(p, q), rtol=1e-9, atol=1e-12)


@given(st.integers(0, 2**31), st.floats(-50, 50), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_of_equal_logits_it_is_zero_to_the_bit(seed: int, size: float, dtype: torch.dtype) -> None:
    """The neutral setting: a model against itself, however sure it is of itself."""
    logits = (size * torch.randn(4, 13, generator=torch.Generator().manual_seed(seed))).to(dtype)
    assert kl_of_logits(logits, logits.clone()).tolist() == [0.0] * 4


@given(st.integers(0, 2**31), st.integers(1, 10))
def test_words_that_are_told_apart_no_more_bring_models_closer(seed: int, words: int) -> None:
    """Data processing: the first `words` + 1 words taken as one, whose probability is their sum."""
    source = torch.Generator().manual_seed(seed)
    p, q = (2.0 * torch.randn(3, 11, generator=source, dtype=torch.float64) for _ in range(2))
    coarse = [torch.cat([x[:, : words + 1].logsumexp(1, keepdim=True), x[:, words + 1 :]], 1) for x in (p, q)]
    assert bool((kl_of_logits(*coarse) <= kl_of_logits(p, q) + 1e-12).all())


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "it")
    other = hf.load(tiny_checkpoint(tmp_path / "other", tiny_config(vocab_size=300)))
    with pytest.raises(ConfigError, match="knows 288 tokens, the model 300"):
        LogitKl(reference=str(path)).measure(other, text_batches(DOCUMENTS, 64))
    with pytest.raises(ConfigError, match="no token to look at"):
        LogitKl(reference=str(path)).measure(hf.load(path), [])
    with pytest.raises(ConfigError, match="must be positive"):
        LogitKl(reference=str(path), z=0.0)
