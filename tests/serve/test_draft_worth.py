"""What guesses cost and gain: times are given, no clock is asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from waypost.serve import draft_worth
from waypost.serve.draft_worth import (
    DECLINED,
    FORGET,
    HOPE,
    HOPED,
    KNOWN,
    LEAST,
    MOST,
    OPENING,
    SHARE,
    TILE_ROWS,
    Acceptance,
    Regime,
    tiles,
    worthwhile,
)

CHANCES = st.lists(st.floats(LEAST, 1), max_size=40).map(lambda chances: sorted(chances, reverse=True))


def of_tiles(first: float, more: float) -> Callable[[int], float]:
    """A step that takes `first` for its first tile, and `more` for each other."""
    return lambda rows: first + more * (tiles(rows) - 1)


def known(sequences: int, plain_s: float = 1.0) -> Regime:
    regime = Regime(sequences)
    for _ in range(KNOWN):
        assert not regime.drafts, "nothing is guessed before it is known what a step takes"
        regime.observe(sequences, plain_s)
    return regime


@settings(max_examples=60, deadline=None)
@given(chances=CHANCES, sequences=st.integers(1, 20), more=st.floats(0, 2))
def test_no_other_number_of_guesses_gives_more_tokens_a_second(chances: list[float], sequences: int, more: float) -> None:
    price = of_tiles(1.0, more)
    plain = price(sequences)
    best = worthwhile(chances, sequences, lambda rows: price(rows) / plain)
    tokens = list(accumulate((draft_worth.VALUE * chance for chance in chances), initial=float(sequences)))
    rates = [tokens[k] / price(sequences + k) for k in range(len(chances) + 1)]
    assert rates[best] == pytest.approx(max(rates))


def test_a_guess_more_is_not_worth_a_tile() -> None:
    price = of_tiles(1.0, 0.5)
    assert worthwhile([0.9] * 8, 1, price) == 7
    assert worthwhile([0.9] * 8, 8, price) == 8, "three quarters of 7.2 tokens for half of a step that gives 8"
    assert worthwhile([0.4] * 8, 8, price) == 0
    assert worthwhile([1.0] * 6 + [0.3] * 2, 8, price) == 8, (
        "those at the end pay nothing, and cost nothing in a tile that is there"
    )


def test_guesses_that_hardly_ever_come_true_are_not_tried_where_rows_are_free() -> None:
    assert known(1).choose([0.5, LEAST, LEAST / 2]) == 2


def test_acceptance_counts_what_was_found_out() -> None:
    acceptance = Acceptance()
    assert acceptance.chance == HOPED
    acceptance.learn(4, 4)
    assert acceptance.chance > HOPED
    acceptance.learn(4, 0)
    found = (acceptance.tried, acceptance.came_true)
    assert found == (4 * FORGET + 1, 4 * FORGET), "of three guesses after a wrong one nothing is known"
    assert acceptance.chance == pytest.approx((4 * FORGET + HOPE * HOPED) / (4 * FORGET + 1 + HOPE))


def test_what_a_step_takes_is_hoped_then_measured() -> None:
    regime = known(8, plain_s=2.0)
    hoped = regime.ratio(16)
    assert 1.0 < hoped < regime.ratio(24)
    regime.observe(16, 200.0)
    assert regime.ratio(16) == hoped, "one pause does not condemn a size"
    for _ in range(4):
        regime.observe(16, 3.0)
    assert regime.ratio(9) == regime.ratio(16) == 1.5
    assert regime.ratio(8) == 1.0
    assert regime.ratio(24) > 1.5, "a larger step takes longer, before it was measured"


def test_a_slower_machine_is_no_reason_to_guess() -> None:
    """All steps take three times as long as before: guesses are given up, and found to gain again."""
    regime = known(8)
    for slow in (1.0, 3.0):
        for _ in range(1000):
            regime.observe(16 if regime.drafts else 8, slow * (1.4 if regime.drafts else 1.0), accepted=8)
    assert regime.ratio(16) == pytest.approx(1.4)
    assert regime.on


def test_a_step_without_guesses_is_run_now_and_then() -> None:
    regime, since = known(1), 0
    for _ in range(500):
        since = since + 1 if regime.drafts else 0
        assert since <= draft_worth.KNOWN_FOR * MOST
        regime.observe(5 if regime.drafts else 1, 1.0, accepted=4)
    assert regime.credit == MOST


def test_guesses_that_are_never_worth_their_rows_end_a_trial() -> None:
    regime = known(8)
    for _ in range(DECLINED):
        assert regime.drafts
        assert regime.choose([0.2]) == 0
        regime.observe(8, 1.0)
    assert not regime.on
    steps = 0
    while not regime.on:
        regime.observe(8, 1.0)
        steps += 1
    assert steps == pytest.approx(OPENING / SHARE, abs=2)
    assert (regime.trials, regime.drafts) == (2, True)


class Account(RuleBasedStateMachine):
    """Texts that begin and cease to repeat, on a machine whose costs are given: losses are bounded, and gains are found."""

    @initialize(
        sequences=st.integers(1, 17), more=st.floats(0.05, 1.0), guessing=st.floats(0.0, 0.3), plain_s=st.floats(1e-3, 1e3)
    )
    def begin(self, sequences: int, more: float, guessing: float, plain_s: float) -> None:
        self.regime, self.price = Regime(sequences), of_tiles(1.0, more)
        self.guessing, self.plain_s = guessing, plain_s
        self.steps = self.gained = self.worst = self.dearest = self.generations = 0.0

    def step(self, chance: float, believed: float) -> bool:
        """Whether guesses were allowed; of four for each sequence, `chance` comes true of those that were run."""
        regime, n = self.regime, self.regime.sequences
        plain, allowed = self.price(n), regime.drafts
        guesses = regime.choose([believed] * 4 * n) if allowed else 0
        accepted = math.floor(chance * guesses)
        ratio = self.price(n + guesses) / plain
        guessing = self.guessing if allowed else 0.0
        regime.observe(n + guesses, (ratio + guessing) * self.plain_s, guessing * self.plain_s, accepted)
        gain = accepted / n - (ratio - 1.0) - guessing
        self.steps, self.gained, self.worst = self.steps + 1, self.gained + gain, max(self.worst, -gain)
        self.dearest = max(self.dearest, (1.0 - draft_worth.VALUE) * accepted / n - gain)  # as it was booked
        return allowed

    @rule(chance=st.floats(0.0, 1.0), steps=st.integers(1, 60))
    def a_text_that_seems_to_repeat(self, chance: float, steps: int) -> None:
        """More than comes true is believed."""
        for _ in range(steps):
            self.step(chance, (chance + HOPED) / 2)

    @rule()
    def a_text_that_repeats(self) -> None:
        """Where all guesses come true and a tile more gains, they run as soon as a trial was earned, and never stop."""
        n = self.regime.sequences
        seen = [self.price(TILE_ROWS * size) / self.price(n) for size in range(tiles(n), tiles(5 * n) + 1)]
        accepted = [min(TILE_ROWS * (tiles(n) + i), 5 * n) - n for i in range(len(seen))]
        gains = [1.0 + draft_worth.VALUE * a / n - r - self.guessing for a, r in zip(accepted, seen, strict=True)]
        if min(gains) < 0.1:
            return
        waited = 0
        while not self.regime.on:
            self.step(1.0, 1.0)
            waited += 1
        assert waited <= (OPENING + self.dearest) / SHARE + 1
        assert sum(self.step(1.0, 1.0) for _ in range(40)) >= 40 - KNOWN - 2

    @rule(share=st.floats(0.0, 1.0))
    def some_texts_are_new(self, share: float) -> None:
        count = math.ceil(share * self.regime.sequences)
        self.regime.meet(count)
        self.generations += count / self.regime.sequences

    @invariant()
    def losses_are_bounded(self) -> None:
        assert -self.gained <= (OPENING + self.worst) * (1 + self.generations) + SHARE * self.steps + 1e-6
        assert self.regime.credit <= MOST


TestAccount = Account.TestCase
TestAccount.settings = settings(max_examples=20, stateful_step_count=6, deadline=None)


def test_a_drafter_that_loses_is_off_but_for_trials() -> None:
    """Every guess fails, and a step with guesses takes half a step more."""
    regime, tried = known(8), 0
    for _ in range(2000):
        guesses = regime.choose([HOPED] * 8) if regime.drafts else 0
        tried += guesses > 0
        regime.observe(8 + guesses, 1.5 if guesses else 1.0)
    assert 10 <= tried <= (OPENING + SHARE * 2000) / 0.5 + 1


def test_new_texts_begin_with_a_trial() -> None:
    """What copying gained pays for no long trials of other texts, and what those lost keeps no copying one waiting."""
    regime = known(8)
    for _ in range(100):
        regime.observe(16 if regime.drafts else 8, 1.2, accepted=8 if regime.drafts else 0)
    assert regime.credit == pytest.approx(MOST, abs=0.5)
    regime.meet(8)
    assert regime.credit == OPENING
    while regime.on:
        regime.observe(16 if regime.drafts else 8, 1.5 if regime.drafts else 1.0)
    regime.meet(4)
    assert 0.0 < regime.credit < OPENING
    regime.meet(8)
    regime.observe(8, 1.0)
    assert regime.drafts


def test_rows_of_a_tile() -> None:
    assert [tiles(rows) for rows in (1, TILE_ROWS, TILE_ROWS + 1, 2 * TILE_ROWS)] == [1, 1, 2, 2]


def test_the_wait_for_a_trial_is_for_what_was_booked() -> None:
    """Steps that gained in truth and lost as they are booked: three quarters of what came true."""
    state = Account()
    state.begin(sequences=6, more=0.75, guessing=0.0, plain_s=1.0)
    state.a_text_that_seems_to_repeat(chance=0.5, steps=6)
    assert state.worst == 0.0
    assert not state.regime.on
    state.a_text_that_repeats()
    state.losses_are_bounded()
