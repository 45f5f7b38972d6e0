"""From a folder to an engine: packing, fusing, end tokens, cache size, and the proof of the numeric contract."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_cases import KERNELS, VARIANTS, answers_of, by_hand, make_engine, model_of, prompt_of
from torch import Tensor

from waypost.core.batch import Batch
from waypost.core.errors import CapacityError, CheckpointError, ConfigError, NumericsError
from waypost.kernels import build, memory, select
from waypost.kernels.build import available
from waypost.kernels.linear import packed as packed_module
from waypost.kernels.linear.cpu import Packed, pack
from waypost.kernels.linear.packed import PackedLinear
from waypost.kernels.linear.quantized import QuantizedWeight
from waypost.kernels.linear.rows import differing_count, trial_input
from waypost.kernels.ops import Kernel
from waypost.model import hf
from waypost.model.decoder import Decoder
from waypost.model.linear.fused import FusedAttention, FusedFfn
from waypost.model.linear.int8 import Int8Linear
from waypost.serve import loading
from waypost.serve.engine import Engine
from waypost.serve.pages import PagedKv
from waypost.serve.sampling import Sampling
from waypost.testing.tiny import tiny_checkpoint, tiny_config, tiny_model
from waypost.transform.quantize import quantize

SAMPLING = Sampling(max_tokens=9, seed=2, logprobs=0, ignore_eos=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prepared_model_has_the_bits_of_the_plain_one(variant: str, dtype: torch.dtype, kernel: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    plain = tiny_model(config, dtype=dtype, kernel=kernel)  # type: ignore[arg-type]
    model = tiny_model(config, dtype=dtype, kernel=kernel)  # type: ignore[arg-type]
    names = [(name, p.shape) for name, p in model.named_parameters()]
    loading.prepare_for_serving(model)
    assert [(name, p.shape) for name, p in model.named_parameters()] == names
    assert isinstance(model.model.layers[0].self_attn, FusedAttention)
    batch = Batch.of([prompt_of(n, n) for n in (1, 5, 40)])
    with torch.no_grad():
        assert torch.equal(model(batch), plain(batch))
        for parameter in (*model.parameters(), *plain.parameters()):
            parameter.mul_(1.25)
        assert torch.equal(model(batch), plain(batch)), "changed weights are seen"
    engine = make_engine(model, num_pages=6, max_batch_tokens=20)
    prompts = [prompt_of(n, n) for n in (3, 40, 17)]
    assert [answers_of(c) for c in engine.generate(prompts, SAMPLING)] == [[by_hand(plain, p, SAMPLING)] for p in prompts]


def test_an_engine_made_from_a_folder(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model")
    engine = Engine(path, num_pages=8)
    assert engine.tokenizer is not None
    (done,) = engine.generate(["the bat"], SAMPLING)
    model = hf.load(path, ops=select())
    assert answers_of(done) == [by_hand(model, engine.tokenizer.encode("the bat", special=True), SAMPLING)]
    half = Engine(path, num_pages=8, dtype=torch.bfloat16)
    assert half.kv.k_pages[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", KERNELS)
def test_fast_numerics_serve_too(kernel: Kernel, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model")
    prompt = [prompt_of(20)]
    exact = Engine(path, num_pages=8, kernel=kernel).generate(prompt, SAMPLING)[0]
    engine = Engine(path, num_pages=8, numerics="fast", kernel=kernel)
    assert engine.model.ops.name == "fast"
    fast = engine.generate(prompt, SAMPLING)[0]
    assert fast.choices[0].logprobs[0] == pytest.approx(exact.choices[0].logprobs[0], abs=1e-4)  # float32, other orders


def test_a_tokenizer_that_does_not_fit_is_refused_before_any_request(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", tiny_config(vocab_size=256))
    with pytest.raises(ConfigError, match=r"ids up to 287, the model a vocabulary of 256; take the tokenizer"):
        Engine(path, num_pages=8)


@pytest.mark.skipif("cpu" not in KERNELS, reason="this machine has no C++ compiler; all dtypes are computed")
@pytest.mark.parametrize("kind", ["asked for", "stored", "rows in 8 bits"])
def test_a_dtype_that_is_not_computed_is_refused_when_it_is_loaded(kind: str, tmp_path: Path) -> None:
    half, asked = torch.float16, None if kind == "stored" else torch.float16
    path = tiny_checkpoint(tmp_path / "model", dtype=half if kind == "stored" else torch.bfloat16)
    if kind == "rows in 8 bits":
        path = quantize({"source": str(path), "quantizer": "llm_int8", "verify": False}, tmp_path / "int8").path
    with pytest.raises(ConfigError, match=f"{path}: float16 is not computed .* choose bfloat16 or float32"):
        Engine(path, num_pages=4, dtype=asked, kernel="cpu")
    assert Engine(path, num_pages=4, dtype=torch.bfloat16, kernel="cpu").dtype == torch.bfloat16
    assert Engine(path, num_pages=4, dtype=asked, kernel="naive").generate(["the bat"], SAMPLING)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, CheckpointError), match="nowhere"):
        Engine(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("written", "want"), [(None, []), ({}, []), ({"eos_token_id": 7}, [7]), ({"eos_token_id": [7, 9]}, [7, 9])]
)
def test_end_tokens_of_the_generation_config(tmp_path: Path, written: dict[str, object] | None, want: list[int]) -> None:
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written))
    assert loading.generation_eos(tmp_path) == want


@pytest.mark.parametrize("wrong", ["x", [1, "x"], 1.5, True, {"id": 1}])
def test_end_tokens_that_are_none_are_named(tmp_path: Path, wrong: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id=.*: must be a token id or a list of them"):
        loading.generation_eos(tmp_path)


def test_a_machine_without_a_compiler_says_what_that_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    loading.load(checkpoint, "exact", "naive", None)
    assert "install g++" not in capsys.readouterr().err
    monkeypatch.setattr(build, "available", lambda: False)
    loading.load(checkpoint, "exact", "auto", None)
    assert "install g++" in capsys.readouterr().err


def test_more_pages_than_there_is_memory_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object) -> Tensor:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(memory, "empty", empty)
    with pytest.raises(CapacityError, match=r"num_pages=1,000: no room for pages of [\d,]+ bytes each"):
        PagedKv(tiny_config(), 1000, torch.float32)


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json: not a JSON object"):
        loading.generation_eos(tmp_path)


def test_the_cache_is_sized_by_the_memory_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    config, dtype = tiny_config(), torch.float32
    page = PagedKv.page_bytes(config, dtype)
    monkeypatch.setattr(loading, "available_bytes", lambda: 40 * page)
    assert loading.num_pages(config, dtype, 256, 64) == 10
    monkeypatch.setattr(loading, "available_bytes", lambda: 10**12)
    assert loading.num_pages(config, dtype, 250, 3) == 3 * 16, "no more than can ever be used"
    monkeypatch.setattr(loading, "available_bytes", lambda: page)
    with pytest.raises(CapacityError, match="no memory for a page"):
        loading.num_pages(config, dtype, 256, 64)
    monkeypatch.undo()
    assert loading.available_bytes() > 1 << 20


def unsteady(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product whose last bits follow the number of rows, for one shape only."""
    out = select(kernel="naive").linear(x, weight, bias)
    return out * (1 + 1e-6 * len(x)) if tuple(weight.shape) == (32, 64) else out


def test_exact_is_refused_where_it_does_not_hold() -> None:
    model = tiny_model()
    model.ops = replace(model.ops, linear=unsteady)
    with pytest.raises(
        NumericsError,
        match=r"model\.layers\.0\.mlp\.down_proj, 64 -> 32 in torch\.float32, are others among 3 rows.*numerics='fast'",
    ):
        Engine(model, num_pages=4)
    model.ops = replace(model.ops, name="fast")
    Engine(model, num_pages=4)


def few_bits(bits: int) -> QuantizedWeight:
    """A weight (32, 64), like each down_proj of the tiny model."""
    return QuantizedWeight.of(torch.ones(32, 64, dtype=torch.int8), torch.ones(32, 1).bfloat16(), bits)


class UnsteadyInEight(PackedLinear):
    """Right, but for weights in 8 bits, whose values follow the number of rows."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        few = self.stored(weight)
        return self.plain(x, weight if few is None else few.dense(), bias) * (1 if few is None or few.bits == 4 else len(x))


@pytest.mark.parametrize("other", ["rows in 8 bits", "8 bits"])
def test_equal_shapes_are_tried_once_for_each_code_that_computes_them(other: str) -> None:
    """The first down_proj is in 4 bits and sound, the second of the same shape is not."""
    model = tiny_model(dtype=torch.bfloat16)
    linear = UnsteadyInEight(model.ops.linear)
    model.ops = replace(model.ops, linear=linear)
    layers: Any = model.model.layers
    first, second = (layer.mlp.down_proj for layer in layers)
    for module in (first, second):
        module.weight = torch.nn.Parameter(module.weight.to("meta"), requires_grad=False)
    linear.store(first.weight, few_bits(4))
    if other == "8 bits":
        linear.store(second.weight, few_bits(8))
    else:
        layers[1].mlp.down_proj = Int8Linear(second, lambda x: x[:, :32] * len(x))
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.down_proj, 64 -> 32 in torch\.bfloat16, are others"):
        loading.check_numerics(model)


def test_a_fused_product_with_other_bits_is_not_used() -> None:
    def by_width(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = select(kernel="naive").linear(x, weight, bias)
        return out + 1e-3 if weight.shape[0] == 128 else out  # gate and up together: 2 x 64

    model = tiny_model()
    model.ops = replace(model.ops, linear=by_width)
    loading.prepare_for_serving(model)
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn, FusedAttention)
    assert not isinstance(layer.mlp, FusedFfn)


@pytest.mark.skipif("cpu" not in KERNELS, reason="this machine has no C++ compiler; nothing is packed")
def test_weights_in_bfloat16_are_packed_and_others_left() -> None:
    weight = torch.randn(50, 31)
    for dtype, packs in ((torch.bfloat16, True), (torch.float32, False)):
        packed = PackedLinear(select().linear)
        converted = weight.to(dtype)
        assert (packed.pack([converted]) is not None) == packs
        packed.hold(converted)
        x = torch.randn(5, 31).to(dtype)
        for _ in range(2):
            assert torch.equal(packed(x, converted), select().linear(x, converted))
            converted.mul_(1.5)
        assert packed(x[:0], converted).shape == (0, 50)


def test_a_model_that_is_handed_over_is_left_as_it_is() -> None:
    model: Decoder = model_of("gqa", "fp32")
    ops = model.ops
    make_engine(model)
    assert model.ops is ops
    assert not any(isinstance(m, FusedAttention | FusedFfn) for m in model.modules())


def test_one_row_alone_has_the_bits_it_has_among_many() -> None:
    """On this shape oneDNN's product of a single row rounds one output in some thousands otherwise."""
    weight = (0.05 * torch.randn(576, 1536, generator=torch.Generator().manual_seed(0))).bfloat16()
    x = trial_input(1536, 576, torch.bfloat16)
    linear = select().linear
    want = linear(x, weight)
    assert all(differing_count(lambda part: linear(part, weight), x, want, [n]) is None for n in (1, 2, 3, 5, 15, 17, 40))


def test_a_difference_is_found_and_its_count_named() -> None:
    x = trial_input(8, 8, torch.float32)
    assert differing_count(lambda part: part + (len(part) == 7), x, x, (3, 7, 9)) == 7
    assert differing_count(lambda part: part * 1, x, x, (3, 7, 9)) is None


def test_of_many_outputs_a_few_rows_are_enough_to_find_a_difference() -> None:
    """Of which the bits depend on a row's place, on a place past the first sixteen, or on calls of two rows."""
    x = torch.randn(32, 1 << 17)
    place = torch.arange(32)[:, None]
    for product, first in (
        (lambda part: part + place[: len(part)], 3),
        (lambda part: part + (place[: len(part)] >= 16), 9),
        (lambda part: part + (len(part) == 2), 3),
        (lambda part: part + (len(part) == 16), 16),
        (lambda part: part * 1, None),
    ):
        assert differing_count(product, x, product(x), (3, 9, 16)) == first


@pytest.mark.skipif(not available(), reason="no C++ compiler here and no library from a wheel; naive is used")
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_packed_once(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []

    def watched(*weights: torch.Tensor) -> Packed:
        packed.extend(weight.data_ptr() for weight in weights)
        return pack(*weights)

    monkeypatch.setattr(packed_module, "pack", watched)
    model = tiny_model(tiny_config(tie_word_embeddings=tied), dtype=torch.bfloat16, kernel="cpu")
    loading.prepare_for_serving(model)
    matrices = [p.data_ptr() for name, p in model.named_parameters() if p.ndim == 2 and (tied or "embed" not in name)]
    assert sorted(packed) == sorted(matrices)
