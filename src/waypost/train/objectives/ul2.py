"""UL2: a mixture of denoisers for a decoder, told apart by mode tokens.

Source    Tay et al. 2022, UL2: Unifying Language Learning Paradigms, arXiv:2205.05131, sec. 3.1, table 1 and app. 9.2; the
          spans: Raffel et al. 2020 (T5), arXiv:1910.10683, sec. 3.1.4
Equation  x -> [mode] x with span k replaced by <k>, then <0> span_0 <1> span_1 ... <n>; L = -sum_t log p of what follows
          the second <0>. R and X: round(r L) tokens in spans of mu; S: the last r L tokens, on average, without sentinels
Shapes    a sequence of L tokens with n spans -> 1 + L + 2 n tokens; S: 1 + L
Acts on   each sequence alone; its denoiser and its spans follow from (seed, row, place in the row)
Differs   attention over the inputs stays causal, where the paper's decoder is a prefix LM: a checkpoint is served under the
          numeric contract, whose chunks and shared pages are causal, and CodeGen2 (arXiv:2305.02309) found no gain in a
          prefix LM. The second <0> is given, not predicted: nothing before it tells that the inputs end. Rows are not cut
          to make room, so sequences grow. S splits as in table 1; app. 9.2 calls T5's prefix_lm instead: rate 0.5
Exact     one S denoiser of rate 1 without mode tokens is causal, bit for bit
"""

from __future__ import annotations

import itertools
from dataclasses import field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from waypost.core.batch import Batch
from waypost.core.config import technique
from waypost.core.errors import ConfigError, ShapeError
from waypost.core.rng import stream_seed
from waypost.model.decoder import Decoder
from waypost.train.objectives._spans import Draw, Ints, places, random_spans, random_suffix
from waypost.train.objectives.causal import Causal

MODES = ("R", "S", "X")


@technique
class Denoiser:
    mode: Literal["R", "S", "X"]
    """Its mode token: regular, sequential, extreme."""
    rate: float
    """Share of a sequence's tokens to predict; r in the paper."""
    span: float | None = None
    """Mean tokens of a span, mu in the paper; null predicts one span, the end of the sequence."""
    share: float = 1.0
    """How often it is chosen, relative to the others."""

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0 or (self.span is not None and not self.span >= 1.0) or not self.share > 0.0:
            raise ConfigError(
                f"Denoiser: rate={self.rate} in (0, 1], span={self.span} at least 1 or null, share={self.share} positive"
            )


def arranged(length: int, denoiser: Denoiser, first_sentinel: int, draw: Draw) -> tuple[Ints, int]:
    """(items of the new sequence, how many of them are given). An item is the place of a token in the old sequence, where
    `length` is the token that follows it, or -1 - id of a sentinel. The items after those given are to be predicted."""
    if denoiser.span is None or length < 2:
        return np.arange(length + 1), length - random_suffix(length, denoiser.rate, draw)
    firsts, lengths = random_spans(length, denoiser.rate, denoiser.span, draw)
    marks = [np.array([-1 - first_sentinel - k]) for k in range(len(firsts) + 1)]
    ends = [0, *(firsts + lengths).tolist()]
    inputs = [part for k, first in enumerate(firsts.tolist()) for part in (np.arange(ends[k], first), marks[k])]
    spans = [part for k, first in enumerate(firsts.tolist()) for part in (marks[k], np.arange(first, ends[k + 1]))]
    inputs.append(np.arange(ends[-1], length))
    return np.concatenate([*inputs, *spans, marks[-1]]), sum(map(len, inputs)) + 1


def _table_1() -> list[Denoiser]:
    spans: list[tuple[Literal["R", "X"], float, float]] = [
        ("R", 3, 0.15), ("R", 8, 0.15), ("X", 3, 0.5), ("X", 8, 0.5), ("X", 64, 0.15), ("X", 64, 0.5),
    ]  # fmt: skip
    return [*(Denoiser(mode=m, span=span, rate=rate) for m, span, rate in spans), Denoiser(mode="S", rate=0.25)]


@technique
class Ul2:
    first_special: int
    """First of the last ids of the vocabulary, which no text has: [R], [S], [X], then the sentinels <0>, <1> ..."""
    denoisers: list[Denoiser] = field(default_factory=_table_1)
    """What is mixed; by default the seven of the paper's table 1, equally often."""
    mode_tokens: bool = True
    """Begin each sequence with the mode token of its denoiser."""

    def __post_init__(self) -> None:
        if self.first_special < 1 or not self.denoisers:
            raise ConfigError(f"Ul2: first_special={self.first_special} must be positive, and denoisers name at least one")

    def prepare(self, batch: Batch, seed: int) -> Batch:
        if batch.targets is None or batch.weights is None:
            raise ShapeError("Ul2.prepare: the batch has no targets or no weights; take it from a DataStream")
        most = max(int(batch.tokens.max()), int((batch.targets * (batch.weights > 0)).max()))
        if most >= self.first_special:
            raise ConfigError(
                f"objective ul2: the data holds token {most}, but ids from first_special={self.first_special} on must stand in "
                "no text; give the first id beyond those of the text, of a vocabulary that goes on after it"
            )
        parts = [self._denoised(batch, *rows, seed, *place) for rows, place in places(batch)]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        own = {name: columns.pop(name) for name in ("tokens", "positions", "targets", "weights")}
        ends = itertools.accumulate((len(part["tokens"]) for part in parts), initial=0)
        starts = torch.tensor(list(ends), dtype=torch.int32)
        return Batch(starts=starts, context=batch.context, token_extras=columns, **own).check()

    def _denoised(self, batch: Batch, start: int, stop: int, seed: int, row: int, place: int) -> dict[str, Tensor]:
        """The columns of one sequence, rows start to stop of `batch`, made anew."""
        assert batch.targets is not None
        assert batch.weights is not None
        draw = Draw(stream_seed(seed, row, place))
        shares = np.cumsum([denoiser.share for denoiser in self.denoisers])
        denoiser = self.denoisers[int(np.searchsorted(shares, draw.uniform() * shares[-1], side="right"))]
        items, given = arranged(stop - start, denoiser, self.first_special + len(MODES), draw)
        if self.mode_tokens:
            items, given = np.insert(items, 0, -1 - self.first_special - MODES.index(denoiser.mode)), given + 1
        at = torch.from_numpy(items)
        ids = torch.cat([batch.tokens[start:stop], batch.targets[stop - 1 : stop]])  # the token that follows is known
        tokens = torch.where(at >= 0, ids[at.clamp(min=0)], -1 - at)
        # The weight of token j is that of the row before it; a sentinel closes a span and has the weight of its last token.
        last = torch.from_numpy(np.maximum.accumulate(np.where(items >= 0, np.arange(len(items)), 0)))
        predictor = (at[last] - 1).clamp(min=-1)
        counted = (torch.arange(len(at)) >= given) & (predictor >= 0)
        weights = torch.where(counted, batch.weights[start:stop][predictor.clamp(min=0)], 0.0)
        near = start + at[last][:-1].clamp(0, stop - start - 1)
        extras = {name: extra[near] for name, extra in batch.token_extras.items() if name != "bytes"}
        if "bytes" in batch.token_extras and all(d.span is None for d in self.denoisers):  # a sentinel counts and has none
            extras["bytes"] = torch.where(counted, batch.token_extras["bytes"][start:stop][predictor.clamp(min=0)], 0.0)[1:]
        own = {"tokens": tokens[:-1], "targets": tokens[1:], "weights": weights[1:]}
        return {**own, "positions": torch.arange(len(at) - 1), **extras}

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self._check(model, batch)
        return Causal().loss(model, batch)

    def losses(self, model: Decoder, batch: Batch) -> Tensor:
        self._check(model, batch)
        return Causal().losses(model, batch)

    def _check(self, model: Decoder, batch: Batch) -> None:
        read, config = (batch.tokens, batch.targets), model.config
        most, longest = max(int(ids.max()) for ids in read if ids is not None), int(batch.positions.max()) + 1
        if most >= config.vocab_size:
            raise ConfigError(
                f"objective ul2: a sequence takes ids up to {most}, the model has a vocabulary of {config.vocab_size}; give "
                "the model a larger vocab_size, or use longer spans, shorter rows or a smaller first_special"
            )
        if longest > config.max_position_embeddings:
            raise ConfigError(
                f"objective ul2: sentinels lengthen a sequence to {longest} tokens, the model knows "
                f"{config.max_position_embeddings} positions (max_position_embeddings); lower data.seq_len"
            )
