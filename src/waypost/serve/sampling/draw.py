"""One step's draws: rows of logits in, tokens and their log-probabilities out.

A draw is the inverse of the cumulative distribution at a uniform number that depends on (seed, choice, position) alone,
so that batching, preemption or a draft never change a sampled token. Rows are handled together where that leaves each
row's bits alone; greedy rows are never sorted or normalised.

Shapes: n rows, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from waypost.core.rng import uniform_at
from waypost.kernels.ops import LogSumExpOp, Ops
from waypost.serve.sampling import grammar, penalties
from waypost.serve.sampling.params import Sampling


@dataclass(slots=True)  # not frozen, which would make it three times as slow: there is one a token
class Ask:
    """What one row of logits is to become."""

    sampling: Sampling
    seed: int
    choice: int
    position: int
    """Absolute position of the token to draw."""
    counts: Mapping[int, int] = field(default_factory=dict)
    """Token -> times it stands in the answer so far; needed where a penalty is asked for."""
    prompt_ids: Tensor | None = None
    """(m,) int64, the prompt's distinct tokens; needed for a repetition penalty."""
    forbidden: Sequence[int] = ()
    """Tokens that may not come yet."""
    allowed: Tensor | None = None
    """(V,) bool, the only tokens that may come; None: all."""

    @property
    def edits(self) -> bool:
        """Whether the row of logits is changed before temperature."""
        return bool(self.forbidden) or self.allowed is not None or self.sampling.edits_logits

    @property
    def plain(self) -> bool:
        """Whether the largest logit's token is all that is wanted."""
        return self.sampling.takes_largest and not self.edits


@dataclass(slots=True)  # not frozen, which would make it three times as slow: there is one a token
class Draw:
    """A drawn token. `failure` is set, and nothing else meaningful, where the logits were not finite."""

    token_id: int
    logprob: float | None = None
    """Natural log-probability under the model itself, raw logits in float32: model/head.py."""
    drawn_logprob: float | None = None
    """Under the distribution it was drawn from, after penalties, temperature and truncation; 0 for a greedy choice."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely alternatives, (token, log-probability) under the model itself, in falling order."""
    failure: str | None = None
    weight_version: int = 0
    """Of the weights that gave the logits (Engine.swap)."""


@dataclass(frozen=True)
class Likeliest:
    """What stands for n rows of logits of which nobody asks for more than the largest: `ops.largest` of them."""

    peak: Tensor
    """(n,) float32, NaN where there is one."""
    token: Tensor
    """(n,) int64, the first that has it."""
    times: Sequence[float] = ()
    """(n,): when each was found, by time.monotonic; none: just now."""

    def __len__(self) -> int:
        return len(self.peak)

    def __getitem__(self, rows: Sequence[int]) -> Likeliest:
        return Likeliest(self.peak[rows], self.token[rows], [self.times[row] for row in rows] if self.times else ())

    def draws(self, weight_version: int) -> list[Draw]:
        """The tokens as draws of the weights `weight_version`; a row that is not finite is a failure."""
        peaks, tokens = self.peak.tolist(), self.token.tolist()
        return [
            Draw(token, weight_version=weight_version) if math.isfinite(peak) else _failure(peak)
            for peak, token in zip(peaks, tokens, strict=True)
        ]


def _failure(peak: float, who: str = "the model gave") -> Draw:
    return Draw(token_id=0, failure=f"{who} logits that are not finite (largest: {peak})")


@torch.no_grad()
def sample(logits: Tensor | Likeliest, asks: Sequence[Ask], ops: Ops, weight_version: int = 0) -> list[Draw]:
    """(n, V) logits of the weights `weight_version`, one Ask a row -> one Draw a row. Where every Ask is `plain`, the
    largest of the logits are enough."""
    if isinstance(logits, Likeliest):
        assert all(ask.plain for ask in asks), "more is asked for than the largest logits"
        return logits.draws(weight_version)
    peak, best = ops.largest(logits)
    failed = {i: _failure(v) for i, v in enumerate(peak.tolist()) if not math.isfinite(v)}
    edited = {i: _edit(logits[i].float(), ask) for i, ask in enumerate(asks) if ask.edits and i not in failed}
    tokens: list[int] = best.tolist()
    for i, row in edited.items():
        tokens[i] = int(row.argmax())
        if not math.isfinite(most := float(row[tokens[i]])):
            failed[i] = _failure(most, "what the request forbids or adds leaves")
    drawn: dict[int, float] = {}
    if sampled := [i for i, ask in enumerate(asks) if ask.sampling.temperature > 0 and i not in failed]:
        wishes = torch.tensor([_wish(asks[i]) for i in sampled], dtype=torch.float64)
        found, shares = ops.draw(logits, sampled, [edited.get(i) for i in sampled], wishes)
        for i, token, share in zip(sampled, found.tolist(), shares.tolist(), strict=True):
            tokens[i], drawn[i] = token, math.log(share)  # of one number: a vector's bits would depend on its place in it
    measured = _measure(logits, asks, tokens, ops.log_sum_exp)
    out = []
    for i, token in enumerate(tokens):
        if i in failed:
            out.append(failed[i])
        elif i in measured:
            out.append(Draw(token, measured[i][0], drawn.get(i, 0.0), measured[i][1], weight_version=weight_version))
        else:
            out.append(Draw(token, weight_version=weight_version))
    return out


def _edit(row: Tensor, ask: Ask) -> Tensor:  # (V,) -> (V,)
    s = ask.sampling
    if s.logit_bias:
        row = penalties.add_bias(row, s.logit_bias)
    if s.repetition_penalty != 1.0:
        said = torch.tensor(list(ask.counts), dtype=torch.int64)
        ids = said if ask.prompt_ids is None else torch.cat([ask.prompt_ids, said]).unique()
        row = penalties.repeat(row, ids, s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        row = penalties.presence_and_frequency(row, ask.counts, s.presence_penalty, s.frequency_penalty)
    if ask.allowed is not None:
        row = grammar.allow(row, ask.allowed)
    return penalties.forbid(row, list(ask.forbidden)) if ask.forbidden else row


def _wish(ask: Ask) -> tuple[float, ...]:
    """A row of DrawOp's wishes."""
    s = ask.sampling
    return s.temperature, s.top_k or 0, s.top_p, s.min_p, uniform_at(ask.seed, ask.choice, ask.position)


def _measure(
    logits: Tensor, asks: Sequence[Ask], tokens: Sequence[int], log_sum_exp: LogSumExpOp
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Row -> (log-probability of its token, the most likely alternatives), for the rows that ask for them.

    A log-probability is the trainer's (model/head.py): the logit minus log_sum_exp of its row.
    """
    wanted = [(i, ask.sampling.logprobs) for i, ask in enumerate(asks) if ask.sampling.logprobs is not None]
    if not wanted:
        return {}
    rows = [i for i, _ in wanted]
    part = logits if len(rows) == len(asks) else logits[rows]
    lse = log_sum_exp(part)[:, None]
    own = part.gather(1, torch.tensor([[tokens[i]] for i in rows])).to(lse.dtype) - lse
    top = part.topk(min(max(count or 0 for _, count in wanted), part.shape[1]), dim=-1)
    logprobs, values, ids = own[:, 0].tolist(), (top.values.to(lse.dtype) - lse).tolist(), top.indices.tolist()
    return {
        i: (logprobs[at], tuple(zip(ids[at][: count or 0], values[at][: count or 0], strict=True)))
        for at, (i, count) in enumerate(wanted)
    }
