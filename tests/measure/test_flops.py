"""FLOPs of a model against torch's own counter and against loops over positions."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from waypost.core.batch import Batch
from waypost.core.errors import ConfigError
from waypost.measure import flops
from waypost.testing.tiny import tiny_config, tiny_model

MOE = {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
       "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip


@pytest.mark.parametrize("keys", [(7, None), (7, 3), (7, 7), (7, 100), (1, 1), (64, 16)])
def test_mean_keys_against_a_loop(keys: tuple[int, int | None]) -> None:
    length, window = keys
    want = [min(position + 1, window or length) for position in range(length)]
    assert flops.mean_keys(length, window) == sum(want) / length


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"head_dim": 24, "num_key_value_heads": 1}])
def test_matrices_against_the_counter_of_torch(changes: dict) -> None:
    model = tiny_model(tiny_config(**changes))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(Batch.of([list(range(16))]))
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm"))
    attention = sum(
        4 * layer.mixer.num_attention_heads * layer.mixer.head_dim * flops.mean_keys(16) for layer in model.config.layers
    )
    assert matrices == pytest.approx(16 * (flops.forward_flops(model.config, 16) - attention))


def test_experts_count_when_they_are_active() -> None:
    config = tiny_config(**MOE)
    spec = config.layers[0].ffn
    wider = tiny_config(**{**MOE, "num_experts": 8})
    assert spec.num_experts_per_tok == 2
    want_ffn = 2 * 32 * 4 + 2 * 6 * 32 * 16 + 6 * 32 * 24 + 2 * 32
    want_mixer = 2 * (2 * 32 * 32 + 2 * 32 * 16) + 4 * 32 * 4.5
    assert flops.forward_flops(config, 8) == 2 * (want_ffn + want_mixer) + 2 * 32 * 288
    more = flops.forward_flops(wider, 8) - flops.forward_flops(config, 8)
    assert more == 2 * 2 * 32 * 4, "unused experts cost their row of the router only"


def test_training_and_decoding() -> None:
    config = tiny_config()
    assert flops.training_flops(config, 50) == 3 * flops.forward_flops(config, 50)
    steps = [flops.decode_flops(config, context) for context in range(50)]
    assert sum(steps) / 50 == pytest.approx(flops.forward_flops(config, 50))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_hidden_layers": 1}, MOE])
def test_a_prefill_leaves_out_what_nobody_reads(changes: dict) -> None:
    """Token by token: every one through all layers but the last, its keys and values there, the last one all the way."""
    config = tiny_config(**changes)
    layers, tokens, spec = len(config.layers), 9, config.layers[0].mixer
    head = 2 * config.hidden_size * config.vocab_size
    through = [(flops.decode_flops(config, context) - head) / layers for context in range(tokens)]  # layers are equal
    stored = 2 * config.hidden_size * 2 * spec.num_key_value_heads * spec.head_dim
    want = sum((layers - 1) * each for each in through) + (tokens - 1) * stored + through[-1] + head
    assert flops.prefill_flops(config, tokens) == pytest.approx(want, rel=1e-12)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="no count for int"):
        flops._of(3)
