"""config.json both ways, parameter names, and folders that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_models import CASES, COMMON, LLAMA3, reference, texts
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from waypost.core.config import build, to_tree
from waypost.core.errors import CheckpointError, ConfigError, ShapeError
from waypost.keep.lineage import Lineage
from waypost.keep.reader import Checkpoint
from waypost.keep.writer import save
from waypost.kernels import select
from waypost.model import hf
from waypost.model.config import LayerSpec, ModelConfig
from waypost.model.decoder import Decoder
from waypost.model.ffn import Dense, Moe
from waypost.model.mixer import Attention
from waypost.testing.tiny import tiny_checkpoint, tiny_config, tiny_model

NAIVE = select(kernel="naive")


def written(case: str) -> dict[str, Any]:
    """The config.json that transformers writes for `case`."""
    model_type, changes = CASES[case]
    text = AutoConfig.for_model(model_type, **{**COMMON, **changes}, dtype="float32").to_json_string()
    tree: dict[str, Any] = json.loads(text)
    return tree


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("extras", [True, False], ids=["verbatim", "derived"])
def test_what_we_save_is_the_same_model_to_transformers(case: str, extras: bool, tmp_path: Path) -> None:
    theirs = reference(case)
    theirs.save_pretrained(tmp_path / "in")
    ours = hf.load(tmp_path / "in", ops=NAIVE)
    config = ours.config if extras else replace(ours.config, hf_extras={})
    tree = hf.config_to_hf(config, torch.float32)
    save(tmp_path / "out", entries=hf.entries(ours), config=tree, lineage=Lineage())

    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager", output_loading_info=True)
    assert type(back) is type(theirs)
    assert not any(info.values()), info
    for tokens in texts():
        assert torch.equal(back(tokens[None]).logits, theirs(tokens[None]).logits)
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(load_file(tmp_path / "in/model.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_written_and_read_back_is_the_same_config(case: str) -> None:
    config = hf.config_from_hf(written(case))
    again = hf.config_from_hf(hf.config_to_hf(config))
    assert replace(again, hf_extras={}) == replace(config, hf_extras={})
    assert hf.config_to_hf(again) == hf.config_to_hf(config)
    assert build(ModelConfig, to_tree(config)) == config


@pytest.mark.parametrize("case", CASES)
def test_fields_that_we_do_not_know_are_written_back_verbatim(case: str) -> None:
    tree = {**written(case), "some_future_field": {"a": [1, None]}, "use_cache": False, "dtype": "bfloat16"}
    back = hf.config_to_hf(hf.config_from_hf(tree))
    assert {key: back[key] for key in tree} == tree


def older(tree: dict[str, Any]) -> dict[str, Any]:
    """The same config.json as transformers 4 writes it."""
    tree = dict(tree)
    rope = tree.pop("rope_parameters")
    tree["rope_theta"] = rope.pop("rope_theta")
    tree["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    tree["torch_dtype"] = tree.pop("dtype")
    if tree["model_type"] == "qwen3_moe":
        tree["num_experts"] = tree.pop("num_local_experts")
    if tree["model_type"] in ("qwen2", "qwen3") and "max_window_layers" in tree:
        tree.pop("layer_types")
    return tree


@pytest.mark.parametrize("case", [case for case in CASES if case != "qwen2-layer-types"])
def test_both_styles_of_config_mean_the_same(case: str) -> None:
    new = hf.config_from_hf(written(case))
    old = hf.config_from_hf(older(written(case)))
    assert replace(old, hf_extras={}) == replace(new, hf_extras={})


def test_what_we_write_holds_both_styles() -> None:
    tree = hf.config_to_hf(tiny_config(rope_parameters=LLAMA3), torch.bfloat16)
    assert tree["dtype"] == tree["torch_dtype"] == "bfloat16"
    assert tree["rope_parameters"] == LLAMA3
    assert tree["rope_theta"] == LLAMA3["rope_theta"]
    assert tree["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert AutoConfig.for_model(**tree).rope_parameters == LLAMA3


def test_layers_that_change_give_way_to_what_the_layers_say() -> None:
    config = hf.config_from_hf(written("qwen2-window"))
    shorter = replace(config, layers=config.layers[:2])
    tree = hf.config_to_hf(shorter)
    assert tree["num_hidden_layers"] == 2
    assert tree["layer_types"] == ["full_attention", "sliding_attention"]
    assert hf.config_from_hf(tree).layers == shorter.layers


def test_layer_types_of_other_layers_are_not_kept() -> None:
    tree = {**written("mistral-window"), "layer_types": ["sliding_attention"] * 3}
    config = hf.config_from_hf(tree)
    assert hf.config_to_hf(config)["layer_types"] == tree["layer_types"]
    shorter = replace(config, layers=config.layers[:1])
    assert hf.config_from_hf(hf.config_to_hf(shorter)).layers == shorter.layers


PUBLIC: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 3.1 8B": (
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "pretraining_tp": 1,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "torch_dtype": "bfloat16",
        },
        8_030_261_248,
    ),
    "Mistral 7B": (
        {
            "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        },
        7_241_732_096,
    ),
    "Qwen2.5 0.5B": (
        {
            "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_window_layers": 24,
            "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False, "rope_theta": 1000000.0,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Qwen3 0.6B": (
        {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "rope_scaling": None,
            "max_position_embeddings": 40960, "rope_theta": 1000000, "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    "Mixtral 8x7B": (
        {
            "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
            "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
        },
        46_702_792_704,
    ),
    "Qwen1.5 MoE A2.7B": (
        {
            "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "decoder_sparse_step": 1,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60,
            "num_experts_per_tok": 4, "norm_topk_prob": False, "max_position_embeddings": 8192,
            "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21,
        },
        14_315_784_192,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configurations_have_the_size_that_their_authors_state(name: str) -> None:
    tree, size = PUBLIC[name]
    config = hf.config_from_hf(tree)
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(config, NAIVE).parameters()) == size
    back = hf.config_to_hf(config)
    assert {key: back[key] for key in tree} == tree


def test_another_stock_class_is_found_where_the_own_one_cannot_express_the_layers() -> None:
    dense = tiny_config()
    moe = Moe(num_experts=4, num_experts_per_tok=2, intermediate_size=64)
    upcycled = replace(dense, layers=[replace(layer, ffn=moe) for layer in dense.layers])
    assert hf.config_to_hf(upcycled)["model_type"] == "mixtral"
    assert hf.to_hf_name(upcycled, "model.layers.1.mlp.experts.3.up_proj.weight") == (
        "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    )
    mixed = replace(dense, layers=[dense.layers[0], replace(dense.layers[1], ffn=moe)])
    assert hf.stock_type(mixed) == "waypost"
    head_norm = [replace(layer, mixer=replace(layer.mixer, qk_norm="head")) for layer in mixed.layers]
    assert hf.stock_type(replace(dense, layers=head_norm)) == "qwen3_moe"


attentions = st.builds(
    Attention,
    num_attention_heads=st.sampled_from([2, 4]),
    num_key_value_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([6, 8]),
    window=st.sampled_from([None, None, 5]),
    qkv_bias=st.booleans(),
    o_bias=st.booleans(),
    qk_norm=st.sampled_from(["none", "head", "full"]),
)
moes = st.builds(
    Moe,
    num_experts=st.just(4),
    num_experts_per_tok=st.sampled_from([1, 2]),
    intermediate_size=st.sampled_from([8, 12]),
    norm_topk_prob=st.booleans(),
    shared_intermediate_size=st.sampled_from([None, 16]),
)
ffns = st.builds(Dense, intermediate_size=st.sampled_from([20, 24]), bias=st.booleans()) | moes
specs = st.builds(LayerSpec, mixer=attentions, ffn=ffns, norm=st.sampled_from(["pre", "post"]))
alike = st.tuples(specs, st.integers(1, 4)).map(lambda pair: [pair[0]] * pair[1])


@settings(max_examples=300, deadline=None)
@given(
    layers=alike | st.lists(specs, min_size=1, max_size=3), origin=st.sampled_from(["llama", "mixtral", "qwen3_moe", "olmo2"])
)
def test_any_layers_are_written_and_read_back(layers: list[LayerSpec], origin: str) -> None:
    base = tiny_config(model_type=origin, num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    config = replace(base, layers=layers)
    tree = json.loads(json.dumps(hf.config_to_hf(config)))
    back = hf.config_from_hf(tree)
    assert back.layers == layers
    assert replace(back, hf_extras={}, model_type="") == replace(config, hf_extras={}, model_type="")
    if tree["model_type"] != "waypost":
        AutoConfig.for_model(**tree)


def test_layers_of_no_stock_class_are_written_out_and_load(tmp_path: Path) -> None:
    base = tiny_config()
    other = Attention(num_attention_heads=2, num_key_value_heads=1, head_dim=6, window=4, qk_norm="full")
    layers = [base.layers[0], replace(base.layers[1], mixer=other, ffn=Dense(intermediate_size=20, bias=True), norm="post")]
    config = replace(base, layers=layers)
    model = tiny_model(config)
    tree = hf.config_to_hf(config, torch.float32)
    assert tree["model_type"] == "waypost"
    save(tmp_path / "own", entries=hf.entries(model), config=tree, lineage=Lineage())
    back = hf.load(tmp_path / "own", ops=NAIVE)
    assert back.config.layers == layers
    assert torch.equal(hf.logits(back, [5, 9, 200, 3]), hf.logits(model, [5, 9, 200, 3]))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"type": "lineer", "factor": 4.0}}, "Did you mean 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_theta": 6.0}, "disagree"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention"),
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_size": 30}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": 10**30}, "must be at most 10,000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types does not agree"),
        ({"model_type": "mistral", "sliding_window": 9, "layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5"),
        ({"model_type": "mixtral"}, "num_local_experts"),
        ({"model_type": "waypost"}, "waypost_layers"),
        ({"model_type": "waypost", "waypost_layers": [{"mixer": {"name": "atention"}}]}, "Did you mean 'attention'"),
    ],
)
def test_what_we_cannot_honour_is_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names.replace("(", r"\(")):
        tiny_config(**changes)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_broken_config_file_is_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "qwen3_moe-mixed"])
def test_fused_experts_are_read_too(case: str, tmp_path: Path) -> None:
    theirs = reference(case)
    theirs.save_pretrained(tmp_path / "apart")
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in Checkpoint(tmp_path / "fused").names)
    apart, fused = (hf.load(tmp_path / kind, ops=NAIVE) for kind in ("apart", "fused"))
    for (name, a), (_, b) in zip(apart.named_parameters(), fused.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_names_go_both_ways() -> None:
    for case in CASES:
        config = hf.config_from_hf(written(case))
        with torch.device("meta"):
            names = [name for name, _ in Decoder(config, NAIVE).named_parameters()]
        theirs = [hf.to_hf_name(config, name) for name in names]
        assert [hf.from_hf_name(config, name) for name in theirs] == names
        assert len(set(theirs)) == len(theirs)


def test_the_dtype_of_the_file_is_kept_or_cast(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    kept = hf.load(folder, ops=NAIVE)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    cast = hf.load(folder, dtype=torch.float32, ops=NAIVE)
    assert {p.dtype for p in cast.parameters()} == {torch.float32}
    assert hf.config_to_hf(cast.config)["dtype"] == "float32"
    assert hf.config_to_hf(cast.config)["torch_dtype"] == "float32"
    assert all(torch.equal(a.float(), b) for a, b in zip(kept.parameters(), cast.parameters(), strict=True))


def test_mapped_weights_are_the_same_bits_and_writing_them_spares_the_file(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    before = (folder / "model.safetensors").read_bytes()
    copied, mapped = hf.load(folder, ops=NAIVE), hf.load(folder, ops=NAIVE, mapped=True)
    assert torch.equal(hf.logits(copied, [3, 4, 5]), hf.logits(mapped, [3, 4, 5]))
    with torch.no_grad():
        for parameter in mapped.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def rewrite(folder: Path, change: Any) -> Path:
    """A plain Hugging Face folder with the tensors of `folder`, changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    plain = folder.parent / "plain"
    plain.mkdir()
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_bytes((folder / "config.json").read_bytes())
    return plain


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    cases: dict[str, tuple[Any, str]] = {
        "missing": (lambda t: t.pop("model.norm.weight"), r"no tensor 'model\.norm\.weight' \(1 of 20"),
        "left over": (lambda t: t.update(extra=torch.zeros(2)), "'extra'"),
        "shape": (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model\.norm\.weight.*\[3\].*\[32\]"),
        "quantised": (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "I8; quantised"),
        "untied": (lambda t: t.update({"lm_head.weight": torch.zeros(288, 32)}), "tie_word_embeddings"),
    }
    for name, (change, match) in cases.items():
        folder = tiny_checkpoint(tmp_path / name / "whole")
        with pytest.raises(CheckpointError, match=match):
            hf.load(rewrite(folder, change), ops=NAIVE)


def test_harmless_tensors_of_old_folders_are_passed_over(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    folder = tiny_checkpoint(tmp_path / "whole")
    model = hf.load(rewrite(folder, change), ops=NAIVE)
    assert torch.equal(hf.logits(model, [1, 2]), hf.logits(hf.load(folder, ops=NAIVE), [1, 2]))


def test_entries_are_live_views(tmp_path: Path) -> None:
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    save(tmp_path / "one", entries=hf.entries(model), config=hf.config_to_hf(model.config), lineage=Lineage())
    checkpoint = Checkpoint(tmp_path / "one")
    for entry in hf.entries(other):
        checkpoint.read(entry)
    assert torch.equal(hf.logits(other, [7, 8]), hf.logits(model, [7, 8]))


def test_logits_take_lists_and_tensors() -> None:
    model = tiny_model()
    scores = hf.logits(model, [4, 5, 6])
    assert scores.shape == (3, 288)
    assert not scores.requires_grad
    assert torch.equal(scores, hf.logits(model, torch.tensor([4, 5, 6], dtype=torch.int32)))


@pytest.mark.parametrize("ids", [[], [1.0, 2.0], [[1, 2]], [True], [-1], [288], [1, 10**9]])
def test_logits_refuse_what_is_no_text(ids: Any) -> None:
    with pytest.raises(ShapeError, match="token_ids"):
        hf.logits(tiny_model(), ids)


def test_a_dtype_is_a_torch_dtype(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype='bfloat16': give a torch.dtype"):
        hf.load(tiny_checkpoint(tmp_path / "one"), dtype="bfloat16")  # type: ignore[arg-type]


def test_a_damaged_weight_is_not_loaded(tmp_path: Path) -> None:
    """One bit in the middle of a matrix: the model would still answer, and nobody would know."""
    folder = tiny_checkpoint(tmp_path / "model")
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its digest"):
        hf.load(folder)
    hf.load(folder, verify=False)
