"""What keys receive: the compiled kernel, its specification, a float64 loop, and independence of how rows were cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waypost.kernels import PAGE_TOKENS as P
from waypost.kernels import build, select

KERNELS = ("naive", "cpu") if build.available() else ("naive",)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


class Case:
    """Sequences of `lengths` keys, on pages in no order, of H query heads over G key heads of width D."""

    def __init__(self, lengths: list[int], heads: int, groups: int, width: int, dtype: torch.dtype) -> None:
        self.lengths, self.dtype = lengths, dtype
        counts = [-(-n // P) for n in lengths]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).tolist()
        self.table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for s, count in enumerate(counts):
            self.table[s, :count] = torch.tensor([order.pop() for _ in range(count)])
        self.q = [draw(n, heads, width, seed=s).to(dtype) for s, n in enumerate(lengths)]
        self.k = [draw(n, groups, width, seed=s + 50).to(dtype) for s, n in enumerate(lengths)]
        self.k_pages = torch.full((sum(counts), groups, width, P), math.nan, dtype=dtype)
        self.v_pages = torch.full((sum(counts), groups, P, width), math.nan, dtype=dtype)
        self.sums = torch.full((sum(counts), groups, P), math.nan, dtype=torch.promote_types(dtype, torch.float32))

    def call(self, kernel: str, cuts: list[list[int]], window: int | None = None) -> list[Tensor]:
        """Rows in as many calls as there are cuts, the s-th list for sequence s -> sums (G, n) of each sequence."""
        ops = select(kernel=kernel)  # type: ignore[arg-type]
        done = [0] * len(self.lengths)
        for part in range(len(cuts[0])):
            rows = [cut[part] for cut in cuts]
            live = [s for s, n in enumerate(rows) if n]
            starts = torch.tensor([0, *torch.tensor([rows[s] for s in live]).cumsum(0).tolist()], dtype=torch.int32)
            context = torch.tensor([done[s] for s in live], dtype=torch.int32)
            at = [torch.arange(done[s], done[s] + rows[s]) for s in live]
            slots = torch.cat([self.table[s, p // P].long() * P + p % P for s, p in zip(live, at, strict=True)])
            q, k = (torch.cat([x[s][p] for s, p in zip(live, at, strict=True)]) for x in (self.q, self.k))
            ops.write_pages(k, k, self.k_pages, self.v_pages, slots)
            args = (q, self.k_pages, self.v_pages, self.table[live], starts, context, 0.3, window)
            assert torch.equal(ops.counting_attention(*args, self.sums), ops.paged_attention(*args))
            for s in live:
                done[s] += rows[s]
        return [self.of(s) for s in range(len(self.lengths))]

    def of(self, s: int) -> Tensor:
        n = self.lengths[s]
        return self.sums[self.table[s, : -(-n // P)].long()].permute(1, 0, 2).flatten(1)[:, :n].clone()

    def by_hand(self, s: int, window: int | None) -> Tensor:
        q, k = self.q[s].double(), self.k[s].double()
        groups, share = k.shape[1], q.shape[1] // k.shape[1]
        total = torch.zeros(groups, len(k), dtype=torch.float64)
        for i in range(len(q)):
            low = 0 if window is None else max(0, i - window + 1)
            for head in range(q.shape[1]):
                scores = 0.3 * (k[low : i + 1, head // share] @ q[i, head])
                total[head // share, low : i + 1] += torch.softmax(scores, 0)
        return total


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 19])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 8), (3, 1, 12), (9, 3, 16)])
def test_golden(kernel: str, dtype: torch.dtype, window: int | None, heads: int, groups: int, width: int) -> None:
    case = Case([37, 5], heads, groups, width, dtype)
    for s, got in enumerate(case.call(kernel, [[37], [5]], window)):
        assert (got.double() - case.by_hand(s, window)).abs().max() < 2e-5  # float32 sums of some dozens of weights
        rows = torch.full((groups,), got.shape[1] * heads / groups, dtype=torch.float64)
        assert torch.allclose(got.double().sum(1), rows, atol=1e-3), "every row gives a weight of one for each of its heads"


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_bits_do_not_depend_on_cuts(data: st.DataObject) -> None:
    kernel = data.draw(st.sampled_from(KERNELS))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    lengths = [35, 18]
    whole = Case(lengths, 4, 2, 8, dtype).call(kernel, [[n] for n in lengths])
    cuts = []
    for n in lengths:
        bounds = sorted(data.draw(st.lists(st.integers(0, n), min_size=3, max_size=3)))
        cuts.append([b - a for a, b in zip([0, *bounds], [*bounds, n], strict=True)])
    cuts = [list(parts) for parts in zip(*[column for column in zip(*cuts, strict=True) if any(column)], strict=True)]
    for got, want in zip(Case(lengths, 4, 2, 8, dtype).call(kernel, cuts), whole, strict=True):
        assert torch.equal(got, want)
