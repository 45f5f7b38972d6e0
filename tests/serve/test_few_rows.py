"""Few rows read codes of their weights after a while: with the same bits, and only where that is worth it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from once_cases import rows_of, served
from serve_cases import answers_of, make_engine, prompt_of
from torch import Tensor

from waypost.core.errors import ConfigError
from waypost.kernels import build
from waypost.kernels.layers.weights import PRODUCTS
from waypost.kernels.linear.compact import FEW_ROWS
from waypost.model.decoder import Decoder
from waypost.model.linear import few_rows
from waypost.model.linear.at_once import LayersAtOnce
from waypost.serve.sampling import Sampling

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler here and no library from a wheel; naive is used")


@pytest.fixture(autouse=True)
def pays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Codes are used on every processor, from the first pass on."""
    few_rows._pays.cache_clear()
    monkeypatch.setattr(few_rows, "pays", lambda: True)
    monkeypatch.setattr(few_rows, "AFTER", 0)
    build.library("compact", "bf16")
    monkeypatch.setattr(build, "pending", lambda group, element: False)  # its thread may be late
    yield
    few_rows._pays.cache_clear()


def at_once(model: Decoder) -> LayersAtOnce:
    assert isinstance(model.at_once, LayersAtOnce)
    return model.at_once


def logits(model: Decoder, rows: int) -> Tensor:
    """Of a pass over so many sequences that decode."""
    with torch.inference_mode():
        found = at_once(model).logits(rows_of(model, [(13 * i % 70 + 1, 1) for i in range(rows)])[0])
    assert found is not None
    return found


def one_by_one(model: Decoder, rows: int) -> Tensor:
    """The same, an operator after the other."""
    batch, _ = rows_of(model, [(13 * i % 70 + 1, 1) for i in range(rows)])
    run, model.at_once = model.at_once, None
    with torch.inference_mode():
        found = model.head(model.run(model.embed(batch.batch), range(len(model.config.layers)), batch), batch)
    model.at_once = run
    return found


def coded(model: Decoder) -> int:
    """How many products of the layers are."""
    return len(at_once(model)._table._compact)


def every(model: Decoder) -> int:
    return len(model.config.layers) * len(PRODUCTS)


@pytest.mark.parametrize("variant", ["gqa", "one-kv-head-wide", "window", "qk-norm", "bias", "panels"])
def test_a_pass_with_codes_has_the_bits_of_one_without(variant: str) -> None:
    model = served(variant)
    for _ in range(every(model)):
        logits(model, 1)
    assert coded(model) == every(model)
    ends = at_once(model)._ends
    assert ends is not None
    assert ends.head.compact is not None
    for rows in range(1, FEW_ROWS + 5):
        assert torch.equal(logits(model, rows), one_by_one(model, rows)), rows


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9), temperature=st.sampled_from([0.0, 0.9]),
    after=st.integers(0, 9), chunk=st.sampled_from([7, 64]),
)  # fmt: skip
def test_answers_are_the_same_wherever_coding_begins(lengths: list[int], temperature: float, after: int, chunk: int) -> None:
    wishes = [Sampling(temperature=temperature, max_tokens=12, seed=i, logprobs=2) for i in range(len(lengths))]
    prompts = [prompt_of(n, i) for i, n in enumerate(lengths)]
    answers = []
    for begin in (1 << 30, after):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(few_rows, "AFTER", begin)
            engine = make_engine(served("gqa"), max_batch_tokens=chunk)
            answers.append([answers_of(c) for c in engine.generate(prompts, wishes)])
            assert (coded(engine.model) > 0) <= (begin == after)
    assert answers[0] == answers[1]


def test_a_few_products_are_coded_with_each_pass_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "AFTER", 3)
    monkeypatch.setattr(few_rows, "AT_ONCE", 2)
    model, found = served("gqa"), []
    for _ in range(9):
        logits(model, 2)
        found.append(coded(model))
    assert found == [0, 0, *(min(2 * n, every(model)) for n in range(1, 8))]


def test_many_rows_neither_count_nor_read_codes() -> None:
    model = served("gqa")
    for _ in range(5):
        logits(model, FEW_ROWS + 1)
    assert not coded(model)
    table = at_once(model)._table
    plain = table.weight_bytes(1)
    for _ in range(every(model)):
        logits(model, FEW_ROWS)
    assert table.weight_bytes(FEW_ROWS) < 0.8 * plain
    assert table.weight_bytes(FEW_ROWS + 1) == plain


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_codes_are_made_where_memory_is_at_hand(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may take a quarter of it."""
    model = served("gqa")
    numbers = sum(p.weight.panels.numel() for p in at_once(model)._table.products)
    monkeypatch.setattr(few_rows, "available_bytes", lambda: int(4 * 1.5 * numbers * share))
    for _ in range(every(model)):
        logits(model, 1)
    assert coded(model) == (every(model) if share > 1 else 0)


def test_weights_that_change_in_place_lose_their_codes() -> None:
    model = served("gqa")
    for _ in range(every(model)):
        logits(model, 1)
    before = logits(model, 1)
    for name in ("self_attn.o_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
        with torch.no_grad():
            model.get_parameter(f"model.layers.1.{name}.weight").mul_(1.5)
        after = logits(model, 1)
        assert coded(model) <= few_rows.AT_ONCE, "of those that are there again"
        assert not torch.equal(after, before)
        assert torch.equal(after, one_by_one(model, 1))
        before = after


def test_a_weight_whose_exponents_are_too_many_is_read_as_it_is() -> None:
    model = served("gqa")
    with torch.no_grad():
        weight = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
        weight.copy_(weight * torch.exp2(torch.randint(-40, 2, weight.shape, generator=torch.Generator().manual_seed(0))))
    for _ in range(every(model)):
        logits(model, 1)
    assert coded(model) == every(model) - 1
    assert torch.equal(logits(model, 3), one_by_one(model, 3))


def test_a_kernel_that_is_still_compiled_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = served("gqa")
    monkeypatch.setattr(build, "pending", lambda group, element: True)
    logits(model, 1)
    assert not coded(model)
    monkeypatch.setattr(build, "pending", lambda group, element: False)
    logits(model, 1)
    assert coded(model)


def test_a_kernel_that_is_not_to_be_had_is_asked_for_and_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def broken() -> bool:
        asked.append(1)
        raise ConfigError("no compiler here")

    model = served("gqa")
    monkeypatch.setattr(few_rows, "pays", broken)
    for _ in range(3):  # of the layers, of the head, and of weights that changed
        logits(model, 1)
        with torch.no_grad():
            model.get_parameter("model.norm.weight").mul_(1.5)
    assert not coded(model)
    assert len(asked) == capsys.readouterr().err.count("few rows read weights of 16 bits") == 1


def test_float32_arithmetic_reads_no_codes() -> None:
    model = served("gqa", torch.float32)
    h = torch.zeros(1, model.config.hidden_size)
    for _ in range(3):
        with torch.inference_mode():
            assert at_once(model)(h, range(2), rows_of(model, [(5, 1)])[0]) is not None
    assert not coded(model)


def test_codes_for_which_there_is_no_memory_are_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(product: object) -> None:
        raise RuntimeError("no memory")

    model = served("gqa")
    monkeypatch.setattr(few_rows, "coded", full)
    for rows in (1, 2, 1):
        assert torch.equal(logits(model, rows), one_by_one(model, rows))
    assert not coded(model)
    assert capsys.readouterr().err.count("no more weights are coded") == 2, "of the layers, and of the head"


def test_passes_in_which_nobody_asks_do_not_count_for_the_head() -> None:
    model = served("gqa")
    for _ in range(4):
        with torch.inference_mode():
            at_once(model).logits(rows_of(model, [(5, 20)])[0], torch.tensor([], dtype=torch.int64))
    ends = at_once(model)._ends
    assert ends is not None
    assert ends.head.compact is None
    assert not coded(model)


def test_a_greedy_pass_without_a_screen_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "AFTER", 1 << 30)
    model = served("gqa")
    once = at_once(model)
    monkeypatch.setattr(LayersAtOnce, "_screened", None)
    rows = rows_of(model, [(5, 1)])[0]
    with torch.inference_mode():
        assert once.largest(rows) is None
        assert once.logits(rows) is not None
    assert once._layers._passes == 1
