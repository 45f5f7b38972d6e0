"""Kernels that were compiled quickly, for the first answers ever, compute the bits of those that follow (kernels/build.py)."""

from __future__ import annotations

import ctypes

import pytest
import torch
from serve_cases import VARIANTS, make_engine, model_of, prompt_of

from waypost.kernels import call, compiling
from waypost.serve.request import Completion
from waypost.serve.sampling import Sampling

pytestmark = pytest.mark.skipif(compiling.compiler() is None, reason="this machine has no C++ compiler")

SAMPLING = (
    Sampling(max_tokens=20, seed=2, logprobs=0, ignore_eos=True),
    Sampling(max_tokens=20, temperature=0.0, seed=1, logprobs=0, ignore_eos=True),
    Sampling(max_tokens=20, temperature=0.8, top_p=0.9, seed=3, logprobs=2, ignore_eos=True),
)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """Of what begins before PyTorch is imported."""
    cxx, folder = compiling.compiler(), tmp_path_factory.mktemp("quick")
    assert cxx is not None
    found = {}
    for group in ("pass", "logits"):
        path = folder / f"{group}.so"
        compiling.compile_library(cxx, path, compiling.units(group, "bf16"), quickly=True)
        found[group] = ctypes.CDLL(str(path))
    return found


def answers(variant: str) -> list[Completion]:
    """Of prompts that are prefilled in chunks beside others that decode."""
    engine = make_engine(model_of(variant, "bf16", "cpu"), max_batch_tokens=40)
    return [found for each in SAMPLING for found in engine.generate([prompt_of(n, n) for n in (3, 70, 21, 45)], each)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_give_the_same_tokens_and_probabilities(
    variant: str, quick: dict[str, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = answers(variant)
    used = set()

    def library(group: str, element: str) -> ctypes.CDLL:
        used.add(group)
        return quick[group] if group in quick else load(group, element)

    load = call.library
    monkeypatch.setattr(call, "library", library)
    monkeypatch.setitem(call._KERNELS, torch.bfloat16, call.Kernels("bf16"))
    quickly = answers(variant)
    assert used >= quick.keys()
    for one, other in zip(fast, quickly, strict=True):
        assert one.choices == other.choices
