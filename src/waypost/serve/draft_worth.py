"""Whether guesses are worth their rows: decided by what steps took with guesses and without.

A step of n sequences draws n tokens, and one more for every guess that comes true. Where a step with guesses takes r times as
long as one without, guesses gain (n + accepted) / n - r such steps, less what guessing itself took; of `accepted`, VALUE is
booked. All is counted in steps without guesses of as many sequences, which are measured again and again, so that a machine that
slows down slows both.

`Regime` keeps an account: credit is what guesses have gained, up to MOST, and SHARE of every step. Guessing goes on while there
is credit; without any it is given up, and tried anew when SHARE has earned a trial. Texts that are new begin with the credit of
a trial, for what others gained or lost says little of them.
Invariant: where steps of a size always take the same, what guesses have lost for one number of sequences is at most
SHARE * steps and, for the first texts and for as many new ones again, OPENING and what one step can lose.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median, median_low

FORGET = 0.995
"""What past guesses still count at the next."""
HOPE, HOPED = 2.0, 0.7
"""What a guess is worth before any was tried: as if of two, 1.4 had come true."""
LEAST = 0.1
"""A guess that is less likely to come true is not tried, even where its row seems to be free."""
VALUE = 0.75
"""Of a token that all streams wait for together, what an accepted guess is worth: it brings one stream ahead of the others, and
those that end early leave smaller steps. A gain that it hides is small. A stream that is alone gains all of it."""
TILE_ROWS = 8
"""Rows that the products take together: the ninth costs more than the eighth."""
TILES_BEFORE_ROWS = 1.5
"""Before it was measured, a step is taken to cost as much as so many tiles, and its own. Hopeful: a try will tell."""
PAUSE = 3.0
"""Of what is hoped, the most that a step is taken to have cost: beyond, the machine stood still."""
RECENT = 9
"""Steps of a size whose median is what it takes: a pause of the machine is not."""
KNOWN = 3
"""Steps without guesses after which it is known what they take."""
KNOWN_FOR = 16
"""Steps with guesses, for each of credit, after which one without is run to know it again."""
DECLINED = 16
"""Steps in which no guess was worth its row, after which a trial is over: what made it decline may have changed."""
SHARE = 0.01
"""Of all steps, what trying guesses may cost."""
OPENING, MOST = 0.5, 3.0
"""Steps that a trial may lose before it is given up, and the most that gains let it lose later."""


@dataclass
class Acceptance:
    """How often a sequence's guesses came true."""

    tried: float = 0.0
    came_true: float = 0.0

    @property
    def chance(self) -> float:
        """That the next guess comes true, if those before it did."""
        return (self.came_true + HOPED * HOPE) / (self.tried + HOPE)

    def learn(self, drafted: int, accepted: int) -> None:
        """Of `drafted` guesses the first `accepted` came true; of those after the first false one nothing is known."""
        self.tried = FORGET * self.tried + accepted + (accepted < drafted)
        self.came_true = FORGET * self.came_true + accepted


@dataclass
class Regime:
    """Decoding steps of `sequences` sequences: what they take, and whether there is credit for guesses."""

    sequences: int
    credit: float = OPENING
    """In steps without guesses."""
    on: bool = True
    trials: int = 1
    """Times that guessing was begun."""
    _plain_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _ratios: dict[int, deque[float]] = field(default_factory=dict)  # tiles -> steps with guesses, in steps without
    _since_plain: int = 0
    _declined: int = 0

    @property
    def value(self) -> float:
        """What a guess's coming true is worth, in tokens."""
        return VALUE if self.sequences > 1 else 1.0

    @property
    def plain(self) -> int:
        """Steps without guesses that are due before the next with some, so that it is known what they take."""
        return max(KNOWN - len(self._plain_s), int(self._since_plain >= KNOWN_FOR * max(self.credit, 1.0)))

    @property
    def plain_s(self) -> float:
        """Seconds of a step without guesses; 0: none was measured."""
        return median(self._plain_s) if self._plain_s else 0.0

    @property
    def drafts(self) -> bool:
        """Whether the next step may have guesses."""
        return self.on and self.plain == 0

    def meet(self, count: int) -> None:
        """`count` of the sequences have texts that are new."""
        self.credit += count / self.sequences * (OPENING - self.credit)

    def choose(self, chances: Sequence[float], steps: int = 1) -> int:
        """How many guesses to run in the next step, or `steps` of them, the likeliest first. `chances`, falling: that each
        comes true."""
        room = TILE_ROWS * (max([tiles(self.sequences), *self._ratios]) + 1) - self.sequences  # a tile more than was measured
        count = worthwhile([chance for chance in chances[:room] if chance >= LEAST], self.sequences, self.ratio, self.value)
        self._declined = 0 if count else self._declined + steps * bool(chances)
        return count

    def observe(self, rows: int, seconds: float, guessing_s: float = 0.0, accepted: int = 0) -> None:
        """One step of `rows` rows took `seconds`, of which guessing took `guessing_s`; `accepted` guesses came true."""
        step_s, gain = seconds - guessing_s, 0.0
        if rows == self.sequences:
            self._plain_s.append(step_s)
            self._since_plain = 0
        plain_s = self.plain_s or step_s
        if rows > self.sequences:
            self._since_plain += 1
            ratios = self._ratios.setdefault(tiles(rows), deque(maxlen=RECENT))
            ratios.append(step_s / plain_s)
            gain = 1.0 + self.value * accepted / self.sequences - min(median(ratios), PAUSE * self._hoped(tiles(rows)))
        self._book(gain - guessing_s / plain_s)

    def ratio(self, rows: int) -> float:
        """What a step of `rows` rows takes, in steps without guesses. One slow step of a size does not condemn it: what was
        hoped counts as one that was measured. A size that was not measured is taken from the largest smaller one that was."""
        size = tiles(rows)
        below = max((known for known in self._ratios if known <= size), default=0)
        if below == 0:
            return self._hoped(size)
        return median_low([*self._ratios[below], self._hoped(below)]) * (self._hoped(size) / self._hoped(below))

    def _hoped(self, size: int) -> float:
        return (TILES_BEFORE_ROWS + size) / (TILES_BEFORE_ROWS + tiles(self.sequences))

    def _book(self, gain: float) -> None:
        self.credit = min(self.credit + gain + SHARE, MOST)
        if self.on and (self.credit <= 0.0 or self._declined >= DECLINED):
            self.on, self._declined, self.credit = False, 0, min(self.credit, 0.0)
        elif not self.on and self.credit >= OPENING:  # what was measured is why it was given up; it may have changed
            self.on, self.trials = True, self.trials + 1
            self._ratios.clear()


def tiles(rows: int) -> int:
    """Tiles that `rows` rows fill, the last perhaps in part."""
    return -(-rows // TILE_ROWS)


@dataclass
class Account:
    """What is known of one way of running steps: by the number of their sequences, and of each sequence, by its arrival."""

    regimes: dict[int, Regime] = field(default_factory=dict)
    _known: dict[int, tuple[int, Acceptance]] = field(default_factory=dict)  # and since which trial
    _met: set[int] = field(default_factory=set)

    def regime(self, sequences: int) -> Regime:
        """Of steps of so many."""
        return self.regimes.get(sequences) or self.regimes.setdefault(sequences, Regime(sequences))

    def meet(self, arrivals: Sequence[int]) -> Regime:
        """These sequences decode in the next step."""
        regime, new = self.regime(len(arrivals)), {*arrivals} - self._met
        if new:
            self._met |= new
            regime.meet(len(new))
        return regime

    def knows(self, arrival: int) -> bool:
        """Whether its guesses are counted."""
        return arrival in self._known

    def acceptance(self, arrival: int, trial: int) -> Acceptance:
        """How often its guesses came true. Forgotten when guessing is tried again: its text may have begun to repeat."""
        since, known = self._known.get(arrival, (trial, None))
        if known is None or since < trial:
            known = Acceptance()
            self._known[arrival] = trial, known
        return known

    def chosen(self, chains: Iterable[tuple[int, int]], regime: Regime, steps: int = 1) -> Counter[int]:
        """arrival -> how many of its guesses are worth their rows, all `chains`, (arrival, guesses), taken together; for so
        many steps."""
        likely: list[tuple[float, int]] = []
        for arrival, guesses in chains:
            chance = self.acceptance(arrival, regime.trials).chance
            likely += [(chance**depth, arrival) for depth in range(1, guesses + 1)]
        likely.sort(key=lambda one: -one[0])
        return Counter(of for _, of in likely[: regime.choose([value for value, _ in likely], steps)])

    def learn(self, arrival: int, drafted: int, accepted: int) -> None:
        """Of its guesses of a step the first `accepted` came true; of a sequence that has ended nothing is kept."""
        if arrival in self._known:
            self._known[arrival][1].learn(drafted, accepted)

    def forget(self, arrival: int) -> None:
        """It has ended."""
        self._known.pop(arrival, None)
        self._met.discard(arrival)


def worthwhile(chances: Sequence[float], sequences: int, ratio: Callable[[int], float], value: float = VALUE) -> int:
    """How many guesses to run, the likeliest first, for the most tokens a second.

    `chances`, falling: that each guess comes true, which is worth `value` tokens. `ratio(rows)`: what a step of so many rows
    takes. Counts that leave a tile half empty are not looked at, but for all guesses together.
    """
    best, best_rate, expected = 0, float(sequences), float(sequences)
    for count, chance in enumerate(chances, 1):
        expected += value * chance
        if (sequences + count) % TILE_ROWS == 0 or count == len(chances):
            rate = expected / ratio(sequences + count)
            if rate > best_rate:
                best, best_rate = count, rate
    return best
