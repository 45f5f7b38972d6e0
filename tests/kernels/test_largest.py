"""The largest of each row is torch.max's, in every set of kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waypost.kernels import build, select

KERNELS = ("naive", "cpu") if build.available() else ("naive",)


@pytest.mark.parametrize("kernel", KERNELS)
@given(
    rows=st.integers(1, 4),
    vocab=st.sampled_from([1, 7, 16, 255, 256, 257, 1000]),
    levels=st.sampled_from([1, 2, 50]),
    seed=st.integers(0, 99),
    special=st.sampled_from([None, math.nan, math.inf, -math.inf]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    apart=st.booleans(),
)
def test_the_largest_is_the_first_of_equals(
    kernel: str, rows: int, vocab: int, levels: int, seed: int, special: float | None, dtype: torch.dtype, apart: bool
) -> None:
    source = torch.Generator().manual_seed(seed)
    logits = torch.randint(-levels, 1, (rows, 2 * vocab), generator=source).to(dtype)
    logits = logits[:, :vocab] if apart else logits[:, :vocab].contiguous()
    if special is not None:
        logits[:, int(torch.randint(vocab, (1,), generator=source)) :: 3] = special
    peak, place = select(kernel=kernel).largest(logits)  # type: ignore[arg-type]
    want = logits.max(-1)
    assert peak.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(place, want.indices)
    assert torch.equal(peak.double().nan_to_num(9e9), want.values.double().nan_to_num(9e9))
