"""The paged cache of keys and values: who holds which page, and where a row's keys go.

Invariants: free + held + cached == total; a page is free exactly when nobody refers to it and the prefix cache does not keep
it; a page that several sequences refer to, or that is kept, is never written.

Shapes: T rows, S sequences, H query heads, G key/value heads, D head width, P tokens a page.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from waypost.core.errors import CapacityError
from waypost.kernels import memory
from waypost.kernels.ops import PAGE_TOKENS as P
from waypost.kernels.ops import Pages
from waypost.model.config import ModelConfig
from waypost.model.rows import Rows


class PagePool:
    """Counts references to pages 0 .. total - 1. Holds no tensors."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise CapacityError(f"num_pages={total}: the cache needs at least one page")
        self.total = total
        self._references = [0] * total
        self._free = list(range(total - 1, -1, -1))  # a stack: page 0 is handed out first
        self._kept: set[int] = set()  # by the prefix cache
        self._idle: dict[int, None] = {}  # kept pages that nobody refers to, the least recently used first
        self.highest = 0
        """The highest page that was ever handed out."""
        self.on_evict: Callable[[int], None] = lambda page: None
        """Told of every idle page that is handed out again."""

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def held(self) -> int:
        """Pages that at least one sequence refers to."""
        return self.total - len(self._free) - self.cached

    @property
    def cached(self) -> int:
        """Pages nobody refers to, kept for their contents."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """Pages that `take` can give: the free, and those kept only for their contents."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int]:
        """`count` pages of unspecified content, held once each. The caller has looked at `available`."""
        if count > self.available:
            raise CapacityError(f"{count} pages asked for, {self.available} of {self.total} are available")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        self.highest = max(self.highest, *pages) if pages else self.highest
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of `pages`."""
        for page in pages:
            assert self._references[page] > 0 or page in self._idle, f"page {page} is free and cannot be shared"
            self._idle.pop(page, None)
            self._references[page] += 1

    def keep(self, page: int) -> None:
        """From now on `page`, which is held, keeps its contents when its last holder leaves, until it is needed."""
        assert self._references[page] > 0, f"page {page} is not held and has nothing to keep"
        self._kept.add(page)

    def forget(self, page: int) -> None:
        """The opposite of `keep`."""
        self._kept.discard(page)
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def _evict(self) -> int:
        page = next(iter(self._idle))
        del self._idle[page]
        self._kept.discard(page)
        self.on_evict(page)
        return page

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer for each of `pages`, the last of them first; a page without holders is free, or idle if kept."""
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} is released but was free"
            self._references[page] -= 1
            if self._references[page] == 0 and page in self._kept:
                self._idle[page] = None
            elif self._references[page] == 0:
                self._free.append(page)

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Asserts that the references are exactly those of `holders`, one list of pages a sequence."""
        counted = [0] * self.total
        for pages in holders:
            for page in pages:
                counted[page] += 1
        assert counted == self._references, f"pages held {counted}, accounted {self._references}"
        unused = {page for page, n in enumerate(counted) if n == 0}
        assert set(self._idle) == unused & self._kept, f"idle {list(self._idle)}, kept {self._kept}, held {counted}"
        assert sorted(self._free) == sorted(unused - self._kept), f"free list {self._free} against {counted}"
        assert self.free + self.held + self.cached == self.total


class PagedKv:
    """One pair of tensors a layer, k (pages, G, D, P) and v (pages, G, P, D), allocated once and never cleared.

    A page has the keys and values of all layers side by side, so that few tokens take little memory: the system gives it in
    pieces of 2 MB, of which 60 tensors would each need one for a first token.
    """

    def __init__(self, config: ModelConfig, num_pages: int, dtype: torch.dtype, counting: bool = False) -> None:
        shapes = [(layer.mixer.num_key_value_heads, layer.mixer.head_dim) for layer in config.layers]
        sizes = [groups * width * P for groups, width in shapes for _ in "kv"]
        try:
            self._storage = memory.empty((num_pages, sum(sizes)), dtype)
        except OSError as error:
            raise CapacityError(
                f"num_pages={num_pages:,}: no room for pages of {sum(sizes) * dtype.itemsize:,} bytes each; give fewer, or "
                "leave it out: then the memory at hand decides"
            ) from error
        halves = self._storage.split(sizes, dim=1)
        self.k_pages = [
            half.unflatten(1, (groups, width, P)) for half, (groups, width) in zip(halves[::2], shapes, strict=True)
        ]
        self.v_pages = [
            half.unflatten(1, (groups, P, width)) for half, (groups, width) in zip(halves[1::2], shapes, strict=True)
        ]
        self._upcoming = UpcomingPages(self._storage)
        self.sums = [torch.zeros(num_pages, groups, P) for groups, _ in shapes] if counting else None
        """Where a KV policy asks for it: of each key, the attention that it has received so far; a layer each, float32."""

    @staticmethod
    def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers."""
        lanes = sum(2 * layer.mixer.num_key_value_heads * layer.mixer.head_dim for layer in config.layers)
        return lanes * P * dtype.itemsize

    def step(self, table: Tensor, slots: Tensor) -> StepKv:
        """The cache as one forward pass sees it: table (S, max_pages) int32, slots (T,) int64."""
        return StepKv(self, table, slots)

    def expect(self, page: int) -> None:
        """Says that pages up to `page` are in use: memory for those after it is fetched before they are due."""
        self._upcoming.reach(page)

    def move(self, layer: int, pages: Sequence[int], keep: Tensor) -> None:
        """Moves the keys in slots `keep` (G, n), ascending, of a sequence's `pages` to its slots 0 .. n - 1, with their values
        and sums: each head its own."""
        at, (groups, count) = torch.tensor(pages), keep.shape
        heads, slots = torch.arange(groups)[:, None], torch.arange(count)
        source = (at[keep // P], heads, keep % P)  # (G, n) each
        target = (at[slots // P].expand(groups, -1), heads, (slots % P).expand(groups, -1))
        k, v = self.k_pages[layer], self.v_pages[layer]
        k.transpose(2, 3)[target] = k.transpose(2, 3)[source]  # what stands right is gathered whole before it is written
        v[target] = v[source]
        if self.sums is not None:
            self.sums[layer][target] = self.sums[layer][source]

    def copy(self, source: int, target: int) -> None:
        """Copies page `source` to page `target` in every layer."""
        for pages in (self._storage, *(self.sums or ())):
            pages[target].copy_(pages[source])


STRIP_PAGES = 64
"""Pages whose memory is fetched at a time, or more: twice what a step of 512 tokens comes to."""


class UpcomingPages:
    """Fetches the memory of cached pages shortly before they are used, on a thread beside: the system gives a huge page in up
    to 5 ms, and a step that came to it would wait. Those of the first strip are there from the beginning."""

    PAUSE_S = 2e-3
    """After each huge page, so that a step finds the cores free in between."""

    def __init__(self, storage: Tensor) -> None:  # (pages, ...)
        self._storage = storage
        page_bytes = max(1, storage[:1].nbytes)
        self._strip = max(memory.CACHE_STRIP_BYTES // page_bytes, STRIP_PAGES)
        self._piece = max(1, memory.HUGE_PAGE_BYTES // page_bytes)
        self._ready = self._strip
        """Pages below this are there, or on their way."""
        self._thread: threading.Thread | None = None
        memory.populate(storage[: self._strip])

    def reach(self, page: int) -> None:
        """Says that `page` is the highest in use: once it is half a strip from the end of what is there, more is fetched."""
        if page < self._ready - self._strip // 2 or self._ready >= len(self._storage):
            return
        if self._thread is None or not self._thread.is_alive():
            begin, self._ready = self._ready, max(self._ready, page) + self._strip
            self._thread = threading.Thread(target=self._fetch, args=(begin, self._ready), name="waypost-cache", daemon=True)
            self._thread.start()

    def _fetch(self, begin: int, end: int) -> None:
        for piece in self._storage[begin:end].split(self._piece):
            memory.populate(piece)
            time.sleep(self.PAUSE_S)


class StepKv:
    """A KvStore (model/rows.py): writes the rows' keys and values to their pages, then attends over pages."""

    def __init__(self, store: PagedKv, table: Tensor, slots: Tensor) -> None:
        self._pages, self._sums = Pages(store.k_pages, store.v_pages, table, slots), store.sums

    @property
    def pages(self) -> Pages | None:
        """None where attention is counted too: layers then run an operator at a time."""
        return self._pages if self._sums is None else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, rows: Rows) -> Tensor:
        """q (T, H, D), k and v (T, G, D) -> (T, H, D): stores k and v first, so that a row sees its own key."""
        pages, batch = self._pages, rows.batch
        k_pages, v_pages = pages.k_pages[layer], pages.v_pages[layer]
        rows.ops.write_pages(k, v, k_pages, v_pages, pages.slots)
        args = (q, k_pages, v_pages, pages.table, batch.starts, batch.context, scale, window)
        return rows.ops.paged_attention(*args) if self._sums is None else rows.ops.counting_attention(*args, self._sums[layer])


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // P)
