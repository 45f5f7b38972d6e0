"""The compiled kernels against their specification, in values and in gradients, and the independence of a row's bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waypost.kernels import PAGE_TOKENS, build, select
from waypost.kernels.attention import naive as naive_attention

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler here and no library from a wheel; naive is used")

# Error of one operator against the float64 specification: a few roundings of the output dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    scale = max(1.0, want.abs().max().item())
    assert (got.double() - want.double()).abs().max().item() <= TOLERANCE[dtype] * scale


def value_and_grads(function, tensors: list[Tensor]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    (out * draw(*out.shape, seed=9).to(out.dtype)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check_twins(dtype: torch.dtype, name: str, tensors: list[Tensor], *args: object) -> None:
    """Values and gradients of the compiled operator in `dtype` against the specification in float64."""
    rounded = [t.to(dtype) for t in tensors]
    fast = value_and_grads(lambda *t: getattr(select(kernel="cpu"), name)(*t, *args), rounded)
    slow = value_and_grads(lambda *t: getattr(select(kernel="naive"), name)(*t, *args), [t.double() for t in rounded])
    for got, want in zip(fast, slow, strict=True):
        assert_near(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 48), (1, 7), (130, 64), (3, 2, 24)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_twins(dtype, "rms_norm", [draw(*shape), draw(shape[-1], seed=1)], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 24, 64])
def test_rope(dtype: torch.dtype, width: int) -> None:
    angle = draw(7, width // 2, seed=3).float()
    check_twins(dtype, "rope", [draw(7, 3, width)], angle.cos(), angle.sin())


def test_results_are_rounded_to_bfloat16_as_pytorch_rounds_them() -> None:
    """Every bfloat16 there is times a number, denormals and infinities among them and beside others in one vector."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))].view(-1, 32)
    factor = torch.full(every.shape, 0.7353)
    x = torch.cat([every, torch.zeros_like(every)], dim=1)[:, None]
    got = select(kernel="cpu").rope(x, factor, torch.zeros_like(factor))[:, 0, :32]
    want = (every.float() * factor).bfloat16()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0).view(torch.int16), want.nan_to_num(0.0).view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 40, 64])
def test_swiglu(dtype: torch.dtype, width: int) -> None:
    check_twins(dtype, "swiglu", [draw(9, width), draw(9, width, seed=1)])


def test_swiglu_of_extreme_gates_stays_finite() -> None:
    gate = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4]])
    out = select(kernel="cpu").swiglu(gate, torch.ones_like(gate))
    torch.testing.assert_close(out, select(kernel="naive").swiglu(gate, torch.ones_like(gate)))


CASES = [  # lengths, heads, groups, width, window
    ([1], 1, 1, 8, None),
    ([37], 4, 2, 16, None),
    ([16, 1, 50, 33], 6, 2, 64, None),
    ([70, 5], 3, 1, 24, 20),
    ([130], 4, 4, 40, 7),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "heads", "groups", "width", "window"), CASES)
def test_ragged_attention(
    dtype: torch.dtype, lengths: list[int], heads: int, groups: int, width: int, window: int | None
) -> None:
    rows = sum(lengths)
    tensors = [draw(rows, heads, width), draw(rows, groups, width, seed=1), draw(rows, groups, width, seed=2)]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    check_twins(dtype, "ragged_attention", tensors, starts, width**-0.5, window)


def test_ragged_attention_against_a_dense_softmax() -> None:
    q, k, v = draw(40, 4, 8), draw(40, 2, 8, seed=1), draw(40, 2, 8, seed=2)
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1)) * 0.3
    scores = scores.masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf)
    want = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.repeat_interleave(2, 1))
    starts = torch.tensor([0, 40], dtype=torch.int32)
    for kernel in ("naive", "cpu"):
        torch.testing.assert_close(select(kernel=kernel).ragged_attention(q, k, v, starts, 0.3, None), want)


@pytest.mark.parametrize("kernel", ["naive", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 7, 40])
def test_rows_with_context_have_the_bits_of_the_whole(kernel: str, dtype: torch.dtype, window: int | None) -> None:
    """Rows 50 .. 130 of sequences of 70, 5 and 120 over their keys so far: forward to the bit, and the gradients are those of
    the whole where only these rows have any (the compiled backward takes the same sums in the same order)."""
    q, k, v = draw(195, 6, 24, dtype=dtype), *(draw(195, 2, 24, dtype=dtype, seed=i) for i in (1, 2))
    op = select(kernel=kernel).ragged_attention  # type: ignore[arg-type]
    leaves, parts = ([x.clone().requires_grad_() for x in xs] for xs in ((q, k, v), (q[50:130], k[:130], v[:130])))
    whole = op(*leaves, torch.tensor([0, 70, 75, 195], dtype=torch.int32), 0.3, window)
    starts, context = torch.tensor([0, 20, 25, 80], dtype=torch.int32), torch.tensor([50, 0, 0], dtype=torch.int32)
    part = op(*parts, starts, 0.3, window, context)
    assert torch.equal(part, whole[50:130])
    grad = draw(80, 6, 24, dtype=dtype, seed=9)
    want = torch.autograd.grad(whole, leaves, torch.nn.functional.pad(grad, (0, 0, 0, 0, 50, 65)))
    for got, x, rows in zip(
        torch.autograd.grad(part, parts, grad), want, (slice(50, 130), slice(130), slice(130)), strict=True
    ):
        assert_near(got, x[rows], dtype)
        assert kernel == "naive" or torch.equal(got, x[rows])


def test_gradients_of_rows_with_context_do_not_depend_on_threads() -> None:
    """One sequence in one pass on one thread, in pieces on three."""
    q, k, v = draw(90, 6, 24).float(), draw(190, 2, 24, seed=1).float(), draw(190, 2, 24, seed=2).float()
    starts, context = torch.tensor([0, 90], dtype=torch.int32), torch.tensor([100], dtype=torch.int32)
    op, before, found = select(kernel="cpu").ragged_attention, torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(value_and_grads(lambda *t: op(*t, starts, 0.3, None, context), [q, k, v]))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_attention_gradients_by_differences() -> None:
    """Our backward against finite differences of our forward, in float64."""
    starts = torch.tensor([0, 3, 21], dtype=torch.int32)
    tensors = [draw(21, 2, 4), draw(21, 1, 4, seed=1), draw(21, 1, 4, seed=2)]
    leaves = [t.requires_grad_() for t in tensors]
    op = select(kernel="cpu").ragged_attention
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, starts, 0.5, 5), leaves)
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, starts, 0.5, None), leaves)


@pytest.mark.parametrize("kernel", ["naive", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_attention_bits_do_not_depend_on_chunks_or_neighbours(kernel: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """Prefill in one piece, in chunks of any size, and one token at a time beside strangers: one answer."""
    ops = select(kernel=kernel)  # type: ignore[arg-type]
    heads, groups, width = data.draw(st.sampled_from([(2, 1, 8), (6, 2, 24)]))
    length, window = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([None, 1, 9, 16, 33]))
    q, k, v = (draw(length, n, width, dtype=dtype, seed=i) for i, n in enumerate((heads, groups, groups)))
    whole = ops.ragged_attention(q, k, v, torch.tensor([0, length], dtype=torch.int32), 0.4, window)

    pages = -(-length // PAGE_TOKENS)
    order = torch.randperm(2 * pages + 2, generator=torch.Generator().manual_seed(length))
    table, stranger = order[:pages].int(), order[pages : 2 * pages].int()
    k_pages = torch.full((2 * pages + 2, groups, width, PAGE_TOKENS), torch.nan, dtype=dtype)
    v_pages = torch.full((2 * pages + 2, groups, PAGE_TOKENS, width), torch.nan, dtype=dtype)
    done = 0
    parts = []
    while done < length:
        n = min(data.draw(st.integers(1, 40)), length - done)
        span = torch.arange(done, done + n)
        both = [(x[done : done + n], x.flip(0)[done : done + n]) for x in (q, k, v)]
        slots = [t[span // PAGE_TOKENS].long() * PAGE_TOKENS + span % PAGE_TOKENS for t in (table, stranger)]
        ops.write_pages(torch.cat(both[1]), torch.cat(both[2]), k_pages, v_pages, torch.cat(slots))
        starts, context = torch.tensor([0, n, 2 * n], dtype=torch.int32), torch.full((2,), done, dtype=torch.int32)
        tables = torch.stack([table, stranger])
        out = ops.paged_attention(torch.cat(both[0]), k_pages, v_pages, tables, starts, context, 0.4, window)
        parts.append(out[:n])
        done += n
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    """Attention and norms, forward and backward: which rows share a block and whose it is changes nothing."""
    starts = torch.tensor([0, 90, 100], dtype=torch.int32)
    tensors = [draw(100, 6, 16).float(), draw(100, 2, 16, seed=1).float(), draw(100, 2, 16, seed=2).float()]
    x, weight = draw(700, 96).float(), draw(96, seed=1).float()
    ops = select(kernel="cpu")

    def run(count: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return [
                *value_and_grads(lambda q, k, v: ops.ragged_attention(q, k, v, starts, 0.3, None), tensors),
                *value_and_grads(lambda a, w: ops.rms_norm(a, w, 1e-5), [x, weight]),
            ]
        finally:
            torch.set_num_threads(before)

    for one, other in zip(run(1), run(threads), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "width"), [(None, 64), (None, 72), (100, 80)])
@pytest.mark.parametrize(("heads", "groups", "rows"), [(4, 4, 600), (6, 2, 250)])
def test_attention_bits_do_not_depend_on_the_size_of_blocks(
    dtype: torch.dtype, window: int | None, width: int, heads: int, groups: int, rows: int
) -> None:
    """The largest that a thread takes, of 250 queries, against those of few rows."""
    ops = select(kernel="cpu")
    q = draw(rows, heads, width, dtype=dtype)
    k, v = (draw(rows, groups, width, dtype=dtype, seed=seed) for seed in (1, 2))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = ops.ragged_attention(q, k, v, torch.tensor([0, rows], dtype=torch.int32), 0.3, window)
    finally:
        torch.set_num_threads(before)
    pages = -(-rows // 16)
    k_pages = torch.zeros(pages, groups, width, 16, dtype=dtype)
    v_pages = torch.zeros(pages, groups, 16, width, dtype=dtype)
    table, parts = torch.arange(pages, dtype=torch.int32)[None], []
    for done in range(0, rows, 44):
        here = slice(done, min(done + 44, rows))
        n = here.stop - done
        ops.write_pages(k[here], v[here], k_pages, v_pages, torch.arange(done, here.stop))
        starts, context = torch.tensor([0, n], dtype=torch.int32), torch.tensor([done], dtype=torch.int32)
        parts.append(ops.paged_attention(q[here], k_pages, v_pages, table, starts, context, 0.3, window))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (30, 62), (48, 1), (96, 17)])
def test_linear_bits_do_not_depend_on_rows(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    x, weight = draw(64, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype, seed=1)
    linear = select(kernel="naive").linear
    whole = linear(x, weight)
    for rows in (1, 2, 3, 5, 7, 15, 16, 17, 33):
        for begin in (0, 3):
            assert torch.equal(linear(x[begin : begin + rows], weight), whole[begin : begin + rows]), (rows, begin)
    assert_near(whole, x.double() @ weight.double().t(), dtype)


def test_stale_values_in_pages_are_never_seen() -> None:
    """A recycled page holds whatever its last owner left: NaN here."""
    for kernel in ("naive", "cpu"):
        ops = select(kernel=kernel)  # type: ignore[arg-type]
        k_pages, v_pages = torch.full((1, 1, 4, PAGE_TOKENS), torch.nan), torch.full((1, 1, PAGE_TOKENS, 4), torch.nan)
        q, k, v = draw(2, 1, 4).float(), draw(2, 1, 4, seed=1).float(), draw(2, 1, 4, seed=2).float()
        ops.write_pages(k, v, k_pages, v_pages, torch.tensor([0, 1]))
        table, starts = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
        out = ops.paged_attention(q, k_pages, v_pages, table, starts, torch.zeros(1, dtype=torch.int32), 0.5, None)
        torch.testing.assert_close(out, naive_attention.ragged_attention(q, k, v, starts, 0.5, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 17, 1000, 100_003])
def test_squared_norm(dtype: torch.dtype, count: int) -> None:
    x = draw(count, dtype=dtype)
    want = sum(v * v for v in x.double().tolist())
    for kernel in ("naive", "cpu"):
        assert abs(select(kernel=kernel).squared_norm(x) - want) <= 1e-5 * want  # type: ignore[arg-type]
