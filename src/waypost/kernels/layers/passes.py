"""Passes that follow each other in one call (passes.cpp): each takes the tokens that the one before has found.

Shapes: S sequences, n passes, R positions of the sequence with most room, D head width, C hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, byref, c_bool, c_double, c_int, c_long, c_void_p

import torch
from torch import Tensor

from waypost.kernels.call import kernels
from waypost.kernels.greedy.cpu import answers
from waypost.kernels.layers.ops import Guessing, Passed, Text
from waypost.kernels.layers.weights import EndsRow, LayerTable, ModelEnds, StepRow, pointer, product_row
from waypost.kernels.ops import Pages


class _Text(Structure):
    _fields_ = [
        ("tokens", c_void_p),
        *((name, c_long) for name in ("known", "room", "most", "found")),
        *((name, c_void_p) for name in ("peaks", "guessed", "accepted")),
    ]


class _Going(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("texts", "context", "cosine", "sine")),
        *((name, c_long) for name in ("angles", "passes", "ran", "plain")),
        *((name, c_int) for name in ("longest", "shortest")),
        *((name, c_double) for name in ("credit", "gain", "plain_s")),
        ("seconds", c_void_p),
        ("open", c_bool),
    ]


def run_passes(
    table: LayerTable, ends: ModelEnds, texts: Sequence[Text], pages: Pages, context: Tensor, cos: Tensor, sin: Tensor,
    passes: int, guessing: Guessing,
) -> Passed:  # fmt: skip
    screen, sequences = ends.screen, len(texts)
    assert screen is not None, "only a head with a screen is asked for the likeliest token alone"
    most_rows = sum(1 + min(text.guesses, text.room - 1) for text in texts)
    with torch.device("cpu"):
        tokens = [torch.tensor([*text.tokens, *[0] * text.room]) for text in texts]
        logits = torch.empty(sequences, max(text.room for text in texts))
        counts = torch.zeros(2, sequences, passes, dtype=torch.int32)  # guessed, accepted
        seconds = torch.zeros(passes, dtype=torch.float64)
        normed, h = torch.empty((2, most_rows, len(ends.norm)), dtype=ends.norm.dtype)
    peaks, places = answers(most_rows)
    context, cos, sin = context.clone(), cos.contiguous(), sin.contiguous()
    rows = (_Text * sequences)()
    for row, text, *of in zip(rows, texts, tokens, logits, *counts, strict=True):
        row.known, row.room, row.most = len(text.tokens), text.room, text.guesses
        row.tokens, row.peaks, row.guessed, row.accepted = (x.data_ptr() for x in of)
    going = _Going(
        addressof(rows), *(x.data_ptr() for x in (context, cos, sin)), cos.shape[1], passes, 0, guessing.plain,
        guessing.longest, guessing.shortest, guessing.credit, guessing.gain, guessing.plain_s, seconds.data_ptr(),
    )  # fmt: skip
    around = EndsRow(
        embedding=ends.embedding.data_ptr(), norm=ends.norm.data_ptr(), eps=ends.eps, head=product_row(ends.head),
        normed=normed.data_ptr(), greedy=screen.function, screen=screen.address, peaks=peaks.data_ptr(),
        places=places.data_ptr(),
    )  # fmt: skip
    k_pages, v_pages, page_stride = table.places(pages)
    step = StepRow(
        table=pages.table.data_ptr(), page_stride=page_stride, table_width=pages.table.shape[1], sequences=sequences,
        seconds=pointer(table.seconds),
    )  # fmt: skip
    ran, unknown = 0, 1
    while unknown:  # it stops behind a pass that does not know everything, and at the end
        unknown = kernels(h).run_passes(
            table.rows, len(table.weights), table.every, k_pages, v_pages, byref(step), byref(around), byref(going),
            h.data_ptr(), h.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        asked = sequences * (going.ran - ran) + int(counts[0, :, ran : going.ran].sum())
        last = slice(around.answers)
        screen.complete(normed[last], peaks[last], places[last], unknown, ends.head.weight, asked)
        ran = going.ran
    given = torch.zeros(logits.shape, dtype=torch.int64, device="cpu")
    for row, text, known, out in zip(rows, texts, tokens, given, strict=True):
        out[: row.found] = known[len(text.tokens) : row.known]
    return Passed([row.found for row in rows], given, logits, counts[0, :, :ran], counts[1, :, :ran], seconds[:ran])
