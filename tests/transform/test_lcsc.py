"""LCSC: moving averages by their recurrence, the search on a loss whose optimum is known, and the neutral setting."""

from __future__ import annotations

import math
import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import same_bits, tiny_run, weights

import waypost
from waypost.core.errors import ConfigError, NumericsError
from waypost.keep.reader import Checkpoint
from waypost.transform.merging.lcsc import Lcsc, child, ema_profile, evolve
from waypost.transform.merging.soup import Soup
from waypost.transform.plan import Plan, Services

LOSSES = {10: 3.0, 20: 2.5, 30: 2.0, 40: 1.8}


@pytest.fixture
def run(tmp_path):
    return tiny_run(tmp_path / "run", LOSSES)


@pytest.fixture
def sources(run):
    return [Checkpoint(run / f"step-{step:08d}") for step in sorted(LOSSES, reverse=True)]


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1.0])
def test_a_profile_is_the_moving_average_written_out(decay):
    """avg_t = avg_{t-1} + (x_t - avg_{t-1}) / (1 + decay + ... + decay^t): the average corrected for its beginning."""
    values = [1.5, -2.0, 0.25, 4.0]
    average, norm = 0.0, 0.0
    for value in values:
        norm = 1.0 + decay * norm
        average += (value - average) / norm
    got = sum(w * v for w, v in zip(ema_profile(decay, 4), reversed(values), strict=True))
    assert got == pytest.approx(average, rel=1e-14)


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000), st.floats(0, 3))
def test_children_sum_to_one(count, seed, noise):
    draws = random.Random(seed)
    born = child(ema_profile(0.5, count), ema_profile(1.0, count), noise, draws)
    assert len(born) == count
    assert math.fsum(born) == pytest.approx(1.0, abs=1e-14 * (1 + sum(map(abs, born))))


def test_a_child_without_noise_lies_between_its_parents():
    mother, father = ema_profile(0.0, 5), ema_profile(1.0, 5)
    born = child(mother, father, 0.0, random.Random(3))
    share = (born[0] - father[0]) / (mother[0] - father[0])
    assert 0.0 <= share <= 1.0
    assert born == pytest.approx([share * m + (1 - share) * f for m, f in zip(mother, father, strict=True)], abs=1e-15)


def test_the_search_finds_the_optimum_of_a_quadratic():
    """theta_k in R^3 and the loss |sum_k a_k theta_k - wanted|^2; the optimum, by least squares, has a negative coefficient."""
    thetas = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    best = torch.tensor([1.4, -0.6, 0.5, -0.3], dtype=torch.float64)
    wanted = best @ thetas

    def loss_of(a: list[float]) -> float:
        return float((torch.tensor(a, dtype=torch.float64) @ thetas - wanted).square().sum())

    seeds = [ema_profile(decay, 4) for decay in (0.0, 0.5, 1.0)]
    found, tried = evolve(loss_of, seeds, 1500, 12, 0.3, random.Random(0))
    assert len(tried) == 1503
    assert loss_of(found) == min(tried) < 0.02 * min(map(loss_of, seeds))
    assert found == pytest.approx(best.tolist(), abs=0.25)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 30), st.integers(2, 6), st.floats(0, 2), st.integers(0, 99))
def test_the_result_is_the_best_of_all_that_was_tried(iterations, population, noise, seed):
    seeds = [ema_profile(decay, 3) for decay in (0.0, 1.0)]
    known: dict[tuple[float, ...], float] = {}

    def loss_of(a: list[float]) -> float:
        return known.setdefault(tuple(a), abs(math.sin(7.0 * a[1]) + a[2]))

    found, tried = evolve(loss_of, seeds, iterations, population, noise, random.Random(seed))
    assert known[tuple(found)] == min(tried) <= min(map(loss_of, seeds))


@given(st.integers(1, 12), st.floats(0, 1), st.integers(2, 9), st.integers(0, 99))
def test_without_a_search_the_first_of_the_best_profiles_is_taken_as_it_is(count, decay, population, seed):
    """The neutral setting is decay 0, the newest checkpoint alone; decay 1 is the plain mean."""
    assert ema_profile(0.0, count) == [1.0] + [0.0] * (count - 1)
    assert ema_profile(1.0, count) == [1.0 / count] * count
    seeds = [ema_profile(d, count) for d in (0.0, decay, 1.0)]
    for wanted in seeds:
        found, tried = evolve(partial(math.dist, wanted), seeds, 0, population, 0.5, random.Random(seed))
        assert (found, len(tried), min(tried)) == (wanted, 3, 0.0)


def test_neutral_is_the_newest_checkpoint_bit_for_bit(run, tmp_path):
    newest = weights(run / "step-00000040")
    neutral = {"name": "lcsc", "decays": [0.0], "iterations": 0}
    settings = [({"name": "last_k", "k": 1}, {"name": "lcsc"}), ({"name": "last_k", "k": 4}, neutral)]
    for number, (select, method) in enumerate(settings):
        out = weights(waypost.transform({"sources": [str(run)], "select": select, "method": method}, tmp_path / f"o{number}"))
        assert all(same_bits(newest[name], out[name]) for name in newest)


def test_one_profile_of_decay_one_is_the_soup(sources):
    plan = Lcsc(decays=[1.0], iterations=0).plan(sources, Services())
    assert plan.notes["weights"] == Soup().plan(sources, Services()).notes["weights"]


def test_a_loss_that_is_not_finite_is_passed_over(sources):
    def score(plan: Plan) -> float:
        if plan.notes["weights"][0] > 0.9:
            raise NumericsError("the loss is nan")
        return plan.notes["weights"][0]

    found = Lcsc(iterations=20).plan(sources, Services(score=score))
    assert found.notes["weights"][0] <= 0.9
    assert math.isinf(found.notes["seed_losses"][0])

    def broken(plan: Plan) -> float:
        raise NumericsError("the loss is nan")

    with pytest.raises(NumericsError, match="no combination of the 4 checkpoints has a finite loss"):
        Lcsc(iterations=2).plan(sources, Services(score=broken))


def test_a_search_needs_a_text_and_sound_settings(sources):
    with pytest.raises(ConfigError, match=r"searches on a text; set held_out\.path"):
        Lcsc().plan(sources, Services())
    with pytest.raises(ConfigError, match=r"decays=\[1.5\]"):
        Lcsc(decays=[1.5])
    with pytest.raises(ConfigError, match="population=1 at least 2"):
        Lcsc(population=1)


def test_as_a_recipe_it_beats_what_it_began_with(run, tmp_path):
    text = tmp_path / "search.txt"
    text.write_text("in the beginning was the word, and the word was long. " * 8)
    recipe = {
        "sources": [str(run)], "select": {"name": "last_k", "k": 3}, "method": {"name": "lcsc", "iterations": 6},
        "held_out": {"path": str(text), "max_tokens": 96, "seq_tokens": 32},
    }  # fmt: skip
    out = waypost.transform(recipe, tmp_path / "out")
    lineage = Checkpoint(out).lineage
    assert lineage is not None
    notes = lineage.recipe["plan"]["notes"]
    assert notes["best_loss"] <= min(notes["seed_losses"])
    assert notes["candidates"] == 6 + 6
    assert len(notes["weights"]) == 3
