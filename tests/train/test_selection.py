"""`select`: a run's checkpoints read its data, files come out, a run on them learns from what was chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from waypost.core.config import technique, to_tree
from waypost.core.errors import ConfigError
from waypost.data.packers.whole import Whole
from waypost.data.selectors import Documents
from waypost.data.selectors.cld import Cld
from waypost.data.shards import prepare
from waypost.data.stream import DataStream
from waypost.keep.lineage import Lineage
from waypost.keep.store import Store
from waypost.measure.perplexity import evaluate, text_batches
from waypost.model import hf
from waypost.model.tokenizer import Tokenizer
from waypost.testing.tiny import tiny_assets, tiny_config, tiny_model
from waypost.train.recipe import TrainRecipe, resolve
from waypost.train.run import train
from waypost.train.selection import select

TEXTS = [f"{word} " * (5 + 3 * n) + f"number {n}" for n, word in enumerate(["sea", "sky", "oak", "elm", "fox", "owl"] * 2)]


@technique
class Longest:
    """A selector from outside, which needs no losses."""

    def score(self, documents: Documents) -> Any:
        return documents.num_tokens.astype(np.float64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four checkpoints, each of other random weights."""
    folder = tmp_path_factory.mktemp("run")
    store = Store(folder, keep_last=9)
    for step in range(1, 5):
        model = tiny_model(seed=step)
        tree = hf.config_to_hf(model.config)
        store.save(step, entries=hf.entries(model), config=tree, lineage=Lineage(verb="tiny"), assets=tiny_assets())
    return folder


def recipe(folder: Path, **changes: Any) -> TrainRecipe:
    files = [("a", TEXTS[::2]), ("b", TEXTS[1::2])]
    for name, texts in files:
        (folder / f"{name}.txt").write_text("\f".join(texts))
    sources = [{"path": str(folder / f"{name}.txt"), "separator": "\f"} for name, _ in files]
    data = {"sources": sources, "seq_len": 48, "held_out": {"documents": 2}, "cache": str(folder / "cache"), **changes}
    return resolve({"init": {"checkpoint": "unused"}, "data": data, "steps": 1, "batch": {"name": "fixed", "tokens": 96}})


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_scores_are_cld_of_losses_computed_alone(run: Path, tmp_path: Path) -> None:
    """Each document's loss, by itself through `evaluate`, correlated by numpy."""
    found = select(recipe(tmp_path), run, tmp_path / "out", Cld(), 1.0)
    told = [line for source in found.sources for line in lines(source["path"])]
    assert sorted(line["text"] for line in told) == sorted(TEXTS)
    losses = losses_of(run)
    for source in found.sources:
        mine = lines(source["path"])
        moved = np.diff(np.mean([losses(line["text"]) for line in mine if "held_out" in line], axis=0))
        for line in mine:
            if "score" in line:
                want = np.corrcoef(np.diff(losses(line["text"])), moved)[0, 1]
                assert line["score"] == pytest.approx(want, abs=1e-4)  # losses to 1e-6, as batches are others
    assert (found.documents, found.of_documents, found.held_out) == (8, 8, 4)


def losses_of(run: Path) -> Callable[[str], list[float]]:
    """Text -> its loss under each of the run's checkpoints, by itself through `evaluate`."""
    tokenizer, store = Tokenizer.from_folder(run / "step-00000004"), Store(run)
    models = [hf.load(store.checkpoint(step).path) for step in store.steps()]

    def losses(text: str) -> list[float]:
        ids = [*tokenizer.encode(text), next(iter(tokenizer.eos_ids))]
        return [evaluate(model, text_batches([ids], 48)).loss for model in models]

    return losses


def test_it_keeps_a_share_and_computes_no_loss_twice(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = select(recipe(tmp_path), run, tmp_path / "out", Cld(), 1.0)
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/losses").iterdir()}
    assert len(files) == 8
    monkeypatch.setattr("waypost.train.selection.hf.load", lambda *args, **more: pytest.fail("a loss was computed again"))
    half = select(recipe(tmp_path), run, tmp_path / "out", Cld(), 0.5)
    told = [[line for line in lines(source["path"]) if "score" in line] for source in half.sources]
    asked = json.loads((tmp_path / "out/selection.json").read_text())
    every = select(recipe(tmp_path), run, tmp_path / "out", Cld(), 1.0)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/losses").iterdir()} == files
    assert 0.5 <= half.tokens / whole.tokens < 0.8
    for chosen, source in zip(told, every.sources, strict=True):
        places = [TEXTS.index(line["text"]) for line in chosen]
        assert places == sorted(places)  # in the source's order
        scores = sorted(line["score"] for line in lines(source["path"]) if "score" in line)
        assert sorted(line["score"] for line in chosen) == scores[-len(chosen) :]
        assert len(chosen) < len(scores)
    assert (asked["selector"], asked["keep"], asked["documents"], len(asked["made_by"])) == ("Cld", 0.5, half.documents, 4)


def test_no_loss_is_computed_that_nobody_asks_for(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A selector that needs none pays for none; one that cannot use the run's checkpoints says so before the first."""
    monkeypatch.setattr("waypost.train.selection.hf.load", lambda *args, **more: pytest.fail("a loss was computed"))
    with pytest.raises(ConfigError, match=r"4 checkpoint\(s\) less skip=2 leave 2"):
        select(recipe(tmp_path), run, tmp_path / "out", Cld(skip=2), 0.5)
    for held_out in ({"documents": 2}, {"frac": 0.0}):
        found = select(recipe(tmp_path, held_out=held_out), run, tmp_path / "out", Longest(), 0.5)
        told = [[line for line in lines(source["path"]) if "score" in line] for source in found.sources]
        assert all(line["score"] > len(line["text"]) / 8 for source in told for line in source)
        assert (found.documents, found.checkpoints) == (sum(map(len, told)), 0)
        assert "by 0" not in found.summary()
    assert not (tmp_path / "out/losses").exists()


def test_two_sources_may_read_other_fields_of_one_file(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"q": TEXTS[n], "a": TEXTS[-1 - n][::-1]}) + "\n" for n in range(10)))
    sources = [{"path": str(path), "text_field": field} for field in ("q", "a")]
    both = select(recipe(tmp_path, sources=sources), run, tmp_path / "both", Cld(), 1.0)
    assert (both.documents, both.of_documents, both.held_out) == (16, 16, 4)
    for number, source in enumerate(sources):
        alone = select(recipe(tmp_path, sources=[source]), run, tmp_path / f"{number}", Cld(), 1.0)
        found, want = lines(both.sources[number]["path"]), lines(alone.sources[0]["path"])
        scores = [[line.pop("score", 0.0) for line in side] for side in (found, want)]
        assert found == want
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)  # losses to 1e-6, as batches are others


def test_a_run_on_the_files_holds_out_the_same_documents(run: Path, tmp_path: Path) -> None:
    found = select(recipe(tmp_path), run, tmp_path / "out", Cld(), 0.4)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tree: dict[str, Any] = {
        "model": {"model_type": "llama", **small, "tie_word_embeddings": True},
        "tokenizer": {"path": str(run / "step-00000004")},
        "data": {"sources": found.sources, "seq_len": 48, "held_out": {"documents": 2}},
        "steps": 2, "batch": {"name": "fixed", "tokens": 96}, "threads": 1,
    }  # fmt: skip
    trained = train(tree, tmp_path / "next")
    before = train(
        {**tree, "data": {**tree["data"], "sources": [vars(s) for s in recipe(tmp_path).data.sources]}}, tmp_path / "all"
    )
    assert trained.metrics["held_out_tokens"] == before.metrics["held_out_tokens"]


def test_a_reference_of_its_own_serves_every_source(run: Path, tmp_path: Path) -> None:
    (tmp_path / "wanted.txt").write_text("owl " * 60)
    free = recipe(tmp_path, held_out={"frac": 0.0})
    with pytest.raises(ConfigError, match="give --reference"):
        select(free, run, tmp_path / "out", Cld(), 0.5)
    found = select(free, run, tmp_path / "out", Cld(), 1.0, str(tmp_path / "wanted.txt"))
    assert (found.documents, found.of_documents, found.held_out) == (len(TEXTS), len(TEXTS), 0)
    losses = losses_of(run)
    moved = np.diff(losses("owl " * 60))
    for line in [line for source in found.sources for line in lines(source["path"])]:
        assert line["score"] == pytest.approx(np.corrcoef(np.diff(losses(line["text"])), moved)[0, 1], abs=1e-4)


def test_what_cannot_be_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        select(recipe(tmp_path), tmp_path, tmp_path / "out", Cld(), 0.5)
    with pytest.raises(ConfigError, match=r"keep=0\.0: a share"):
        select(recipe(tmp_path), run, tmp_path / "out", Cld(), 0.0)
    assert tiny_config().vocab_size == 288  # the tokenizer's, so that the fixture's folders open


def test_chats_stay_chats(run: Path, tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"to you {n} " * 3}] for n in range(6)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"said": chat}) + "\n" for chat in chats))
    source = {"path": str(path), "messages_field": "said", "weight": 2.0}
    found = select(recipe(tmp_path, sources=[source], seq_len=128), run, tmp_path / "out", Cld(), 0.5)
    assert {key: found.sources[0][key] for key in ("messages_field", "weight")} == {"messages_field": "messages", "weight": 2.0}
    assert all(line["messages"] in chats for line in lines(found.sources[0]["path"]))


@pytest.mark.parametrize("too_long", ["drop", "split"])
def test_chats_that_do_not_fit_go_the_way_of_the_recipe_s_packer(too_long: Any, run: Path, tmp_path: Path) -> None:
    """Training takes them so. Those that are held out and dropped come along: the others' threshold goes by them too."""
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"{n} to you " * (1 + 9 * (n % 3 == 0))}]
             for n in range(24)]  # fmt: skip
    path, packer = tmp_path / "chats.jsonl", Whole(too_long=too_long)
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    sources = [{"path": str(path), "messages_field": "messages"}]
    packed = {"name": "whole", **to_tree(packer)}
    chosen = recipe(tmp_path, sources=sources, seq_len=64, held_out={"documents": 6}, packer=packed)
    found = select(chosen, run, tmp_path / "out", Cld(), 1.0)
    told = lines(found.sources[0]["path"])
    long = [len(line["messages"][1]["content"]) > 64 for line in told]
    aside = ["held_out" in line for line in told]
    both = sum(x and y for x, y in zip(long, aside, strict=True))
    assert (sum(long), sum(aside), both) == (3 if too_long == "drop" else 8, 6, 3)
    assert found.of_documents == (13 if too_long == "drop" else 18)
    assert held_out(chosen, found.sources, run, tmp_path) == held_out(chosen, sources, run, tmp_path)


def held_out(recipe: TrainRecipe, sources: Any, run: Path, cache: Path) -> list[Any]:
    """The chats that a run of `recipe` on `sources` evaluates on."""
    data = resolve({**to_tree(recipe), "data": {**to_tree(recipe)["data"], "sources": sources}}).data
    shards = prepare(data.sources, Tokenizer.from_folder(run / "step-00000004"), cache)
    stream = DataStream(shards, seq_len=data.seq_len, split="held_out", held_out=data.held_out, packer=data.packer)
    ids = {int(d) for batch in stream.batches(1) for d in batch.token_extras["document"].unique()}
    told = [lines(file)[int(line) - 1] for file, line in (stream.where(d).rsplit(":", 1) for d in sorted(ids))]
    return [line["messages"] for line in told]
