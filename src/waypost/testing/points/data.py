"""What decides the data: packers and selectors."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from waypost.core.errors import ConfigError
from waypost.data.order import Order
from waypost.data.packers import PACKERS, PackedRows
from waypost.data.selectors import SELECTORS, Documents, Losses, best
from waypost.testing.contracts import Size
from waypost.testing.points._shared import Stateless

LENGTHS: dict[Size, list[int]] = {"some": [5, 16, 1, 30, 7, 3, 2], "one": [1]}
"""An epoch is a whole number of rows; a document of 30 tokens is longer than a row of 16."""

SEQ_LEN: dict[Size, int] = {"some": 16, "one": 1}


class Packers(Stateless):
    """No row is over seq_len or empty; over an epoch each token once; the rows of a call are those of a larger call."""

    table = PACKERS
    sizes: tuple[Size, ...] = ("some", "one")

    def inputs(self, size: Size) -> Any:
        lengths = np.array(LENGTHS[size], dtype=np.int64)
        return {"documents": 10 + np.arange(len(lengths)), "lengths": lengths, "seq_len": SEQ_LEN[size]}

    def run(self, technique: Any, inputs: Any) -> Any:
        packed = self._pack(technique, inputs)
        pieces = packed.pieces(0, 3 * packed.rows_per_epoch + 1)
        return {"rows_per_epoch": packed.rows_per_epoch, "report": packed.report, "pieces": pieces}

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        pieces, per_epoch, seq_len = result["pieces"], result["rows_per_epoch"], inputs["seq_len"]
        assert isinstance(technique.keeps_whole, bool)
        assert (pieces.lengths > 0).all(), "an empty piece"
        assert (np.diff(pieces.rows) >= 0).all(), "rows do not ascend"
        sizes = np.bincount(pieces.rows, pieces.lengths)
        assert len(sizes) == 3 * per_epoch + 1, "not the rows that were asked for"
        assert ((sizes > 0) & (sizes <= seq_len)).all(), f"rows of {sizes} tokens, at most {seq_len}"
        packed = self._pack(technique, inputs)
        for first, count in ((per_epoch, 1), (2 * per_epoch, per_epoch), (0, 2)):
            part = packed.pieces(first, count)
            inside = (pieces.rows >= first) & (pieces.rows < first + count)
            for name in ("rows", "documents", "starts", "lengths"):
                assert (getattr(part, name) == getattr(pieces, name)[inside]).all(), f"rows {first}.. are other rows alone"
        self._check_epoch(inputs, result)

    def _check_epoch(self, inputs: Any, result: Any) -> None:
        """Every token of every document in one piece of the first epoch, unless the packer says what it left out."""
        pieces = result["pieces"]
        for document, length in zip(inputs["documents"], inputs["lengths"], strict=True):
            mine = (pieces.documents == document) & (pieces.rows < result["rows_per_epoch"])
            spans = zip(pieces.starts[mine].tolist(), pieces.lengths[mine].tolist(), strict=True)
            seen = sorted(token for start, count in spans for token in range(start, start + count))
            left_out = not seen and "dropped" in result["report"]
            assert left_out or seen == list(range(length)), f"document {document}: tokens {seen} of {length}"

    def _pack(self, technique: Any, inputs: Any) -> PackedRows:
        packed: PackedRows = technique.pack(Order(inputs["documents"], inputs["lengths"], seed=3), inputs["seq_len"])
        return packed


class Selectors(Stateless):
    """One finite number a document, the same in any order; a share of one keeps all; too few models are refused unasked."""

    table = SELECTORS
    sizes: tuple[Size, ...] = ("some", "one")

    def inputs(self, size: Size) -> Any:
        count = 11 if size == "some" else 1
        rng = np.random.Generator(np.random.Philox(key=5))
        return {
            "num_tokens": 3 + np.arange(count, dtype=np.int64),
            "domains": np.arange(count, dtype=np.int64) % 2,
            "documents": rng.random((8, count)),
            "reference": rng.random((8, 2)),
        }

    def run(self, technique: Any, inputs: Any) -> Any:
        return technique.score(self._documents(inputs))

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        documents = self._documents(inputs)
        assert (result.shape, result.dtype) == (documents.num_tokens.shape, np.float64)
        assert bool(np.isfinite(result).all()), f"{result}: not finite"
        turned = {**inputs, "documents": inputs["documents"][:, ::-1]}
        turned |= {name: inputs[name][::-1] for name in ("num_tokens", "domains")}
        again = technique.score(self._documents(turned))[::-1]
        assert np.allclose(again, result, rtol=1e-12), "documents in another order have other scores"
        assert best(result, documents, 1.0).all(), "a share of one leaves documents out"
        with suppress(ConfigError):
            technique.score(replace(documents, num_models=0, losses=_never))

    def _documents(self, inputs: Any) -> Documents:
        losses = Losses(inputs["documents"], inputs["reference"])
        return Documents(inputs["num_tokens"], inputs["domains"], len(losses.documents), lambda: losses)


def _never() -> Losses:
    raise AssertionError("losses of no models are asked for: refuse their number first")
