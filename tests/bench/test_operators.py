"""Our operators against PyTorch's: what is compared agrees, and a wrong one is found."""

from __future__ import annotations

import pytest
from torch import Tensor

from waypost.bench import operators
from waypost.core.errors import ConfigError, NumericsError
from waypost.kernels import build
from waypost.kernels.linear import cpu
from waypost.model.config import LayerSpec
from waypost.model.ffn import Moe
from waypost.testing.tiny import tiny_config

pytestmark = pytest.mark.skipif(
    not build.available(), reason="this machine has no C++ compiler; there are no operators of ours"
)


@pytest.mark.parametrize(
    ("rows", "sequences", "context"), [(40, 1, 0), (3, 3, 21), (1, 1, 15)], ids=["prompt", "steps", "step"]
)
def test_every_operator_is_compared_once_the_outputs_agree(
    rows: int, sequences: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "CALLS", 1)
    found = operators.ratios(tiny_config(), rows, sequences, context, 1)
    assert list(found) == ["qkv", "out", "gate_up", "down", "head", "attention"]
    assert all(ratio > 0 for ratio in found.values())


def test_outputs_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.Packed.__call__

    def wrong(self: cpu.Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = right(self, x, bias)
        out[-1, -1] += out.abs().max()
        return out

    monkeypatch.setattr(cpu.Packed, "__call__", wrong)
    with pytest.raises(NumericsError, match=r"qkv: PyTorch's outputs are off by 0\.[3-9]"):
        operators.ratios(tiny_config(), 4, 4, 5, 1)


def test_a_chunk_with_a_cache_is_not_compared() -> None:
    with pytest.raises(ConfigError, match="without a cache, or with one new row"):
        operators.ratios(tiny_config(), 8, 2, 5, 1)


def test_only_dense_models_are_compared() -> None:
    config = tiny_config()
    experts = Moe(intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    config.layers[0] = LayerSpec(mixer=config.layers[0].mixer, ffn=experts)
    with pytest.raises(ConfigError, match="a dense model"):
        operators.ratios(config, 4, 4, 5, 1)
