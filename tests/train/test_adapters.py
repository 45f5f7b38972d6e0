"""Training adapters: the base stays, a killed run comes to the same bits, and PEFT reads what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_cases import same_state, tiny_recipe, write_corpus, write_tokenizer

from waypost.core.errors import ConfigError
from waypost.keep.export import export_weights
from waypost.keep.reader import Checkpoint
from waypost.model import hf
from waypost.model.adapters import Lora
from waypost.model.adapters.lora import PROJECTIONS
from waypost.model.peft import read
from waypost.testing.points._shared import noise, token_batch
from waypost.testing.tiny import tiny_checkpoint, tiny_config, tiny_model
from waypost.train.memory import Plain
from waypost.train.objectives import Causal
from waypost.train.run import train

IDS = list(range(3, 40))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_corpus(folder)
    tiny_checkpoint(folder / "base", tiny_config(max_position_embeddings=128))
    return folder


def recipe(home: Path, **changes: Any) -> dict[str, Any]:
    tree = tiny_recipe(home / "text.jsonl", home)
    del tree["model"], tree["tokenizer"]
    tree |= {"init": {"checkpoint": str(home / "base")}, "adapters": {"name": "lora", "r": 3}}
    tree["optimizer"] = {"name": "adamw", "lr": 0.02}
    return {**tree, **changes}


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    return train(recipe(home), home / "run").checkpoint


def test_only_the_adapter_moves(home: Path, trained: Path) -> None:
    before, after = Checkpoint(home / "base"), Checkpoint(trained)
    weights = [name for role, name in after.specs if role == "weight"]
    assert weights
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in weights)
    adapter = {name: after.tensor(name, "adapter") for role, name in after.specs if role == "adapter"}
    assert len(adapter) == 2 * 2 * 7  # A and B, two layers, seven projections
    assert all(bool(t.any()) for t in adapter.values())
    moments = {name for role, name in after.specs if role == "exp_avg"}
    assert moments == set(adapter), "the optimizer has state for the adapter alone"
    lines = [json.loads(line) for line in (trained.parent / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_and_resumed_is_never_stopped(home: Path, tmp_path: Path, precision: str) -> None:
    tree = recipe(home, precision={"name": precision}, micro_tokens=64, memory={"name": "recompute"})
    whole = train(tree, tmp_path / "whole").checkpoint
    train({**tree, "steps": 2}, tmp_path / "halves")
    same_state(whole, train(tree, tmp_path / "halves").checkpoint)
    dtypes = {spec.dtype for spec in Checkpoint(whole).specs.values() if spec.role == "adapter"}
    assert dtypes == {"F32"}, "an adapter is float32 beside any weights"


LORAS = st.builds(
    Lora, r=st.integers(1, 40), alpha=st.floats(0.1, 64), rslora=st.booleans(),
    target_modules=st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True),
)  # fmt: skip


@settings(max_examples=10, deadline=None)
@given(LORAS, st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_begins_as_the_base_model(spec: Lora, seed: int, dtype: torch.dtype) -> None:
    """The neutral setting, B = 0: the frozen model, bit for bit."""
    base, adapted = tiny_model(seed=seed, dtype=dtype, kernel="auto"), tiny_model(seed=seed, dtype=dtype, kernel="auto")
    spec.apply(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(spec.initial_value(name, tuple(parameter.shape), seed))
    assert torch.equal(hf.logits(base, IDS), hf.logits(adapted, IDS))


@settings(max_examples=8, deadline=None)
@given(LORAS, st.integers(0, 1000))
def test_gradients_are_those_of_the_weights_it_stands_for(spec: Lora, seed: int) -> None:
    """Of W + s B A: dA = s B^T dW and dB = s dW A^T, dW the gradient of a model that has that sum for its weight. Float32
    sums in another order, 1e-4 of the largest entry."""
    base, adapted, merged = (tiny_model(seed=seed, kernel="auto") for _ in range(3))
    spec.apply(adapted)
    scale = spec.alpha / (spec.r**0.5 if spec.rslora else spec.r)
    pairs = {}
    with torch.no_grad():
        for site, linear in adapted.named_modules():
            if hasattr(linear, "adapter"):
                a, b = linear.adapter.lora_A.weight, linear.adapter.lora_B.weight
                a.copy_(noise(*a.shape, name=f"{site} A") / a.shape[1] ** 0.5)
                b.copy_(0.1 * noise(*b.shape, name=f"{site} B") / (scale * spec.r**0.5))
                merged.get_parameter(f"{site}.weight").add_(scale * b @ a)
                pairs[site] = (a, b)
    for model in (adapted, merged):
        Plain().forward_backward(model, token_batch(9, 14), Causal(), 4.0)
    assert {site.rpartition(".")[2] for site in pairs} == set(spec.target_modules)
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, "the base is frozen"
            assert torch.equal(parameter, base.get_parameter(name))
    for site, (a, b) in pairs.items():
        change = merged.get_parameter(f"{site}.weight").grad
        assert change is not None
        for got, want in ((a.grad, scale * b.t() @ change), (b.grad, scale * change @ a.t())):
            assert float((got - want).detach().abs().max()) <= 1e-4 * float(want.detach().abs().max()), site


def test_an_engine_says_that_it_leaves_the_adapter_out(
    trained: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    from waypost.serve.engine import Engine

    Engine(home / "base", num_pages=8)
    assert "adapter" not in capsys.readouterr().err
    Engine(trained, num_pages=8)
    assert "the model is loaded without it" in capsys.readouterr().err


def test_an_adapter_is_exported_beside_its_weights(trained: Path, tmp_path: Path) -> None:
    out = export_weights(trained, tmp_path / "out")
    assert not (out / "state").exists()
    kept, there = read(trained), read(out)
    assert all(torch.equal(x, y) for site in kept.pairs for x, y in zip(kept.pairs[site], there.pairs[site], strict=True))
    assert Checkpoint(out).manifest.hash == Checkpoint(trained).manifest.hash  # type: ignore[union-attr]


def test_a_later_run_goes_on_with_the_adapter_or_refuses(home: Path, trained: Path, tmp_path: Path) -> None:
    more = recipe(home, init={"checkpoint": str(trained)}, optimizer={"name": "adamw", "lr": 0.0}, steps=1)
    after = train(more, tmp_path / "more").checkpoint
    for role, name in Checkpoint(trained).specs:
        if role in ("weight", "adapter"):
            assert torch.equal(Checkpoint(trained).tensor(name, role), Checkpoint(after).tensor(name, role))
    with pytest.raises(ConfigError, match="holds an adapter beside its weights"):
        train({**more, "adapters": None}, tmp_path / "none")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's, which calls old names of transformers
def test_peft_gives_the_same_logits(home: Path, trained: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), trained / "adapter").eval()
    with torch.no_grad():
        want = theirs(torch.tensor([IDS])).logits[0]
    model = hf.load(home / "base")
    found = read(trained)
    Lora(r=3).apply(model)
    with torch.no_grad():
        for site, (a, b) in found.pairs.items():
            linear = model.get_submodule(site)
            linear.adapter.lora_A.weight.copy_(a)  # type: ignore[union-attr,operator]
            linear.adapter.lora_B.weight.copy_(b)  # type: ignore[union-attr,operator]
    got = hf.logits(model, IDS)
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())  # two orders of float32 sums


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": {"name": "lora", "target_modules": ["q_prj"]}}, "Did you mean 'q_proj'"),
        ({"adapters": {"name": "lora", "r": 0}}, "must be at least 1"),
        ({"adapters": {"name": "lora", "alpha": 0.0}}, "positive"),
        ({"adapters": {"name": "lora", "target_modules": []}}, "empty"),
    ],
)
def test_what_cannot_be_honoured_is_refused(home: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(recipe(home, **changes), tmp_path / "x")


def test_adapters_need_a_model_to_change(home: Path, tmp_path: Path) -> None:
    tree = tiny_recipe(home / "text.jsonl", write_tokenizer(tmp_path), adapters={"name": "lora"})
    with pytest.raises(ConfigError, match="give init"):
        train(tree, tmp_path / "x")
