"""Upcycling: the function before training against transformers and loops, what is copied, and what is refused."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import same_bits, tiny_checkpoint, weights

import waypost
from waypost.core.batch import Batch
from waypost.core.config import build
from waypost.core.errors import ConfigError, NumericsError
from waypost.keep.reader import Checkpoint
from waypost.kernels import select
from waypost.model import hf
from waypost.model.rows import Rows
from waypost.testing.tiny import tiny_config, tiny_model
from waypost.transform import invariant
from waypost.transform.expression import Normal
from waypost.transform.plan import Services
from waypost.transform.recipe import HeldOut
from waypost.transform.run import run
from waypost.transform.squares import GradientSquares, WeightSquares
from waypost.transform.upcycling.expert_upcycling import ExpertUpcycling, greedy_copies, original
from waypost.transform.upcycling.sparse_upcycling import SparseUpcycling, dense_name

IDS = [5, 90, 17, 203, 44, 44, 281, 3, 150, 66, 7, 8]
EVEN = {"name": "expert_upcycling", "router_noise": 0.0, "max_duplicates": 1, "num_experts_per_tok": 4}


def mixtral(path, per_tok: int = 2, **changes):
    sizes = {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": per_tok, **changes}
    return tiny_checkpoint(path, tiny_config(model_type="mixtral", **sizes))


def logits(folder) -> torch.Tensor:
    return hf.logits(hf.load(folder, torch.float64, select("exact", "naive")), IDS)


def upcycle(source, out, method):
    return run({"sources": [str(source)], "method": method}, out)


@pytest.mark.parametrize(
    ("family", "changes", "architecture"),
    [
        ("llama", {}, "MixtralForCausalLM"),
        ("mistral", {"sliding_window": 5, "tie_word_embeddings": False}, "MixtralForCausalLM"),
        ("qwen3", {"head_dim": 8}, "Qwen3MoeForCausalLM"),
    ],
)
def test_the_mixture_is_the_dense_model_and_transformers_agrees(tmp_path, family, changes, architecture):
    transformers = pytest.importorskip("transformers")
    source = tiny_checkpoint(tmp_path / "dense", tiny_config(model_type=family, **changes))
    result = upcycle(source, tmp_path / "moe", {"name": "sparse_upcycling", "num_experts": 4})
    want = logits(source)
    assert (logits(result.path) - want).abs().max() < 1e-10 * want.abs().max()  # float64: rounding alone
    theirs = transformers.AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32)
    assert type(theirs).__name__ == architecture
    with torch.no_grad():
        assert (theirs(torch.tensor([IDS])).logits[0] - want).abs().max() < 2e-5 * want.abs().max()  # float32 against float64


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 6), st.floats(0.01, 3), st.integers(0, 99), st.sampled_from([torch.bfloat16, torch.float32]))
def test_one_expert_a_token_keeps_the_bits(tmp_path_factory, experts, std, seed, dtype):
    """The neutral setting, whatever the routers: the dense model, also in the arithmetic that it is trained in."""
    folder = tmp_path_factory.mktemp("one")
    source = tiny_checkpoint(folder / "dense", tiny_config(num_hidden_layers=1), dtype=dtype)
    method = {"name": "sparse_upcycling", "num_experts": experts, "num_experts_per_tok": 1, "router_std": std, "seed": seed}
    result = upcycle(source, folder / "moe", method)
    assert (result.plan.invariant, result.plan.equality) == ("exact_at_start", "bits")
    assert result.receipt["max_logit_diff"] == 0.0
    assert torch.equal(*(hf.logits(hf.load(path), IDS) for path in (source, result.path)))


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 6), st.data(), st.floats(0.01, 3), st.integers(0, 99), st.integers(0, 99))
def test_whoever_is_chosen_the_mixture_is_the_dense_feed_forward(experts, data, std, seed, weights_seed):
    """One layer's, in float64, where a sum of parts may round otherwise than the whole."""
    chosen = data.draw(st.integers(1, experts))
    sizes = {"num_local_experts": experts, "num_experts_per_tok": chosen}
    dense = tiny_model(tiny_config(), seed=weights_seed, dtype=torch.float64).model.layers[0].mlp
    mixture = tiny_model(tiny_config(model_type="mixtral", **sizes), dtype=torch.float64).model.layers[0].mlp
    router = Normal(std=[std] * experts, shape=[experts, 32], stream="model.layers.0.mlp.gate.weight", seed=seed)
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            like = dense_name(f"model.layers.0.mlp.{name}").removeprefix("model.layers.0.mlp.")
            parameter.copy_(router.rows(None, 0, experts) if name == "gate.weight" else dense.get_parameter(like))
        h = torch.randn(9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        rows = Rows(Batch.of([[1] * 9]), select("exact", "naive"))
        assert (mixture(h, rows) - dense(h, rows)).abs().max() < 1e-12 * dense(h, rows).abs().max()


def test_every_expert_is_the_dense_feed_forward_and_the_rest_is_copied(tmp_path):
    source = tiny_checkpoint(tmp_path / "dense")
    dense, moe = weights(source), weights(upcycle(source, tmp_path / "moe", "sparse_upcycling").path)
    spelled = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for name, tensor in moe.items():
        head, _, tail = name.partition(".block_sparse_moe.")
        if tail == "gate.weight":
            assert tensor.shape == (8, 32)
            assert 0.015 < float(tensor.std()) < 0.025  # 256 draws of 0.02
            continue
        like = f"{head}.mlp.{spelled[tail.split('.')[2]]}.weight" if tail else name
        assert same_bits(tensor, dense[like]), name
    gates = [tensor for name, tensor in moe.items() if name.endswith("gate.weight")]
    assert not torch.equal(*gates), "layers draw routers of their own"


def test_the_invariant_is_found_out_where_it_does_not_hold(tmp_path):
    source = tiny_checkpoint(tmp_path / "dense")
    made = Checkpoint(upcycle(source, tmp_path / "moe", "sparse_upcycling").path)
    broken = {name: made.tensor(name).clone() for name in made.names}
    broken["model.layers.1.block_sparse_moe.experts.0.w2.weight"][0, 0] += 1e-4
    output = invariant.Weights(made.path, made.config, made.names, broken.__getitem__, lambda name: None)
    with pytest.raises(NumericsError, match=r"promises 'exact_at_start', but logits differ .* in float64"):
        invariant.measure(Checkpoint(source), output, "exact_at_start", 32, "values")


@pytest.mark.parametrize(("method", "change"), [(EVEN, 0.0), ({**EVEN, "router_noise": 0.01}, 1e-12)])
def test_as_many_copies_of_all_with_as_many_more_chosen_is_the_same_function(tmp_path, method, change):
    source = mixtral(tmp_path / "four")
    result = upcycle(source, tmp_path / "eight", method)
    want, have = logits(source), logits(result.path)
    if change == 0.0:
        assert (result.plan.invariant, result.plan.equality) == ("exact_at_start", "values")
        assert (have - want).abs().max() < 1e-10 * want.abs().max()
    else:
        assert result.plan.invariant == "lossy"
        assert (have - want).abs().max() > change


def test_one_expert_a_token_may_be_copied_unevenly_and_keeps_the_bits(tmp_path):
    source = mixtral(tmp_path / "four", per_tok=1)
    result = upcycle(source, tmp_path / "eight", {"name": "expert_upcycling", "router_noise": 0.0})
    copies = result.plan.notes["copied_experts"]
    assert any(len(set(chosen)) < 4 for chosen in copies.values())
    assert (result.plan.invariant, result.receipt["max_logit_diff"]) == ("exact_at_start", 0.0)


def test_with_top_k_kept_two_copies_of_the_best_expert_are_all_that_is_left(tmp_path):
    """The source's function with k = 1 is what an even doubling with k = 2 computes: the jump that is measured."""
    source = mixtral(tmp_path / "four", per_tok=2)
    result = upcycle(source, tmp_path / "eight", {**EVEN, "num_experts_per_tok": None})
    assert result.plan.invariant == "lossy"
    alone = mixtral(tmp_path / "one", per_tok=1)  # the same weights: names and seed are the same
    assert (logits(result.path) - logits(alone)).abs().max() < 1e-10
    assert result.receipt["kl_nats"] > 1e-6


@settings(max_examples=5, deadline=None)
@given(st.integers(2, 5), st.data(), st.integers(1, 9), st.floats(0, 9), st.integers(0, 99))
def test_factor_one_is_the_identity(tmp_path_factory, experts, data, most, noise, seed):
    """The neutral setting: nothing is copied, so that nothing else matters."""
    folder = tmp_path_factory.mktemp("same")
    source = mixtral(folder / "few", data.draw(st.integers(1, experts)), num_local_experts=experts, num_hidden_layers=1)
    method = {"name": "expert_upcycling", "factor": 1, "max_duplicates": most, "router_noise": noise, "seed": seed}
    result = upcycle(source, folder / "same", method)
    one, other = weights(source), weights(result.path)
    assert list(one) == list(other)
    assert all(same_bits(one[name], other[name]) for name in one)
    assert (result.plan.invariant, result.plan.equality) == ("exact", "bits")


@settings(deadline=None)
@given(st.lists(st.floats(0, 9), min_size=1, max_size=9), st.integers(1, 3), st.integers(1, 4))
def test_copies_go_to_the_most_useful_first(utilities, more, most):
    copied = greedy_copies(utilities, more * len(utilities), most)
    counts = Counter(copied)
    assert len(copied) == more * len(utilities)
    if more * len(utilities) <= most * len(utilities):
        assert max(counts.values()) <= most
        unused = [e for e in range(len(utilities)) if counts[e] < most]
        full = [e for e in range(len(utilities)) if counts[e] == most]
        assert all(utilities[e] >= utilities[f] for e in full for f in unused)


def test_copies_by_hand():
    assert greedy_copies([1.0, 4.0, 2.0], 3, 3) == [1, 1, 1]
    assert greedy_copies([1.0, 4.0, 2.0], 3, 2) == [1, 1, 2]
    assert greedy_copies([1.0, 4.0, 2.0], 6, 1) == [1, 2, 0, 1, 2, 0]  # all used up, it begins again
    name = "model.layers.0.mlp.experts.5.up_proj.weight"
    assert original(name, 4, [3, 2, 2, 1]) == name.replace("experts.5", "experts.2")
    assert original(name, 8, []) == name


def test_the_router_keeps_its_rows_and_copies_get_noise(tmp_path):
    source = mixtral(tmp_path / "four")
    result = upcycle(source, tmp_path / "twelve", {"name": "expert_upcycling", "factor": 3, "router_noise": 0.25})
    one, other = weights(source), weights(result.path)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    copied = result.plan.notes["copied_experts"]["1"]
    assert len(copied) == 8
    assert same_bits(other[name][:4], one[name])
    noise = other[name][4:] - one[name][copied]
    spread = 0.25 * float(one[name].square().mean().sqrt())
    assert 0.8 * spread < float(noise.std()) < 1.2 * spread  # 256 draws


def test_utilities_are_the_norms_they_say(tmp_path):
    """Against transformers: the gradient of the mean loss a token, and the weights, of gate and up of each expert."""
    transformers = pytest.importorskip("transformers")
    source, text = mixtral(tmp_path / "four"), tmp_path / "text.txt"
    text.write_text("the ships came in, one after the other, and the harbour was full. " * 3)
    held_out = build(HeldOut, {"path": str(text), "max_tokens": 64, "seq_tokens": 64})
    checkpoint = Checkpoint(source)
    gradients, squares = GradientSquares(checkpoint, held_out), WeightSquares(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    from waypost.transform.run import held_out_batches

    batch = held_out_batches(checkpoint, held_out)[0]
    assert batch.targets is not None
    out = model(batch.tokens[None]).logits[0]
    torch.nn.functional.cross_entropy(out, batch.targets).backward()
    fused = model.model.layers[1].mlp.experts.gate_up_proj
    for expert in range(4):
        names = [f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight" for part in ("w1", "w3")]
        assert sum(map(gradients, names)) == pytest.approx(float(fused.grad[expert].square().sum()), rel=1e-4, abs=1e-12)
        assert sum(map(squares, names)) == pytest.approx(float(fused[expert].detach().double().square().sum()), rel=1e-6)
    utilities = [
        math.fsum(gradients(f"model.layers.1.block_sparse_moe.experts.{e}.{p}.weight") for p in ("w1", "w3")) for e in range(4)
    ]
    plan = ExpertUpcycling(utility="gradient_squared").plan([checkpoint], Services(None, squares, gradients))
    assert plan.notes["copied_experts"]["1"] == greedy_copies(utilities, 4, 3)


def test_what_cannot_be_is_refused(tmp_path):
    dense, moe = Checkpoint(tiny_checkpoint(tmp_path / "dense")), Checkpoint(mixtral(tmp_path / "moe"))
    services = Services(weight_squares=WeightSquares(moe))
    with pytest.raises(ConfigError, match="is a mixture already; expert_upcycling adds experts"):
        SparseUpcycling().plan([moe], services)
    with pytest.raises(ConfigError, match="has no experts; sparse_upcycling makes them"):
        ExpertUpcycling().plan([dense], services)
    with pytest.raises(ConfigError, match=r"takes gradients on a text; set held_out\.path"):
        ExpertUpcycling(utility="saliency").plan([moe], services)
    with pytest.raises(ConfigError, match="takes one source, given 2"):
        SparseUpcycling().plan([dense, moe], services)
    for name, changes in (("qwen2", {}), ("olmo2", {})):
        odd = Checkpoint(tiny_checkpoint(tmp_path / name, tiny_config(model_type=name, **changes)))
        with pytest.raises(ConfigError, match="no stock mixture has the layers of"):
            SparseUpcycling().plan([odd], services)
    with pytest.raises(ConfigError, match="num_experts_per_tok=5: 1 to 4"):
        SparseUpcycling(num_experts=4, num_experts_per_tok=5)


def test_another_dtype_makes_it_lossy(tmp_path):
    source = tiny_checkpoint(tmp_path / "dense")
    out = waypost.transform({"sources": [str(source)], "method": "sparse_upcycling", "dtype": "BF16"}, tmp_path / "out")
    tree = json.loads((out / "config.json").read_text())
    assert tree["dtype"] == "bfloat16"
    manifest = Checkpoint(out).manifest
    assert manifest is not None
    assert manifest.receipts[0]["invariant"] == "lossy"


def test_the_state_is_said_to_be_dropped(tmp_path):
    out = upcycle(tiny_checkpoint(tmp_path / "dense"), tmp_path / "out", "sparse_upcycling").path
    lineage = Checkpoint(out).lineage
    assert lineage is not None
    assert lineage.recipe["plan"]["state"] == "optimizer state is dropped"
