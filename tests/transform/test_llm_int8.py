"""LLM.int8() as a folder: its bytes, its bits in any company, and what the threshold is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waypost.core.batch import Batch
from waypost.core.config import build as made
from waypost.core.errors import ConfigError
from waypost.keep.reader import Checkpoint
from waypost.kernels import build, select
from waypost.kernels.linear import int8
from waypost.model import hf
from waypost.model.linear.int8 import Int8Linear
from waypost.model.linear.quantized import load
from waypost.model.linear.scheme import KEY, Rows8, Scheme, from_config, to_config
from waypost.serve.engine import Engine
from waypost.serve.request import Completion
from waypost.serve.sampling import Sampling
from waypost.testing.tiny import tiny_checkpoint, tiny_config
from waypost.transform.converting.exporting import export_folder
from waypost.transform.quantize import quantize
from waypost.transform.quantizing import LlmInt8
from waypost.transform.quantizing.llm_int8 import vector_wise

KERNELS = ("naive", "cpu") if build.available() else ("naive",)
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "source", dtype=torch.bfloat16)


def folder(source: Path, out: Path, threshold: float | None = 1.0, **more: Any) -> Path:
    return quantize({"source": str(source), "quantizer": {"name": "llm_int8", "threshold": threshold}, **more}, out).path


@given(st.integers(0, 2**31), st.floats(-10, 10))
def test_a_weight_comes_back_within_half_a_step(seed: int, size: float) -> None:
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    q, scale = vector_wise(weight)
    assert float(((weight.double() / scale.double()) - q.double()).abs().max()) <= 0.5 + 2.0**-16
    assert int(q.abs().max()) <= 127


@given(st.integers(0, 2**31))
def test_with_every_entry_in_16_bits_it_is_the_dense_product(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    made = LlmInt8().quantize(torch.randn(5, 16, generator=source), None)
    x = torch.randn(4, 16, generator=source)
    want = x.double() @ made.dense().double().t()
    torch.testing.assert_close(int8.product(x, made, 1e-30).double(), want, rtol=1e-5, atol=1e-5)  # float32 sums


def test_a_folder_holds_integers_and_its_receipt_is_of_what_is_served(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the other one is in the house " * 20)
    known = {"path": str(text), "max_tokens": 90, "seq_tokens": 30}
    path = folder(source, tmp_path / "out", held_out=known)
    checkpoint = Checkpoint(path)
    name = "model.layers.1.mlp.down_proj"
    q, scale = vector_wise(Checkpoint(source).tensor(f"{name}.weight").float())
    assert torch.equal(checkpoint.tensor(f"{name}.weight"), q)
    assert torch.equal(checkpoint.tensor(f"{name}.weight_scale"), scale)
    assert checkpoint.config[KEY]["waypost"] == {"outlier_thresholds": {"group_0": 1.0}}
    assert from_config(checkpoint.config).of(name) == Scheme(8, None, Rows8(1.0))
    from waypost.measure.perplexity import evaluate
    from waypost.transform.recipe import HeldOut
    from waypost.transform.run import held_out_batches

    (receipt,) = checkpoint.manifest.receipts  # type: ignore[union-attr]
    batches = held_out_batches(checkpoint, made(HeldOut, known))
    assert receipt["held_out"]["loss_output"] == evaluate(load(path), batches).loss
    rounded = evaluate(hf.load(folder(source, tmp_path / "all", None)), batches).loss
    assert rounded != receipt["held_out"]["loss_output"]  # the threshold is read


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_served_it_has_the_same_bits_alone_and_in_company(tmp_path: Path, kernel: Any, family: str) -> None:
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    tiny_checkpoint(tmp_path / "source", tiny_config(model_type=family, **more), dtype=torch.bfloat16)
    path = folder(tmp_path / "source", tmp_path / "out", verify=False)
    sampling = Sampling(temperature=0.9, max_tokens=6, seed=5, logprobs=0, ignore_eos=True)
    prompts = [[3 + (7 * i + n) % 250 for i in range(n)] for n in (3, 40, 17)]

    def answers(found: list[Completion]) -> list[Any]:
        return [(c.choices[0].token_ids, c.choices[0].logprobs) for c in found]

    engine = Engine(path, kernel=kernel, num_pages=12, max_batch_tokens=24)
    assert any(isinstance(module, Int8Linear) for module in engine.model.modules())
    assert engine.model.at_once is None
    together = answers(engine.generate(prompts, sampling))
    alone = Engine(path, kernel=kernel, num_pages=12, max_batch_tokens=64)
    assert [answers(alone.generate([p], sampling))[0] for p in prompts] == together
    engine.swap(path)
    assert answers(engine.generate(prompts, sampling)) == together


@pytest.mark.skipif(len(KERNELS) == 1, reason="no C++ compiler here and no library from a wheel; naive is used")
def test_one_linear_has_equal_bits_on_both_kernels(source: Path, tmp_path: Path) -> None:
    path = folder(source, tmp_path / "out", verify=False)
    x = 3.0 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = []
    for kernel in ("naive", "cpu"):
        model = load(path, ops=select(kernel=kernel))
        linear = model.get_submodule("model.layers.0.self_attn.q_proj")
        assert isinstance(linear, Int8Linear)
        found.append(linear.product(x, model.ops))
    assert torch.equal(*found)


def test_the_decomposition_is_for_channels_that_stand_out(tmp_path: Path) -> None:
    """One channel 64 times as large behind the norms, its weights an eighth: rounding all of a
    row loses the rest of it, as the paper's sec. 4 says; the entry taken out, most of it is kept."""
    source = tiny_checkpoint(tmp_path / "plain", dtype=torch.bfloat16)
    model = hf.load(source)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, linears in (
                ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ):
                layer.get_parameter(f"{norm}.weight")[5] *= 64.0
                for name in linears:
                    layer.get_parameter(f"{name}.weight")[:, 5] /= 8.0
    from waypost.keep.lineage import Lineage
    from waypost.keep.writer import save

    old = Checkpoint(source)
    loud = save(tmp_path / "loud", entries=hf.entries(model), config=old.config, lineage=Lineage(verb="t"), assets=old.assets())

    def distance(threshold: float | None) -> float:
        made = folder(loud, tmp_path / f"int8-{threshold}", threshold, verify=False)
        want, have = (m(Batch.of([TOKENS])).double().log_softmax(-1) for m in (hf.load(loud), hf.load(made)))
        return float((want.exp() * (want - have)).sum(-1).mean())

    with torch.no_grad():
        assert distance(6.0) < 0.5 * distance(None)


def test_what_cannot_be_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"threshold=0\.0: must be positive, or null"):
        LlmInt8(threshold=0.0)
    with pytest.raises(ConfigError, match="rows in 8 bits need weights in 8"):
        Scheme(4, None, Rows8(6.0))
    recipe = {"source": str(source), "quantizer": "round_to_nearest", "head": "llm_int8"}
    with pytest.raises(ConfigError, match="the output head takes rows as they are"):
        quantize(recipe, tmp_path / "out")
    engine = Engine(folder(source, tmp_path / "int8", verify=False), num_pages=7)
    with pytest.raises(Exception, match="swap in a whole folder"):
        engine.swap({"model.norm.weight": torch.ones(32)})


def test_schemes_in_one_folder_and_those_of_others() -> None:
    schemes = {"a.q_proj": Scheme(8, None, Rows8(6.0)), "a.k_proj": Scheme(8, None, Rows8(None)), "lm_head": Scheme(8, 32)}
    tree = json.loads(json.dumps(to_config(schemes, [])))
    assert tree["format"] == "mixed-precision"
    layout = from_config({KEY: tree})
    assert {name: layout.of(name) for name in schemes} == schemes
    foreign = to_config({"a.q_proj": Scheme(8, None, Rows8(None))}, [])
    assert foreign["format"] == "int-quantized"
    assert "waypost" not in foreign
    foreign["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    with pytest.raises(ConfigError, match="8 bits, symmetric, dynamic and by token"):
        from_config({KEY: foreign})


def test_a_model_with_rows_in_8_bits_is_not_saved(source: Path, tmp_path: Path) -> None:
    model = hf.load(folder(source, tmp_path / "out", verify=False))
    with pytest.raises(ConfigError, match=r"q_proj\.weight \(14 in all\) is quantised: .* waypost export CKPT OUT"):
        hf.entries(model)
    wide = export_folder(tmp_path / "out", tmp_path / "wide", dtype="bf16")
    assert len(hf.entries(hf.load(wide))) == sum(1 for _ in model.parameters())
    assert len(hf.entries(model.to("meta"))) == sum(1 for _ in model.parameters()), "names and shapes alone"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("waypost.outlier_thresholds", {"group_0": 6.0, "group_7": 5.0}, r"group_7: belongs to no config group .*\(group_0\)"),
        ("waypost.outlier_thresholds", {"group_1": 5.0}, "group_1: belongs to no config group"),  # whose rows are not rounded
        ("waypost.outlier_tresholds", {"group_0": 6.0}, "outlier_tresholds: belongs to no"),
        ("waypost.outlier_thresholds", {"group_0": "6.0"}, "outlier threshold is '6.0', and must be a number"),
        ("waypost.outlier_thresholds", {"group_0": True}, "outlier threshold is True, and must be a number"),
        ("waypost.outlier_thresholds", {"group_0": [6.0]}, "must be a number"),
        ("waypost.outlier_thresholds", {"group_0": float("nan")}, "must be positive"),
        ("waypost.outlier_thresholds", [6.0], r"waypost\.outlier_thresholds: must be a mapping"),
        ("waypost", 6.0, "waypost: must be a mapping"),
        ("config_groups", ["group_0"], "config_groups: must be a mapping"),
        ("config_groups.group_0", None, "symmetric whole numbers"),
        ("config_groups.group_0", "int8", "group_0: must be a mapping"),
        ("config_groups.group_0.input_activations", "int8", "input_activations: must be a mapping"),
        ("config_groups.group_0.targets", 3, "target 3 is neither a name nor"),
        ("config_groups.group_0.targets", ["re:("], r"target 're:\(' is neither"),
        ("config_groups.group_1.weights", "int8", "weights: must be a mapping"),
        ("config_groups.group_1.weights.group_size", None, "group_size=None: must be a whole number"),
        ("config_groups.group_1.weights.group_size", 32.5, "group_size=32.5: must be a whole number"),
        ("config_groups.group_1.weights.num_bits", 8.0, r"num_bits=8\.0"),
        ("config_groups.group_1.weights.num_bits", [8], r"num_bits=\[8\]"),
    ],
)
def test_what_a_config_says_of_nothing_or_in_the_wrong_type_is_refused(place: str, value: Any, message: str) -> None:
    """Above all thresholds: without one the same weights would compute another function."""
    tree = json.loads(json.dumps(to_config({"a.q_proj": Scheme(8, None, Rows8(6.0)), "lm_head": Scheme(8, 32)}, [])))
    assert from_config({KEY: tree}).of("a.q_proj") == Scheme(8, None, Rows8(6.0))
    *path, last = place.split(".")
    inner = tree
    for key in path:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(ConfigError, match=message):
        from_config({KEY: tree})


def test_widened_and_counted(source: Path, tmp_path: Path) -> None:
    from waypost.cli.facts import parameters

    path = folder(source, tmp_path / "out", verify=False)
    wide = export_folder(path, tmp_path / "wide", dtype="bf16")
    q, scale = vector_wise(Checkpoint(source).tensor("model.layers.0.mlp.up_proj.weight").float())
    assert torch.equal(Checkpoint(wide).tensor("model.layers.0.mlp.up_proj.weight"), (q.float() * scale.float()).bfloat16())
    counts = [parameters(Checkpoint(p).specs.values(), Checkpoint(p).config) for p in (source, path)]
    assert counts[0] == counts[1]
