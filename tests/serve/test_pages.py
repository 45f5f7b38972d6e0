"""The page pool's accounting, and the paged cache against attention over whole sequences."""

from __future__ import annotations

import pytest
import torch
from serve_cases import KERNELS, model_of
from torch import Tensor

from waypost.core.batch import Batch
from waypost.core.errors import CapacityError, ShapeError
from waypost.kernels import memory
from waypost.kernels.call import page_stride
from waypost.kernels.ops import PAGE_TOKENS
from waypost.model.rows import Rows
from waypost.serve import pages as pages_module
from waypost.serve.pages import PagedKv, PagePool, UpcomingPages, pages_for
from waypost.testing.tiny import tiny_config


def test_pages_are_free_again_when_the_last_holder_lets_go() -> None:
    pool = PagePool(4)
    mine = pool.take(3)
    pool.share(mine[:2])
    pool.check([mine, mine[:2]])
    pool.release(mine)
    assert (pool.free, pool.held, pool.cached) == (2, 2, 0)
    pool.check([mine[:2]])
    pool.release(mine[:2])
    assert pool.free == 4


def test_a_pool_gives_no_more_than_it_has() -> None:
    pool = PagePool(2)
    pool.take(1)
    with pytest.raises(CapacityError, match="2 pages asked for, 1 of 2 are available"):
        pool.take(2)
    assert pool.free == 1
    with pytest.raises(CapacityError, match="at least one page"):
        PagePool(0)


def test_mistakes_in_accounting_are_caught() -> None:
    pool = PagePool(2)
    (page,) = pool.take(1)
    with pytest.raises(AssertionError, match="pages held"):
        pool.check([])
    pool.release([page])
    with pytest.raises(AssertionError, match="was free"):
        pool.release([page])
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share([page])


def test_bytes_of_a_page() -> None:
    config = tiny_config()  # 2 layers, 2 key/value heads of 8: (8 + 8) * 2 * 2 numbers a token
    assert PagedKv.page_bytes(config, torch.bfloat16) == 2 * (8 + 8) * 2 * PAGE_TOKENS * 2
    store = PagedKv(config, 3, torch.bfloat16)
    held = sum(t.numel() * t.element_size() for t in (*store.k_pages, *store.v_pages))
    assert held == 3 * PagedKv.page_bytes(config, torch.bfloat16)


@pytest.mark.parametrize("kernel", KERNELS)
def test_layers_may_have_key_value_heads_of_their_own(kernel: str) -> None:
    """A model whose layers differ in heads and width, in two chunks over scattered poisoned pages, equals one forward."""
    from dataclasses import replace

    from waypost.kernels import select
    from waypost.model.decoder import Decoder
    from waypost.model.mixer import Attention

    config = tiny_config()
    other = replace(config.layers[1], mixer=Attention(num_attention_heads=6, num_key_value_heads=1, head_dim=4, window=9))
    model = Decoder(replace(config, layers=[config.layers[0], other]), select(kernel=kernel)).initialise(3)  # type: ignore[arg-type]
    store = PagedKv(model.config, 9, torch.float32)
    for tensor in (*store.k_pages, *store.v_pages):
        tensor.fill_(float("nan"))
    tokens = list(range(10, 10 + 37))
    pages = torch.tensor([[7, 0, 4]], dtype=torch.int32)
    parts = []
    with torch.no_grad():
        for begin, end in ((0, 21), (21, 37)):
            batch = Batch.of([tokens[begin:end]], context=[begin])
            slots = pages[0].long()[batch.positions // PAGE_TOKENS] * PAGE_TOKENS + batch.positions % PAGE_TOKENS
            rows = Rows(batch, model.ops, store.step(pages, slots))
            parts.append(model.head(model.run(model.embed(batch), range(2), rows), rows))
        whole: Tensor = model(Batch.of([tokens]))
    assert torch.equal(torch.cat(parts), whole)


def test_copied_pages_hold_the_same_keys_in_every_layer() -> None:
    store = PagedKv(model_of("gqa", "fp32").config, 4, torch.float32)
    for tensor in (*store.k_pages, *store.v_pages):
        tensor.copy_(torch.arange(4.0)[:, None, None, None])
    store.copy(1, 3)
    assert all(bool((t[3] == 1.0).all()) and bool((t[2] == 2.0).all()) for t in (*store.k_pages, *store.v_pages))


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (PAGE_TOKENS, 1), (PAGE_TOKENS + 1, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages


def test_memory_of_pages_is_fetched_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, fetched = torch.arange(40.0).repeat(2, 1).T.contiguous(), []
    before = storage.clone()
    real = memory.populate
    monkeypatch.setattr(memory, "CACHE_STRIP_BYTES", 10 * storage[0].nbytes)
    monkeypatch.setattr(pages_module, "STRIP_PAGES", 1)
    monkeypatch.setattr(memory, "HUGE_PAGE_BYTES", 4 * storage[0].nbytes)
    monkeypatch.setattr(UpcomingPages, "PAUSE_S", 0.0)
    monkeypatch.setattr(memory, "populate", lambda part: (fetched.append((int(part[0, 0]), int(part[-1, 0]))), real(part)))
    upcoming = UpcomingPages(storage)
    assert fetched == [(0, 9)], "the first strip, at once"

    def reach(page: int) -> list[tuple[int, int]]:
        fetched.clear()
        upcoming.reach(page)
        if upcoming._thread is not None:
            upcoming._thread.join(60)
        return list(fetched)

    assert reach(4) == []
    assert reach(5) == [(10, 13), (14, 17), (18, 19)], "half a strip before the end of the first, a huge page at a time"
    assert reach(9) == reach(14) == []
    assert reach(27)[::4] == [(20, 23), (36, 36)], "one that jumped: up to a strip beyond it"
    assert reach(36) == [(37, 39)]
    assert reach(39) == [], "the last are there"
    assert torch.equal(storage, before)


def test_populated_memory_is_there_and_unchanged() -> None:
    whole = memory.empty((1 << 20,), torch.float32)
    whole[5::1000] = 7.0
    want = whole.clone()
    memory.populate(whole[100:-3])
    memory.populate(whole[:0])
    assert torch.equal(whole, want)


def test_pages_that_lie_unequally_far_apart_are_refused() -> None:
    store = PagedKv(tiny_config(), 3, torch.float32)
    assert page_stride(*store.k_pages, *store.v_pages) == store.page_bytes(tiny_config(), torch.float32) // 4
    with pytest.raises(ShapeError, match="equally far apart"):
        page_stride(store.k_pages[0], store.v_pages[0].clone())
    with pytest.raises(ShapeError, match=r"\(3, 2, 16, 8\) in strides"):
        page_stride(store.k_pages[0].transpose(2, 3))
