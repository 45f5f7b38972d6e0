"""CLD against the authors' score written out, what moves it and what does not, and which documents are kept."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from waypost.core.errors import ConfigError
from waypost.data.selectors import Documents, Losses, best
from waypost.data.selectors.cld import Cld


def documents(losses: Any, reference: Any, domains: Any = None, tokens: Any = None) -> Documents:
    table = Losses(np.array(losses, dtype=np.float64), np.array(reference, dtype=np.float64))
    count = table.documents.shape[1]
    return Documents(
        num_tokens=np.array(tokens if tokens is not None else [10] * count),
        domains=np.array(domains if domains is not None else [0] * count),
        num_models=len(table.documents),
        losses=lambda: table,
    )


def reference(x: list[float], y: list[float]) -> float:
    """Pearson's r of the differences, a number at a time: mean((x - mean) (y - mean)) / (std std), as the authors have it."""
    dx, dy = ([b - a for a, b in itertools.pairwise(z)] for z in (x, y))
    mx, my = sum(dx) / len(dx), sum(dy) / len(dy)
    sx, sy = (math.sqrt(sum((v - m) ** 2 for v in d) / len(d)) for d, m in ((dx, mx), (dy, my)))
    return sum((a - mx) * (b - my) for a, b in zip(dx, dy, strict=True)) / len(dx) / (sx * sy) if sx and sy else 0.0


LOSSES = np.random.default_rng(3).normal(3.0, 0.5, (9, 14)).cumsum(axis=0)
REFERENCE = np.random.default_rng(4).normal(3.0, 0.5, (9, 2)).cumsum(axis=0)
DOMAINS = [0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("skip", [0, 3])
def test_golden(skip: int) -> None:
    found = Cld(skip=skip).score(documents(LOSSES, REFERENCE, DOMAINS))
    want = [reference(LOSSES[skip:, m].tolist(), REFERENCE[skip:, d].tolist()) for m, d in enumerate(DOMAINS)]
    assert found.tolist() == pytest.approx(want, abs=1e-14)


def test_by_hand() -> None:
    """Differences of the reference -1, -2, -3: the same, the opposite, none at all, and -1, -3, -2 (r = 1/2)."""
    losses = [[9, 0, 5, 9], [8, 1, 5, 8], [6, 3, 5, 5], [3, 6, 5, 3]]
    assert Cld().score(documents(losses, [[9], [8], [6], [3]])).tolist() == pytest.approx([1.0, -1.0, 0.0, 0.5])


@given(st.floats(0.01, 100), st.floats(-50, 50), st.integers(0, 13))
def test_scale_and_shift_of_a_document_s_losses_change_nothing(scale: float, shift: float, which: int) -> None:
    moved = LOSSES.copy()
    moved[:, which] = scale * moved[:, which] + shift
    scores = [Cld().score(documents(losses, REFERENCE, DOMAINS)) for losses in (LOSSES, moved)]
    assert np.allclose(scores[0], scores[1], atol=1e-9)


@example([[0.0, 1e-81, 3e-81, 2e-81, 7e-81]])
@given(st.lists(st.lists(st.floats(-100, 100), min_size=5, max_size=5), min_size=1, max_size=6))
def test_scores_are_correlations(columns: list[list[float]]) -> None:
    losses = np.array(columns).T
    found = Cld().score(documents(losses, losses[:, :1]))
    assert bool((np.abs(found) <= 1 + 1e-9).all())


def kept(scores: Any, share: float, domains: Any, tokens: Any) -> NDArray[np.bool_]:
    pool = documents(np.zeros((4, len(scores))), np.zeros((4, 2)), domains, tokens)
    return best(np.array(scores, dtype=np.float64), pool, share)


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 2), st.integers(1, 99)), min_size=1, max_size=30), st.floats(0.01, 1)
)
def test_a_share_of_each_domain_is_kept_and_it_is_the_best(given: list[tuple[float, int, int]], share: float) -> None:
    scores, domains, tokens = (np.array(column) for column in zip(*given, strict=True))
    chosen = kept(scores, share, domains, tokens)
    for domain in np.unique(domains):
        mine = domains == domain
        inside, wanted = tokens[mine & chosen].sum(), share * tokens[mine].sum()
        assert inside >= wanted - 1e-9
        assert (
            inside - tokens[mine & chosen][np.argmin(scores[mine & chosen])] <= wanted
            or (mine & chosen).sum() == 1
            or (scores[mine & chosen].min() == np.sort(scores[mine & chosen])[1])
        )
        if (mine & ~chosen).any():
            assert scores[mine & ~chosen].max() <= scores[mine & chosen].min()


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_a_share_of_one_keeps_everything(scores: list[float]) -> None:
    assert kept(scores, 1.0, [0] * len(scores), [3] * len(scores)).all()


def test_too_few_checkpoints_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"9 checkpoint\(s\) less skip=7 leave 2; a correlation of differences needs 3"):
        Cld(skip=7).score(documents(LOSSES, REFERENCE, DOMAINS))
    with pytest.raises(ConfigError, match="at least 0"):
        Cld(skip=-1)
