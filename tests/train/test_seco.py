"""SeCO: StreamBP's bits, and the bytes it keeps. What the two share is in test_chunks.py, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import MODELS, gradients

from waypost.measure.live import LiveBytes
from waypost.testing.tiny import tiny_config, tiny_model
from waypost.train.memory import Memory, Plain, Seco, StreamBp


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), chunk=st.integers(1, 40),
    name=st.sampled_from(list(MODELS)), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_any_cut_has_the_bits_of_stream_bp(lengths: list[int], chunk: int, name: str, dtype: torch.dtype) -> None:
    """Chunks go backward in the same order through each layer, and every sum is added in that order."""
    config = tiny_config(**MODELS[name])
    stream, seco = (
        gradients(memory, tiny_model(config, dtype=dtype, kernel="auto"), *lengths)
        for memory in (StreamBp(chunk_tokens=chunk), Seco(chunk_tokens=chunk))
    )
    assert stream.keys() == seco.keys()
    assert [name for name, value in stream.items() if not torch.equal(seco[name], value)] == []


def test_bytes_alive_grow_by_keys_and_values_alone() -> None:
    """Peak bytes of 32 channels, one key/value head of 8: between 128 and 256 tokens a layer adds its keys, its values and
    their gradients, 2 x 2 x 8 numbers a token; the rest is four rows of 32, whatever the number of layers. Plain adds more
    than 13 rows a layer."""

    def growth(memory: Memory, layers: int) -> float:
        peaks = []
        for tokens in (128, 256):
            model = tiny_model(tiny_config(num_hidden_layers=layers, num_key_value_heads=1), kernel="auto")
            with LiveBytes(model.parameters()) as live:
                gradients(memory, model, tokens)
            peaks.append(live.peak)
        return (peaks[1] - peaks[0]) / 128 / 4  # numbers a token

    two, four = (growth(Seco(chunk_tokens=32), layers) for layers in (2, 4))
    assert four - two == pytest.approx(2 * 2 * 2 * 8, rel=0.01)
    assert two < 2 * 2 * 2 * 8 + 4 * 32
    assert growth(Plain(), 2) > 2 * 13 * 32
