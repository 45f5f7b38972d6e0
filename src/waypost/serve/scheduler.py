"""The granting of pages to what a policy wants to run (serve/ledger.py says what a sequence is).

Invariants: running is in order of rank (priority, then arrival); waiting is put in order of priority, then of fair turns
between users, before a policy sees it; a sequence holds pages exactly while it runs; the first by rank can always go on,
because later ones are preempted for it and one that could not fit alone is refused at submission. With a prefix cache a
sequence that is admitted starts behind the pages that are known, its own from before a preemption among them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable

from waypost.kernels.ops import PAGE_TOKENS
from waypost.serve.fairness import Turns
from waypost.serve.kv import KvPolicy
from waypost.serve.ledger import Ledger, LiveSequence
from waypost.serve.pages import PagePool, pages_for
from waypost.serve.prefix import PrefixCache
from waypost.serve.scheduling import Policy, Span


class Scheduler:
    """Turns a policy's wishes into spans that have their pages."""

    def __init__(
        self, policy: Policy, pool: PagePool, *, num_layers: int, max_batch_tokens: int, max_sequences: int,
        prefix_cache: bool = False, kv_policy: KvPolicy | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.pool, self.max_batch_tokens = policy, pool, max_batch_tokens
        self.ledger = Ledger(pool, num_layers, max_sequences, PrefixCache(pool) if prefix_cache else None, kv_policy)
        self.num_preemptions = 0
        self.prefix_queries = self.prefix_hits = 0
        """Tokens of admitted sequences, and those of them that the prefix cache knew."""
        self.turns = Turns()

    def add(self, sequence: LiveSequence) -> None:
        """Lets `sequence` wait for its turn."""
        self.turns.arrive(sequence.user, {s.user for s in (*self.ledger.running, *self.ledger.waiting)})
        self.ledger.waiting.append(sequence)

    def plan(self) -> list[Span]:
        """The spans of the next step. Pages for all of them are held when this returns."""
        granted: list[Span] = []
        before = self.num_preemptions
        self.ledger.waiting = self.turns.order(self.ledger.waiting)
        spans = self.policy.schedule(self.ledger, self.max_batch_tokens)
        for span in spans:
            self._validate(span)
        assert self.ledger.tokens(spans) <= self.max_batch_tokens, "a policy went over the budget of tokens"
        for span in map(self.ledger.clipped, spans):
            sequence = span.sequence
            if sequence.pages:
                if self._extend(span, granted):
                    granted.append(span)
            elif self.num_preemptions == before:  # a step that took pages away admits nobody, its victims least of all
                if not self._admit(sequence):
                    break
                granted.append(self.ledger.clipped(span))
        for span in granted:
            self.turns.charge(span.sequence, span.work / self.ledger.num_layers)
        return granted

    def index(self, spans: Iterable[Span]) -> None:
        """Puts the pages that `spans` have filled into the prefix cache; a page that it has already is exchanged for that."""
        prefix = self.ledger.prefix
        if prefix is None:
            return
        for s in (span.sequence for span in spans):
            while s.node is not None and (s.num_indexed + 1) * PAGE_TOKENS <= s.num_computed:
                at, own = s.num_indexed * PAGE_TOKENS, s.pages[s.num_indexed]
                s.node = prefix.insert(s.node, s.tokens[at : at + PAGE_TOKENS], own)
                if s.node.page != own:
                    self.pool.share([s.node.page])
                    self.pool.release([own])
                    s.pages[s.num_indexed] = s.node.page
                s.num_indexed += 1

    def make_room(self, span: Span, guesses: list[int]) -> list[int]:
        """As many of `guesses` for the rows after `span` as there are pages for; nobody loses a page for them."""
        sequence = span.sequence
        least = sequence.num_slots + span.num_tokens
        most = (len(sequence.pages) + self.pool.available) * PAGE_TOKENS - least
        guesses = guesses[: max(most, 0)]
        until = self.ledger.kv_policy.next(sequence.num_computed, sequence.prompt_tokens)
        if until is not None:
            guesses = guesses[: until - sequence.num_computed - span.num_tokens]
        need = pages_for(least + len(guesses)) - len(sequence.pages)
        if need > 0:
            sequence.pages.extend(self.pool.take(need))
        return guesses

    def trim(self, span: Span, accepted: int) -> None:
        """Takes back the pages that the rows of a draft had beyond what was `accepted`, which counts as the user's turn."""
        sequence = span.sequence
        self.turns.charge(sequence, accepted)
        if sequence.pages:
            keep = pages_for(sequence.num_slots + sequence.remaining)
            self.pool.release(sequence.pages[keep:])
            del sequence.pages[keep:]
            self.index([span])

    def renew(self, weight_version: int) -> None:
        """What is computed from now on comes from the weights `weight_version`; pages of others are found no more, and
        those of sequences that run, which then hold a mixture, are never put into the cache."""
        if self.ledger.prefix is not None:
            self.ledger.prefix.retire(weight_version)
        self.ledger.weight_version = weight_version
        for sequence in self.ledger.running:
            sequence.node = None

    def finish(self, sequence: LiveSequence) -> None:
        """Forgets `sequence`, wherever it is, and frees its pages."""
        for queue in (self.ledger.running, self.ledger.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._release(sequence)

    def fork(self, parent: LiveSequence, child: LiveSequence, copy: Callable[[int, int], None]) -> None:
        """Starts `child` from the prompt that `parent` has just computed: whole pages are shared, the last one is copied
        by `copy(source, target)`. Where there is no room the child waits, and computes the prompt itself later."""
        shared = parent.num_slots // PAGE_TOKENS if self.ledger.shares(parent) else 0
        own = pages_for(parent.num_slots) - shared
        room = len(self.ledger.running) < self.ledger.max_sequences and self.pool.available >= own
        if not room:
            self.add(child)
            return
        child.pages = parent.pages[:shared]
        self.pool.share(child.pages)
        child.pages = child.pages + self.pool.take(own)
        child.adapter_pages = list(parent.adapter_pages)
        self.pool.share(child.adapter_pages)
        for index in range(shared, shared + own):
            copy(parent.pages[index], child.pages[index])
        child.num_computed, child.dropped, child.kept = parent.num_computed, parent.dropped, parent.kept
        child.node, child.num_indexed, child.cached_tokens = parent.node, parent.num_indexed, parent.cached_tokens
        bisect.insort(self.ledger.running, child, key=_rank)

    def preempt(self, sequence: LiveSequence) -> None:
        """Takes the pages of `sequence` and lets it wait; its tokens stay, their keys are computed again."""
        self.num_preemptions += 1
        self.ledger.running.remove(sequence)
        self._release(sequence)
        self.add(sequence)

    def check(self) -> None:
        """Asserts the invariants of the ledger and of the pool."""
        running, waiting = self.ledger.running, self.ledger.waiting
        assert [s.rank for s in running] == sorted(s.rank for s in running), "the running are out of order"
        assert len({s.arrival for s in (*running, *waiting)}) == len(running) + len(waiting), "a sequence is there twice"
        assert len(running) <= self.ledger.max_sequences
        for s in running:
            assert s.pages, f"sequence {s.arrival} runs without pages"
            assert pages_for(s.num_slots) <= len(s.pages) <= pages_for(len(s.tokens)), f"sequence {s.arrival}: {s.pages}"
        for s in waiting:
            assert not s.held, f"sequence {s.arrival} waits with pages"
            assert (s.num_slots, s.layer, s.hidden) == (0, 0, None), f"sequence {s.arrival} waits half computed"
            assert s.num_indexed * PAGE_TOKENS <= s.num_computed
        self.pool.check(s.held for s in running)
        if self.ledger.prefix is not None:
            self.ledger.prefix.check()

    def _validate(self, span: Span) -> None:
        s = span.sequence
        assert 1 <= span.num_tokens <= s.remaining, f"a span of {span.num_tokens} tokens, {s.remaining} remain"
        assert span.first_layer == s.layer < span.stop_layer <= self.ledger.num_layers, f"layers {span}, at {s.layer}"
        assert not s.layer or span.num_tokens == s.span_tokens, "a span under way keeps its tokens"

    def _admit(self, sequence: LiveSequence) -> bool:
        """Gives a waiting sequence pages for all it knows, so that only growth can run short later."""
        if len(self.ledger.running) >= self.ledger.max_sequences:
            return False
        path = self.ledger.known(sequence)
        known = [node.page for node in path]
        adapter = sequence.adapter
        sequence.adapter_pages = [] if adapter is None else list(adapter.pages)
        self.pool.share([*sequence.adapter_pages, *known])
        need = pages_for(len(sequence.tokens)) - len(known)
        if need + (0 if adapter is None else adapter.missing) > self.pool.available:
            self.pool.release([*sequence.adapter_pages, *known])
            sequence.adapter_pages = []
            return False
        sequence.pages = known + self.pool.take(need)
        if adapter is not None and adapter.missing:
            adapter.settle()
            sequence.adapter_pages = list(adapter.pages)
        sequence.num_computed, sequence.num_indexed = len(known) * PAGE_TOKENS, len(known)
        if self.ledger.prefix is not None and self.ledger.indexed(sequence):
            sequence.node = path[-1] if path else self.ledger.prefix.root(self.ledger.namespace(sequence))
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.num_computed
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
        self.ledger.waiting.remove(sequence)
        bisect.insort(self.ledger.running, sequence, key=_rank)
        return True

    def _extend(self, span: Span, granted: list[Span]) -> bool:
        """Pages for a running sequence's span, taken from the last by rank if there are none; False: it was the last."""
        sequence = span.sequence
        need = pages_for(sequence.num_slots + span.num_tokens) - len(sequence.pages)
        while need > self.pool.available:
            victim = self.ledger.running[-1]
            self.preempt(victim)
            granted[:] = [s for s in granted if s.sequence is not victim]
            if victim is sequence:
                return False
        if need > 0:
            sequence.pages.extend(self.pool.take(need))
        return True

    def _release(self, sequence: LiveSequence) -> None:
        self.pool.release(sequence.held)
        sequence.pages, sequence.adapter_pages = [], []
        sequence.num_computed = sequence.dropped = sequence.layer = sequence.span_tokens = 0
        sequence.kept = []
        sequence.hidden, sequence.node, sequence.num_indexed = None, None, 0
        if sequence.reader is not None:
            sequence.reader.reset()


def _rank(sequence: LiveSequence) -> tuple[int, int]:
    return sequence.rank


def advance(spans: Iterable[Span], num_layers: int) -> None:
    """Writes into the sequences that `spans` have run."""
    for span in spans:
        sequence = span.sequence
        if span.stop_layer == num_layers:
            sequence.num_computed += span.num_tokens
            sequence.layer, sequence.span_tokens, sequence.hidden = 0, 0, None
        else:
            sequence.layer, sequence.span_tokens = span.stop_layer, span.num_tokens
