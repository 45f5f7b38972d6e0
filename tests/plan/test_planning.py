"""Predicted bytes against counted ones; what `waypost plan` says, and its score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from waypost.cli.main import main
from waypost.core.errors import ConfigError
from waypost.measure.live import LiveBytes
from waypost.plan.memory import memory_plan
from waypost.plan.planning import Score, plan, score
from waypost.testing.points._shared import token_batch
from waypost.testing.tiny import tiny_config, tiny_model
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


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        score(plan(resolve(TREE)), tmp_path)
    assert Score("x", 3.0, 2.0).error == 0.5
