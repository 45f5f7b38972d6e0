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

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from waypost.kernels.layers.ops import Guessing, Passed
from waypost.kernels.ops import Ops
from waypost.serve.draft_worth import Account
from waypost.serve.drafting import Drafter, NGram
from waypost.serve.drafting._shared import Wish
from waypost.serve.ledger import LiveSequence
from waypost.serve.request import Delta
from waypost.serve.scheduler import Scheduler
from waypost.serve.scheduling import Span
from waypost.serve.stats import Stats

Auto = Literal["auto"]
FEW = 2
"""Sequences at work, beyond which nothing is guessed where nobody has chosen a drafter: from four on it gained too little."""


@dataclass
class Speculation:
    """The drafts of one engine; without a drafter every step is as it would be."""

    drafter: Drafter | None
    scheduler: Scheduler
    stats: Stats
    most_sequences: float = math.inf
    """At work at once; with more of them nothing is guessed."""
    always: bool = False
    """As many guesses as there is room for, whether they pay or not: for measuring what they cost."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds; tokens and log-probabilities do not depend on it."""
    steps: Account = field(default_factory=Account)
    """Of single steps."""
    strides: Account = field(default_factory=Account)
    """Of steps that run several in one go (stride.py), where the kernel guesses as NGram does."""

    @classmethod
    def of(cls, drafting: Drafter | Auto | None, ops: Ops, scheduler: Scheduler, stats: Stats) -> Speculation:
        """Under "auto" n-grams for FEW, where the engine is exact, so that they change nothing but its speed, and where no KV
        policy stands against them."""
        if drafting != "auto":
            return cls(drafting, scheduler, stats)
        may = ops.name != "fast" and not scheduler.ledger.kv_policy.counts_attention
        return cls(NGram() if may else None, scheduler, stats, FEW)

    def __post_init__(self) -> None:
        self._proposer = self.drafter.build() if self.drafter is not None else None
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
        if not self._guesses(len(spans)):
            return spans
        regime, decoding = self.steps.regime(len(spans)), all(s.sequence.decoding for s in spans)
        if decoding:
            self.steps.meet([s.sequence.arrival for s in spans])
        if not (self.always or (regime.drafts and decoding)):
            return spans
        drafting = [s for s in spans if self._may(s)]
        self._follow(drafting, regime.trials)
        began = self.clock()
        chains = self._chains(drafting)
        room = int(self.scheduler.max_batch_tokens - self.scheduler.ledger.tokens(spans))
        lengths = {s.sequence.arrival: len(guesses) for s, guesses in chains}
        counts = lengths if self.always else self.steps.chosen(lengths.items(), regime)
        out = {s.sequence.arrival: s for s in spans}
        for span, guesses in chains:
            arrival = span.sequence.arrival
            if counts[arrival]:
                draft = self.scheduler.make_room(span, guesses[: min(counts[arrival], room)])
                room -= len(draft)
                out[arrival] = replace(span, draft=tuple(draft))
        self._guessing_s += self.clock() - began
        return list(out.values())

    def _guesses(self, sequences: int) -> bool:
        return self._proposer is not None and 0 < sequences <= self.most_sequences

    def _follow(self, spans: Sequence[Span], trial: int) -> None:
        """Shows the drafter how texts have gone on. Its first sight of one is charged to no decoding step: that is a thousandth
        of what computing the prompt took, and would end a trial before the first guess."""
        assert self._proposer is not None
        new = [s.sequence for s in spans if not self.steps.knows(s.sequence.arrival)]
        old = [s.sequence for s in spans if self.steps.knows(s.sequence.arrival)]
        times = [self.clock()]
        for sequences in (new, old):
            for sequence in sequences:
                self._proposer.observe(sequence.arrival, sequence.tokens)
            times.append(self.clock())
        self._prompts_s, self._guessing_s = times[1] - times[0], times[2] - times[1]
        for sequence in new:
            self.steps.acceptance(sequence.arrival, trial)

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

    def observe(self, spans: Sequence[Span], took_s: float) -> None:
        """The step of `spans`, decodes all of them, took `took_s` from before `lengthen` on."""
        if self._guesses(len(spans)):
            rows = sum(s.num_rows for s in spans)
            self.steps.regime(len(spans)).observe(rows, took_s - self._prompts_s, self._guessing_s, self._accepted)

    def follow(
        self, spans: Sequence[Span], first_row: dict[int, int], computed: Callable[[list[Span]], None],
        draw: Callable[[list[LiveSequence], list[int]], list[Delta]],
    ) -> list[Delta]:  # fmt: skip
        """What the rows of drafts give, after the draw at the row before them: `draw(sequences, rows)` for as long as a draw
        is what was drafted, each guess being written down by `computed` as a step of its own would be. `first_row`: arrival ->
        the row of a sequence's newest token. Takes back what was not accepted."""
        drafted = alive = [s for s in spans if s.draft]
        accepted = dict.fromkeys((s.sequence.arrival for s in drafted), 0)
        deltas: list[Delta] = []
        for depth in range(max((len(s.draft) for s in drafted), default=0)):
            open_ = [s for s in alive if s.sequence.pages and depth < len(s.draft)]  # a choice that ended has no pages
            alive = [s for s in open_ if s.sequence.tokens[-1] == s.draft[depth]]
            if not alive:
                break
            computed(alive)
            for span in alive:
                accepted[span.sequence.arrival] += 1
            deltas += draw([s.sequence for s in alive], [first_row[s.sequence.arrival] + depth + 1 for s in alive])
        for span in drafted:
            self._settle(span, accepted[span.sequence.arrival])
        return deltas

    def forget(self, sequence: LiveSequence) -> None:
        """`sequence` has ended."""
        if self._proposer is not None:
            self._proposer.forget(sequence.arrival)
            self.steps.forget(sequence.arrival)
            self.strides.forget(sequence.arrival)

    def _may(self, span: Span) -> bool:
        s = span.sequence
        whole = span.first_layer == 0 and span.stop_layer == self.scheduler.ledger.num_layers
        return whole and s.decoding and s.answer.num_tokens > 0

    def _settle(self, span: Span, accepted: int) -> None:
        self._count(len(span.draft), accepted)
        self._accepted += accepted
        self.steps.learn(span.sequence.arrival, len(span.draft), accepted)
        self.scheduler.trim(span, accepted)

    def _count(self, drafted: int, accepted: int) -> None:
        self.stats.num_drafts += 1
        self.stats.draft_tokens += drafted
        self.stats.accepted_tokens += accepted

    # Of several steps in one go

    def strides_with(self, sequences: int) -> bool:
        """Whether steps of so many may run several in one go: where nothing is guessed, or the kernel can do it."""
        return isinstance(self.drafter, NGram) or not self._guesses(sequences)

    def guessing(self, spans: Sequence[Span], passes: int) -> tuple[list[int], Guessing]:
        """For so many passes of `spans` in one go: how many guesses each of them may have in a pass, and when."""
        drafter, arrivals = self.drafter, [s.sequence.arrival for s in spans]
        if not (isinstance(drafter, NGram) and self._guesses(len(spans))):
            return [0] * len(spans), Guessing()
        most, ends = drafter.num_draft_tokens, (drafter.max_ngram, drafter.min_ngram)
        if self.always:
            return [most] * len(spans), Guessing(*ends, credit=math.inf)
        regime = self.strides.meet(arrivals)
        chains = [(arrival, most) for arrival in arrivals] if regime.on else []
        chosen = self.strides.chosen(chains, regime, passes)
        return [chosen[a] for a in arrivals], Guessing(*ends, regime.plain, regime.credit, regime.value, regime.plain_s)

    def book(self, spans: Sequence[Span], passed: Passed) -> None:
        """What passes of `spans` in one go have come to."""
        if not self._guesses(len(spans)):
            return
        regime, arrivals = self.strides.regime(len(spans)), [s.sequence.arrival for s in spans]
        for took_s, guessed, accepted in zip(
            passed.seconds.tolist(), passed.guessed.t().tolist(), passed.accepted.t().tolist()
        ):
            for arrival, drafted, true in zip(arrivals, guessed, accepted, strict=True):
                if drafted:
                    self._count(drafted, true)
                    self.strides.learn(arrival, drafted, true)
            regime.observe(len(spans) + sum(guessed), took_s, accepted=sum(accepted))
