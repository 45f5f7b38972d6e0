"""The likeliest token without most logits is the one with all of them, bit for bit, or it is said to be unknown."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels import build
from waypost.kernels.greedy.cpu import REMEMBERED, RETRY, Screen, fits
from waypost.kernels.largest.cpu import largest
from waypost.kernels.linear.cpu import pack

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler here and no library from a wheel; naive is used")


def check(weight: Tensor, x: Tensor) -> Tensor:
    """(n,) bool: which rows the screen knew; those it has right, and `complete` all of them."""
    screen, head = Screen(weight), pack(weight)
    want = largest(head(x))
    found = screen(x)
    known = found[1] >= 0
    for got, full in zip(found, want, strict=True):
        assert torch.equal(got[known], full[known])
    screen.complete(x, *found, int((~known).sum()), head)
    for got, full in zip(found, want, strict=True):
        assert torch.equal(got.double().nan_to_num(9e9), full.double().nan_to_num(9e9))
    return known


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 20), vocab=st.sampled_from([1, 15, 48, 49, 200, 1000]), pairs=st.integers(1, 70),
    seed=st.integers(0, 99), levels=st.sampled_from([None, 1, 3]),
    far=st.sampled_from([0.0, 0.05, 1.0]), size=st.sampled_from([1e-4, 1.0, 1e4]), threads=st.integers(1, 3),
)  # fmt: skip
def test_it_is_the_largest_of_all_logits(
    rows: int, vocab: int, pairs: int, seed: int, levels: int | None, far: float, size: float, threads: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(vocab, 2 * pairs, generator=source), torch.randn(rows, 2 * pairs, generator=source)
    if levels is not None:  # few different numbers: many logits are equal, or differ by a rounding
        weight, x = (weight.clamp(-2, 2) * levels).round(), (x.clamp(-2, 2) * levels).round()
    x = torch.where(torch.rand(x.shape, generator=source) < far, 60.0 * x, x) * size
    torch.set_num_threads(threads)
    known = check(weight.bfloat16(), x.bfloat16())
    assert known[(x != 0).any(1)].all()  # so few outputs that all of them could be tried


def signs(seed: int) -> Tensor:
    """(128,) of 1 and -1 but for two noughts: numbers of which a row's step is a 32nd, so that rounding them loses nothing."""
    x = torch.randint(0, 2, (128,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    x[:2] = 0
    return x


def whole(seed: int) -> Tensor:
    """(128,) whole numbers, the largest 127, which are their own codes."""
    q = torch.randint(-2, 3, (128,), generator=torch.Generator().manual_seed(seed)).float()
    q[0] = 127
    return q


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_weight_whose_rounding_lost_all_in_one_direction(seed: int, first: bool) -> None:
    """Its codes say 0.49 less for each entry; another output, whose codes say it all, lies above them by 0.3 and below it."""
    x, q = signs(seed), whole(seed + 9)
    behind = torch.where(torch.rand(128, generator=torch.Generator().manual_seed(seed)) < 0.3, q + x, q)
    pair = [q + 0.49 * x, behind] if first else [behind, q + 0.49 * x]
    torch.set_num_threads(1)  # which meets them in their order
    for apart in (0, 60):  # in one panel, in two
        assert check(torch.stack([pair[0], *[0 * q] * apart, pair[1]]).bfloat16(), x[None].bfloat16()).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_row_whose_rounding_lost_all_in_one_direction(seed: int) -> None:
    """Entries between two steps, away from nought where one output has its weights, towards it where another has more."""
    x, half = signs(seed), torch.arange(128) < 64
    row = x * torch.where(half, 1 + 2.0**-7, 1 - 3 * 2.0**-8)
    up, down = 2 * x * half, 2 * x * ~half * (torch.arange(128) < 127)
    up[0] = down[0] = 127
    assert check(torch.stack([down, up]).bfloat16(), row[None].bfloat16()).all()


def test_logits_that_only_rounding_makes_equal() -> None:
    """300 and 301 are one number in bfloat16, and the first place has it."""
    x, weight = signs(1), torch.zeros(60, 128)
    weight[:, 0] = 127
    for output, logit in ((2, 300), (50, 301)):
        entries = torch.zeros(126)
        entries[:100] = 3
        entries[100] = logit - 300
        weight[output, 2:] = entries * x[2:]
    screen = Screen(weight.bfloat16())
    assert screen(x[None].bfloat16())[1].tolist() == [2]
    assert check(weight.bfloat16(), x[None].bfloat16()).all()


@settings(max_examples=60, deadline=None)
@given(base=st.integers(1, 50), places=st.lists(st.tuples(st.integers(0, 299), st.integers(0, 63)), max_size=40))
def test_outputs_that_differ_in_the_last_bit_of_one_weight(base: int, places: list[tuple[int, int]]) -> None:
    source = torch.Generator().manual_seed(base)
    weight = torch.randn(64, generator=source).bfloat16().repeat(300, 1)
    for output, entry in places:
        weight.view(torch.int16)[output, entry] += 1
    assert check(weight, torch.randn(3, 64, generator=source).bfloat16()).all()


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 3e38, 1e-39, 1e-25, 0.0])
def test_numbers_that_no_bound_holds_for(special: float) -> None:
    source = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 48, generator=source).bfloat16() for n in (500, 9))
    strange = weight.clone()
    strange[7::50] = special
    check(strange, x)
    strange = weight.clone()
    strange[3, 5] = special
    check(strange, x)
    for where in (slice(None), slice(0, 5)):
        rows = x.clone()
        rows[2:4, where] = special
        known = check(weight, rows)
        assert known[[0, 1, *range(4, 9)]].all()
        if not math.isfinite(special):
            assert not known[2:4].any()


def test_with_too_many_in_question_it_says_so_and_is_given_up() -> None:
    weight, x = torch.ones(9000, 16).bfloat16(), torch.ones(REMEMBERED, 16).bfloat16()
    screen = Screen(weight)
    found = screen(x)
    assert (found[1] == -1).all()
    assert screen.helps
    screen.complete(x, *found, len(x), pack(weight))
    peaks, places = found
    assert peaks.tolist() == [16.0] * len(x)
    assert not places.any()
    for _ in range(RETRY):
        assert not screen.helps
        screen.left_out()
    assert screen.helps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_type_of_the_process_is_nobodys_business(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(5)
    weight, x = torch.randn(900, 64, generator=source).bfloat16(), torch.randn(4, 64, generator=source).bfloat16()
    torch.set_default_dtype(dtype)
    try:
        assert check(weight, x).all()
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_bits_do_not_depend_on_threads_or_rows_beside() -> None:
    source = torch.Generator().manual_seed(3)
    weight, x = torch.randn(5000, 64, generator=source).bfloat16(), torch.randn(19, 64, generator=source).bfloat16()
    screen = Screen(weight)
    torch.set_num_threads(1)
    peaks, places = screen(x)
    torch.set_num_threads(4)
    assert all(torch.equal(a, b) for a, b in zip(screen(x), (peaks, places), strict=True))
    for t in range(len(x)):
        assert screen(x[t : t + 1])[1].tolist() == [places[t]]


def test_other_heads_and_rows_are_refused() -> None:
    for weight in (torch.zeros(4, 7).bfloat16(), torch.zeros(4, 8), torch.zeros(8, 4).bfloat16().t()):
        assert not fits(weight)
        with pytest.raises(ShapeError, match="a head of"):
            Screen(weight)
    with pytest.raises(ShapeError, match=r"rows \(2, 6\)"):
        Screen(torch.ones(4, 8).bfloat16())(torch.ones(2, 6).bfloat16())
