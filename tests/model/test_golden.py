"""Every family against transformers: logits, gradients, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference_models import CASES, reference, texts
from torch import Tensor

from waypost.core.batch import Batch
from waypost.kernels import build, select
from waypost.model import hf

TOLERANCE = 2e-5
"""Largest difference allowed, as a share of the tensor's largest entry. Both sides compute in fp32 and sum up to a few
hundred products in different orders through three layers: about 2**-24 times a few tens."""

KERNELS = ("naive", *(("cpu",) if build.available() else ()))


def assert_near(have: Tensor, want: Tensor, what: str) -> None:
    assert have.shape == want.shape, what
    have, want = have.detach(), want.detach()
    scale = max(float(want.abs().max()), 1e-3)
    worst = float((have - want).abs().max()) / scale
    assert worst <= TOLERANCE, f"{what}: {worst:.1e} of its largest entry"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str, kernel: Any, tmp_path: Path) -> None:
    theirs = reference(case)
    theirs.save_pretrained(tmp_path)
    ours = hf.load(tmp_path, ops=select(kernel=kernel))
    sequences = texts()
    batch = Batch.of([s[:-1] for s in sequences], targets=[s[1:] for s in sequences])

    scores = ours(batch)
    F.cross_entropy(scores, batch.targets, reduction="sum").backward()
    wanted = [theirs(s[None, :-1]).logits[0] for s in sequences]
    F.cross_entropy(torch.cat(wanted), batch.targets, reduction="sum").backward()

    for n, (have, want) in enumerate(zip(scores.split([len(s) - 1 for s in sequences]), wanted, strict=True)):
        assert_near(have, want, f"{case}: logits of sequence {n}")
    gradients = per_expert({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert_near(parameter.grad, gradients.pop(name), f"{case}: gradient of {name}")
    assert not gradients


def per_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers holds the experts of a layer in two tensors: (E, 2F, C) and (E, C, F)."""
    out = {}
    for name, tensor in tensors.items():
        stem, fused, kind = name.rpartition(".experts.")
        if not fused:
            out[name] = tensor
            continue
        for e, part in enumerate(tensor):
            pieces = {"gate_proj": part[: len(part) // 2], "up_proj": part[len(part) // 2 :]}
            pieces = pieces if kind == "gate_up_proj" else {"down_proj": part}
            out |= {f"{stem}.experts.{e}.{piece}.weight": value for piece, value in pieces.items()}
    return out
