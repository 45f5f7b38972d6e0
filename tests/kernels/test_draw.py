"""The draw against transformers' logits processors and against its own definition in loops, in every set of kernels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels import build, select
from waypost.kernels.draw import truncation
from waypost.kernels.draw.naive import BLOCK, inverse_cdf

KERNELS = ("naive", "cpu") if build.available() else ("naive",)
V = 300
MOST = 1.0 - 2.0**-53
"""The largest uniform number."""


def rows(n: int = 6, vocab: int = V, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


def draw(
    kernel: str, logits: Tensor, uniform: list[float], temperature: float = 1.0, k: int = 0, p: float = 1.0, m: float = 0.0
) -> tuple[list[int], list[float]]:
    """One row of logits (V,) drawn from at every uniform number."""
    wishes = torch.tensor([[temperature, k, p, m, u] for u in uniform], dtype=torch.float64)
    tokens, shares = select(kernel=kernel).draw(logits[None], [0] * len(uniform), [None] * len(uniform), wishes)  # type: ignore[arg-type]
    return tokens.tolist(), shares.tolist()


def check_distribution(kernel: str, logits: Tensor, want: Tensor, **how: float) -> None:
    """`want` (V,) in float64: drawn at the middle of each token's interval, that token comes, with its share; so all that is
    left out there is left out here, to a few millionths, since the shares sum to one."""
    kept = torch.nonzero(want)[:, 0]
    ends = want[kept].cumsum(0)
    wide = want[kept] > 1e-7  # what is narrower than a rounding of float32 may lie beside its place
    middles = (ends - want[kept] / 2).clamp(max=MOST)
    tokens, shares = draw(kernel, logits, middles[wide].tolist(), **how)  # type: ignore[arg-type]
    assert tokens == kept[wide].tolist()
    torch.testing.assert_close(torch.tensor(shares, dtype=torch.float64), want[kept][wide], rtol=4e-6, atol=0)  # of float32


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("k", [None, 1, 7, V])
@pytest.mark.parametrize("p", [1.0, 0.99, 0.6, 0.01])
@pytest.mark.parametrize("m", [0.0, 0.05, 1.0])
def test_the_distribution_is_that_of_transformers(kernel: str, temperature: float, k: int | None, p: float, m: float) -> None:
    from transformers.generation import logits_process as hf

    logits = rows(3)
    steps: list[object] = [hf.TemperatureLogitsWarper(temperature)]
    steps += [hf.TopKLogitsWarper(k)] if k else []
    steps += [hf.TopPLogitsWarper(p)] if p < 1 else []
    steps += [hf.MinPLogitsWarper(m)] if m else []
    scores = logits.clone()
    for step in steps:
        scores = step(torch.zeros(len(logits), 1, dtype=torch.int64), scores)  # type: ignore[operator]
    for row, want in zip(logits, torch.softmax(scores.double(), -1), strict=True):
        check_distribution(kernel, row, want, temperature=temperature, k=k or 0, p=p, m=m)


def slowly(logits: Tensor, temperature: float, k: int, p: float, m: float) -> Tensor:
    """(V,) probabilities in float64, by sorting; what is as likely as the last one kept is kept too."""
    weights = [math.exp((x - float(logits.max())) / temperature) for x in logits.tolist()]
    if 0 < k < len(weights):
        last = sorted(weights, reverse=True)[k - 1]
        weights = [w if w >= last else 0.0 for w in weights]
    floor = m * max(weights)
    if p < 1:
        falling = sorted(weights, reverse=True)
        reached = next(i for i, mass in enumerate(itertools.accumulate(falling)) if mass >= p * sum(weights))
        floor = max(floor, falling[reached])
    kept = torch.tensor([w if w >= floor else 0.0 for w in weights], dtype=torch.float64)
    return kept / kept.sum()


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 15, 16, 17, 255, 256, 257, 1000]),
    levels=st.sampled_from([1, 2, 9, 1000]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    temperature=st.sampled_from([1e-6, 0.25, 1.0, 4.0]),
    k=st.sampled_from([0, 1, 2, 3, 5, 40, 2000]),
    p=st.sampled_from([1.0, 0.997, 0.83, 0.41, 1e-4]),
    m=st.sampled_from([0.0, 0.123, 1.0]),
    forbidden=st.booleans(),
)
def test_it_is_what_sorting_says(
    kernel: str, vocab: int, levels: int, scale: float, seed: int, dtype: torch.dtype, temperature: float, k: int, p: float,
    m: float, forbidden: bool,
) -> None:  # fmt: skip
    """Few levels are many equals: with a power of two between them and shares that no sum of theirs hits."""
    source = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randint(levels, (vocab,), generator=source) / levels).to(dtype)
    if forbidden:
        logits[1::2] = -math.inf
    check_distribution(kernel, logits, slowly(logits.double(), temperature, k, p, m), temperature=temperature, k=k, p=p, m=m)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [6.0, 1.5, 0.01])
@pytest.mark.parametrize("how", [{"p": 0.9}, {"k": 40}, {"k": 2500}, {"k": 40, "p": 0.5}, {"k": 5, "p": 0.999, "m": 0.2}, {}])
def test_small_and_large_nuclei_of_a_large_vocabulary(kernel: str, scale: float, how: dict[str, float]) -> None:
    logits = rows(1, 5000, scale=scale)[0].bfloat16()
    complete = {"temperature": 1.0, "k": 0, "p": 1.0, "m": 0.0, **how}
    check_distribution(kernel, logits, slowly(logits.double(), **complete), **complete)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("many", "rare", "how"), [(1, 0.3, {"p": 0.9}), (1, 0.12, {"p": 0.9}), (39, 9.0, {"k": 40}), (3, 1.0, {"k": 2})]
)
def test_a_cut_between_a_few_tokens_and_a_flat_tail(kernel: str, many: int, rare: float, how: dict[str, float]) -> None:
    """`many` tokens of weight 1 all over the vocabulary, the others `rare` together: the last one kept is one of them."""
    logits = torch.full((5000,), math.log(rare / (5000 - many)))
    logits[torch.linspace(0, 4999, many).long()] = 0.0
    complete = {"temperature": 1.0, "k": 0, "p": 1.0, "m": 0.0, **how}
    check_distribution(kernel, logits, slowly(logits, **complete), **complete)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_ends_of_the_interval_draw_tokens_that_are_kept(kernel: str) -> None:
    """At the largest uniform number the product with the total may round up to the total."""
    for seed in range(60):
        logits = rows(1, 3 * BLOCK, seed, scale=1.0)[0]
        logits[2 * BLOCK + 7 :], logits[:3] = -math.inf, -math.inf
        tokens, shares = draw(kernel, logits, [0.0, MOST])
        assert tokens == [3, 2 * BLOCK + 6]
        assert min(shares) > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_temperatures_make_all_that_is_allowed_alike(kernel: str) -> None:
    logits = rows(1)[0]
    logits[::2] = -math.inf
    for temperature in (1e30, 1e46, 1e300):
        tokens, shares = draw(kernel, logits, [0.0, 0.5, MOST], temperature)
        assert tokens == [1, V // 2 + 1, V - 1]
        assert shares == pytest.approx([2 / V] * 3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("how", [{"k": 50}, {"k": 50, "p": 0.9}])
def test_more_are_to_be_kept_than_may_come(kernel: str, how: dict[str, float]) -> None:
    logits = torch.full((3000,), -math.inf)
    logits[[5, 700, 2999]] = torch.tensor([0.0, 1.0, -2.0])
    complete = {"temperature": 1.0, "k": 0, "p": 1.0, "m": 0.0, **how}
    check_distribution(kernel, logits, slowly(logits, **complete), **complete)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_smallest_temperature_is_greedy(kernel: str) -> None:
    for row in rows(scale=1e4):
        assert draw(kernel, row, [0.0, 0.5, MOST], 1e-6, p=0.5, m=0.5) == ([int(row.argmax())] * 3, [1.0] * 3)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None)
@given(
    order=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    edited=st.lists(st.booleans(), min_size=9, max_size=9),
    apart=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_row_does_not_depend_on_the_rows_beside_it(
    kernel: str, order: list[int], edited: list[bool], apart: bool, dtype: torch.dtype
) -> None:
    """In whatever order, rows twice, some of them replaced, in memory side by side or not."""
    logits = rows(6, 2 * V).to(dtype)
    logits = logits[:, :V] if apart else logits[:, :V].contiguous()
    instead = rows(6, seed=5).to(torch.float64 if dtype == torch.float64 else torch.float32)
    wishes = torch.tensor([[0.8, 5 * i, 1 - i / 9, i / 20, i / 6] for i in range(6)], dtype=torch.float64)
    op = select(kernel=kernel).draw  # type: ignore[arg-type]
    own = [instead[i] if edited[at] else None for at, i in enumerate(order)]
    together = op(logits, order, own, wishes[order])
    for at, i in enumerate(order):
        alone = op(logits[i : i + 1], [0], [own[at]], wishes[i : i + 1])
        assert [t[at].item() for t in together] == [t[0].item() for t in alone]
        if own[at] is not None:
            assert alone[0].item() == op(instead, [i], [None], wishes[i : i + 1])[0].item()


@pytest.mark.skipif("cpu" not in KERNELS, reason="no C++ compiler here and no library from a wheel; naive is used")
def test_rows_that_are_not_there_are_refused() -> None:
    op, wish = select(kernel="cpu").draw, torch.tensor([[1.0, 0, 1, 0, 0.5]])
    with pytest.raises(ShapeError, match="rows 6 to 6 of 6"):
        op(rows(), [6], [None], wish)
    with pytest.raises(ShapeError, match="edited"):
        op(rows(), [0], [rows(1, V + 1)[0]], wish)
    with pytest.raises(ShapeError, match=r"wishes \(1, 5\)"):
        op(rows(), [0, 1], [None, None], wish)


def test_top_p_looks_beyond_every_prefix() -> None:
    """Nuclei that end in the first head, in the second, and in the sorted rest, in one batch, equal a full sort."""
    vocab = 3000
    probs = torch.softmax(torch.stack([rows(1, vocab, scale=s)[0] for s in (6.0, 1.5, 0.01)]), -1)
    got = truncation.top_p(probs, torch.full((3, 1), 0.9, dtype=torch.float64))
    sizes = []
    for row, kept in zip(probs.tolist(), got, strict=True):
        total, want = 0.0, set()
        for j in sorted(range(vocab), key=lambda j: -row[j]):
            if total < 0.9:
                want.add(j)
            total += row[j]
        assert set(torch.nonzero(kept)[:, 0].tolist()) == want
        sizes.append(len(want))
    first, second = truncation.PREFIXES
    assert sizes[0] < first < sizes[1] < second < sizes[2], sizes


def test_equal_logits_stay_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert (truncation.top_k(logits, torch.tensor([[2]])) > -torch.inf).tolist() == [[False, True, True, True, True, False]]
    probs = torch.softmax(logits, -1)
    kept = truncation.top_p(probs, torch.tensor([[float(probs[0, 1]) + 0.01]], dtype=torch.float64))
    assert (kept > 0).tolist() == [[False, True, True, True, True, False]]


def test_inverse_cdf_has_the_distribution() -> None:
    probs = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.125, 0.125, 0.0])
    grid = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    tokens, shares = inverse_cdf(probs.expand(64, -1).contiguous(), grid)
    assert tokens.bincount(minlength=7).tolist() == [0, 32, 0, 16, 8, 8, 0]
    assert torch.equal(shares, probs[tokens].double())
