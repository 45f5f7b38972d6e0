"""The global order: against a naive loop, and its promises for any documents, lengths and calls."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import PLAIN, Numbers, jsonl, shards_of, spell, unique_documents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from waypost.core.batch import Batch
from waypost.core.errors import ConfigError
from waypost.data.packers import PACKERS
from waypost.data.packers.concat import Concat
from waypost.data.packers.whole import Whole
from waypost.data.shards import prepare
from waypost.data.sources import Source
from waypost.data.split import HeldOut, held_out_mask
from waypost.data.stream import DataStream

EVERYTHING = HeldOut(frac=0.0)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25)
RUN = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def sequences(batch: Batch) -> list[dict[str, list]]:
    """The sequences of a batch as lists."""
    columns = {
        "tokens": batch.tokens, "positions": batch.positions, "targets": batch.targets, "weights": batch.weights,
        "document": batch.token_extras["document"], "bytes": batch.token_extras["bytes"],
    }  # fmt: skip
    bounds = batch.starts.tolist()
    return [{n: t[a:b].tolist() for n, t in columns.items()} for a, b in pairwise(bounds)]


def naive_concat(stream: DataStream, documents: list[list[int]], rows: int) -> list[dict[str, list]]:
    """The definition: documents of epoch after epoch end to end, a new sequence at every document and every row."""
    found: list[dict[str, list]] = []
    at, epoch = 0, 0
    while at < rows * stream.seq_len:
        for number in stream._orders[0].permutation(epoch).tolist():
            ids = documents[number]
            for index, token in enumerate(ids):
                if at == rows * stream.seq_len:
                    return found
                if index == 0 or at % stream.seq_len == 0:
                    found.append({"tokens": [], "positions": [], "targets": [], "weights": [], "document": []})
                piece = found[-1]
                last = index + 1 == len(ids)
                piece["positions"].append(len(piece["tokens"]))
                piece["tokens"].append(token)
                piece["targets"].append(0 if last else ids[index + 1])
                piece["weights"].append(0.0 if last else 1.0)
                piece["document"].append(number)
                at += 1
        epoch += 1
    return found


def test_a_token_knows_the_number_of_its_row() -> None:
    stream = DataStream(shards_of(unique_documents([9, 4, 17])), seq_len=5, held_out=EVERYTHING)
    assert stream.batch(3, 2).token_extras["row"].tolist() == [3] * 5 + [4] * 5
    assert stream.batch(4, 1).token_extras["row"].tolist() == [4] * 5


@given(lengths=LENGTHS, seq_len=st.integers(2, 60), seed=st.integers(0, 5))
@RUN
def test_concat_is_the_naive_loop(lengths: list[int], seq_len: int, seed: int) -> None:
    documents = unique_documents(lengths)
    stream = DataStream(shards_of(documents, part_bytes=200), seq_len=seq_len, seed=seed, held_out=EVERYTHING)
    rows = 2 * stream.num_rows_per_epoch + 1
    want = naive_concat(stream, documents, rows)
    got = sequences(stream.batch(0, rows))
    assert [{k: v for k, v in s.items() if k != "bytes"} for s in got] == want
    assert stream.batch(0, rows).num_tokens == rows * seq_len


@given(lengths=LENGTHS, seq_len=st.integers(2, 60), data=st.data(), packer=st.sampled_from(sorted(PACKERS)))
@RUN
def test_rows_do_not_depend_on_the_call(lengths: list[int], seq_len: int, data: st.DataObject, packer: str) -> None:
    chosen = Whole(too_long="split") if packer == "whole" else Concat()
    two = (unique_documents(lengths), unique_documents(lengths[::-1])[:3])
    stream = DataStream(shards_of(*two), seq_len=seq_len, held_out=EVERYTHING, packer=chosen)
    count = 2 * stream.num_rows_per_epoch
    whole = stream.batch(0, count)
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=4))) if count > 1 else []
    fresh = DataStream(stream.shards, seq_len=seq_len, held_out=EVERYTHING, packer=chosen)
    parts = [fresh.batch(a, b - a) for a, b in reversed(list(zip([0, *cuts], [*cuts, count], strict=True)))][::-1]
    assert [s for part in parts for s in sequences(part)] == sequences(whole)
    assert fresh.fingerprint == stream.fingerprint


@given(lengths=LENGTHS, seq_len=st.integers(2, 60), epochs=st.integers(1, 3), packer=st.sampled_from(["concat", "whole"]))
@RUN
def test_every_token_of_an_epoch_once(lengths: list[int], seq_len: int, epochs: int, packer: str) -> None:
    documents = unique_documents(lengths)
    chosen = Whole(too_long="split") if packer == "whole" else Concat()
    stream = DataStream(shards_of(documents), seq_len=seq_len, held_out=EVERYTHING, packer=chosen)
    total = sum(lengths)
    rows = -(-epochs * total // seq_len)
    while (batch := stream.batch(0, rows)).num_tokens < epochs * total:  # rows of `whole` are shorter than seq_len
        rows += 1
    seen: dict[int, list[int]] = {}
    for sequence in sequences(batch):
        assert len(set(sequence["document"])) == 1, "a sequence holds one document"
        assert sequence["positions"] == list(range(len(sequence["tokens"])))
        seen.setdefault(sequence["document"][0], []).extend(sequence["tokens"])
    left = batch.num_tokens - epochs * total
    assert sum(len(t) for t in seen.values()) == epochs * total + left
    for number, tokens in seen.items():
        assert tokens[: epochs * lengths[number]] == documents[number] * epochs
    assert len(seen) == len(documents)


@given(lengths=LENGTHS, extra=st.integers(0, 30))
@RUN
def test_whole_never_cuts_and_never_overfills(lengths: list[int], extra: int) -> None:
    seq_len = max(2, max(lengths) + extra)
    documents = unique_documents(lengths)
    stream = DataStream(shards_of(documents), seq_len=seq_len, held_out=EVERYTHING, packer=Whole())
    sizes = []
    for row in range(stream.num_rows_per_epoch):
        batch = stream.batch(row, 1)
        assert batch.num_tokens <= seq_len
        assert all(s["tokens"] == documents[s["document"][0]] for s in sequences(batch))
        sizes.append([len(s["tokens"]) for s in sequences(batch)])
    assert sum(map(sum, sizes)) == sum(lengths)
    assert all(sum(a) + b[0] > seq_len for a, b in pairwise(sizes)), "the next one did not fit"


def test_epochs_are_permuted_anew_and_seeds_differ() -> None:
    documents = unique_documents([5] * 40)
    shards = shards_of(documents)

    def order(seed: int, epoch: int) -> list[int]:
        stream = DataStream(shards, seq_len=5, seed=seed, held_out=EVERYTHING)
        return stream.batch(40 * epoch, 40).token_extras["document"][::5].tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), order(0, 1000)]
    assert all(sorted(o) == list(range(40)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4
    # The order is a promise to runs that are resumed on a later version: these numbers may only change with VERSION.
    assert orders[0][:8] == [11, 25, 16, 12, 29, 37, 9, 32]


@given(weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5), rows=st.integers(1, 400))
@settings(deadline=None, max_examples=60)
def test_mixture_has_exact_proportions_and_numbers_every_source(weights: list[float], rows: int) -> None:
    from waypost.data.mixture import Mixture

    mixture, seen = Mixture(weights), [0] * len(weights)
    for row in range(rows):
        source, index = mixture.locate(row)
        assert index == seen[source], "rows of a source follow one another"
        seen[source] += 1
        assert mixture.counts(row + 1) == seen
        for count, weight in zip(seen, weights, strict=True):
            assert abs(count - (row + 1) * weight / sum(weights)) <= len(weights) / 2 + 1e-6
    many = 10**12
    for count, weight in zip(mixture.counts(many), weights, strict=True):
        assert abs(count / many - weight / sum(weights)) < 1e-11


def test_a_mixture_of_sources_in_one_batch() -> None:
    corpora = [[[1] * 7] * 3, [[2] * 5] * 4, [[3] * 11]]
    stream = DataStream(shards_of(*corpora, weights=[3.0, 2.0, 1.0]), seq_len=8, held_out=EVERYTHING)
    tokens = stream.batch(0, 600).tokens.reshape(600, 8)
    assert (tokens == tokens[:, :1]).all(), "a row comes from one source"
    assert torch.bincount(tokens[:, 0]).tolist() == [0, 300, 200, 100]
    assert stream.batch(0, 600).token_extras["document"].unique().tolist() == list(range(8))
    assert stream.where(7).endswith("2.jsonl:1")
    by_size = DataStream(shards_of(*corpora), seq_len=8, held_out=EVERYTHING)
    assert by_size.weights == [3.0, 3.0, 2.0]


@given(hashes=st.lists(st.integers(0, 2**64 - 1), min_size=3, max_size=200, unique=True), frac=st.floats(0.01, 0.9))
@settings(deadline=None, max_examples=60)
def test_held_out_is_stable_when_documents_are_added(hashes: list[int], frac: float) -> None:
    spec, few = HeldOut(frac=frac), np.array(hashes[: len(hashes) // 2 + 1], dtype=np.uint64)
    everything = np.array(hashes, dtype=np.uint64)
    try:
        before, after = held_out_mask(few, spec, "x"), held_out_mask(everything, spec, "x")
    except ConfigError:
        assert (few < np.uint64(int(frac * 2.0**64))).all() or len(few) == 1
        return
    assert before.any()
    assert not before.all()
    below = few < np.uint64(int(frac * 2.0**64))
    if below.any():
        assert (before == below).all()
        assert (after[: len(few)] == before).all()


def test_held_out_by_count_and_duplicates() -> None:
    hashes = np.array([5, 3, 9, 3, 7], dtype=np.uint64)
    assert held_out_mask(hashes, HeldOut(documents=1), "x").tolist() == [False, True, False, True, False]
    assert held_out_mask(hashes, HeldOut(documents=3), "x").tolist() == [True, True, False, True, False]
    assert not held_out_mask(hashes, HeldOut(frac=0.0), "x").any()
    fallback = np.array([2**63, 2**62, 2**61], dtype=np.uint64)  # nothing falls below the threshold: the smallest is taken
    assert held_out_mask(fallback, HeldOut(frac=1e-9), "x").tolist() == [False, False, True]
    with pytest.raises(ConfigError, match="leaves nothing to train on"):
        held_out_mask(hashes, HeldOut(documents=5), "corpus.txt")
    with pytest.raises(ConfigError, match=r"frac=1\.0"):
        HeldOut(frac=1.0)
    with pytest.raises(ConfigError, match="documents=0"):
        HeldOut(documents=0)


@given(lengths=st.lists(st.integers(2, 40), min_size=4, max_size=25), seq_len=st.integers(2, 30), step=st.integers(1, 4))
@RUN
def test_held_out_rows_are_disjoint_from_training_and_complete(lengths: list[int], seq_len: int, step: int) -> None:
    documents = unique_documents(lengths)
    shards, split = shards_of(documents), HeldOut(documents=1)
    held = DataStream(shards, seq_len=seq_len, split="held_out", held_out=split)
    train = DataStream(shards, seq_len=seq_len, held_out=split)
    batches = list(held.batches(step))
    evaluated = {int(d) for batch in batches for d in batch.token_extras["document"]}
    trained = set(train.batch(0, train.num_rows_per_epoch).token_extras["document"].tolist())
    assert evaluated
    assert not evaluated & trained
    assert evaluated | trained == set(range(len(documents)))
    assert (held.kept_documents.tolist(), train.kept_documents.tolist()) == (sorted(evaluated), sorted(trained))
    assert sum(batch.num_tokens for batch in batches) == held.num_tokens == sum(lengths[d] for d in evaluated)
    assert held.num_documents + train.num_documents == len(documents)
    predicted = sum(float(batch.weights.sum()) for batch in batches)
    assert predicted == sum(lengths[d] - 1 for d in evaluated)
    counted = sum(float(batch.token_extras["bytes"].sum()) for batch in batches)
    assert math.isclose(counted, held.num_bytes, rel_tol=1e-12)
    assert held.num_bytes == sum(len(spell(documents[d])) for d in evaluated)
    first = [s["tokens"] for batch in batches for s in sequences(batch) if s["document"][0] == min(evaluated)]
    assert first[0] == documents[min(evaluated)][:seq_len], "a held-out document begins at its beginning"


def chat_source(folder: Path, lengths: list[int]) -> Source:
    chats = [
        [{"role": "user", "content": "1"}, {"role": "assistant", "content": spell([2 + i] * (n - 1))}]
        for i, n in enumerate(lengths)
    ]
    path = jsonl(folder / "chat.jsonl", [{"messages": chat} for chat in chats])
    return Source(path=str(path), messages_field="messages")


def test_chats_are_whole_and_learn_from_the_assistant(tmp_path: Path) -> None:
    shards = prepare([chat_source(tmp_path, [4, 6, 3, 5])], Numbers(), tmp_path / "out", settings=PLAIN)
    stream = DataStream(shards, seq_len=9, held_out=EVERYTHING)
    batch = stream.batch(0, stream.num_rows_per_epoch)
    assert batch.num_sequences == 4
    for sequence in sequences(batch):
        assert sequence["tokens"][0] == 1
        assert sequence["weights"] == [1.0] * (len(sequence["tokens"]) - 1) + [0.0]
    with pytest.raises(ConfigError, match="chats are never split"):
        DataStream(shards, seq_len=9, held_out=EVERYTHING, packer=Concat())


def test_documents_that_are_too_long(tmp_path: Path) -> None:
    shards = prepare([chat_source(tmp_path, [4, 12, 3, 5])], Numbers(), tmp_path / "out", settings=PLAIN)
    with pytest.raises(ConfigError, match=r"chat.jsonl:2: 12 tokens do not fit into seq_len=9 \(1 of 4"):
        DataStream(shards, seq_len=9, held_out=EVERYTHING)
    dropped = DataStream(shards, seq_len=9, held_out=EVERYTHING, packer=Whole(too_long="drop"))
    assert sorted(set(dropped.batch(0, dropped.num_rows_per_epoch).token_extras["document"].tolist())) == [0, 2, 3]
    assert dropped.kept_documents.tolist() == [0, 2, 3]
    assert "1 of 4 documents (12 tokens)" in dropped.reports[0]
    split = DataStream(shards, seq_len=9, held_out=EVERYTHING, packer=Whole(too_long="split"))
    assert split.batch(0, split.num_rows_per_epoch).num_tokens == 24
    assert "split" in split.reports[0]
    with pytest.raises(ConfigError, match="all 4 documents are longer"):
        DataStream(shards, seq_len=2, held_out=EVERYTHING, packer=Whole(too_long="drop"))


def test_too_little_data_is_refused_with_the_numbers() -> None:
    stream = DataStream(shards_of([[1] * 30] * 2), seq_len=16, held_out=EVERYTHING)
    stream.require(3)
    with pytest.raises(ConfigError, match=r"holds 60 tokens in 2 document\(s\), one batch takes 8 x 16 = 128"):
        stream.require(8)


def test_bad_calls() -> None:
    shards = shards_of([[1] * 30, [2] * 5])
    for bad, message in (
        ({"seq_len": 1}, "at least 2"),
        ({"seq_len": 4, "split": "test"}, "must be 'train', 'held_out' or 'train_once'"),
        ({"seq_len": 4, "split": "held_out", "held_out": EVERYTHING}, "nothing is held out"),
    ):
        with pytest.raises(ConfigError, match=message):
            DataStream(shards, **bad)
    held = DataStream(shards, seq_len=4, split="held_out", held_out=HeldOut(documents=1))
    with pytest.raises(ConfigError, match="the 'held_out' split has"):
        held.batch(0, held.num_rows_per_epoch + 1)
    with pytest.raises(ConfigError, match="at least one row"):
        held.batch(0, 0)


@pytest.mark.parametrize("change", ["seq_len", "seed", "split", "held_out", "packer", "corpus", "weights"])
def test_the_fingerprint_tells_streams_apart(change: str) -> None:
    corpora = [unique_documents([5] * 30), unique_documents([4] * 9)]
    base = {"seq_len": 8, "seed": 0, "held_out": HeldOut(documents=2), "packer": Concat()}
    other = {"seq_len": 9, "seed": 1, "split": "held_out", "held_out": HeldOut(documents=3), "packer": Whole()}
    changed = {**base, change: other[change]} if change in other else base
    shards = shards_of(*corpora)
    if change == "corpus":
        corpora = corpora[::-1]
    moved = shards_of(*corpora, weights=[1.0, 2.0] if change == "weights" else None)
    same = DataStream(shards_of(*corpora), **base) if change in other else DataStream(shards, **base)
    assert DataStream(shards, **base).fingerprint == same.fingerprint
    assert DataStream(moved, **changed).fingerprint != same.fingerprint
