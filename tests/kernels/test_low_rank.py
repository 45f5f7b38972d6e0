"""Low-rank changes row by row: against float64 loops, in any company, from anywhere in memory, with their gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels import select
from waypost.kernels.build import available
from waypost.kernels.low_rank.factors import LANES, Factors
from waypost.kernels.low_rank.gradient import add_low_rank

KERNELS = ("naive", "cpu") if available() else ("naive",)
RANKS = (1, 3, 4, 8, 17)


def trial(inputs: int, outputs: int, dtype: torch.dtype, rows: int = 23) -> tuple[Tensor, Tensor, Tensor, list[Factors]]:
    g = torch.Generator().manual_seed(inputs + outputs)
    x, y = torch.randn(rows, inputs, generator=g).to(dtype), torch.randn(rows, outputs, generator=g).to(dtype)
    pairs = [(torch.randn(r, inputs, generator=g), torch.randn(outputs, r, generator=g), 0.25 * r) for r in RANKS]
    which = torch.randint(-1, len(RANKS), (rows,), generator=g, dtype=torch.int32)
    return x, y, which, [Factors.of(a, b, scale) for a, b, scale in pairs]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 48), (37, 5), (1, 1)])
def test_golden(kernel: str, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    x, y, which, factors = trial(inputs, outputs, dtype)
    got = select(kernel=kernel).low_rank(x, y, which, factors)  # type: ignore[arg-type]
    assert got.dtype == dtype
    for t in range(len(x)):
        want = [float(v) for v in y[t]]
        if which[t] >= 0:
            f = factors[int(which[t])]
            a, b = f.dense()
            u = [sum(float(p) * float(q) for p, q in zip(row, x[t], strict=True)) for row in a]
            want = [v + f.scale * sum(u[j] * float(b[j, n]) for j in range(f.rank)) for n, v in enumerate(want)]
        close = torch.tensor(want, dtype=torch.float64)
        bound = (2**-7 if dtype == torch.bfloat16 else 2**-18) * max(1.0, float(close.abs().max()))
        assert float((got[t].double() - close).abs().max()) <= bound  # one rounding; float32 sums of at most 37 products


@pytest.mark.parametrize("kernel", KERNELS)
@given(st.integers(0, 22), st.integers(1, 9), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_row_does_not_know_its_neighbours(kernel: str, first: int, count: int, half: bool) -> None:
    x, y, which, factors = trial(37, 50, torch.bfloat16 if half else torch.float32)
    op = select(kernel=kernel).low_rank  # type: ignore[arg-type]
    whole, part = op(x, y, which, factors), slice(first, first + count)
    assert torch.equal(op(x[part], y[part], which[part].clone(), factors), whole[part])
    used = sorted({int(i) for i in which[part] if i >= 0})  # other adapters gone, the rest in another order
    others = torch.tensor([used[::-1].index(int(i)) if i >= 0 else -1 for i in which[part]], dtype=torch.int32)
    assert torch.equal(op(x[part], y[part], others, [factors[i] for i in used[::-1]]), whole[part])


@pytest.mark.parametrize("kernel", KERNELS)
@given(st.floats(-2, 2, width=32))
@settings(max_examples=10, deadline=None)
def test_nothing_to_add_is_the_identity(kernel: str, scale: float) -> None:
    x, y, which, factors = trial(16, 24, torch.float32)
    op = select(kernel=kernel).low_rank  # type: ignore[arg-type]
    assert torch.equal(op(x, y, torch.full_like(which, -1), factors), y)
    a, _ = factors[3].dense()
    zero = Factors.of(a, torch.zeros(24, len(a)), scale)  # B = 0: how training begins
    assert torch.equal(op(x, y, torch.zeros_like(which), [zero]), y)


@pytest.mark.skipif(not available(), reason="no C++ compiler here and no library from a wheel; naive is used")
@given(st.integers(1, 5))
@settings(max_examples=5, deadline=None)
def test_vectors_may_lie_in_segments_anywhere(lanes: int) -> None:
    x, y, which, factors = trial(83, 70, torch.float32)
    width, kept, cut = lanes * LANES, [], []
    for f in factors:
        sides: list[list[int]] = [[], []]
        for side, dense in zip(sides, f.dense(), strict=True):
            for vector in dense:
                for piece in vector.split(width):
                    kept.append(piece.clone())
                    side.append(kept[-1].data_ptr())
        cut.append(Factors(f.rank, width, f.scale, *sides, f.dense))
    op = select(kernel="cpu").low_rank
    assert torch.equal(op(x, y, which, cut), op(x, y, which, factors))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients(kernel: str) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((5, 10), (5, 6), (3, 10), (6, 3))
    given = tuple(torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes)
    op = select(kernel=kernel).low_rank  # type: ignore[arg-type]
    assert torch.autograd.gradcheck(lambda *t: add_low_rank(op, *t, 0.7), given)


def test_factors_must_share_a_rank() -> None:
    with pytest.raises(ShapeError, match="no rank in common"):
        Factors.of(torch.zeros(3, 8), torch.zeros(8, 4), 1.0)
