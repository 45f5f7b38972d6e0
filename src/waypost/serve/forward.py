"""One step of computation: spans in, logits of the sequences that are ready for their next token out.

Shapes: T tokens, S sequences, C hidden_size, V vocab_size, P tokens a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from waypost.core.batch import Batch
from waypost.kernels.ops import PAGE_TOKENS as P
from waypost.model.decoder import AtOnce, Decoder
from waypost.model.rows import Rows
from waypost.serve.adapters import StepAdapters
from waypost.serve.ledger import LiveSequence
from waypost.serve.pages import PagedKv, pages_for
from waypost.serve.sampling import Likeliest
from waypost.serve.scheduling import Span


def run_spans(model: Decoder, kv: PagedKv, spans: Sequence[Span]) -> tuple[list[Span], Tensor | Likeliest | None]:
    """Runs `spans`, whose pages are held -> (those that run their sequence's last known token, the logits (n, V) of that
    token and of the drafted ones after it, one span after the other, or what stands for them where it is enough).

    Spans of unequal layer ranges share every interval of layers that they have in common. The hidden states of a span
    that stops short are kept on its sequence; the ledger itself is not touched.
    """
    last = len(model.config.layers)
    ready = [s for s in spans if s.stop_layer == last and s.num_tokens == s.sequence.remaining]
    cuts = sorted({bound for s in spans for bound in (s.first_layer, s.stop_layer)})
    logits: Tensor | Likeliest | None = None
    for first, stop in pairwise(cuts):
        here = [s for s in spans if s.first_layer <= first and stop <= s.stop_layer]
        if not here:
            continue
        batch, table, slots = build_batch(here)
        rows = Rows(batch, model.ops, kv.step(table, slots), _adapters(model, here))
        wanted = _answered(here, ready) if stop == last else None
        if first == 0 and stop == last and model.at_once is not None and all(s.sequence.reader is None for s in here):
            logits = _at_once(model.at_once, rows, wanted, ready)
            if logits is not None:
                break
        h = model.embed(batch) if first == 0 else torch.cat([_hidden(s.sequence) for s in here])
        h = model.run(h, range(first, stop), rows)
        if stop < last:
            for span, part in zip(here, h.split([s.num_rows for s in here]), strict=True):
                span.sequence.hidden = part
        else:
            logits = model.head(h if wanted is None else h[wanted], rows) if ready else None
            _read(model, h, rows, here)
    return ready, logits if ready else None


def _at_once(model: AtOnce, rows: Rows, wanted: Tensor | None, ready: Sequence[Span]) -> Tensor | Likeliest | None:
    """Of no wanted row there are no logits, and the pass fills the pages alone."""
    largest = model.largest(rows, wanted) if ready and all(s.sequence.answer.plain for s in ready) else None
    return model.logits(rows, wanted) if largest is None else Likeliest(*largest)


def _adapters(model: Decoder, spans: Sequence[Span]) -> StepAdapters | None:
    users = [s.sequence.adapter for s in spans]
    store = next((user.store for user in users if user is not None), None)
    return None if store is None else store.step(model, users, [s.num_rows for s in spans])


def _answered(spans: Sequence[Span], ready: Sequence[Span]) -> Tensor | None:
    """(n,) int64: the rows of `spans` whose logits are wanted, those of `ready` after all of their tokens; None: every row."""
    if not ready:
        return torch.empty(0, dtype=torch.int64)
    counts = [s.num_rows for s in spans]
    if len(ready) == len(spans) == sum(counts):
        return None
    ends = dict(zip(map(id, spans), accumulate(counts)))
    return torch.from_numpy(np.concatenate([np.arange(ends[id(s)] - 1 - len(s.draft), ends[id(s)]) for s in ready]))


def _read(model: Decoder, h: Tensor, rows: Rows, spans: Sequence[Span]) -> None:
    if all(s.sequence.reader is None for s in spans):
        return
    for span, part in zip(spans, model.model.norm(h, rows).split([s.num_rows for s in spans]), strict=True):
        if span.sequence.reader is not None:
            span.sequence.reader.keep(span.sequence.num_computed, part, model)


def _hidden(sequence: LiveSequence) -> Tensor:
    assert sequence.hidden is not None, f"sequence {sequence.arrival} has no hidden states for layer {sequence.layer}"
    return sequence.hidden


def build_batch(spans: Sequence[Span], beyond: int = 0) -> tuple[Batch, Tensor, Tensor]:
    """-> (batch, table (S, max_pages) int32, slots (T,) int64): where each sequence's pages are, those of `beyond` more tokens
    among them, and where each row's keys go.

    Numbers go through as few arrays as they can: after a pass the code that makes one has left the caches.
    """
    context = [s.sequence.num_slots for s in spans]
    counts = [s.num_rows for s in spans]
    used = [s.sequence.pages[: pages_for(cached + count + beyond)] for s, cached, count in zip(spans, context, counts)]
    sequences, most = len(spans), max(map(len, used))
    numbers = [0, *accumulate(counts), *context]
    for pages in used:
        numbers += pages
        numbers += [0] * (most - len(pages))
    sizes = [sequences + 1, sequences, sequences * most]
    starts, cached, flat = torch.from_numpy(np.array(numbers, dtype=np.int32)).split(sizes)
    table = flat.view(sequences, most)
    per_row = _single_rows(spans, context) if sum(counts) == sequences else _rows(spans, context, counts, table.numpy())
    tokens, positions, slots = torch.from_numpy(per_row).unbind()
    return Batch(tokens=tokens, positions=positions, starts=starts, context=cached), table, slots


def _single_rows(spans: Sequence[Span], context: Sequence[int]) -> np.ndarray:
    """(3, T) int64: the token, the position and the slot of every row, where each span has one, as in most steps."""
    tokens, positions, slots = [], [], []
    for span, cached in zip(spans, context):
        s = span.sequence
        tokens.append(s.tokens[s.num_computed])
        positions.append(s.num_computed)
        slots.append(s.pages[cached // P] * P + cached % P)
    return np.array((tokens, positions, slots), dtype=np.int64)


def _rows(spans: Sequence[Span], context: Sequence[int], counts: Sequence[int], table: np.ndarray) -> np.ndarray:
    """As _single_rows, for spans of any lengths."""
    tokens: list[int] = []
    for span in spans:
        begin = span.sequence.num_computed
        tokens += span.sequence.tokens[begin : begin + span.num_tokens]
        tokens += span.draft
    starts = np.cumsum(counts) - counts
    row_sequence = np.repeat(np.arange(len(spans)), counts)
    places = np.arange(len(tokens)) + np.repeat(np.array(context) - starts, counts)
    slots = table[row_sequence, places // P].astype(np.int64) * P + places % P
    positions = places + np.array([s.sequence.dropped for s in spans], dtype=np.int64)[row_sequence]
    return np.stack([np.array(tokens, dtype=np.int64), positions, slots])
