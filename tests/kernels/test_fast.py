"""`numerics: fast`: the fastest operators at hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from waypost.core.errors import ConfigError
from waypost.kernels import build, select

compiled = pytest.mark.skipif(not build.available(), reason="this machine has no C++ compiler")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@compiled
def test_on_a_cpu_they_are_the_compiled_ones_and_pytorchs_products_for_other_types() -> None:
    fast, exact = select("fast"), select("exact", "cpu")
    assert (fast.name, fast.compiled) == ("fast", True)
    x, weight, bias = noise(3, 64), noise(32, 64), noise(32)
    assert torch.equal(fast.linear(x, weight, bias), F.linear(x, weight, bias)), "rows as they are, not padded"
    halves = [t.bfloat16() for t in (x, weight, bias)]
    assert torch.equal(fast.linear(*halves), exact.linear(*halves))
    assert torch.equal(fast.linear(x, halves[1]), exact.linear(x, halves[1])), "bfloat16 weights in float32 arithmetic"


@compiled
def test_a_machine_with_a_gpu_has_pytorchs_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not select("fast").compiled
    assert select("fast", "cpu").compiled
    assert select("exact").compiled


def test_without_a_compiler_or_by_request_they_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not select("fast", "naive").compiled
    monkeypatch.setattr(build, "available", lambda: False)
    fast = select("fast")
    assert (fast.name, fast.compiled) == ("fast", False)


def test_an_unknown_mode_is_told() -> None:
    with pytest.raises(ConfigError, match=r"numerics='fats': no such mode\. Did you mean 'fast'"):
        select("fats")  # type: ignore[arg-type]
