"""The Triton kernels in Triton's interpreter against the specification; on a GPU where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_kernels import TOLERANCE, assert_near, draw, value_and_grads
from torch import Tensor

from waypost.core.errors import ConfigError
from waypost.kernels import PAGE_TOKENS, select
from waypost.kernels.ops import Ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, by whomever
pytest.importorskip("triton")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def interpreted_products() -> Iterator[None]:
    """The interpreter multiplies with NumPy, whose library gives a row other bits at another place of the tile on some
    processors, as the matrix units of a GPU do not. Here every entry of a product has one order of addition."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime import interpreter

    def in_order(a: NDArray[Any], b: NDArray[Any], dtype: Any) -> NDArray[Any]:
        total = np.zeros((a.shape[0], b.shape[1]), dtype)
        for k in range(a.shape[1]):
            total += a[:, k, None].astype(dtype) * b[k].astype(dtype)
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "np", SimpleNamespace(**{**vars(np), "matmul": in_order}))
        yield


@pytest.fixture(scope="module")
def ops() -> Ops:
    return select(kernel="triton")


def there(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 48), (1, 7), (3, 2, 24)])
def test_rms_norm(ops: Ops, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = [draw(*shape).to(dtype), draw(shape[-1], seed=1).to(dtype)]
    got = value_and_grads(lambda x, w: ops.rms_norm(*there(x, w), 1e-5).cpu(), tensors)
    want = value_and_grads(lambda x, w: select(kernel="naive").rms_norm(x, w, 1e-5), [t.double() for t in tensors])
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "width", "window"), [(6, 2, 24, None), (2, 1, 64, 19)])
def test_ragged_attention(
    ops: Ops, dtype: torch.dtype, heads: int, groups: int, width: int, window: int | None
) -> None:  # fmt: skip
    starts = torch.tensor([0, 68, 69, 80], dtype=torch.int32)
    tensors = [draw(80, n, width, seed=i).to(dtype) for i, n in enumerate((heads, groups, groups))]
    got = value_and_grads(lambda *t: ops.ragged_attention(*there(*t, starts), 0.3, window).cpu(), tensors)
    naive = select(kernel="naive").ragged_attention
    want = value_and_grads(lambda *t: naive(*t, starts, 0.3, window), [t.double() for t in tensors])
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20])
def test_attention_bits_do_not_depend_on_chunks_or_neighbours(ops: Ops, dtype: torch.dtype, window: int | None) -> None:
    """Prefill in one piece, in chunks and one token at a time, beside a stranger, over recycled pages full of NaN."""
    heads, groups, width, length = 6, 2, 24, 75
    q, k, v = (draw(length, n, width, seed=i).to(dtype) for i, n in enumerate((heads, groups, groups)))
    whole = ops.ragged_attention(*there(q, k, v, torch.tensor([0, length], dtype=torch.int32)), 0.4, window).cpu()
    pages = -(-length // PAGE_TOKENS)
    order = torch.randperm(2 * pages, generator=torch.Generator().manual_seed(1))
    tables = order.view(2, pages).int()
    k_pages = torch.full((2 * pages, groups, width, PAGE_TOKENS), torch.nan, dtype=dtype, device=DEVICE)
    v_pages = torch.full((2 * pages, groups, PAGE_TOKENS, width), torch.nan, dtype=dtype, device=DEVICE)
    done, parts = 0, []
    for n in (1, 1, 30, 1, 17, 5, 20):
        span = torch.arange(done, done + n)
        both = [torch.cat([x[done : done + n], x.flip(0)[done : done + n]]) for x in (q, k, v)]
        slots = torch.cat([table[span // PAGE_TOKENS].long() * PAGE_TOKENS + span % PAGE_TOKENS for table in tables])
        ops.write_pages(*there(both[1], both[2]), k_pages, v_pages, slots.to(DEVICE))
        starts, context = torch.tensor([0, n, 2 * n], dtype=torch.int32), torch.full((2,), done, dtype=torch.int32)
        out = ops.paged_attention(*there(both[0]), k_pages, v_pages, *there(tables, starts, context), 0.4, window)
        parts.append(out[:n].cpu())
        done += n
    assert done == length
    assert torch.equal(torch.cat(parts), whole)


def test_agrees_with_the_compiled_attention(ops: Ops) -> None:
    q, k, v = draw(40, 4, 32).float(), draw(40, 2, 32, seed=1).float(), draw(40, 2, 32, seed=2).float()
    starts = torch.tensor([0, 40], dtype=torch.int32)
    got = ops.ragged_attention(*there(q, k, v, starts), 0.2, None).cpu()
    want = select(kernel="auto").ragged_attention(q, k, v, starts, 0.2, None)
    assert (got - want).abs().max() < TOLERANCE[torch.float32]


def test_without_a_gpu_the_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"needs a GPU.*TRITON_INTERPRET=1"):
        select(kernel="triton")
