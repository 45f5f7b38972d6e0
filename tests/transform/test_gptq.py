"""GPTQ against its algorithm in float64 loops, its neutral setting, and what it is for: a smaller error on the text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waypost.core.errors import ConfigError, NumericsError
from waypost.testing.tiny import tiny_checkpoint
from waypost.transform.quantize import quantize
from waypost.transform.quantizing import Gptq
from waypost.transform.quantizing.gptq import SecondMoments, gptq, inverse_factor
from waypost.transform.quantizing.round_to_nearest import round_to_nearest, scales_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments_of(x: Tensor) -> Tensor:
    seen = SecondMoments(x.shape[1])
    seen.add(x[:3])
    seen.add(x[3:])
    return seen.sum


def inverse(matrix: list[list[float]]) -> list[list[float]]:
    """Gauss and Jordan, with the largest pivot."""
    n = len(matrix)
    rows = [[*row, *(float(i == j) for j in range(n))] for i, row in enumerate(matrix)]
    for k in range(n):
        best = max(range(k, n), key=lambda i: abs(rows[i][k]))
        rows[k], rows[best] = rows[best], rows[k]
        rows[k] = [v / rows[k][k] for v in rows[k]]
        rows = [row if i == k else [a - row[k] * b for a, b in zip(row, rows[k], strict=True)] for i, row in enumerate(rows)]
    return [row[n:] for row in rows]


def by_loops(weight: Tensor, x: Tensor, bits: int, group: int, damping: float, by_energy: bool) -> list[list[int]]:
    """Optimal brain quantisation in a fixed order: after each column the inverse of what is left of H, anew (no Cholesky)."""
    inputs = weight.shape[1]
    hessian = [[math.fsum(float(a) * float(b) for a, b in zip(x[:, i], x[:, j], strict=True)) for j in range(inputs)]
               for i in range(inputs)]  # fmt: skip
    mean = math.fsum(hessian[i][i] for i in range(inputs)) / inputs
    order = sorted(range(inputs), key=lambda i: -hessian[i][i]) if by_energy else list(range(inputs))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    static = scales_of(weight.unflatten(1, (-1, group)), bits).tolist()
    out = []
    for row, scales in zip(weight.double().tolist(), static, strict=True):
        codes = [0] * inputs
        for at, j in enumerate(order):
            if not by_energy and j % group == 0:
                scales[j // group] = float(scales_of(torch.tensor(row[j : j + group]), bits))
            left = order[at:]
            part = inverse([[hessian[a][b] + (damping * mean if a == b else 0.0) for b in left] for a in left])
            scale = scales[j // group]
            codes[j] = max(low, min(high, round(row[j] / scale)))
            error = (row[j] - codes[j] * scale) / part[0][0]
            for place, k in enumerate(left[1:], 1):
                row[k] -= error * part[place][0]
        out.append(codes)
    return out


@pytest.mark.parametrize("by_energy", [True, False])
@pytest.mark.parametrize("group", [4, 12])
def test_it_is_the_algorithm(group: int, by_energy: bool) -> None:
    weight, x = normal(3, 12), normal(9, 12, seed=1) @ normal(12, 12, seed=2)
    q, scale = gptq(weight, moments_of(x), 4, group, 0.1, by_energy)
    assert q.tolist() == by_loops(weight, x, 4, group, 0.1, by_energy)
    assert scale.shape == (3, 12 // group)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([4, 8]), st.sampled_from([8, 40]), st.booleans(), st.floats(1e-3, 1e3))
def test_with_inputs_that_say_nothing_of_each_other_it_rounds_to_nearest(
    seed: int, bits: int, group: int, by_energy: bool, size: float
) -> None:
    weight = normal(4, 40, seed=seed)
    want_q, want_scale = round_to_nearest(weight, bits, group)
    for moments in (size * torch.eye(40, dtype=torch.float64), torch.zeros(40, 40, dtype=torch.float64)):
        q, scale = gptq(weight, moments, bits, group, 0.01, by_energy)
        assert torch.equal(q, want_q)
        assert torch.equal(scale, want_scale)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([32, 160, 320]))
def test_what_the_linear_computes_on_the_text_comes_closer(seed: int, by_energy: bool, group: int) -> None:
    """Over several blocks of columns, with groups smaller and larger than one."""
    x = normal(400, 40, seed=seed) @ normal(40, 320, seed=seed + 1) + 0.1 * normal(400, 320, seed=seed + 2)
    weight = normal(8, 320, seed=seed + 3)

    def error(q: Tensor, scale: Tensor) -> float:
        dense = (q.unflatten(1, (-1, group)).float() * scale.float()[:, :, None]).flatten(1)
        return float(((dense - weight) @ x.T).square().mean())

    found = error(*gptq(weight, moments_of(x), 4, group, 0.01, by_energy))
    assert found < 0.5 * error(*round_to_nearest(weight, 4, group))


def test_an_input_that_the_text_never_uses_keeps_its_weight() -> None:
    weight, x = normal(5, 16), normal(50, 16, seed=1)
    x[:, 3] = 0.0
    q, _ = gptq(weight, moments_of(x), 8, 16, 0.01, True)
    assert torch.equal(q[:, 3], round_to_nearest(weight, 8, 16)[0][:, 3])


def test_what_cannot_be_inverted_says_what_to_do() -> None:
    moments = moments_of(normal(8, 128))  # 8 rows say nothing of 120 directions
    with pytest.raises(NumericsError, match=r"128 inputs has no inverse with damping=1e-20: .* raise damping .* a longer text"):
        inverse_factor(moments, 1e-20)
    assert inverse_factor(moments, 0.01).isfinite().all()
    for broken in (math.nan, math.inf):
        moments[3, 5] = broken
        with pytest.raises(NumericsError, match="on the calibration text is not finite"):
            inverse_factor(moments, 0.01)


def test_a_linear_that_cannot_be_quantised_is_named(tmp_path: Path) -> None:
    source, text = tiny_checkpoint(tmp_path / "source", dtype=torch.bfloat16), tmp_path / "text.txt"
    text.write_text("the other")
    recipe = {
        "source": str(source), "quantizer": {"name": "gptq", "damping": 1e-20}, "calibration": {"path": str(text)},
    }  # fmt: skip
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.self_attn\.q_proj: X\^T X"):
        quantize(recipe, tmp_path / "out")


def test_a_folder_made_with_a_text(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    text = tmp_path / "text.txt"
    text.write_text("the other one is in the house and on the hill, " * 30)
    known = {"path": str(text), "max_tokens": 200, "seq_tokens": 50}
    recipe: dict[str, Any] = {"source": str(source), "calibration": known}
    tree = {"name": "gptq", "group_size": 8}
    done = quantize({**recipe, "quantizer": tree}, tmp_path / "gptq")
    plain = quantize({**recipe, "quantizer": {**tree, "name": "round_to_nearest"}}, tmp_path / "plain")
    configs = [json.loads((path / "config.json").read_text()) for path in (done.path, plain.path)]
    assert configs[0] == configs[1]  # one layout
    assert done.receipt["bytes_output"] == plain.receipt["bytes_output"]
    assert done.receipt["largest_error_steps"] > 0.5 > plain.receipt["largest_error_steps"] - 0.01
    again = quantize({**recipe, "quantizer": tree, "verify": False}, tmp_path / "again")
    assert (again.path / "model.safetensors").read_bytes() == (done.path / "model.safetensors").read_bytes()


def test_without_damping_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Gptq\.damping=0\.0: must be above 0"):
        Gptq(damping=0.0)
