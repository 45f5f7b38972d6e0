"""The product over 4- and 8-bit weights has the bits of the dense product over what they mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waypost.core.errors import ShapeError
from waypost.kernels import build, select
from waypost.kernels.linear.quantized import QuantizedPanels, QuantizedWeight

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler here and no library from a wheel; naive is used")


def weight_of(bits: int, outputs: int, inputs: int, group: int) -> QuantizedWeight:
    source = torch.Generator().manual_seed(outputs + inputs)
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (outputs, inputs), generator=source).to(torch.int8)
    scale = (torch.rand(outputs, inputs // group, generator=source) * 0.1).bfloat16()
    return QuantizedWeight.of(q, scale, bits)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_bits_are_those_of_the_dense_product(data: st.DataObject) -> None:
    bits, group = data.draw(st.sampled_from([4, 8])), 2 * data.draw(st.integers(1, 16))
    weight = weight_of(bits, data.draw(st.integers(1, 120)), group * data.draw(st.integers(1, 5)), group)
    rows = data.draw(st.integers(0, 20))
    x = torch.randn(rows, weight.inputs, generator=torch.Generator().manual_seed(rows)).bfloat16()
    assert torch.equal(QuantizedPanels([weight])(x), select(kernel="cpu").linear(x, weight.dense()))


def test_weights_that_are_one_product_keep_their_bits() -> None:
    parts = [weight_of(4, outputs, 64, 16) for outputs in (50, 3, 96)]
    x = torch.randn(11, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    apart = torch.cat([QuantizedPanels([part])(x) for part in parts], dim=1)
    assert torch.equal(QuantizedPanels(parts)(x), apart)


def test_what_a_weight_means() -> None:
    weight = QuantizedWeight.of(torch.tensor([[1, -8, 7, 0]], dtype=torch.int8), torch.tensor([[0.5, 2.0]]).bfloat16(), 4)
    assert weight.dense().tolist() == [[0.5, -4.0, 14.0, 0.0]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="bits must be 4 or 8"):
        QuantizedWeight(torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 2).bfloat16(), 5, 4)
    with pytest.raises(ShapeError, match="an even number of inputs"):
        QuantizedWeight.of(torch.zeros(2, 6, dtype=torch.int8), torch.ones(2, 2).bfloat16(), 4)
    with pytest.raises(ShapeError, match=r"takes \(T, 4\) in bfloat16"):
        QuantizedPanels([weight_of(4, 2, 4, 2)])(torch.zeros(1, 6).bfloat16())
    with pytest.raises(ShapeError, match="need the same inputs, bits and group size"):
        QuantizedPanels([weight_of(4, 2, 4, 2), weight_of(8, 2, 4, 2)])
