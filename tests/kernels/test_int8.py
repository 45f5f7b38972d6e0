"""Rows and weights in 8 bits: the equation in float64 loops, the compiled twin bit for bit, and rows that stand alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels import build
from waypost.kernels.linear.int8 import Int8Panels, product, split_rows
from waypost.kernels.linear.quantized import QuantizedWeight

compiled = pytest.mark.skipif(not build.available(), reason="no C++ compiler here and no library from a wheel; naive is used")


def weight_of(outputs: int, inputs: int) -> QuantizedWeight:
    source = torch.Generator().manual_seed(outputs + inputs)
    q = torch.randint(-127, 128, (outputs, inputs), generator=source).to(torch.int8)
    return QuantizedWeight.of(q, (torch.rand(outputs, 1, generator=source) * 0.02 + 0.001).bfloat16(), 8)


def rows_of(rows: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers, some of which stand out."""
    source = torch.Generator().manual_seed(rows * inputs)
    x = torch.randn(rows, inputs, generator=source)
    return torch.where(torch.rand(rows, inputs, generator=source) < 0.1, 20.0 * x, x).to(dtype)


@pytest.mark.parametrize("threshold", [None, 6.0, 0.5])
def test_it_is_the_equation(threshold: float | None) -> None:
    weight, x = weight_of(5, 12), rows_of(4, 12, torch.float32)
    got = product(x, weight, threshold)
    for t, row in enumerate(x.double().tolist()):
        far = [threshold is not None and abs(v) >= threshold for v in row]
        largest = max((abs(v) for v, out in zip(row, far, strict=True) if not out), default=0.0)
        codes = [0 if out or not largest else round(127 * v / largest) for v, out in zip(row, far, strict=True)]
        for n in range(5):
            q, scale = weight.q[n].tolist(), float(weight.scale[n, 0])
            whole = sum(a * b for a, b in zip(codes, q, strict=True)) * largest / 127 * scale
            dense = weight.dense()[n].tolist()
            full = math.fsum(v * w for v, w, out in zip(row, dense, far, strict=True) if out)
            assert got[t, n].item() == pytest.approx(whole + full, rel=1e-5, abs=1e-5)  # float32


@compiled
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_compiled_twin_has_its_bits(data: st.DataObject) -> None:
    weight = weight_of(data.draw(st.integers(1, 120)), 2 * data.draw(st.integers(1, 60)))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    x, threshold = rows_of(data.draw(st.integers(0, 20)), weight.inputs, dtype), data.draw(st.sampled_from([None, 1e-9, 6.0]))
    want = product(x, weight, threshold)
    panels = Int8Panels(weight, threshold)
    assert torch.equal(panels(x), want)
    assert all(torch.equal(panels(x[t : t + 1])[0], row) for t, row in enumerate(want))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.floats(0.1, 30.0), st.integers(0, 11))
def test_a_row_does_not_depend_on_those_beside_it(rows: int, threshold: float, seed: int) -> None:
    weight, x = weight_of(7, 20 + 2 * seed), rows_of(rows, 20 + 2 * seed)
    want = product(x, weight, threshold)
    for t in range(rows):
        assert torch.equal(product(x[t : t + 1], weight, threshold)[0], want[t])


@given(st.floats(1e-6, 1e6), st.integers(0, 100))
def test_what_is_rounded_comes_back_within_half_a_step(size: float, seed: int) -> None:
    x = size * torch.randn(3, 10, generator=torch.Generator().manual_seed(seed))
    rows = split_rows(x, None)
    steps = (x.double() / rows.scale.double()[:, None] - rows.codes).abs()
    assert float(steps.max()) <= 0.5 + 2.0**-16  # a quotient up to 127 in float32


def test_rows_of_nothing_and_of_zeros() -> None:
    weight = weight_of(3, 8)
    assert product(torch.zeros(0, 8), weight, 6.0).shape == (0, 3)
    assert not product(torch.zeros(2, 8), weight, 6.0).any()
    with pytest.raises(ShapeError, match="rows in 8 bits need weights in 8 with one"):
        product(torch.zeros(1, 8), QuantizedWeight.of(torch.zeros(1, 8, dtype=torch.int8), torch.ones(1, 2).bfloat16(), 8), 6.0)


@compiled
def test_other_rows_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"takes \(T, 8\) in bfloat16 or float32"):
        Int8Panels(weight_of(3, 8), 6.0)(torch.zeros(1, 6))
