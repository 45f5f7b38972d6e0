"""The ledger of what every sequence has computed.

A sequence knows `tokens` (prompt and answer) and has computed keys and values for the first `num_computed` of them; a
step runs spans of (tokens, layers). Prefill, chunks of it, decode and recomputing after a preemption are all this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from waypost.kernels.ops import PAGE_TOKENS
from waypost.model.decoder import Decoder
from waypost.serve.adapters import ServedAdapter
from waypost.serve.answer import Answer
from waypost.serve.kv import Full, KvPolicy
from waypost.serve.pages import PagePool
from waypost.serve.prefix import Namespace, Node, PrefixCache
from waypost.serve.request import Delta
from waypost.serve.scheduling import Span


class RowReader(Protocol):
    """Makes something of every row of a prompt. Its sequence takes nothing from the prefix cache and gives it nothing."""

    def keep(self, begin: int, h: Tensor, model: Decoder) -> None:
        """h (n, C): the last hidden states, after the final norm, of the tokens from position `begin` on."""
        ...

    def reset(self) -> None:
        """The prompt is computed again from its first token."""
        ...

    def finish(self, delta: Delta) -> Delta:
        """`delta`, the first or only one of its choice, with what was read."""
        ...


@dataclass(eq=False)
class LiveSequence:
    """One choice of one request, from submission to its last token."""

    arrival: int
    """Rank by time of submission; unique."""
    tokens: list[int]
    """Prompt and answer so far."""
    prompt_tokens: int
    answer: Answer
    num_computed: int = 0
    """Tokens whose keys and values are in the pages, for all layers."""
    dropped: int = 0
    """Of these, tokens whose keys and values a KV policy has dropped: as many in every layer and head."""
    kept: list[Tensor] = field(default_factory=list)
    """A layer each, (G, n) int64: the positions of the keys that the policy kept when it last acted; all later ones follow."""
    layer: int = 0
    """Layers already run for the `span_tokens` tokens after `num_computed`; 0 between whole spans."""
    span_tokens: int = 0
    hidden: Tensor | None = None
    """(span_tokens, C), what layer `layer` will read."""
    pages: list[int] = field(default_factory=list)
    siblings: list[LiveSequence] = field(default_factory=list)
    """Choices of the same request that start from this one's prompt once it is computed."""
    user: str = ""
    """Whose turn it takes, and `weight` how large that user's share is."""
    weight: float = 1.0
    priority: int = 0
    """Lower goes first."""
    reader: RowReader | None = None
    """Wants every row of the prompt, until the first delta."""
    space: Namespace = field(default_factory=Namespace)
    """What its keys and values depend on beside tokens and weights."""
    adapter: ServedAdapter | None = None
    """What it adds to the model; None: nothing."""
    adapter_pages: list[int] = field(default_factory=list)
    """Where the adapter's weights lie, held while the sequence runs."""
    node: Node | None = None
    """Where the prefix cache has the last whole page of this sequence; None: its pages are not for the cache."""
    num_indexed: int = 0
    """Pages up to `node`."""
    cached_tokens: int | None = None
    """Tokens that its first admission found in the prefix cache; None: not yet admitted."""
    began_s: float | None = None
    """When its first span ran, by time.monotonic."""

    def __post_init__(self) -> None:
        if self.adapter is not None:
            self.space = replace(self.space, adapter=self.adapter.key)

    def read(self, delta: Delta) -> Delta:
        """`delta` with what the reader made of the prompt; its work is then done."""
        reader, self.reader = self.reader, None
        return delta if reader is None else reader.finish(delta)

    @property
    def rank(self) -> tuple[int, int]:
        """Precedence among the running: the last by rank loses its pages first."""
        return self.priority, self.arrival

    @property
    def held(self) -> list[int]:
        """All pages that it holds."""
        return [*self.adapter_pages, *self.pages]

    @property
    def num_slots(self) -> int:
        """Keys in its pages, in each layer and head."""
        return self.num_computed - self.dropped

    @property
    def remaining(self) -> int:
        """Tokens known but not computed; at least one while the sequence lives."""
        return len(self.tokens) - self.num_computed

    @property
    def decoding(self) -> bool:
        """Whether only its newest token is missing."""
        return self.num_computed > 0 and len(self.tokens) - self.num_computed == 1


class Ledger:
    """What a policy sees: `running` by rank, `waiting` in the order of turns, and the room there is."""

    def __init__(
        self, pool: PagePool, num_layers: int, max_sequences: int, prefix: PrefixCache | None = None,
        kv_policy: KvPolicy | None = None,
    ) -> None:  # fmt: skip
        self.pool, self.num_layers, self.max_sequences = pool, num_layers, max_sequences
        self.prefix, self.weight_version = prefix, 0
        self.kv_policy: KvPolicy = kv_policy if kv_policy is not None else Full()
        self.running: list[LiveSequence] = []
        self.waiting: list[LiveSequence] = []

    def span(self, sequence: LiveSequence, most_tokens: int, most_layers: int | None = None) -> Span:
        """The next tokens of `sequence` that must be computed, up to `most_tokens`, through the next `most_layers` layers,
        None: all that are left. Of a span under way, its own tokens, however many those are."""
        last = self.num_layers if most_layers is None else min(self.num_layers, sequence.layer + most_layers)
        if sequence.layer:
            return Span(sequence, sequence.span_tokens, sequence.layer, last)
        known = 0 if sequence.pages else len(self.known(sequence)) * PAGE_TOKENS
        return Span(sequence, min(sequence.remaining - known, most_tokens), 0, last)

    def tokens(self, spans: Iterable[Span]) -> float:
        """What `spans` compute, in tokens that go through all layers."""
        return sum(span.work for span in spans) / self.num_layers

    def clipped(self, span: Span) -> Span:
        """`span` up to where the KV policy acts next: nothing runs past that place before it has acted."""
        sequence = span.sequence
        stop = self.kv_policy.next(sequence.num_computed, sequence.prompt_tokens)
        most = sequence.remaining if stop is None else min(sequence.remaining, stop - sequence.num_computed)
        return span if span.num_tokens <= most else replace(span, num_tokens=most)

    def shares(self, sequence: LiveSequence) -> bool:
        """Whether its pages may be others' too: what a KV policy changes is its alone."""
        return self.kv_policy.next(0, sequence.prompt_tokens) is None

    def indexed(self, sequence: LiveSequence) -> bool:
        """Whether it takes from the prefix cache and gives to it."""
        return self.prefix is not None and sequence.reader is None and self.shares(sequence)

    def known(self, sequence: LiveSequence) -> list[Node]:
        """The pages from which `sequence`, which waits, would start."""
        if self.prefix is None or not self.indexed(sequence):
            return []
        return self.prefix.match(self.namespace(sequence), sequence.tokens)

    def namespace(self, sequence: LiveSequence) -> Namespace:
        """Where the prefix cache has what `sequence` computes now."""
        return replace(sequence.space, weight_version=self.weight_version)
