"""All layers in one call give the bits of the operators one by one, and of the specification's order of calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from once_cases import rows_of, served
from serve_cases import VARIANTS, answers_of, make_engine, prompt_of
from torch import Tensor

from waypost.core.batch import Batch
from waypost.kernels.build import available
from waypost.kernels.layers import cpu as layers_cpu
from waypost.kernels.layers.weights import KINDS
from waypost.model.decoder import Decoder
from waypost.model.linear.at_once import LayersAtOnce
from waypost.model.rows import Rows
from waypost.serve.loading import prepare_for_serving
from waypost.serve.pages import PagedKv, StepKv
from waypost.serve.sampling import Sampling
from waypost.testing.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler here and no library from a wheel; naive is used")

ARITHMETIC = {"bf16": torch.bfloat16, "bf16 weights, fp32 arithmetic": torch.float32}
TAKES_IT = ("gqa", "one-kv-head-wide", "window", "qk-norm", "bias", "panels")
"""The last has heads and gates of whole vectors and panels: rows are placed, and gates taken, on the way."""


def one_pass(
    model: Decoder, spans: list[tuple[int, int]], layers: range, at_once: bool, adapters: Sequence[int | None] = ()
) -> tuple[Tensor, list[Tensor]]:
    """The rows of rows_of through `layers`, and the cache afterwards."""
    rows, kv = rows_of(model, spans, adapters)
    run, model.at_once = model.at_once, model.at_once if at_once else None
    with torch.inference_mode():
        h = model.embed(rows.batch)
        before = h.clone()
        out = model.run(h, layers, rows)
        assert torch.equal(h, before), "the input is left as it was"
    model.at_once = run
    return out, [*kv.k_pages, *kv.v_pages]


def check_equal(model: Decoder, spans: list[tuple[int, int]], layers: range, adapters: Sequence[int | None] = ()) -> Tensor:
    assert model.at_once is not None
    (ours, our_cache), (plain, plain_cache) = (one_pass(model, spans, layers, way, adapters) for way in (True, False))
    assert torch.isfinite(plain.float()).all()
    assert torch.equal(ours, plain)
    assert all(torch.equal(a, b) for a, b in zip(our_cache, plain_cache, strict=True))
    return ours


def everywhere(test: Callable[..., None]) -> Callable[..., None]:
    """Every variant that can, in every arithmetic, on one thread and on two."""
    for name, values in (("variant", TAKES_IT), ("arithmetic", tuple(ARITHMETIC)), ("threads", (1, 2))):
        test = pytest.mark.parametrize(name, values)(test)
    return test


@everywhere
def test_any_number_of_rows_has_the_bits_of_one_operator_at_a_time(variant: str, arithmetic: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = served(variant, ARITHMETIC[arithmetic])
    layers = range(len(model.config.layers))
    for rows in (*range(1, 41), 100) if threads == 1 else (1, 2, 7, 16, 33):
        check_equal(model, [(0, rows)], layers)  # a prompt
        check_equal(model, [(13 * i % 70 + 1, 1) for i in range(rows)], layers)  # decodes
    check_equal(model, [(0, 9), (40, 1), (17, 30), (3, 1), (64, 65)], layers)


@settings(max_examples=40, deadline=None)
@given(
    variant=st.sampled_from(TAKES_IT),
    spans=st.lists(st.tuples(st.integers(0, 140), st.integers(1, 40)), min_size=1, max_size=6),
    cut=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_any_batch_and_any_layers(variant: str, spans: list[tuple[int, int]], cut: tuple[int, int]) -> None:
    model = served(variant)
    check_equal(model, spans, range(min(cut), min(max(cut), len(model.config.layers))))


@everywhere
def test_adapters_of_rows_are_added_where_they_are_one_operator_at_a_time(variant: str, arithmetic: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = served(variant, ARITHMETIC[arithmetic])
    layers = range(len(model.config.layers))
    spans = [(0, 9), (40, 1), (17, 30), (3, 1), (64, 65)]
    mixed = check_equal(model, spans, layers, [0, None, 2, 1, 0])
    assert torch.equal(mixed[9], check_equal(model, spans, layers)[9]), "a row with none is as it would be alone"
    assert not torch.equal(mixed[8], check_equal(model, spans, layers)[8])
    assert torch.equal(mixed[:9], check_equal(model, spans, layers, [0, 1, 1, 2, 2])[:9]), "neighbours' adapters change nothing"
    check_equal(model, spans, layers, [None] * 5)
    check_equal(model, spans, layers[1:], [2, 1, 0, None, 1])


@everywhere
def test_from_tokens_to_logits_in_one_call_is_embedding_layers_and_head(variant: str, arithmetic: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = served(variant, ARITHMETIC[arithmetic])
    assert model.at_once is not None
    for spans, adapters in (
        ([(0, 9), (40, 1), (17, 30), (3, 1)], [0, None, 2, 1]),
        ([(13 * i % 70 + 1, 1) for i in range(19)], []),
        ([(5, 1)], [1]),
    ):
        (rows, kv), (again, kv_again) = (rows_of(model, spans, adapters) for _ in range(2))
        wanted = torch.arange(again.batch.num_tokens)[:: 1 if len(spans) == 1 else 3]
        with torch.inference_mode():
            ours = model.at_once.logits(rows, None if len(spans) == 1 else wanted)
            h = model.run(model.embed(again.batch), range(len(model.config.layers)), again)
            plain = model.head(h[wanted], again)
        assert ours is not None or ARITHMETIC[arithmetic] != model.model.embed_tokens.weight.dtype
        if ours is not None:
            assert torch.equal(ours, plain)
            assert all(
                torch.equal(a, b) for a, b in zip(kv.k_pages + kv.v_pages, kv_again.k_pages + kv_again.v_pages, strict=True)
            )


@everywhere
def test_rows_that_nobody_asks_for_stop_at_the_keys_of_the_last_layer(variant: str, arithmetic: str, threads: int) -> None:
    """Whichever rows are asked for, in whatever order: their logits and all pages are those of a pass over every row."""
    torch.set_num_threads(threads)
    model = served(variant, ARITHMETIC[arithmetic])
    assert model.at_once is not None
    spans, adapters = [(0, 9), (40, 1), (17, 30), (3, 1), (70, 26)], [0, None, 2, 1, None]
    for each in (adapters, []):
        rows, kv = rows_of(model, spans, each)
        with torch.inference_mode():
            every = model.at_once.logits(rows)
        if every is None:
            assert ARITHMETIC[arithmetic] != model.model.embed_tokens.weight.dtype
            continue
        for wanted in ([], [8], [66, 8, 9], [9, 9, 40], [*range(67)], [*range(66, -1, -1)]):
            rows, own = rows_of(model, spans, each)
            with torch.inference_mode():
                found = model.at_once.logits(rows, torch.tensor(wanted, dtype=torch.int64))
            assert found is not None
            assert torch.equal(found, every[wanted]), wanted
            pages = zip(kv.k_pages + kv.v_pages, own.k_pages + own.v_pages, strict=True)
            assert all(torch.equal(a, b) for a, b in pages), wanted


@pytest.mark.parametrize("wanted", [[], [8], [3, 11, 12]])
def test_the_last_layer_leaves_the_other_rows_as_they_came(wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = served("panels"), []
    run = layers_cpu._run

    def watched(table: Any, order: Any, ends: Any, h: Tensor, *rest: Any) -> int:
        unknown = run(table, order, ends, h, *rest)
        seen.append(h.clone())
        return unknown

    spans = [(0, 9), (30, 4)]
    (rows, _), (again, _) = (rows_of(model, spans) for _ in range(2))
    assert model.at_once is not None
    with torch.inference_mode():
        before = model.run(model.embed(again.batch), range(len(model.config.layers) - 1), again)
        monkeypatch.setattr(layers_cpu, "_run", watched)
        assert model.at_once.logits(rows, torch.tensor(wanted, dtype=torch.int64)) is not None
    assert torch.equal(seen[0], before)


def test_a_changed_head_or_embedding_is_followed() -> None:
    model = served("one-kv-head-wide")
    assert model.at_once is not None
    found = []
    for name in (None, "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        if name is not None:
            with torch.no_grad():
                model.get_parameter(name).mul_(1.5)
        with torch.inference_mode():
            logits = model.at_once.logits(rows_of(model, [(5, 1), (9, 1)])[0])
        assert logits is not None
        assert all(not torch.equal(logits, before) for before in found)
        found.append(logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_served_model_answers_as_the_one_it_was_made_from(variant: str) -> None:
    """Where layers of a kind do not run at once (post-norm, experts), the plain path answers."""
    plain = tiny_model(tiny_config(**VARIANTS[variant]), dtype=torch.bfloat16, kernel="cpu")
    model = prepare_for_serving(tiny_model(tiny_config(**VARIANTS[variant]), dtype=torch.bfloat16, kernel="cpu"))
    assert (model.at_once is not None) == (variant in TAKES_IT)
    prompts = [prompt_of(n, n) for n in (1, 5, 16, 33, 40)]
    wish = Sampling(temperature=1.0, max_tokens=20, seed=3, logprobs=0, ignore_eos=True)
    answers = [
        [answers_of(c) for c in make_engine(m, num_pages=9, max_batch_tokens=24).generate(prompts, wish)]
        for m in (plain, model)
    ]
    assert answers[0] == answers[1]


def test_weights_that_change_in_place_are_followed() -> None:
    model = served("bias")
    spans, layers = [(5, 3), (0, 20)], range(len(model.config.layers))
    before = one_pass(model, spans, layers, at_once=True)[0]
    for name in ("self_attn.o_proj", "self_attn.k_proj", "mlp.up_proj"):
        with torch.no_grad():
            model.get_parameter(f"model.layers.1.{name}.weight").mul_(1.5)
        after = one_pass(model, spans, layers, at_once=True)[0]
        assert not torch.equal(after, before)
        check_equal(model, spans, layers)
        before = after
    with torch.no_grad():
        model.get_parameter("model.layers.1.input_layernorm.weight").mul_(0.5)
    check_equal(model, spans, layers)


def test_a_pass_with_gradients_or_without_pages_runs_one_by_one() -> None:
    model = served("gqa")
    assert model.at_once is not None
    batch = Batch.of([prompt_of(9)])
    rows = Rows(batch, model.ops)
    with torch.no_grad():
        h = model.embed(batch)
        assert model.at_once(h, [0], rows) is None, "keys and values are kept in no pages"
    kv = PagedKv(model.config, 1, model.dtype)
    rows = Rows(batch, model.ops, StepKv(kv, torch.zeros(1, 1, dtype=torch.int32), torch.arange(9)))
    assert model.at_once(h, [0], rows) is None, "gradients are wanted"


def test_other_operators_and_float32_weights_keep_the_plain_path() -> None:
    for kernel, dtype in (("naive", torch.bfloat16), ("cpu", torch.float32)):
        model = tiny_model(tiny_config(), dtype=dtype, kernel=kernel)  # type: ignore[arg-type]
        assert prepare_for_serving(model).at_once is None


def test_a_timed_pass_says_where_the_time_went_and_keeps_its_bits() -> None:
    model, seconds = served("gqa"), torch.zeros(len(KINDS), dtype=torch.float64)
    assert isinstance(model.at_once, LayersAtOnce)
    layers = range(len(model.model.layers))
    want, _ = one_pass(model, [(5, 30), (40, 1)], layers, at_once=True)
    model.at_once.time_into(seconds)
    began = time.perf_counter()
    got, _ = one_pass(model, [(5, 30), (40, 1)], layers, at_once=True)
    took = time.perf_counter() - began
    assert torch.equal(got, want)
    assert (seconds > 0).tolist() == [kind != "head" for kind in KINDS], "the layers alone"
    assert seconds.sum() < took
    with torch.inference_mode():
        model.at_once.logits(rows_of(model, [(5, 1)])[0])
    assert seconds[KINDS.index("head")] > 0
    model.at_once.time_into(None)
    before = seconds.clone()
    one_pass(model, [(5, 30)], layers, at_once=True)
    assert torch.equal(seconds, before)
