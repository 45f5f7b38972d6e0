"""Other weights while serving: exact after the swap and after the way back, and no token of unknown origin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serve_cases import DTYPES, KERNELS, answers_of, by_hand, finish, make_engine, prompt_of

from waypost.core.errors import CheckpointError, ConfigError
from waypost.model import hf
from waypost.model.decoder import Decoder
from waypost.serve.engine import Engine
from waypost.serve.request import Completion, Request
from waypost.serve.sampling import Sampling
from waypost.testing.tiny import tiny_checkpoint, tiny_config, tiny_model

SAMPLING = Sampling(temperature=0.9, max_tokens=8, seed=5, logprobs=0, ignore_eos=True)
PROMPT = prompt_of(40)


def weights_of(model: Decoder) -> dict[str, torch.Tensor]:
    return {entry.spec.name: entry.tensor for entry in hf.entries(model)}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_from_folders(tmp_path: Path, dtype: str, kernel: str) -> None:
    paths = [tiny_checkpoint(tmp_path / str(seed), seed=seed, dtype=DTYPES[dtype]) for seed in (0, 1)]
    engine = Engine(paths[0], num_pages=64, kernel=kernel)  # type: ignore[arg-type]
    want = [answers_of(Engine(p, num_pages=64, kernel=kernel).generate([PROMPT], SAMPLING)[0]) for p in paths]  # type: ignore[arg-type]
    assert want[0] != want[1]
    for version, which in enumerate((0, 1, 0, 0)):
        if version:
            assert engine.swap(paths[which]) == version == engine.weight_version
        for cached in (0, 32):
            done = engine.generate([PROMPT], SAMPLING)[0]
            assert answers_of(done) == want[which]
            assert done.cached_tokens == cached, "pages of other weights are never found"
            assert set(done.choices[0].weight_versions) == {version}
        engine.scheduler.check()


def test_named_tensors_take_the_place_of_some_weights() -> None:
    first, second = tiny_model(seed=0), tiny_model(seed=1)
    name = "model.layers.1.mlp.up_proj.weight"
    given = weights_of(second)[name].clone()
    engine = make_engine(first)
    engine.swap({name: given})
    given.fill_(0.0)  # the engine has copied it
    mixed = hf.assemble(first.config, {**weights_of(first), name: weights_of(second)[name]}, ops=first.ops)
    assert answers_of(engine.generate([PROMPT], SAMPLING)[0]) == [by_hand(mixed, PROMPT, SAMPLING)]
    assert engine.model is not first


def begun(engine: Engine) -> Completion:
    """A request with two tokens drawn."""
    ready = engine.prepare(Request(PROMPT, SAMPLING))
    completion = ready.completion()
    engine.submit(ready)
    for _ in range(2):
        for delta in engine.step():
            completion.add(delta)
    return completion


def test_wait_ends_the_old_on_the_old_and_starts_the_new_on_the_new() -> None:
    first, second = tiny_model(seed=0), tiny_model(seed=1)
    engine = make_engine(first)
    old = begun(engine)
    assert engine.swap(weights_of(second), "wait") == 1
    assert engine.weight_version == 0
    with pytest.raises(ConfigError, match="a swap is waiting for its turn"):
        engine.swap(weights_of(first), "keep")
    ready = engine.prepare(Request(PROMPT, SAMPLING))
    new = ready.completion()
    engine.submit(ready)
    doomed = engine.submit(Request(PROMPT, SAMPLING))
    engine.cancel(doomed)
    assert answers_of(finish(engine, old)) == [by_hand(first, PROMPT, SAMPLING)]
    assert answers_of(finish(engine, new)) == [by_hand(second, PROMPT, SAMPLING)]
    assert (set(old.choices[0].weight_versions), set(new.choices[0].weight_versions)) == ({0}, {1})
    assert engine.idle


def test_wait_swaps_though_nothing_follows() -> None:
    engine = make_engine(tiny_model(seed=0))
    old = begun(engine)
    engine.swap(weights_of(tiny_model(seed=1)), "wait")
    finish(engine, old)
    while not engine.idle:
        engine.step()
    assert engine.weight_version == 1


def test_abort_ends_what_is_in_flight() -> None:
    first, second = tiny_model(seed=0), tiny_model(seed=1)
    engine = make_engine(first)
    old = begun(engine)
    engine.swap(weights_of(second), "abort")
    assert finish(engine, old).finish_reason == "cancelled"
    assert old.token_ids == by_hand(first, PROMPT, SAMPLING)[0][:2]
    assert answers_of(engine.generate([PROMPT], SAMPLING)[0]) == [by_hand(second, PROMPT, SAMPLING)]


def test_keep_goes_on_and_says_which_tokens_are_new() -> None:
    first, second = tiny_model(seed=0), tiny_model(seed=1)
    engine = make_engine(first)
    kept = begun(engine)
    engine.swap(weights_of(second), "keep")
    finish(engine, kept)
    assert kept.choices[0].weight_versions == [0, 0, 1, 1, 1, 1, 1, 1]
    assert kept.token_ids[:2] == by_hand(first, PROMPT, SAMPLING)[0][:2]
    assert engine.pool.cached == 0, "a mixture is never put into the cache"
    assert answers_of(engine.generate([PROMPT], SAMPLING)[0]) == [by_hand(second, PROMPT, SAMPLING)]


def test_the_same_weights_again_change_nothing_in_the_middle() -> None:
    model = tiny_model(seed=0)
    engine = make_engine(model)
    kept = begun(engine)
    engine.swap(weights_of(tiny_model(seed=0)), "keep")
    assert answers_of(finish(engine, kept)) == [by_hand(model, PROMPT, SAMPLING)]


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_through_the_thread_that_steps(mode: str) -> None:
    first, second = tiny_model(seed=0), tiny_model(seed=1)
    with make_engine(first) as engine:
        engine.background()
        assert answers_of(engine.generate([PROMPT], SAMPLING)[0]) == [by_hand(first, PROMPT, SAMPLING)]
        assert engine.swap(weights_of(second), mode) == 1  # type: ignore[arg-type]
        assert answers_of(engine.generate([PROMPT], SAMPLING)[0]) == [by_hand(second, PROMPT, SAMPLING)]


def test_what_does_not_fit_leaves_everything(tmp_path: Path) -> None:
    engine = make_engine(tiny_model())
    other = tiny_checkpoint(tmp_path / "other", tiny_config(intermediate_size=96))
    for weights, mode, error, message in (
        (other, "keep", CheckpointError, "another layers than the model being served"),
        ({"model.norm.wight": torch.ones(32)}, "keep", CheckpointError, r"no tensor 'model\.norm\.wight'.*model\.norm\.weight"),
        ({"model.norm.weight": torch.ones(31)}, "keep", CheckpointError, r"gives \[31\] for model\.norm\.weight"),
        ({}, "kept", ConfigError, "no mode named 'kept'.*keep"),
    ):
        with pytest.raises(error, match=message):
            engine.swap(weights, mode)  # type: ignore[arg-type]
    assert engine.weight_version == 0
    assert answers_of(engine.generate([PROMPT], SAMPLING)[0]) == [by_hand(tiny_model(), PROMPT, SAMPLING)]
