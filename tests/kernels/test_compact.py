"""Weights in 12 bits hold every bit of bfloat16, and their products are those of the weights themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels import build
from waypost.kernels.linear.compact import FEW_ROWS, GROUP, UNCODED, Compact, fits
from waypost.kernels.linear.cpu import PANEL, Packed, pack

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler here and no library from a wheel; naive is used")

LANES = 16


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


def decoded(weight: Packed) -> Tensor:
    """The panels (P, pairs, 48, 2) as int16, read from the codes by their description alone (compact.cpp)."""
    coded = Compact.of(weight)
    assert coded is not None
    codes, tops, escapes = coded._kept
    count, pairs = weight.panels.shape[:2]
    words = codes.view(torch.uint16).to(torch.int32).view(count, -1, PANEL // LANES, 3, 2 * LANES)
    weights = []
    for i in range(GROUP):
        byte = words[..., i // 2, :] >> (8 * (i % 2)) & 255
        code = words[..., 2, :] >> (4 * i) & 15
        exponent = torch.where(code == 15, 0, tops.to(torch.int32)[:, None, None, None] - code)
        weights.append((byte >> 7) << 15 | exponent << 7 | byte & 127)
    found = torch.stack(weights, 2).flatten(1, 2)[:, :pairs].reshape(count, -1)  # (P, groups, 4, 3, 32) -> (P, weights)
    for panel, listed in zip(found, escapes, strict=True):
        places = listed[:, 0].tolist()
        for place, bits in listed[: places.index(-1)].tolist():
            panel[place] = bits & 0xFFFF
        assert places[: places.index(-1)] == sorted(places[: places.index(-1)])
    return found.to(torch.int32).bitwise_and(0xFFFF).sub(0x8000).bitwise_xor(-0x8000).to(torch.int16).view(weight.panels.shape)


def weights(outputs: int, inputs: int, seed: int, zeros: float = 0.0, rare: float = 0.0, scale: float = 0.05) -> Tensor:
    """(N, K): normal; a share of them zero, of either sign; and a share `rare`, at most what is listed, of any bits at all."""
    source = torch.Generator().manual_seed(seed)
    out = (torch.randn(outputs, inputs, generator=source) * scale).bfloat16()
    out[torch.rand(out.shape, generator=source) < zeros] *= 0.0
    some = torch.rand(out.shape, generator=source) < rare
    any_bits = torch.randint(-(1 << 15), 1 << 15, out.shape, generator=source, dtype=torch.int32).to(torch.int16)
    return torch.where(some, any_bits, bits_of(out)).view(torch.bfloat16)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, FEW_ROWS), outputs=st.sampled_from([1, 16, 47, 48, 49, 150, 500]), pairs=st.integers(1, 90),
    seed=st.integers(0, 99), zeros=st.sampled_from([0.0, 0.5, 1.0]), rare=st.sampled_from([0.0, 1e-3]),
    scale=st.sampled_from([1e-30, 0.05, 1e30]), threads=st.integers(1, 3),
)  # fmt: skip
def test_a_product_has_the_bits_of_the_weight_itself(
    rows: int, outputs: int, pairs: int, seed: int, zeros: float, rare: float, scale: float, threads: int
) -> None:
    torch.set_num_threads(threads)
    weight = pack(weights(outputs, 2 * pairs, seed, zeros, rare, scale))
    x = torch.randn(rows, 2 * pairs, generator=torch.Generator().manual_seed(seed)).bfloat16()
    coded = Compact.of(weight)
    if coded is not None:
        assert torch.equal(bits_of(coded(x)), bits_of(weight(x)))
        assert torch.equal(decoded(weight), bits_of(weight.panels))
    # Of a normal's weights one in ten thousand lies below fourteen powers of two from its largest: small panels may list none.
    assert coded is not None or rare or weight.panels.shape[1] * 2 * PANEL < 100 * UNCODED


@pytest.mark.parametrize("threads", [1, 2])
def test_a_real_shape_with_exponents_of_every_kind(threads: int) -> None:
    torch.set_num_threads(threads)
    plain = weights(960, 576, 3, zeros=1e-3, rare=1e-3)
    for at, value in enumerate((0.0, -0.0, 1e-40, -1e-40, float("inf"), -float("inf"), 3e38, 1e-38)):
        plain[7 * at, 5 * at] = value
    weight = pack(plain)
    assert torch.equal(decoded(weight), bits_of(weight.panels))
    coded = Compact.of(weight)
    assert coded is not None
    for rows in range(1, FEW_ROWS + 1):
        x = torch.randn(rows, 576).bfloat16()
        assert torch.equal(bits_of(coded(x)), bits_of(weight(x)))
    assert coded.num_bytes == 0.75 * weight.panels.nbytes


def test_weights_whose_exponents_are_all_different_are_left_alone() -> None:
    assert Compact.of(pack(weights(96, 64, 0, rare=1.0))) is None
    one_panel = weights(96, 128, 0)
    one_panel[:48] = weights(48, 128, 1, rare=1.0)
    assert Compact.of(pack(one_panel)) is None


@pytest.mark.parametrize("few", [0, 1])
def test_as_many_may_be_listed_as_are_promised(few: int) -> None:
    """In one panel, exponents far off at exactly the last number that is listed, and at one more."""
    most = PANEL * 256 // UNCODED
    plain = torch.ones(PANEL, 256)
    plain.view(-1)[torch.randperm(plain.numel(), generator=torch.Generator().manual_seed(0))[: most + few]] = 1e-20
    weight = pack(plain.bfloat16())
    if few:
        assert Compact.of(weight) is None
    else:
        assert torch.equal(decoded(weight), bits_of(weight.panels))


def test_what_does_not_fit_is_refused() -> None:
    odd, coded = pack(weights(48, 7, 0)), Compact.of(pack(weights(48, 64, 0)))
    assert coded is not None
    assert not fits(odd)
    with pytest.raises(ShapeError, match="7 inputs"):
        Compact.of(odd)
    for x in (torch.zeros(FEW_ROWS + 1, 64).bfloat16(), torch.zeros(1, 32).bfloat16(), torch.zeros(1, 64)):
        with pytest.raises(ShapeError, match=f"up to {FEW_ROWS} of 64"):
            coded(x)
