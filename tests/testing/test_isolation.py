"""The checker finds planted leaks of several kinds, and finds none in ours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from waypost.core.errors import NumericsError
from waypost.kernels.build import available
from waypost.kernels.ops import LinearOp, Ops
from waypost.model.decoder import Decoder
from waypost.serve.engine import Engine
from waypost.testing.isolation import Leak, check_isolation, find_leaks, logits_of
from waypost.testing.tiny import tiny_config, tiny_model

KERNELS = ("naive", "cpu") if available() else ("naive",)
VARIANTS: dict[str, dict[str, object]] = {
    "gqa": {},
    "moe": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ours_leak_nothing(variant: str, dtype: torch.dtype, kernel: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]), dtype=dtype, kernel=kernel)  # type: ignore[arg-type]
    check_isolation(model)
    check_isolation(Engine(model, num_pages=14, max_batch_tokens=40))


def with_linear(change: LinearOp) -> Decoder:
    model = tiny_model()
    model.ops = replace(model.ops, linear=change)
    return model


def quantised(x: Tensor, per_row: bool) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) if per_row else x.abs().max()) / 127
    return torch.round(x / scale.clamp(min=1e-9)) * scale


def test_planted_leaks_are_found() -> None:
    plain: Ops = tiny_model().ops

    def mean_into_first_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = plain.linear(x, weight, bias).clone()
        out[0] += 1e-3 * out.mean(0)
        return out

    def one_scale(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return plain.linear(quantised(x, per_row=False), weight, bias)

    def a_scale_a_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return plain.linear(quantised(x, per_row=True), weight, bias)

    for leaky in (mean_into_first_row, one_scale):
        with pytest.raises(NumericsError, match=r"leaks between entries of a batch: entry \d reads entry \d"):
            check_isolation(with_linear(leaky))
    check_isolation(with_linear(a_scale_a_row))
    leaks = find_leaks(logits_of(with_linear(mean_into_first_row)), 288)
    assert {leak.reader for leak in leaks if leak.change == "other tokens"} == {0}, "the plant writes into the first row alone"
    assert Leak(1, 0, "other tokens") in leaks


def test_a_blind_check_says_so() -> None:
    with pytest.raises(NumericsError, match="does not depend on its own tokens"):
        find_leaks(lambda entries: [torch.zeros(1) for _ in entries], 10)
    noise = iter(range(1000))
    with pytest.raises(NumericsError, match="two calls on one batch differ"):
        find_leaks(lambda entries: [torch.tensor([float(next(noise))]) for _ in entries], 10)
