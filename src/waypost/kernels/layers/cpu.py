"""Whole layers in one call (layers.cpp): what the interpreter spends on the operators of a layer is spent once a step.

Shapes: T rows, S sequences, C hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, addressof, byref, c_int32, c_void_p, cast

import torch
from torch import Tensor

from waypost.kernels.call import kernels
from waypost.kernels.greedy.cpu import answers
from waypost.kernels.layers.weights import EndsRow, LayerAdapters, LayerTable, ModelEnds, StepRow, pointer, product_row
from waypost.kernels.ops import Pages


def run_layers(
    table: LayerTable, order: Sequence[int], h: Tensor, pages: Pages, starts: Tensor, context: Tensor, cos: Tensor, sin: Tensor,
    which: Tensor | None = None, adapters: LayerAdapters | None = None,
) -> Tensor:  # fmt: skip
    out = h.clone(memory_format=torch.contiguous_format)
    step = _step(table, pages, starts, context, cos, sin, which, adapters, out)
    _run(table, (c_int32 * len(order))(*order), None, out, pages, step)
    return out


def run_model(
    table: LayerTable, ends: ModelEnds, tokens: Tensor, wanted: Tensor | None, pages: Pages, starts: Tensor, context: Tensor,
    cos: Tensor, sin: Tensor, which: Tensor | None = None, adapters: LayerAdapters | None = None,
) -> Tensor:  # fmt: skip
    around, normed, wanted = _around(ends, tokens, wanted)
    logits = torch.empty((len(normed), ends.head.weight.outputs), dtype=normed.dtype)
    around.logits = logits.data_ptr()
    h = torch.empty((len(tokens), normed.shape[1]), dtype=normed.dtype)
    _run(table, table.every, around, h, pages, _step(table, pages, starts, context, cos, sin, which, adapters, h))
    return logits


def run_greedy(
    table: LayerTable, ends: ModelEnds, tokens: Tensor, wanted: Tensor | None, pages: Pages, starts: Tensor, context: Tensor,
    cos: Tensor, sin: Tensor, which: Tensor | None = None, adapters: LayerAdapters | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    screen = ends.screen
    assert screen is not None, "only a head with a screen is asked for the likeliest token alone"
    around, normed, wanted = _around(ends, tokens, wanted)
    peaks, places = answers(len(normed))
    around.greedy, around.screen = screen.function, screen.address
    around.peaks, around.places = peaks.data_ptr(), places.data_ptr()
    h = torch.empty((len(tokens), normed.shape[1]), dtype=normed.dtype)
    unknown = _run(table, table.every, around, h, pages, _step(table, pages, starts, context, cos, sin, which, adapters, h))
    screen.complete(normed, peaks, places, unknown, ends.head.weight)
    return peaks, places


def _around(ends: ModelEnds, tokens: Tensor, wanted: Tensor | None) -> tuple[EndsRow, Tensor, Tensor | None]:
    """-> (the structure without what is asked for, where the rows (n, C) go that the head takes, `wanted` as it is read)."""
    wanted = None if wanted is None else wanted.contiguous()
    normed = torch.empty((len(tokens) if wanted is None else len(wanted), ends.norm.shape[0]), dtype=ends.norm.dtype)
    around = EndsRow(
        tokens.data_ptr(), ends.embedding.data_ptr(), ends.norm.data_ptr(), ends.eps, product_row(ends.head), pointer(wanted),
        len(normed), normed.data_ptr(),
    )  # fmt: skip
    return around, normed, wanted


def _step(
    table: LayerTable, pages: Pages, starts: Tensor, context: Tensor, cos: Tensor, sin: Tensor, which: Tensor | None,
    adapters: LayerAdapters | None, h: Tensor,
) -> StepRow:  # fmt: skip
    step = StepRow(
        *(x.data_ptr() for x in (pages.table, starts, context, pages.slots, cos, sin)), table.places(pages)[2],
        pages.table.shape[1], len(starts) - 1, pointer(table.seconds), pointer(which),
    )  # fmt: skip
    if adapters is not None:
        step.factors, step.adapters = addressof(adapters.rows), adapters.count
        step.share_low_rank = cast(kernels(h).share_low_rank, c_void_p)
    return step


def _run(table: LayerTable, order: Array[c_int32], ends: EndsRow | None, h: Tensor, pages: Pages, step: StepRow) -> int:
    """-> of how many rows the largest logit was asked for and is not known."""
    unknown: int = kernels(h).run_layers(
        table.rows, len(table.weights), order, len(order), *table.places(pages)[:2], byref(step),
        None if ends is None else byref(ends), h.data_ptr(), *h.shape, torch.get_num_threads(),
    )  # fmt: skip
    return unknown
