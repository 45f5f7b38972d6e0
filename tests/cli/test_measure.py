"""`waypost measure` within the context that a model was made for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from waypost.cli.main import main
from waypost.core.config import build
from waypost.core.errors import ConfigError
from waypost.keep.reader import Checkpoint
from waypost.measure.perplexity import evaluate
from waypost.model import hf
from waypost.testing.tiny import tiny_checkpoint, tiny_config, tiny_tokenizer
from waypost.transform.recipe import HeldOut
from waypost.transform.run import held_out_batches

CONTEXT = 48


def beginning(text: Path, **fields: int) -> HeldOut:
    return build(HeldOut, {"path": str(text), **fields})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "it", tiny_config(max_position_embeddings=CONTEXT), dtype=torch.bfloat16)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The other one is in the house on the hill. " * 5)
    assert len(tiny_tokenizer().encode(path.read_text())) > 2 * CONTEXT
    return path


def test_a_piece_longer_than_the_context_is_refused(model: Path, text: Path) -> None:
    (batch, *_) = held_out_batches(Checkpoint(model), beginning(text, seq_tokens=CONTEXT))
    assert int(batch.positions.max()) == CONTEXT - 2, "the last token of a piece is only a target"
    with pytest.raises(ConfigError, match=rf"seq_tokens={CONTEXT + 1}.* of up to {CONTEXT + 1} tokens, .* is {CONTEXT};"):
        held_out_batches(Checkpoint(model), beginning(text, seq_tokens=CONTEXT + 1))
    text.write_text("The other one.")
    assert held_out_batches(Checkpoint(model), beginning(text, seq_tokens=512)), "a text that is short anyway"


@pytest.mark.parametrize("max_tokens", [8192, 40])
def test_pieces_are_as_long_as_fit_where_nothing_is_said(
    max_tokens: int, model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["measure", str(model), str(text), "--json", "--max-tokens", str(max_tokens)])
    out, err = capsys.readouterr()
    assert not left.value.code, err
    held_out = beginning(text, max_tokens=max_tokens, seq_tokens=min(max_tokens, CONTEXT))
    want = evaluate(hf.load(model), held_out_batches(Checkpoint(model), held_out))
    assert json.loads(out)["metrics"]["perplexity"]["value"] == pytest.approx(want.perplexity, rel=1e-3)  # other kernels
