"""Several decoding steps in one go, where nobody waits for the tokens in between.

Between two steps the interpreter takes about a millisecond, in which no product runs. Sequences that take the likeliest token
need nothing of it: each pass gets its tokens from the one before, and what was drawn is told afterwards. The passes are those
of single steps, so the bits are too. A sequence that ends on the way has been computed a little further for nothing.

How far ahead an answer ends is not known, so there are no more passes at once than the answer has tokens.

With a drafter that the kernel knows, a pass verifies guesses too and may give a sequence several tokens (speculation.py).
Room for them may take the place of cached prefixes, the oldest: 18 pages at most, once, for what goes back is taken first.

Shapes: S sequences, R positions of the one that may get the most tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from waypost.kernels.layers.ops import Guessing, Passed, Text
from waypost.model.decoder import Decoder
from waypost.model.rows import Rows
from waypost.serve.forward import build_batch
from waypost.serve.ledger import LiveSequence
from waypost.serve.pages import PagedKv
from waypost.serve.request import Delta
from waypost.serve.sampling import Likeliest
from waypost.serve.scheduler import Scheduler
from waypost.serve.scheduling import Span
from waypost.serve.speculation import Speculation

MOST = 32
"""Passes in one go: nearly all of what the interpreter takes is saved."""

UNHEARD_S = 0.1
"""What they may take together: meanwhile nobody hears of a token, and no interrupt is heard."""

UNHEEDED_S = 0.02
"""The same for a server, to which somebody else may come meanwhile."""

LOOKED_BACK = 8192
"""Tokens of a text among which guesses are looked for."""


def in_time(pass_s: float, most_s: float) -> int:
    """How many passes of `pass_s` seconds each may run in one go of `most_s`; MOST where 0 says that it is not known."""
    return MOST if pass_s <= 0 else max(1, min(MOST, int(most_s / pass_s)))


def run(
    model: Decoder, kv: PagedKv, drafts: Speculation, spans: Sequence[Span], most: int, deltas: list[Delta],
    computed: Callable[[list[Span]], None], draw: Callable[[Likeliest, list[LiveSequence], list[int]], list[Delta]],
) -> list[float]:  # fmt: skip
    """Up to `most` passes of `spans`, where the next steps would run the same again; -> the tokens that each has computed, []
    where something stands in the way. What they draw of each sequence, up to its end, is added to `deltas`.

    `computed` writes down that spans have run, `draw(likeliest, sequences, rows)` gives a token to each.
    """
    if model.at_once is None or not model.at_once.screened or kv.sums is not None or not drafts.strides_with(len(spans)):
        return []
    scheduler = drafts.scheduler
    passes = _count(spans, scheduler, most)
    if passes < 2:
        return []
    guesses, guessing = drafts.guessing(spans, passes)
    try:
        texts = _texts(spans, scheduler, passes, guesses)
        if min(text.room for text in texts) < 2:
            return []
        kv.expect(scheduler.pool.highest)
        began = time.monotonic()
        passed = _pass(model, kv, spans, texts, passes, guessing)
        if passed is None:
            return []
        ended = began + passed.seconds.cumsum(0)
        times = [ended.repeat_interleave(accepted + 1).tolist() for accepted in passed.accepted]  # of each token
        drafts.book(spans, passed)
        for number in range(max(passed.counts)):
            alive = [i for i, span in enumerate(spans) if span.sequence.pages and number < passed.counts[i]]
            if not alive:  # all have ended, and have no pages
                break
            for i in alive if number else ():  # the first was charged when it was planned
                scheduler.turns.charge(spans[i].sequence, 1)
            computed([spans[i] for i in alive])
            when = [times[i][number] for i in alive]
            likeliest = Likeliest(passed.peaks[alive, number], passed.tokens[alive, number], when)
            deltas += draw(likeliest, [spans[i].sequence for i in alive], [*range(len(alive))])
    finally:
        for span in spans:  # pages that were not needed go back
            scheduler.trim(span, 0)
    return (len(spans) + passed.guessed.sum(0)).tolist()


def _count(spans: Sequence[Span], scheduler: Scheduler, most: int) -> int:
    """How many passes may run, 1 to `most`."""
    ledger = scheduler.ledger
    if ledger.waiting or len(spans) < len(ledger.running) or not all(_plain(s, ledger.num_layers) for s in spans):
        return 1
    answers = [span.sequence.answer for span in spans]
    return min(most, *(min(a.num_tokens, a.max_tokens - a.num_tokens) for a in answers))


def _texts(spans: Sequence[Span], scheduler: Scheduler, passes: int, guesses: Sequence[int]) -> list[Text]:
    """`spans` with as many guesses in a pass, and room for what they may come to, at least a token, in pages that are held."""
    texts = []
    for span, count in zip(spans, guesses, strict=True):
        sequence, answer = span.sequence, span.sequence.answer
        more = min(answer.max_tokens - answer.num_tokens, passes * (1 + count)) - 1
        texts.append(Text(sequence.tokens[-LOOKED_BACK:], 1 + len(scheduler.make_room(span, [0] * more)), count))
    return texts


def _plain(span: Span, num_layers: int) -> bool:
    s = span.sequence
    decode = s.decoding and not (span.draft or span.first_layer) and span.stop_layer == num_layers
    return decode and not s.siblings and s.reader is None and s.adapter is None and s.answer.plain


def _pass(
    model: Decoder, kv: PagedKv, spans: Sequence[Span], texts: Sequence[Text], passes: int, guessing: Guessing
) -> Passed | None:
    if model.at_once is None:
        return None
    most = max(text.room for text in texts)
    batch, table, slots = build_batch(spans, beyond=most - 1)
    positions = batch.positions[:, None] + torch.arange(most)  # (S, R)
    return model.at_once.passes(Rows(batch, model.ops, kv.step(table, slots)), texts, positions, passes, guessing)
