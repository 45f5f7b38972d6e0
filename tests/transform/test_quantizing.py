"""Quantised folders: rounding against loops, bytes against a reader written here, resuming, and what a quantiser is shown."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waypost.cli.main import main
from waypost.core.config import build, technique, to_tree
from waypost.core.errors import CheckpointError, ConfigError
from waypost.keep import streaming
from waypost.keep.reader import Checkpoint
from waypost.kernels.linear.quantized import QuantizedWeight
from waypost.model import hf
from waypost.model.linear.scheme import Layout, Scheme, from_config, to_config
from waypost.testing.tiny import tiny_checkpoint, tiny_config
from waypost.transform.converting.exporting import export_folder
from waypost.transform.quantize import QuantizeRecipe, quantize, resolve
from waypost.transform.quantizing import RoundToNearest
from waypost.transform.quantizing.round_to_nearest import round_to_nearest, rounded_up
from waypost.transform.run import transform

RTN = {"name": "round_to_nearest", "bits": 4, "group_size": 8}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "source", dtype=torch.bfloat16)


def bits_of(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def bfloat16_up(x: float) -> float:
    """The smallest bfloat16 that is not below x, a positive float32."""
    bits = bits_of(x)
    kept = (bits >> 16) + (bits & 0xFFFF != 0)
    return float(struct.unpack("<f", struct.pack("<I", kept << 16))[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_that_of_loops(bits: int) -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(bits))
    q, scale = round_to_nearest(weight, bits, 6)
    top = 2 ** (bits - 1)
    for row, values in enumerate(weight.tolist()):
        for group in range(4):
            members = values[6 * group : 6 * group + 6]
            largest = torch.tensor(max(map(abs, members))) / (top - 0.5)  # float32, as the transform divides
            want = bfloat16_up(float(largest))
            assert float(scale[row, group]) == want
            for at, value in enumerate(members):
                number = float(torch.tensor(value) / torch.tensor(want))  # half to even, as Python's round
                assert int(q[row, 6 * group + at]) == max(-top, min(top - 1, round(number)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([4, 8]), st.sampled_from([2, 6, 24]), st.floats(-20, 20))
def test_every_weight_comes_back_within_half_a_step(seed: int, bits: int, group: int, size: float) -> None:
    weight = torch.randn(4, 24, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    q, scale = round_to_nearest(weight, bits, group)
    steps = (weight.double().unflatten(1, (-1, group)) / scale.double()[:, :, None]).flatten(1) - q.double()
    assert float(steps.abs().max()) <= 0.5 + 2.0**-16  # of a quotient up to 128 in float32, which has 2^-17 of rounding


@given(st.floats(0, 2.0**100, width=32, allow_subnormal=False))
def test_a_scale_is_rounded_up_to_the_next_number(x: float) -> None:
    up = float(rounded_up(torch.tensor([x]))[0])
    assert up == bfloat16_up(x)


def test_zeros_stay_zero_and_finer_groups_lie_closer() -> None:
    q, scale = round_to_nearest(torch.zeros(2, 8), 4, 4)
    assert not q.any()
    assert bool((scale > 0).all())
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    errors = []
    for group in (64, 16, 4):
        made = RoundToNearest(group_size=group).quantize(weight, None)
        errors.append(float((made.dense().float() - weight).square().mean()))
    assert errors == sorted(errors, reverse=True)


def stored(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors of a safetensors file, read by hand: dtype, shape, bytes."""
    data = (path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    begin = 8 + length
    return {
        name: (entry["dtype"], entry["shape"], data[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def widened(tensors: dict[str, tuple[str, list[int], bytes]], name: str, bits: int, group: int) -> list[list[float]]:
    """The weight that a reader of "pack-quantized" computes: q * scale, a bit at a time."""
    outputs, inputs = struct.unpack("<2q", tensors[f"{name}.weight_shape"][2])
    packed, scales = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    assert (packed[0], scales[0]) == ("I32", "BF16")
    assert packed[1] == [outputs, inputs * bits // 32]
    words = struct.unpack(f"<{len(packed[2]) // 4}I", packed[2])
    halves = struct.unpack(f"<{len(scales[2]) // 2}H", scales[2])
    rows = []
    for n in range(outputs):
        row = []
        for k in range(inputs):
            word = words[n * packed[1][1] + k * bits // 32]
            code = word >> (k * bits % 32) & ((1 << bits) - 1)
            (scale,) = struct.unpack("<f", struct.pack("<I", halves[n * (inputs // group) + k // group] << 16))
            row.append((code - (1 << (bits - 1))) * scale)
        rows.append(row)
    return rows


@pytest.mark.parametrize("bits", [4, 8])
def test_the_folder_is_read_by_hand(source: Path, tmp_path: Path, bits: int) -> None:
    done = quantize({"source": str(source), "quantizer": {**RTN, "bits": bits}, "head": {**RTN, "bits": 8}}, tmp_path / "out")
    tensors, model = stored(done.path), hf.load(done.path)
    for name, width in (("model.layers.1.mlp.down_proj", bits), ("lm_head", 8)):
        want = torch.tensor(widened(tensors, name, width, 8)).bfloat16()
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        assert torch.equal(weight.detach(), want)
    config = json.loads((done.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert tensors["model.embed_tokens.weight"] == stored(source)["model.embed_tokens.weight"]
    receipt = done.receipt
    assert receipt["largest_error_steps"] <= 0.5 + 2.0**-16
    assert receipt["kl_nats"] > 0
    assert receipt["perplexity_ratio"] == math.exp(receipt["loss_output"] - receipt["loss_reference"])
    assert Checkpoint(done.path, verify=True).manifest.receipts == (dict(receipt),)  # type: ignore[union-attr]


def test_compressed_tensors_unpacks_the_same(source: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    done = quantize({"source": str(source), "quantizer": RTN}, tmp_path / "out")
    folder = Checkpoint(done.path)
    for name in [name for name in folder.names if name.endswith("weight_packed")]:
        shape = folder.tensor(name.replace("packed", "shape"))
        words = folder.tensor(name)
        ours = QuantizedWeight(words, folder.tensor(name.replace("packed", "scale")), 4, int(shape[1]))
        assert torch.equal(reader.unpack_from_int32(words, 4, torch.Size(shape.tolist())), ours.q)


def test_killed_and_run_again_it_gives_the_same_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"source": str(source), "quantizer": RTN}
    whole = quantize(recipe, tmp_path / "whole").path
    monkeypatch.setattr(streaming, "SYNC_BYTES", 1)
    inner, calls = RoundToNearest.quantize, []

    def dies(self: RoundToNearest, weight: Tensor, seen: Any) -> QuantizedWeight:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return inner(self, weight, seen)

    with monkeypatch.context() as patch:
        patch.setattr(RoundToNearest, "quantize", dies)
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = quantize(recipe, tmp_path / "out")
    assert again.resumed_tensors > 8
    for file in ("model.safetensors", "config.json"):
        assert (again.path / file).read_bytes() == (whole / file).read_bytes()


class Rows:
    """Keeps every row that a linear is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.seen.append(x.clone())


SHOWN: list[Tensor] = []


@technique
class Watching:
    """Rounds to the nearest, after looking at what the linear is given."""

    bits: int = 4

    def scheme(self) -> Scheme:
        return Scheme(self.bits, 8)

    def observe(self, inputs: int) -> Rows:
        return Rows()

    def quantize(self, weight: Tensor, seen: Rows) -> QuantizedWeight:
        SHOWN.append(torch.cat(seen.seen))
        assert SHOWN[-1].shape[1] == weight.shape[1]
        return RoundToNearest(group_size=8).quantize(weight, None)


def norm_of(model: Any, layer: int) -> Any:
    return model.model.layers[layer].input_layernorm


def test_a_quantizer_is_shown_what_its_linear_is_given(source: Path, tmp_path: Path) -> None:
    """Of the first layer the source's own rows; of the second those that come out of the first one quantised."""
    SHOWN.clear()
    (tmp_path / "text.txt").write_text("the other one is in the house and on the hill " * 4)
    watching: dict[str, Any] = {"name": f"{__name__}:Watching"}
    recipe = {"source": str(source), "quantizer": watching, "verify": False}
    text = {"path": str(tmp_path / "text.txt"), "max_tokens": 40, "seq_tokens": 20}
    done = quantize({**recipe, "calibration": text}, tmp_path / "out")
    from waypost.model.rows import Rows as Pass
    from waypost.transform.recipe import HeldOut
    from waypost.transform.run import held_out_batches

    (batch,) = held_out_batches(Checkpoint(source), HeldOut(**text))
    plain, packed = hf.load(source), hf.load(done.path)
    with torch.no_grad():
        rows = Pass(batch, plain.ops)
        h = plain.embed(batch)
        assert torch.equal(SHOWN[0], norm_of(plain, 0)(h, rows))
        h = packed.run(h, [0], rows)
        assert torch.equal(SHOWN[7], norm_of(plain, 1)(h, rows))
    assert len(SHOWN) == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantizer": "gptq"}, r"quantizer: Gptq looks at .* set calibration\.path to a text"),
        ({"head": "gptq"}, r"head: Gptq looks at"),
        ({"quantizer": "gptq", "calibration": {"path": "TEXT"}}, "seq_tokens=512: .* and the context of .* is 256"),
        ({"held_out": {"path": "TEXT"}}, "seq_tokens=512: .* and the context of .* is 256"),
        ({"held_out": {"path": "TEXT/none"}}, "none"),
    ],
)
def test_a_wrong_text_is_found_before_anything_is_written(
    source: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the other one is in the house and on the hill " * 30)
    told = json.loads(json.dumps(change).replace("TEXT", str(text)))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message):
        quantize({"source": str(source), "quantizer": RTN, **told}, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_says_that_a_text_is_missing(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["transform", "quantize", str(source), "--method", "gptq", "--dry-run"])
    assert "Gptq looks at what linears are given; set calibration.path" in capsys.readouterr().err


def test_what_is_kept_keeps_its_bits(source: Path, tmp_path: Path) -> None:
    done = quantize({"source": str(source), "quantizer": RTN, "keep": ["*.down_proj"], "verify": False}, tmp_path / "out")
    before, after = stored(source), stored(done.path)
    same = [name for name in before if name in after]
    assert all(before[name] == after[name] for name in same)
    assert sum("down_proj" in name for name in same) == 2
    assert done.receipt["kept_linears"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    assert not done.receipt["verified"]
    with pytest.raises(ConfigError, match="leaves no linear"):
        quantize({"source": str(source), "quantizer": RTN, "keep": ["*"]}, tmp_path / "none")


def test_experts_are_quantised_and_routers_are_not(tmp_path: Path) -> None:
    config = tiny_config(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    source = tiny_checkpoint(tmp_path / "source", config, dtype=torch.bfloat16)
    done = quantize({"source": str(source), "quantizer": RTN}, tmp_path / "out")
    names = Checkpoint(done.path).names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_packed" in names
    assert done.receipt["kl_nats"] > 0


def test_a_quantised_folder_is_not_trained_or_merged_but_can_be_widened(source: Path, tmp_path: Path) -> None:
    done = quantize({"source": str(source), "quantizer": RTN, "verify": False}, tmp_path / "out")
    with pytest.raises(ConfigError, match="waypost export CKPT OUT --weights-only --dtype bf16"):
        hf.config_from_hf(Checkpoint(done.path).config)
    with pytest.raises(ConfigError, match="a transform needs full ones"):
        transform({"sources": [str(done.path)], "method": {"name": "soup"}}, tmp_path / "merged")
    with pytest.raises(ConfigError, match="its weights are quantised"):
        quantize({"source": str(done.path), "quantizer": RTN}, tmp_path / "twice")
    wide = export_folder(done.path, tmp_path / "wide", dtype="bf16")
    assert "quantization_config" not in Checkpoint(wide).config
    for one, other in zip(hf.load(wide).parameters(), hf.load(done.path).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantizer": {**RTN, "group_size": 7}}, "must be an even number of inputs"),
        (
            {"quantizer": {**RTN, "group_size": 12}},
            "group_size=12 does not divide the 32 inputs of model.layers.0.self_attn.q_proj",
        ),
        ({"quantizer": {**RTN, "bits": 3}}, "bits"),
        ({"quantizer": {"name": "round_to_neerest"}}, "Did you mean 'round_to_nearest'"),
    ],
)
def test_what_cannot_be_is_refused(source: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize({"source": str(source), "quantizer": RTN, **change}, tmp_path / "out")


@pytest.mark.parametrize("name", ["int4", "gptq", "llm-int8"])
def test_the_shipped_recipes_are_valid(name: str) -> None:
    recipe = resolve(Path(__file__).parents[2] / "recipes" / f"quantize-{name}.yaml")
    assert build(QuantizeRecipe, to_tree(recipe)) == recipe


def test_schemes_come_back_from_the_config() -> None:
    schemes = {"a.q_proj": Scheme(4, 32), "a.down_proj": Scheme(4, 32), "lm_head": Scheme(8, None)}
    tree = to_config(schemes, ["a.gate"])
    layout = from_config({"quantization_config": tree})
    assert {name: layout.of(name) for name in schemes} == schemes
    assert tree["ignore"] == ["a.gate"]
    mixed = {"a.q_proj": Scheme(4, 32), "b.q_proj": Scheme(8, 32)}
    layout = from_config({"quantization_config": to_config(mixed, [])})
    assert {name: layout.of(name) for name in mixed} == mixed
    with pytest.raises(ConfigError, match=r"no config group speaks of 'c\.q_proj'"):
        layout.of("c.q_proj")
    assert Layout(((("Linear",), Scheme(4, 8)), (("b",), Scheme(8, 8)))).of("b") == Scheme(8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "'gptq' in format 'pack-quantized' is not read here"),
        ({"format": "float-quantized"}, "is not read here"),
    ],
)
def test_other_layouts_are_refused(change: dict[str, Any], message: str) -> None:
    tree = to_config({"a": Scheme(4, 8)}, [])
    with pytest.raises(ConfigError, match=message):
        from_config({"quantization_config": {**tree, **change}})
    group = tree["config_groups"]["group_0"]
    for weights, what in (
        ({"num_bits": 3}, "num_bits=3"),
        ({"symmetric": False}, "symmetric"),
        ({"actorder": "group"}, "order"),
    ):
        changed = {**tree, "config_groups": {"g": {**group, "weights": {**group["weights"], **weights}}}}
        with pytest.raises(ConfigError, match=what):
            from_config({"quantization_config": changed})
    with pytest.raises(ConfigError, match="quantised activations"):
        from_config({"quantization_config": {**tree, "config_groups": {"g": {**group, "input_activations": {"num_bits": 8}}}}})


def test_parts_that_do_not_fit_are_named(source: Path, tmp_path: Path) -> None:
    done = quantize({"source": str(source), "quantizer": RTN, "verify": False}, tmp_path / "out")
    config = json.loads((done.path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 16
    (done.path / "waypost.json").unlink()
    (done.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"with groups of 16 has \[32, 4\] and \[32, 2\]"):
        hf.load(done.path)


def test_on_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["transform", *args])
        assert not caught.value.code
        return capsys.readouterr().out

    text = run("quantize", str(source), str(tmp_path / "one"), "--bits", "8", "--group", "16", "--head-bits", "0")
    assert "round_to_nearest, bits 8, group_size 16" in text
    assert "perplexity times" in text
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(run("quantize", str(source), "--bits", "8", "--group", "16", "--head-bits", "0", "--dry-run"))
    told = json.loads(run("--recipe", str(recipe), "--out", str(tmp_path / "two"), "--json"))
    assert told["receipt"]["bytes_output"] < told["receipt"]["bytes_source"]
    assert stored(tmp_path / "one") == stored(tmp_path / "two")
