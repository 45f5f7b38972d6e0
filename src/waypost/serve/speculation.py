"""Drafts in the engine: who gets how many guesses, what becomes of them, and when they are not worth their rows.

A decode of one row becomes one of 1 + k rows: the newest token and k guesses. The draw at each row is the one that decoding
would make there, because the noise depends on (seed, choice, position) and a row's bits on nothing beside it; a guess is
accepted where it equals the draw before it, and the first that does not ends the chain. So no token changes, penalties and
grammars included, and what these rows have written to the pages is overwritten by what comes next.

A guess costs a row in a step that every sequence waits for, and guessing takes time of its own. serve/draft_worth.py says
from measured times which guesses are run, the likeliest first, and whether guessing is worth it at all with so many sequences
at work. Where it is not, texts are not even followed: the drafter catches up when it is tried again. Steps that compute
prompts too are not measured, and have no guesses.

Shapes: n rows, V vocab_size.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from waypost.serve.draft_worth import Acceptance, Regime
from waypost.serve.drafting import Drafter
from waypost.serve.drafting._shared import Wish
from waypost.serve.ledger import LiveSequence
from waypost.serve.request import Delta
from waypost.serve.scheduler import Scheduler
from waypost.serve.scheduling import Span
from waypost.serve.stats import Stats


@dataclass
class Speculation:
    """The drafts of one engine; without a drafter every step is as it would be."""

    drafter: Drafter | None
    scheduler: Scheduler
    stats: Stats
    always: bool = False
    """As many guesses as there is room for, whether they pay or not: for measuring what they cost."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds; tokens and log-probabilities do not depend on it."""
    regimes: dict[int, Regime] = field(default_factory=dict)
    """Sequences of a decoding step -> what is known of such steps."""

    def __post_init__(self) -> None:
        self._proposer = self.drafter.build() if self.drafter is not None else None
        self._known: dict[int, tuple[int, Acceptance]] = {}
        self._met: set[int] = set()
        self._guessing_s = self._prompts_s = 0.0
        self._accepted = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is guessed inside."""
        proposer, self._proposer = self._proposer, None
        try:
            yield
        finally:
            self._proposer = proposer

    def lengthen(self, spans: list[Span]) -> list[Span]:
        """`spans`, decodes among them with guesses for which there are rows and pages."""
        self._guessing_s, self._prompts_s, self._accepted = 0.0, 0.0, 0
        if self._proposer is None or not spans:
            return spans
        regime = self.regimes.get(len(spans)) or self.regimes.setdefault(len(spans), Regime(len(spans)))
        decoding = all(s.sequence.decoding for s in spans)
        if decoding:
            self._meet(spans, regime)
        if not (self.always or (regime.drafts and decoding)):
            return spans
        drafting = [s for s in spans if self._may(s)]
        self._follow(drafting, regime.trials)
        began = self.clock()
        chains = self._chains(drafting)
        room = int(self.scheduler.max_batch_tokens - self.scheduler.ledger.tokens(spans))
        counts = {id(s): len(guesses) for s, guesses in chains} if self.always else self._chosen(chains, regime)
        out = {id(s): s for s in spans}
        for span, guesses in chains:
            if counts[id(span)]:
                draft = self.scheduler.make_room(span, guesses[: min(counts[id(span)], room)])
                room -= len(draft)
                out[id(span)] = replace(span, draft=tuple(draft))
        self._guessing_s += self.clock() - began
        return list(out.values())

    def _meet(self, spans: Sequence[Span], regime: Regime) -> None:
        new = {s.sequence.arrival for s in spans} - self._met
        if new:
            self._met |= new
            regime.meet(len(new))

    def _follow(self, spans: Sequence[Span], trial: int) -> None:
        """Shows the drafter how texts have gone on. Its first sight of one is charged to no decoding step: that is a thousandth
        of what computing the prompt took, and would end a trial before the first guess."""
        assert self._proposer is not None
        new = [s.sequence for s in spans if s.sequence.arrival not in self._known]
        old = [s.sequence for s in spans if s.sequence.arrival in self._known]
        times = [self.clock()]
        for sequences in (new, old):
            for sequence in sequences:
                self._proposer.observe(sequence.arrival, sequence.tokens)
            times.append(self.clock())
        self._prompts_s, self._guessing_s = times[1] - times[0], times[2] - times[1]
        self._known.update((sequence.arrival, (trial, Acceptance())) for sequence in new)

    def _chains(self, spans: Sequence[Span]) -> list[tuple[Span, list[int]]]:
        """What is guessed to follow each of `spans`, as far as its answer may go on; the draw after the last guess is a
        token too."""
        assert self._proposer is not None
        wishes = []
        for sequence in (s.sequence for s in spans):
            answer = sequence.answer
            wishes.append(Wish(sequence.arrival, sequence.tokens, answer.max_tokens - answer.num_tokens - 1))
        asked = [(span, wish) for span, wish in zip(spans, wishes, strict=True) if wish.most > 0]
        proposed = self._proposer.propose([wish for _, wish in asked])
        return [(span, guesses[: wish.most]) for (span, wish), guesses in zip(asked, proposed, strict=True)]

    def _chosen(self, chains: Sequence[tuple[Span, list[int]]], regime: Regime) -> Counter[int]:
        """id of a span -> how many of its guesses are worth their rows, all spans taken together."""
        likely: list[tuple[float, int]] = []
        for span, guesses in chains:
            known = self._acceptance(span, regime.trials)
            known.fade()
            value = chance = known.chance
            for _ in guesses:
                likely.append((value, id(span)))
                value *= chance
        likely.sort(key=lambda one: -one[0])
        return Counter(of for _, of in likely[: regime.choose([value for value, _ in likely])])

    def _acceptance(self, span: Span, trial: int) -> Acceptance:
        """Of a sequence, forgotten when guessing is tried again: its text may have begun to repeat."""
        since, known = self._known[span.sequence.arrival]
        if since < trial:
            known = Acceptance()
            self._known[span.sequence.arrival] = trial, known
        return known

    def observe(self, spans: Sequence[Span], took_s: float) -> None:
        """The step of `spans`, decodes all of them, took `took_s` from before `lengthen` on."""
        if self._proposer is not None:
            rows = sum(s.num_rows for s in spans)
            self.regimes[len(spans)].observe(rows, took_s - self._prompts_s, self._guessing_s, self._accepted)

    def follow(
        self, spans: Sequence[Span], first_row: dict[int, int], draw: Callable[[list[LiveSequence], list[int]], list[Delta]]
    ) -> list[Delta]:
        """What the rows of drafts give, after the draw at the row before them: `draw(sequences, rows)` for as long as a draw
        is what was drafted. `first_row`: arrival -> the row of a sequence's newest token. Takes back what was not accepted."""
        drafted = alive = [s for s in spans if s.draft]
        accepted = dict.fromkeys((s.sequence.arrival for s in drafted), 0)
        deltas: list[Delta] = []
        for depth in range(max((len(s.draft) for s in drafted), default=0)):
            open_ = [s for s in alive if s.sequence.pages and depth < len(s.draft)]  # a choice that ended has no pages
            alive = [s for s in open_ if s.sequence.tokens[-1] == s.draft[depth]]
            if not alive:
                break
            for span in alive:
                span.sequence.num_computed += 1
                accepted[span.sequence.arrival] += 1
            deltas += draw([s.sequence for s in alive], [first_row[s.sequence.arrival] + depth + 1 for s in alive])
        for span in drafted:
            self._settle(span, accepted[span.sequence.arrival])
        return deltas

    def forget(self, sequence: LiveSequence) -> None:
        """`sequence` has ended."""
        if self._proposer is not None:
            self._proposer.forget(sequence.arrival)
            self._known.pop(sequence.arrival, None)
            self._met.discard(sequence.arrival)

    def _may(self, span: Span) -> bool:
        s = span.sequence
        whole = span.first_layer == 0 and span.stop_layer == self.scheduler.ledger.num_layers
        return whole and s.decoding and s.answer.num_tokens > 0

    def _settle(self, span: Span, accepted: int) -> None:
        self.stats.num_drafts += 1
        self.stats.draft_tokens += len(span.draft)
        self.stats.accepted_tokens += accepted
        self._accepted += accepted
        if span.sequence.arrival in self._known:  # its last token did not end it
            self._known[span.sequence.arrival][1].learn(len(span.draft), accepted)
        self.scheduler.trim(span, accepted)
