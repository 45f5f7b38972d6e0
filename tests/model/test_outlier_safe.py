"""Norms with one gain and projections of the embedding: what they are, and what of a plain model they leave as it is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waypost.core.batch import Batch
from waypost.core.errors import ConfigError
from waypost.kernels import select
from waypost.model import hf
from waypost.model.config import ModelConfig
from waypost.model.decoder import Decoder
from waypost.model.hf_config import OWN
from waypost.model.norm import build_norm
from waypost.model.rows import Rows
from waypost.testing.tiny import tiny_checkpoint, tiny_config, tiny_model

TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]


def logits(model: Decoder) -> torch.Tensor:
    return hf.logits(model, TOKENS)


def outlier_safe(**changes: object) -> ModelConfig:
    return tiny_config(norm_gain="scalar", embedding_projection=True, **changes)


@given(st.integers(1, 40), st.floats(-3, 3), st.sampled_from(["naive", "cpu"]))
@settings(max_examples=20, deadline=None)
def test_a_scalar_gain_is_a_vector_of_it_to_the_bit(width: int, gain: float, kernel: str) -> None:
    rows = Rows(Batch.of([TOKENS]), select(kernel=kernel))  # type: ignore[arg-type]
    x, functional = torch.randn(8, width), torch.randn(8, width)
    found = []
    for kind in ("scalar", "vector"):
        norm = build_norm(width, 1e-5, kind)  # type: ignore[arg-type]
        torch.nn.init.constant_(norm.weight, gain)
        with torch.no_grad():
            found.append(norm(x, rows))
        (norm(x, rows) * functional).sum().backward()
        assert norm.weight.grad is not None
        found.append(norm.weight.grad.sum())
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[1], found[3], rtol=1e-5, atol=1e-5)  # sums of float32 in another order


@given(st.integers(1, 40), st.floats(-3, 3), st.floats(1e-2, 1e2), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_norm_with_one_gain_is_the_equation_in_float64(width: int, gain: float, size: float, seed: int) -> None:
    """gain x / sqrt(mean x^2 + eps), an entry at a time; a few roundings of 2^-24."""
    norm = build_norm(width, 1e-5, "scalar")
    torch.nn.init.constant_(norm.weight, gain)
    x = size * torch.randn(8, width, generator=torch.Generator().manual_seed(seed))
    got = norm(x, Rows(Batch.of([TOKENS]), select(kernel="naive"))).double()
    for row, values in zip(got.tolist(), x.double().tolist(), strict=True):
        root = math.sqrt(math.fsum(v * v for v in values) / width + 1e-5)
        assert row == pytest.approx([gain * v / root for v in values], rel=1e-5, abs=1e-6)


@given(st.integers(0, 1000))
@settings(max_examples=4, deadline=None)
def test_projections_of_one_are_no_projections(seed: int) -> None:
    """The neutral setting; two products by the unit matrix, each with a rounding."""
    plain, model = tiny_model(seed=seed), tiny_model(tiny_config(embedding_projection=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.eye(32) if name.endswith("projection.weight") else plain.get_parameter(_plain(name)))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-6)


def _plain(name: str) -> str:
    return name.replace("model.norm.norm.", "model.norm.")


@given(st.integers(0, 5))
@settings(max_examples=4, deadline=None)
def test_folded_into_embedding_and_head_they_give_the_same_model(seed: int) -> None:
    """logits = W (Q n), h_0 = P E[t]: a stock model with E P^T and W Q; float32 sums in another order."""
    config = tiny_config(embedding_projection=True, tie_word_embeddings=False)
    model, folded = tiny_model(config, seed=seed), tiny_model(replace(config, embedding_projection=False), seed=seed)
    assert model.model.embed_projection is not None
    assert model.lm_head is not None
    assert folded.lm_head is not None
    p, q = model.model.embed_projection.weight, model.get_parameter("model.norm.projection.weight")
    torch.testing.assert_close(p @ p.t(), torch.eye(32), rtol=0, atol=1e-5)
    with torch.no_grad():
        folded.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ p.t())
        folded.lm_head.weight.copy_(model.lm_head.weight @ q)
    torch.testing.assert_close(logits(folded), logits(model), rtol=0, atol=2e-5)


def test_the_folder_says_what_it_is_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "it", outlier_safe())
    model = hf.load(path)
    assert (model.config.model_type, model.config.norm_gain, model.config.embedding_projection) == ("waypost", "scalar", True)
    assert model.model.norm.weight.shape == (1,)
    assert torch.equal(logits(model), logits(tiny_model(outlier_safe(), kernel="auto")))
    tree = hf.config_to_hf(model.config)
    assert hf.config_from_hf(tree).layers == outlier_safe().layers
    assert not set(OWN) & set(hf.config_to_hf(tiny_config())), "a stock config.json does not speak of them"


@pytest.mark.parametrize("change", [{"norm_gain": "scalar"}, {"embedding_projection": True}])
def test_each_alone_is_no_stock_class(change: dict[str, object]) -> None:
    assert hf.stock_type(tiny_config(**change)) == "waypost"
    assert hf.stock_type(tiny_config()) == "llama"


def test_an_unknown_gain_is_refused() -> None:
    with pytest.raises(ConfigError, match="norm_gain"):
        tiny_config(norm_gain="matrix")
