"""What the decoder promises whatever its family: rows alone, calls composed, layers cut anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waypost.core.batch import Batch
from waypost.core.errors import ConfigError
from waypost.kernels import build
from waypost.model.decoder import Decoder
from waypost.model.rows import Rows
from waypost.testing.tiny import VOCAB_SIZE, tiny_config, tiny_model

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "window": {"model_type": "mistral", "sliding_window": 5},
    "biases": {"model_type": "qwen2", "tie_word_embeddings": False},
    "head norms": {"model_type": "qwen3", "head_dim": 8},
    "post norms": {"model_type": "olmo2"},
    "experts": {"model_type": "mixtral", **EXPERTS},
    "shared expert": {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 20, **EXPERTS},
}
KERNELS = ("naive", *(("cpu",) if build.available() else ()))
sequences = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=18), min_size=1, max_size=4)

_MODELS: dict[tuple[str, str, torch.dtype], Decoder] = {}


def model_of(family: str, kernel: Any = "naive", dtype: torch.dtype = torch.float32) -> Decoder:
    key = (family, kernel, dtype)
    if key not in _MODELS:
        _MODELS[key] = tiny_model(tiny_config(**FAMILIES[family]), dtype=dtype, kernel=kernel)
    return _MODELS[key]


def parts(scores: Tensor, tokens: list[list[int]]) -> tuple[Tensor, ...]:
    return scores.split([len(s) for s in tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(tokens=sequences)
@torch.no_grad()
def test_a_rows_bits_do_not_depend_on_the_batch(family: str, kernel: str, dtype: torch.dtype, tokens: list[list[int]]) -> None:
    model = model_of(family, kernel, dtype)
    together = parts(model(Batch.of(tokens)), tokens)
    for alone, batched in zip((model(Batch.of([s])) for s in tokens), together, strict=True):
        assert torch.equal(alone, batched)
    reversed_order = parts(model(Batch.of(tokens[::-1])), tokens[::-1])
    assert all(torch.equal(a, b) for a, b in zip(together, reversed_order[::-1], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(tokens=sequences, cut=st.integers(1, 19))
@torch.no_grad()
def test_a_rows_bits_do_not_depend_on_what_follows(family: str, tokens: list[list[int]], cut: int) -> None:
    model = model_of(family)
    whole = parts(model(Batch.of(tokens)), tokens)
    short = [s[:cut] for s in tokens]
    for a, b in zip(whole, parts(model(Batch.of(short)), short), strict=True):
        assert torch.equal(a[: len(b)], b)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, deadline=None)
@given(tokens=sequences)
@torch.no_grad()
def test_embed_run_and_head_compose_to_forward(family: str, tokens: list[list[int]]) -> None:
    model, batch = model_of(family), Batch.of(tokens)
    want = model(batch)
    rows = Rows(batch, model.ops)
    h = model.embed(batch)
    at_once = model.run(h, range(len(model.model.layers)), rows)
    in_two = model.run(model.run(h, [0], rows), [1], rows)
    assert torch.equal(at_once, in_two)
    assert torch.equal(model.head(in_two, rows), want)
    assert torch.equal(model.head(in_two[-1:], rows), want[-1:])  # only the rows that are asked for
    assert torch.equal(model(batch, tail=model.head), want)


def test_running_no_layer_changes_nothing() -> None:
    model, batch = model_of("llama"), Batch.of([[1, 2, 3]])
    h = model.embed(batch)
    assert model.run(h, [], Rows(batch, model.ops)) is h


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_gradient(family: str) -> None:
    model = tiny_model(tiny_config(**FAMILIES[family]))
    model(Batch.of([list(range(40)), [7]])).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_initialise_depends_on_the_seed_and_the_name_alone() -> None:
    one, same, other = tiny_model(seed=3), tiny_model(seed=3), tiny_model(seed=4)
    deeper = tiny_model(tiny_config(num_hidden_layers=3), seed=3)
    weights = dict(deeper.named_parameters())
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, weights[name])
        assert torch.equal(a, c) == name.endswith("norm.weight"), name


def test_initialise_uses_the_range_of_the_config() -> None:
    model = tiny_model(tiny_config(initializer_range=0.5, vocab_size=3000))
    weight = model.model.embed_tokens.weight
    assert abs(float(weight.detach().std()) - 0.5) < 0.01  # 96 000 draws: the deviation of the estimate is 0.001
    assert all(p.eq(1).all() for name, p in model.named_parameters() if name.endswith("norm.weight"))


def test_a_window_at_least_as_long_as_the_sequence_is_full_attention() -> None:
    tokens = [list(range(30, 50))]
    wide = tiny_model(tiny_config(model_type="mistral", sliding_window=20))
    full = tiny_model(tiny_config(model_type="mistral", sliding_window=None))
    narrow = tiny_model(tiny_config(model_type="mistral", sliding_window=19))
    assert torch.equal(wide(Batch.of(tokens)), full(Batch.of(tokens)))
    assert not torch.equal(narrow(Batch.of(tokens)), full(Batch.of(tokens)))


def test_one_expert_of_one_is_the_dense_layer() -> None:
    dense = tiny_model(tiny_config())
    same = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    routed = tiny_model(tiny_config(model_type="mixtral", num_local_experts=1, num_experts_per_tok=1, **same))
    weights = {name.replace(".mlp.", ".mlp.experts.0."): p for name, p in dense.state_dict().items()}
    gates = {name: p for name, p in routed.state_dict().items() if ".mlp.gate." in name}
    routed.load_state_dict({**weights, **gates})
    batch = Batch.of([[5, 6, 7], [8]])
    assert torch.equal(routed(batch), dense(batch))


@pytest.mark.parametrize("change", [{"num_key_value_heads": 3}, {"head_dim": 7}])
def test_shapes_that_cannot_be_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        tiny_config(**change)
