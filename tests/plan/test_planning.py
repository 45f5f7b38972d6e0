"""Predicted bytes against counted ones; what `waypost plan` says, and its score."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waypost.cli.main import main
from waypost.core.config import technique
from waypost.core.errors import ConfigError
from waypost.measure.live import LiveBytes
from waypost.plan import process
from waypost.plan.laws import Scale
from waypost.plan.memory import MemoryPlan, layer_sizes, memory_plan
from waypost.plan.planning import Score, plan, score, scores_text
from waypost.testing.points._shared import token_batch
from waypost.testing.tiny import tiny_config, tiny_model
from waypost.train.memory import Held, Plain, Sizes
from waypost.train.objectives import Causal
from waypost.train.parallel import Single
from waypost.train.recipe import TrainRecipe, resolve

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "initializer_range": 0.02}
TREE: dict[str, Any] = {
    "model": {"model_type": "llama", **SIZES, "num_attention_heads": 4, "num_key_value_heads": 2},
    "tokenizer": {"vocab_size": 300}, "data": {"sources": [{"path": "builtin:kjv"}], "seq_len": 64},
    "batch": {"name": "fixed", "tokens": 256}, "steps": 5,
}  # fmt: skip
MEMORIES: list[Any] = ["plain", "selective", "recompute", {"name": "stream_bp", "chunk_tokens": 64},
                       {"name": "seco", "chunk_tokens": 64}]  # fmt: skip


def counted(recipe: TrainRecipe, config: Any, tokens: int, micro_batches: int) -> int:
    """Bytes of a step, counted."""
    model = tiny_model(config, dtype=recipe.precision.dtype, kernel="auto")
    optimizer = recipe.optimizer.build(list(model.named_parameters()))
    with LiveBytes([*model.parameters(), *(e.tensor for e in optimizer.entries())]) as live:
        Single().begin(model, micro_batches)
        for _ in range(micro_batches):
            recipe.memory.forward_backward(model, token_batch(tokens), Causal(), 4.0)
        optimizer.step(gradient_scale=1.0)
    return live.peak


@pytest.mark.parametrize("memory", MEMORIES, ids=["plain", "selective", "recompute", "stream_bp", "seco"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_predicted_bytes_are_within_a_tenth_of_counted_ones(memory: Any, precision: str, kind: str) -> None:
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
    config = tiny_config(**{**SIZES, **(mixture if kind == "mixture" else {})})
    recipe = resolve({**TREE, "precision": precision, "memory": memory})
    assert memory_plan(recipe, config, 256, 1).peak == pytest.approx(counted(recipe, config, 256, 1), rel=0.1)


def planned(memory: Any, tokens: int, layers: int = 6, precision: str = "fp32", micro_batches: int = 1) -> MemoryPlan:
    config = tiny_config(**{**SIZES, "num_hidden_layers": layers})
    return memory_plan(resolve({**TREE, "precision": precision, "memory": memory}), config, tokens, micro_batches)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["stream_bp", "seco"]), tokens=st.integers(1, 300), more=st.integers(0, 300),
    precision=st.sampled_from(["fp32", "bf16"]),
)  # fmt: skip
def test_beyond_one_chunk_and_two_micro_batches_nothing_changes(name: str, tokens: int, more: int, precision: str) -> None:
    here = planned({"name": name, "chunk_tokens": tokens}, tokens, 2, precision)
    assert planned({"name": name, "chunk_tokens": tokens + more}, tokens, 2, precision) == here
    several = [planned("plain", tokens, 2, precision, micro_batches) for micro_batches in (2, 3, 2 + more)]
    assert several == [several[0]] * 3


@settings(max_examples=25, deadline=None)
@given(
    memory=st.sampled_from(MEMORIES), tokens=st.integers(1, 600), more=st.integers(0, 200), layers=st.integers(1, 6),
    micro_batches=st.integers(1, 3),
)  # fmt: skip
def test_more_tokens_and_more_layers_hold_more(memory: Any, tokens: int, more: int, layers: int, micro_batches: int) -> None:
    here = planned(memory, tokens, layers, micro_batches=micro_batches)
    longer = planned(memory, tokens + more, layers, micro_batches=micro_batches)
    deeper = planned(memory, tokens, layers + 1, micro_batches=micro_batches)
    assert (longer.weights, longer.optimizer, longer.gradients) == (here.weights, here.optimizer, here.gradients)
    assert longer.peak >= here.peak
    assert deeper.peak > here.peak
    assert here.peak >= here.weights + here.optimizer + here.gradients


def test_gradients_of_several_micro_batches_are_counted_in_float32() -> None:
    recipe, config = resolve({**TREE, "precision": "bf16"}), tiny_config(**SIZES)
    assert memory_plan(recipe, config, 128, 2).peak == pytest.approx(counted(recipe, config, 128, 2), rel=0.1)
    assert memory_plan(recipe, config, 128, 2).gradients == 2 * memory_plan(recipe, config, 128, 1).gradients


def test_the_state_is_counted_exactly() -> None:
    recipe, config = resolve({**TREE, "precision": "bf16"}), tiny_config(**SIZES)
    model = tiny_model(config, dtype=torch.bfloat16)
    found = memory_plan(recipe, config, 128, 1)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.optimizer == sum(e.tensor.nbytes for e in recipe.optimizer.build(list(model.named_parameters())).entries())


def test_a_plan_reads_well_and_scores_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(TREE))
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(path)])
    text = capsys.readouterr().out
    assert "1,280 tokens in 5 steps of 1 x 256" in text
    assert "step_law lr" in text
    assert "the recipe's 256" in text
    assert "a guess: found with 60M parameters and more" in text
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": i, "step_seconds": s, "peak_rss_bytes": 10**9} for i, s in enumerate((9.0, 0.5, 0.25, 0.75))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(path), "--score", str(run), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["seconds"] == pytest.approx(5 * facts["step_seconds"])
    found = facts["scores"]["step_seconds"]
    assert found["measured"] == 0.5  # the first step warms up
    assert found["error"] == pytest.approx(found["predicted"] / 0.5 - 1)
    assert facts["scores"]["peak_rss_bytes"]["predicted"] == (
        facts["memory"]["peak"] + facts["memory"]["holes"] + facts["process_bytes"]
    )


class HalfKept(Plain):
    """A technique from outside, which says that it holds half of what plain holds."""

    def holds(self, layer: Sizes, tokens: int, index: int) -> Held:
        held = super().holds(layer, tokens, index)
        return replace(held, kept=held.kept / 2)


@technique
class Flat:
    """A law from outside, with a loss for any size."""

    def predict(self, scale: Scale) -> dict[str, float]:
        return {"loss": 2.5}

    def doubt(self, scale: Scale) -> str:
        return "made up"


def test_a_memory_technique_from_outside_is_planned() -> None:
    recipe, config = resolve(TREE), tiny_config(**SIZES)
    plain = memory_plan(recipe, config, 256, 1)
    half = memory_plan(replace(recipe, memory=HalfKept()), config, 256, 1)  # type: ignore[type-var]
    kept = sum(recipe.memory.holds(layer, 256, 0).kept for layer in layer_sizes(config, 4))
    assert 0 < plain.peak - half.peak <= kept / 2
    silent = replace(config, layers=[replace(config.layers[0], ffn=object())])
    with pytest.raises(ConfigError, match=r"object has no `keeps\(hidden_size\)`"):
        layer_sizes(silent, 4)


def test_a_law_from_outside_is_asked_and_scored(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step_seconds": 1.0, "peak_rss_bytes": 10**9, "tokens": 1280, "loss": 2.0})
    )
    planned = plan(resolve(TREE), [f"{__name__}:Flat"])
    assert planned.laws == {f"{__name__}:Flat": {"loss": 2.5}}
    assert "loss 2.5; made up" in planned.text()
    assert "loss     2.500 nats a token" in planned.text()
    scores = {s.what: s for s in score(planned, tmp_path)}
    assert scores["loss"].error == 0.25
    assert "loss             predicted      2.500  measured      2.000  +25%" in scores_text(list(scores.values()))
    with pytest.raises(ConfigError, match="Did you mean 'step_law'"):
        plan(resolve(TREE), ["step_lav"])


def test_a_second_plan_says_what_the_first_did() -> None:
    """Memory that the first one's trial took is no part of the second one's process."""
    large = resolve({**TREE, "batch": {"name": "fixed", "tokens": 2048}, "memory": "recompute"})
    first, second = plan(large), plan(large)
    assert second.memory == first.memory
    assert second.process_bytes == pytest.approx(first.process_bytes, rel=0.03)


def test_holes_are_glibc_s_and_of_blocks_in_its_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "trims", lambda: True)
    assert process.hole_bytes(1000.0, 1 << 20) == 500
    assert process.hole_bytes(1000.0, 1 << 25) == 0
    monkeypatch.setattr(process, "trims", lambda: False)
    assert process.hole_bytes(1000.0, 1 << 20) == 0


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        score(None, tmp_path)  # type: ignore[arg-type]  # it looks for the run first
    assert Score("x", 3.0, 2.0).error == 0.5
