"""Models that run at once, and passes for them; for test_at_once.py and test_likeliest.py."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import torch
from serve_cases import VARIANTS, prompt_of

from waypost.core.batch import Batch
from waypost.kernels.low_rank.factors import Factors
from waypost.model.adapter_sites import sites
from waypost.model.decoder import Decoder
from waypost.model.linear.layercast import widen_arithmetic
from waypost.model.rows import Rows
from waypost.serve.adapters import ServedAdapter, StepAdapters
from waypost.serve.loading import prepare_for_serving
from waypost.serve.pages import PagedKv, StepKv
from waypost.testing.tiny import tiny_config, tiny_model


def served(variant: str, arithmetic: torch.dtype = torch.bfloat16) -> Decoder:
    model = tiny_model(tiny_config(**VARIANTS[variant]), dtype=torch.bfloat16, kernel="cpu")
    with torch.no_grad():
        for name, vector in model.named_parameters():
            if vector.ndim == 1:  # norms of one and biases of nought would hide a missing one
                vector.add_(torch.linspace(-0.4, 0.6, len(vector)).roll(len(name)))
    return prepare_for_serving(widen_arithmetic(model, arithmetic))


def rows_of(model: Decoder, spans: list[tuple[int, int]], adapters: Sequence[int | None] = ()) -> tuple[Rows, PagedKv]:
    """Sequences (context, new tokens) and their cache, whose keys are noise; sequence i has the adapter `adapters[i]`."""
    pages_each = max(-(-(c + n) // 16) for c, n in spans)
    kv = PagedKv(model.config, pages_each * len(spans), model.dtype)
    source = torch.Generator().manual_seed(7)
    for pages in (*kv.k_pages, *kv.v_pages):
        pages.copy_(torch.randn(pages.shape, generator=source))
    table = torch.randperm(pages_each * len(spans), generator=source).view(len(spans), -1).int()
    batch = Batch.of([prompt_of(n, c + n) for c, n in spans], context=[c for c, _ in spans])
    row = torch.arange(len(spans)).repeat_interleave(torch.tensor([n for _, n in spans]))
    slots = table[row, batch.positions // 16].long() * 16 + batch.positions % 16
    return Rows(batch, model.ops, StepKv(kv, table, slots), step_adapters(model, adapters, [n for _, n in spans])), kv


RANKS = (1, 4, 7)


def step_adapters(model: Decoder, adapters: Sequence[int | None], counts: Sequence[int]) -> StepAdapters | None:
    """Adapters 0, 1, 2 of RANKS, the last of which leaves every other projection alone."""
    if not adapters:
        return None
    found = sites(model)
    used = []
    for index, rank in enumerate(RANKS):
        factors = {}
        for number, (name, linear) in enumerate(found.items()):
            if index < 2 or number % 2:
                source = torch.Generator().manual_seed(100 * index + number)
                outputs, inputs = linear.weight.shape
                a, b = torch.randn(rank, inputs, generator=source), torch.randn(outputs, rank, generator=source)
                factors[name] = Factors.of(a / inputs**0.5, b, 0.3)
        used.append(cast(ServedAdapter, SimpleNamespace(key=f"{index}", times_settled=1, factors=factors)))
    which = torch.tensor([-1 if each is None else each for each in adapters], dtype=torch.int32)
    return StepAdapters({module: name for name, module in found.items()}, used, which.repeat_interleave(torch.tensor(counts)))
