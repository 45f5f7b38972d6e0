"""What StreamBP and SeCO promise alike: plain's gradient however the batch is cut, and plain's bits where nothing is cut."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import MODELS, TOLERANCE, assert_near, gradients

from waypost.core.errors import ConfigError
from waypost.model.decoder import Decoder
from waypost.testing.points._shared import token_batch
from waypost.testing.tiny import tiny_config, tiny_model
from waypost.train.balancing import GlobalBatch
from waypost.train.memory import Plain, Seco, StreamBp
from waypost.train.memory.seco import chunked
from waypost.train.memory.stream_bp import streamed
from waypost.train.parallel import Share, World
from waypost.train.routing import Routing

TECHNIQUES = (StreamBp, Seco)
Technique = type[StreamBp] | type[Seco]
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
both = pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.__name__)


@both
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_are_plain_s(technique: Technique, name: str, dtype: torch.dtype) -> None:
    """Of a mixture in bfloat16 too: rows' hidden states have plain's bits, so that no row near a tie goes elsewhere."""
    config = tiny_config(**MODELS[name])
    plain, cut = (
        gradients(memory, tiny_model(config, dtype=dtype, kernel="auto"), 70, 5, 33)
        for memory in (Plain(), technique(chunk_tokens=20))
    )
    assert_near(cut, plain, TOLERANCE[dtype])


@both
@settings(max_examples=6, deadline=None)
@given(lengths=LENGTHS, chunk=st.integers(1, 40), name=st.sampled_from(list(MODELS)))
def test_any_cut_gives_the_same_gradient(technique: Technique, lengths: list[int], chunk: int, name: str) -> None:
    config = tiny_config(**MODELS[name])
    plain, cut = (
        gradients(memory, tiny_model(config, dtype=torch.float64, kernel="auto"), *lengths)
        for memory in (Plain(), technique(chunk_tokens=chunk))
    )
    assert_near(cut, plain, TOLERANCE[torch.float64])


@both
@settings(max_examples=6, deadline=None)
@given(lengths=LENGTHS, spare=st.integers(0, 20), dtype=DTYPES, name=st.sampled_from(list(MODELS)))
def test_one_chunk_is_plain_to_the_bit(
    technique: Technique, lengths: list[int], spare: int, dtype: torch.dtype, name: str
) -> None:
    """The neutral setting: chunks at least as long as the batch."""
    config = tiny_config(**MODELS[name])
    plain, whole = (
        gradients(memory, tiny_model(config, dtype=dtype, kernel="auto"), *lengths)
        for memory in (Plain(), technique(chunk_tokens=sum(lengths) + spare))
    )
    assert plain.keys() == whole.keys()
    assert [name for name, value in plain.items() if not torch.equal(whole[name], value)] == []


def in_streams(model: Decoder, chunk_tokens: int) -> AbstractContextManager[None]:
    return streamed(list(model.model.layers), chunk_tokens)


@pytest.mark.parametrize("opened", [in_streams, chunked], ids=["StreamBp", "Seco"])
@settings(max_examples=10, deadline=None)
@given(lengths=LENGTHS, chunk=st.integers(1, 40), dtype=DTYPES, name=st.sampled_from(list(MODELS)))
def test_any_cut_has_plain_s_logits_to_the_bit(
    opened: Callable[[Decoder, int], AbstractContextManager[None]],
    lengths: list[int],
    chunk: int,
    dtype: torch.dtype,
    name: str,
) -> None:
    model, batch = tiny_model(tiny_config(**MODELS[name]), dtype=dtype, kernel="auto"), token_batch(*lengths)
    with torch.no_grad():
        want = model(batch)
        with opened(model, chunk):
            found = model(batch)
    assert torch.equal(found, want)


@both
def test_frozen_weights_get_no_gradient_and_the_model_is_left_as_it_was(technique: Technique) -> None:
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    found = gradients(technique(chunk_tokens=8), model, 30)
    assert "model.layers.1.mlp.up_proj.weight" in found
    assert not any("layers.0" in name or "embed" in name for name in found)
    assert "run" not in vars(model)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


@both
def test_a_balancing_loss_sees_the_whole_micro_batch(technique: Technique) -> None:
    found = []
    for memory in (Plain(), technique(chunk_tokens=11)):
        model = tiny_model(tiny_config(**MODELS["mixture"]), dtype=torch.float64)
        routing = Routing(model, GlobalBatch(coef=0.5), World(), Share())
        routing.begin(40.0)
        routing.micro_batch()
        found.append((gradients(memory, model, 25, 18), routing.report()))
    assert_near(found[1][0], found[0][0], TOLERANCE[torch.float64])
    assert found[1][1] == pytest.approx(found[0][1])


@both
def test_a_chunk_has_a_token(technique: Technique) -> None:
    with pytest.raises(ConfigError, match="chunk_tokens=0"):
        technique(chunk_tokens=0)
