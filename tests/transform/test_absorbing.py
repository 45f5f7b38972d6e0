"""Merging an adapter into weights: against float64 loops and against the adapter beside them; and the whole way of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waypost.core.errors import ConfigError, ShapeError
from waypost.keep.reader import Checkpoint
from waypost.model.adapter_sites import sites
from waypost.model.adapters import Lora
from waypost.model.peft import LoraFile, read, write
from waypost.serve.engine import Engine
from waypost.serve.request import Request
from waypost.serve.sampling import Sampling
from waypost.testing.points._shared import noise
from waypost.testing.tiny import tiny_checkpoint, tiny_config, tiny_model
from waypost.train.run import train
from waypost.transform.quantize import quantize
from waypost.transform.run import transform

PROMPT = list(range(3, 40))


def adapter(folder: Path, size: float = 0.2, rank: int = 3) -> Path:
    shapes = {name: linear.weight.shape for name, linear in sites(tiny_model()).items()}
    pairs = {n: (noise(rank, s[1], name=n), size * noise(s[0], rank, name=n)) for n, s in shapes.items()}
    return write(folder, LoraFile(folder, pairs, {}, Lora(r=rank, alpha=1.5).file_config("base")))


def test_golden(tmp_path: Path) -> None:
    base, added = tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16), adapter(tmp_path / "lora")
    out = Checkpoint(transform({"sources": [str(base)], "method": {"name": "lora", "adapter": str(added)}}, tmp_path / "out"))
    file, before = read(added), Checkpoint(base)
    for name in before.names:
        got, was = out.tensor(name), before.tensor(name)
        pair = file.pairs.get(name.removesuffix(".weight"))
        if pair is None:
            assert torch.equal(got, was)
            continue
        (a, b), s = pair, 1.5 / 3
        for i in range(0, len(was), 7):
            want = [float(was[i, k]) + s * sum(float(b[i, j]) * float(a[j, k]) for j in range(3)) for k in range(was.shape[1])]
            assert torch.equal(got[i], torch.tensor(want, dtype=torch.float64).to(torch.bfloat16))


def test_merged_is_the_adapter_beside_the_weights_to_rounding(tmp_path: Path) -> None:
    base, added = tiny_checkpoint(tmp_path / "base"), adapter(tmp_path / "lora")
    merged = transform({"sources": [str(base)], "method": {"name": "lora", "adapter": str(added)}}, tmp_path / "out")
    ask = Sampling(max_tokens=0, prompt_logprobs=0)
    with Engine(base, num_pages=80) as engine, Engine(merged, num_pages=80) as whole:
        engine.adapters.add("x", added)
        beside = _scores(engine, Request(PROMPT, ask, adapter="x"))
        inside, plain = _scores(whole, Request(PROMPT, ask)), _scores(engine, Request(PROMPT, ask))
    assert float((beside - inside).abs().max()) < 1e-4  # float32 sums in another order
    assert float((beside - plain).abs().max()) > 0.1


def _scores(engine: Engine, request: Request) -> torch.Tensor:
    ready = engine.prepare(request)
    completion = ready.completion()
    engine.submit(ready)
    while not engine.idle:
        for delta in engine.step():
            completion.add(delta)
    return torch.tensor([score.logprob for score in completion.prompt_scores])


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 5))
@settings(max_examples=6, deadline=None)
def test_an_adapter_that_does_nothing_gives_the_bytes_back(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, rank: int
) -> None:
    folder = tmp_path_factory.mktemp("nothing")
    base, added = tiny_checkpoint(folder / "base", dtype=dtype), adapter(folder / "lora", size=0.0, rank=rank)
    out = Checkpoint(transform({"sources": [str(base)], "method": {"name": "lora", "adapter": str(added)}}, folder / "out"))
    assert all(torch.equal(out.tensor(name), Checkpoint(base).tensor(name)) for name in out.names)


def test_one_model_that_fits_is_asked_for(tmp_path: Path) -> None:
    base, added = str(tiny_checkpoint(tmp_path / "base")), str(adapter(tmp_path / "lora"))
    wide = str(tiny_checkpoint(tmp_path / "wide", tiny_config(hidden_size=64)))
    with pytest.raises(ShapeError, match=r"lora changes \(32, 64\) of floats; give the model that it was trained with"):
        transform({"sources": [wide], "method": {"name": "lora", "adapter": added}}, tmp_path / "out")
    with pytest.raises(ConfigError, match="name one"):
        transform({"sources": [base, base], "method": {"name": "lora", "adapter": added}}, tmp_path / "out")


def test_an_adapter_is_never_left_out_without_a_word(tmp_path: Path) -> None:
    """A run of an adapter holds the base's weights: averaged or quantised as they stand, nothing of it would be left."""
    (tmp_path / "text.txt").write_text("The keeper of the light wrote down every ship. " * 20)
    recipe = {
        "init": {"checkpoint": str(tiny_checkpoint(tmp_path / "base"))}, "adapters": {"name": "lora", "r": 2},
        "data": {"sources": [{"path": str(tmp_path / "text.txt")}], "seq_len": 32, "held_out": {"frac": 0.0}},
        "optimizer": {"name": "adamw", "lr": 1e-2}, "batch": {"name": "fixed", "tokens": 64}, "steps": 2,
    }  # fmt: skip
    run = str(train(recipe, tmp_path / "run").checkpoint)
    plain = str(tmp_path / "base")
    for sources in ([run, plain], [plain, run]):
        with pytest.raises(ConfigError, match=r"holds an adapter beside its weights.*lora-merge.yaml --set sources.0="):
            transform({"sources": sources, "method": {"name": "linear", "weights": [0.5, 0.5]}}, tmp_path / "mean")
    with pytest.raises(ConfigError, match="holds an adapter"):
        quantize({"source": run, "quantizer": {"name": "round_to_nearest", "bits": 8, "group_size": 16}}, tmp_path / "few")
    merge = {"name": "lora", "adapter": str(adapter(tmp_path / "lora"))}
    with pytest.raises(ConfigError, match="holds an adapter"):  # its own would be lost for the other
        transform({"sources": [run], "method": merge}, tmp_path / "other")
    merged = str(transform({"sources": [run], "method": {"name": "lora"}}, tmp_path / "merged"))
    assert transform({"sources": [merged, plain], "method": {"name": "linear", "weights": [0.5, 0.5]}}, tmp_path / "mean")
