"""The compiled linear against the product in float64, in values and gradients, and the independence of a row's bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels import build, select
from waypost.kernels.linear.cpu import pack

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler here and no library from a wheel; naive is used")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("row_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(5, 64, 48), (1, 7, 50), (300, 33, 97), (17, 2, 1), (0, 4, 3)])
def test_values_and_gradients(row_dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    x = normal(rows, inputs).to(row_dtype).requires_grad_()
    weight = normal(outputs, inputs, seed=1).bfloat16().requires_grad_()
    bias = normal(outputs, seed=2).to(row_dtype).requires_grad_()
    probe = normal(rows, outputs, seed=3).to(row_dtype)
    got = select().linear(x, weight, bias)
    assert got.dtype == row_dtype
    (got * probe).sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = leaves[0] @ leaves[1].t() + leaves[2]
    (want * probe.double()).sum().backward()
    # bfloat16 rounds the product, the sum with the bias and each gradient once: 3 * 2^-9; float32 only its own sums.
    bound = 3 * 2**-9 if row_dtype == torch.bfloat16 else 1e-5
    assert_close(got, want, bound)
    for leaf, own in zip(leaves, (x, weight, bias), strict=True):
        assert own.grad is not None
        assert own.grad.dtype == own.dtype
        assert_close(own.grad, leaf.grad, max(bound, 3 * 2**-9 if own is weight else 0.0))


def assert_close(got: Tensor, want: Tensor | None, bound: float) -> None:
    assert want is not None
    if got.numel():
        assert float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max().clamp(min=1.0)) <= bound


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_row_has_the_same_bits_in_any_company_at_any_number_of_threads(data: st.DataObject) -> None:
    rows, inputs = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 80))
    outputs, dtype = data.draw(st.integers(1, 120)), data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    x, weight = normal(rows, inputs).to(dtype), normal(outputs, inputs, seed=1).bfloat16()
    linear, before = select().linear, torch.get_num_threads()
    whole = linear(x, weight)
    cut = data.draw(st.integers(0, rows))
    try:
        torch.set_num_threads(data.draw(st.integers(1, 2)))
        assert torch.equal(torch.cat([linear(x[:cut], weight), linear(x[cut:], weight)]), whole)
        at = data.draw(st.integers(0, outputs))
        assert torch.equal(torch.cat([linear(x, weight[:at]), linear(x, weight[at:])], 1), whole), "an output stands alone"
    finally:
        torch.set_num_threads(before)


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeError, match="a row has 6 inputs, the weight takes 8"):
        pack(torch.zeros(4, 8, dtype=torch.bfloat16))(torch.zeros(2, 6, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 48), (9, 31, 50), (300, 96, 7), (17, 576, 100)])
def test_a_plain_weight_gives_the_bits_of_a_packed_one(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    """Training multiplies with weights as they lie, serving with packed ones."""
    linear = select(kernel="cpu").linear
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(linear(x, weight), pack(weight)(x))
    with pytest.raises(ShapeError, match="inputs"):
        linear(x[:, 1:], weight)
