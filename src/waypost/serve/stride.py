"""Several decoding steps in one go, where nobody waits for the tokens in between.

Between two steps the interpreter takes about a millisecond, in which no product runs. Sequences that take the likeliest token
need nothing of it: each pass gets its tokens from the one before, and what was drawn is told afterwards. The passes are those
of single steps, so the bits are too. A sequence that ends on the way has been computed a little further for nothing.

How far ahead an answer ends is not known, so no sequence runs further at once than it has come.

Shapes: S sequences, n passes, P tokens a page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from waypost.kernels.ops import PAGE_TOKENS as P
from waypost.model.decoder import Decoder
from waypost.model.rows import Rows
from waypost.serve.forward import build_batch
from waypost.serve.ledger import LiveSequence
from waypost.serve.pages import PagedKv
from waypost.serve.request import Delta
from waypost.serve.sampling import Likeliest
from waypost.serve.scheduler import Scheduler
from waypost.serve.scheduling import Span

MOST = 32
"""Passes in one go: nearly all of what the interpreter takes is saved."""

UNHEARD_S = 0.1
"""What they may take together: meanwhile nobody hears of a token, and no interrupt is heard."""


def in_time(pass_s: float) -> int:
    """How many passes of so many seconds each may run in one go; MOST where that is not known, 0."""
    return MOST if pass_s <= 0 else max(1, min(MOST, int(UNHEARD_S / pass_s)))


def run(
    model: Decoder, kv: PagedKv, scheduler: Scheduler, spans: Sequence[Span], most: int, deltas: list[Delta],
    computed: Callable[[list[Span]], None], draw: Callable[[Likeliest, list[LiveSequence], list[int]], list[Delta]],
) -> int:  # fmt: skip
    """Up to `most` passes of `spans`, where the next steps would run the same again; -> how many, 0 where something stands in
    the way. What they draw of each sequence, up to its end, is added to `deltas`.

    `computed` writes down that spans have run, `draw(likeliest, sequences, rows)` gives a token to each.
    """
    if model.at_once is None or not model.at_once.screened or kv.sums is not None:
        return 0
    count = _grant(spans, scheduler, most)
    if count < 2:
        return 0
    kv.expect(scheduler.pool.highest)
    try:
        passes = _passes(model, kv, spans, count)
        for number, likeliest in enumerate(passes):
            alive = [i for i, span in enumerate(spans) if span.sequence.pages]  # a sequence that ended has none
            for i in alive if number else ():  # the first was charged when it was planned
                scheduler.turns.charge(spans[i].sequence, 1)
            computed([spans[i] for i in alive])
            deltas += draw(likeliest, [spans[i].sequence for i in alive], alive)
    finally:
        for span in spans:  # pages that were not needed go back
            scheduler.trim(span, 0)
    return len(passes)


def _grant(spans: Sequence[Span], scheduler: Scheduler, most: int) -> int:
    """How many passes may run, 1 to `most`; the pages for them are held when this returns, and for one no more than before."""
    ledger = scheduler.ledger
    if ledger.waiting or len(spans) < len(ledger.running) or not all(_plain(s, ledger.num_layers) for s in spans):
        return 1
    answers = [span.sequence.answer for span in spans]
    most = min(most, *(min(a.num_tokens, a.max_tokens - a.num_tokens) for a in answers))
    if most < 2:
        return 1
    for span in spans:
        most = 1 + len(scheduler.make_room(span, [0] * (most - 1)))
    if most < 2:
        for span in spans:  # the first may have got pages before one got none
            scheduler.trim(span, 0)
    return most


def _plain(span: Span, num_layers: int) -> bool:
    s = span.sequence
    decode = s.decoding and not (span.draft or span.first_layer) and span.stop_layer == num_layers
    return decode and not s.siblings and s.reader is None and s.adapter is None and s.answer.plain


def _passes(model: Decoder, kv: PagedKv, spans: Sequence[Span], count: int) -> list[Likeliest]:
    if model.at_once is None:
        return []
    batch, table, slots = build_batch(spans, beyond=count - 1)
    steps = torch.arange(count)[:, None]
    positions, context = batch.positions + steps, batch.context + steps.int()  # (n, S)
    places = (table.t().gather(0, context.long() // P) * P + context % P).long()
    found = model.at_once.passes(Rows(batch, model.ops, kv.step(table, slots)), positions, context, places)
    return [] if found is None else [Likeliest(*each) for each in zip(*found, strict=True)]
