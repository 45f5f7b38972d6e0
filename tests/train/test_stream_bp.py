"""StreamBP: the bytes it keeps. What it shares with SeCO is in test_chunks.py, gradients and bits included."""

from __future__ import annotations

from memory_cases import gradients

from waypost.measure.live import LiveBytes
from waypost.testing.tiny import tiny_config, tiny_model
from waypost.train.memory import Memory, Plain, Recompute, StreamBp


def test_bytes_alive_grow_by_a_layer_s_input_alone() -> None:
    """Peak bytes of 64 channels, 192 wide, 8 layers: between 256 and 512 tokens plain adds every activation, recomputation
    those of one layer and its inputs, StreamBP inputs and the keys and values of one layer."""
    config = tiny_config(hidden_size=64, intermediate_size=192, num_hidden_layers=8, max_position_embeddings=1024)

    def peak(memory: Memory, tokens: int) -> int:
        model = tiny_model(config, kernel="auto")
        with LiveBytes(model.parameters()) as live:
            gradients(memory, model, tokens)
        assert live.now < live.peak
        return live.peak

    plain, recompute, stream = (
        (peak(memory, 512) - peak(memory, 256)) / 256 / 4 for memory in (Plain(), Recompute(), StreamBp(chunk_tokens=64))
    )  # numbers a token
    assert stream < 0.75 * recompute < 0.4 * plain
    assert stream < 8 * 64 + 12 * 64  # eight inputs; a dozen rows of 64 for hidden states, keys, values and their gradients
