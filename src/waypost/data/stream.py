"""The endless, deterministic stream of training rows, and the finite one of held-out rows.

Row i of the global order is a pure function of the shards, the settings, the seed and i. The data position of a run is
therefore one integer, the rows consumed, and it is the same for any number of ranks: a rank asks for its rows by number.

    mixture.py   row i -> (source, row j of that source)       by the weights, exactly
    order.py     epoch e of a source -> a permutation of its documents
    packers/     row j of a source -> pieces of documents
    token_shards pieces -> tokens, targets, weights

A piece of a document is a sequence of the Batch: no attention across documents, positions from 0. The last token of a
piece that was cut still predicts its successor, which is known; the last token of a document predicts nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from waypost.core.batch import Batch
from waypost.core.config import to_tree
from waypost.core.errors import ConfigError
from waypost.core.rng import stream_seed
from waypost.data.mixture import Mixture
from waypost.data.order import Order
from waypost.data.packers import PackedRows, Packer, Pieces
from waypost.data.packers.concat import Concat
from waypost.data.packers.whole import Whole
from waypost.data.split import HeldOut, held_out_mask
from waypost.data.token_shards import SourceShards, TokenShards, runs

VERSION = 1
"""Raised when the same settings would give other rows, so that no run resumes on another order."""


class DataStream:
    """Rows of at most `seq_len` tokens as ragged batches.

    split "train": endless, shuffled anew each epoch, sources interleaved by weight. split "held_out": one pass, unshuffled,
    source after source, whole documents (cut every seq_len tokens where longer), so that a document's loss depends on no
    other. split "train_once": such a pass over the documents of "train". `packer` None takes Concat for text and Whole for
    chats. Nothing is held out when `held_out.frac` is 0.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        seed: int = 0,
        split: str = "train",
        held_out: HeldOut | None = None,
        packer: Packer | None = None,
    ) -> None:
        if seq_len < 2:
            raise ConfigError(f"seq_len={seq_len}: must be at least 2, a token and the one it predicts")
        if split not in ("train", "held_out", "train_once"):
            raise ConfigError(f"split='{split}': must be 'train', 'held_out' or 'train_once'")
        self.shards, self.seq_len, self.seed, self.split = shards, seq_len, seed, split
        self.held_out = held_out or HeldOut()
        self._packers = [self._packer(source, packer) for source in shards.sources]
        self._orders = [self._order(index, source) for index, source in enumerate(shards.sources)]
        self._rows: list[PackedRows] = [
            chosen.pack(order, seq_len) for chosen, order in zip(self._packers, self._orders, strict=True)
        ]
        given = [source.source.weight for source in shards.sources]
        self.weights = [w if w is not None else float(r.rows_per_epoch) for w, r in zip(given, self._rows, strict=True)]
        self._mixture = Mixture(self.weights)
        self._bytes_per_target = [source.num_bytes / np.maximum(source.num_targets, 1) for source in shards.sources]

    def _packer(self, source: SourceShards, packer: Packer | None) -> Packer:
        if self.split != "train" and not source.is_chat:
            return Whole(too_long="split")
        if packer is None:
            return Whole() if source.is_chat else Concat()
        if source.is_chat and not packer.keeps_whole:
            raise ConfigError(f"{source.source.path}: chats are never split across rows; set packer: whole")
        return packer

    def _order(self, index: int, source: SourceShards) -> Order:
        held = held_out_mask(source.hashes, self.held_out, source.source.path)
        chosen = np.flatnonzero(held if self.split == "held_out" else ~held)
        if not len(chosen):
            raise ConfigError(f"{source.source.path}: nothing is held out; set held_out.frac or held_out.documents")
        seed = stream_seed(self.seed, "data", index)
        return Order(chosen, source.lengths[chosen], seed, shuffle=self.split == "train", where=source.where)

    @property
    def num_rows_per_epoch(self) -> int:
        """Rows after which the sources together have given as many tokens as they hold; all rows of "held_out"."""
        return sum(rows.rows_per_epoch for rows in self._rows)

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, each document once."""
        return sum(order.num_tokens for order in self._orders)

    @property
    def num_documents(self) -> int:
        return sum(len(order.documents) for order in self._orders)

    @property
    def kept_documents(self) -> NDArray[np.int64]:
        """(D,) global ids, ascending, of the documents in an epoch's rows: the split's, less those that its packer drops."""
        pairs = zip(self.shards.first_document[:-1], self._rows, strict=True)
        return np.concatenate([first + np.unique(rows.pieces(0, rows.rows_per_epoch).documents) for first, rows in pairs])

    @property
    def num_bytes(self) -> int:
        """Bytes of text behind the tokens of the split."""
        pairs = zip(self.shards.sources, self._orders, strict=True)
        return sum(int(source.num_bytes[order.documents].sum()) for source, order in pairs)

    @property
    def reports(self) -> list[str]:
        """What packing did that is not plain, one line a source; empty when nothing was split or dropped."""
        pairs = zip(self.shards.sources, self._rows, strict=True)
        return [f"{source.source.path}: {rows.report}" for source, rows in pairs if rows.report]

    @property
    def fingerprint(self) -> str:
        """Equal for two streams only if all their rows are equal; store it beside the data position."""
        parts = [
            VERSION, self.shards.fingerprint, self.seq_len, self.seed, self.split, self.weights, to_tree(self.held_out),
            [[type(packer).__qualname__, to_tree(packer)] for packer in self._packers],
        ]  # fmt: skip
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def where(self, document: int) -> str:
        """The file and line of a document id from `token_extras["document"]`."""
        return self.shards.where(document)

    def require(self, num_rows: int) -> None:
        """ConfigError unless an epoch of the split has the `num_rows` rows of one batch."""
        if self.num_rows_per_epoch < num_rows:
            raise ConfigError(
                f"data: the {self.split} split holds {self.num_tokens:,} tokens in {self.num_documents:,} document(s), one "
                f"batch takes {num_rows} x {self.seq_len} = {num_rows * self.seq_len:,}; give more text, or lower the "
                "tokens of a batch or seq_len"
            )

    def batch(self, first_row: int, num_rows: int) -> Batch:
        """Rows first_row .. first_row + num_rows - 1 of the global order, T <= num_rows * seq_len tokens.

        token_extras: "document" (T,) int64, the document's global id; "row" (T,) int64, the row's number in the global
        order; "bytes" (T,) float64, the document's bytes shared evenly among the tokens it predicts, so that a sum of nats
        over a sum of bytes is bits per byte times ln 2.
        """
        if first_row < 0 or num_rows < 1:
            raise ConfigError(f"DataStream.batch({first_row}, {num_rows}): needs a row from 0 on and at least one row")
        wanted = self._wanted(first_row, num_rows)
        parts = [self._pieces(source, np.array(rows)) for source, rows in wanted.items()]
        rows = np.concatenate([rows for rows, _ in parts])
        sources = np.repeat(np.array(list(wanted)), [len(rows) for rows, _ in parts])
        place = np.argsort(rows, kind="stable")
        lengths = np.concatenate([p.lengths for _, p in parts])[place]
        documents = np.concatenate([p.documents for _, p in parts])[place]
        starts = np.concatenate([p.starts for _, p in parts])[place]
        return self._assemble(sources[place], rows[place], documents, starts, lengths)

    def _wanted(self, first_row: int, num_rows: int) -> dict[int, list[tuple[int, int]]]:
        """source -> [(global row, row of the source)], ascending."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for row in range(first_row, first_row + num_rows):
            source, index = self._mixture.locate(row) if self.split == "train" else self._pass(row)
            wanted.setdefault(source, []).append((row, index))
        return wanted

    def _pass(self, row: int) -> tuple[int, int]:
        if row >= self.num_rows_per_epoch:
            raise ConfigError(f"DataStream.batch: row {row} asked for, the '{self.split}' split has {self.num_rows_per_epoch}")
        source = 0
        while row >= self._rows[source].rows_per_epoch:
            row -= self._rows[source].rows_per_epoch
            source += 1
        return source, row

    def _pieces(self, source: int, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Pieces]:
        """(global row of each piece, pieces); the rows of one source in a run of global rows follow one another."""
        pieces = self._rows[source].pieces(int(rows[0, 1]), len(rows))
        return rows[pieces.rows - rows[0, 1], 0], pieces

    def _assemble(self, sources: Any, numbers: Any, documents: Any, starts: Any, lengths: Any) -> Batch:
        total, begins = int(lengths.sum()), np.cumsum(lengths) - lengths
        tokens, targets = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
        weights, share = np.empty(total, dtype=np.float32), np.empty(total, dtype=np.float64)
        for source in np.unique(sources):
            chosen = sources == source
            rows = runs(begins[chosen], lengths[chosen])
            gathered = self.shards.sources[source].gather(documents[chosen], starts[chosen], lengths[chosen])
            tokens[rows], targets[rows], weights[rows] = gathered
            share[rows] = np.repeat(self._bytes_per_target[source][documents[chosen]], lengths[chosen])
        ids = np.repeat(self.shards.first_document[sources] + documents, lengths)
        extras = {"document": ids, "row": np.repeat(numbers, lengths), "bytes": share * (weights > 0)}
        return Batch(
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(runs(np.zeros_like(lengths), lengths)),
            starts=torch.from_numpy(np.append(begins, total).astype(np.int32)),
            context=torch.zeros(len(lengths), dtype=torch.int32),
            targets=torch.from_numpy(targets),
            weights=torch.from_numpy(weights),
            token_extras={name: torch.from_numpy(extra) for name, extra in extras.items()},
        ).check()

    def batches(self, num_rows: int, max_rows: int | None = None) -> Iterator[Batch]:
        """One pass over the split (its first `max_rows` rows) in batches of `num_rows` rows; the last may be shorter."""
        end = self.num_rows_per_epoch if max_rows is None else min(max_rows, self.num_rows_per_epoch)
        for first in range(0, end, num_rows):
            yield self.batch(first, min(num_rows, end - first))
