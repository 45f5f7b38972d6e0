"""The engine: requests in, tokens out, one ragged batch a step.

`submit`, `cancel` and `step` are the whole of it and are called from one thread; `generate` steps until it is done, and
`EngineThread` (loop.py), which `stream` uses, steps in a thread of its own.

Invariants: a request's tokens and log-probabilities depend on its prompt, its sampling and the weights, never on what
runs beside it, how its prompt was cut or whether it was preempted (numerics "exact"); every request that was accepted
gets a last delta with a finish reason for each of its choices; an exception in a step fails the requests of that step
and no other.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from waypost.core.errors import ConfigError
from waypost.kernels import memory
from waypost.kernels.ops import Kernel, Numerics
from waypost.model.decoder import Decoder
from waypost.model.tokenizer import Tokenizer
from waypost.serve import loading, stride
from waypost.serve.adapters import AdapterStore
from waypost.serve.ahead import Ahead
from waypost.serve.answer import Answer
from waypost.serve.collecting import collect, requests
from waypost.serve.drafting import Drafter
from waypost.serve.eviction import act, check_policy
from waypost.serve.forward import run_spans
from waypost.serve.kv import Full, KvPolicy
from waypost.serve.loop import EngineThread
from waypost.serve.pages import PagedKv, PagePool
from waypost.serve.prepare import Prepared, prepare
from waypost.serve.request import Completion, Delta, FinishReason, Request, TextTokenizer
from waypost.serve.sampling import Draw, Likeliest, Sampling, sample
from waypost.serve.sampling.grammar import Grammars
from waypost.serve.scheduler import LiveSequence, Scheduler, advance
from waypost.serve.scheduling import Chunked, Policy, Span
from waypost.serve.speculation import Auto, Speculation
from waypost.serve.stats import Stats
from waypost.serve.swap import Mode, Pending, Weights, check_mode, with_weights


@dataclass
class _Live:
    sequences: list[LiveSequence]
    arrived_s: float
    ends_s: float
    last_token_s: dict[int, float] = field(default_factory=dict)


class Engine:
    """One model, its pages and its requests.

    `model` is a checkpoint (folder, run folder or plain Hugging Face folder; `Ahead` has begun to read it) or a Decoder, which
    is used as it is.
    `numerics` and `kernel` choose the operators of a model that is loaded here; dtype None keeps the checkpoint's.
    `arithmetic` torch.float32 computes in float32 over 16-bit weights (model/linear/layercast.py).
    `num_pages` None sizes the cache by the memory at hand. `threads` sets PyTorch's number of threads for the process.
    `prefix_cache` False computes every prompt from its first token; the answers are the same bits.
    `kv_policy` may drop cached keys (serve/kv); `drafting` guesses tokens ahead for the same bits ("auto": of one or two).
    """

    def __init__(
        self, model: str | Path | Ahead | Decoder, *, numerics: Numerics = "exact", kernel: Kernel = "auto",
        dtype: torch.dtype | None = None, arithmetic: torch.dtype | None = None, max_seq_len: int | None = None,
        num_pages: int | None = None, max_batch_tokens: int = 512, max_sequences: int = 64, policy: Policy | None = None,
        threads: int | None = None, prefix_cache: bool = True, tokenizer: TextTokenizer | None = None,
        kv_policy: KvPolicy | None = None, drafting: Drafter | Auto | None = "auto",
    ) -> None:  # fmt: skip
        began_s = time.monotonic()
        self.eos_ids: list[int] = []
        try:
            for name, value in (("max_batch_tokens", max_batch_tokens), ("max_sequences", max_sequences), ("threads", threads)):
                if value is not None and value < 1:
                    raise ConfigError(f"Engine: {name}={value}: must be at least 1")
            if threads is not None:
                torch.set_num_threads(threads)
            if isinstance(model, Decoder):
                self.model, self._plain_ops = model, model.ops
            else:
                loaded = loading.load(model, numerics, kernel, dtype, arithmetic)
                self.model, self.eos_ids, self._plain_ops = loaded.model, loaded.eos_ids, loaded.plain_ops
                tokenizer = tokenizer if tokenizer is not None else loaded.tokenizer
        finally:
            memory.settle()  # what was reserved and no weight took goes back before the cache is sized, or for good
        config = self.model.config
        self.tokenizer = tokenizer
        self.eos_ids = sorted({*self.eos_ids, *config.eos_token_ids, *(tokenizer.eos_ids if tokenizer is not None else ())})
        self._grammars = Grammars(tokenizer, config.vocab_size, self.eos_ids) if isinstance(tokenizer, Tokenizer) else None
        self.max_seq_len = loading.context_length(config, max_seq_len)
        self.dtype = self.model.dtype
        loaded_s = time.monotonic()
        if self.model.ops.name != "fast":
            loading.check_numerics(self.model)
        self.startup_s = {"load": loaded_s - began_s, "check": time.monotonic() - loaded_s}
        """Seconds that the model took to load, and the numeric contract to be proved."""
        if num_pages is None:
            num_pages = loading.num_pages(config, self.dtype, self.max_seq_len, max_sequences)
        kept = Full() if kv_policy is None else kv_policy
        check_policy(kept, config, drafts=drafting not in (None, "auto"))
        self.pool = PagePool(num_pages)
        self.kv = PagedKv(config, num_pages, self.dtype, kept.counts_attention)
        self.scheduler = Scheduler(
            policy if policy is not None else Chunked(), self.pool, num_layers=len(config.layers),
            max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, prefix_cache=prefix_cache, kv_policy=kept,
        )  # fmt: skip
        self.adapters = AdapterStore(self.model, self.kv, self.pool)
        self._live: dict[str, _Live] = {}
        self._outbox: list[Delta] = []
        self._arrivals = 0
        self._stats = Stats(pages_total=num_pages)
        self.drafts = Speculation.of(drafting, self.model.ops, self.scheduler, self._stats)
        self._thread: EngineThread | None = None
        self.weight_version = 0
        """Number of swaps so far; every token says the version that drew it."""
        self._pending: Pending | None = None

    # Submission

    def prepare(self, request: Request) -> Prepared:
        """`request` with its prompt encoded and its limits resolved. Touches no state: any thread may call it.

        Raises CapacityError for what can never fit, ConfigError for what the model cannot honour.
        """
        return prepare(request, self.tokenizer, self._grammars, self.model.config.vocab_size, self.max_seq_len, self.adapters)

    def submit(self, request: Request | Prepared) -> str:
        """Accepts a request and returns its id; its deltas come from `step`. Raises as `prepare` does."""
        ready = request if isinstance(request, Prepared) else self.prepare(request)
        if ready.id in self._live:
            raise ConfigError(f"a request with the id '{ready.id}' is in flight; give each its own")
        first, *others = [self._sequence(ready, choice) for choice in range(ready.sampling.n)]
        first.siblings = others
        now = time.monotonic()
        deadline_s = ready.request.deadline_s
        self._live[ready.id] = _Live([first, *others], now, math.inf if deadline_s is None else now + deadline_s)
        (self.scheduler.add if self._pending is None else self._pending.held.append)(first)
        return ready.id

    def cancel(self, request_id: str) -> bool:
        """Ends a request now; its last deltas come with the next step. False: no such request is in flight."""
        live = self._live.get(request_id)
        if live is None:
            return False
        self._end(live, "cancelled")
        return True

    def _end(self, live: _Live, reason: FinishReason) -> None:
        for sequence in list(live.sequences):
            self._outbox.append(self._close(sequence, sequence.answer.end(reason)))

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do and nothing to say."""
        return not (self._live or self._outbox or self._pending)

    def _sequence(self, ready: Prepared, choice: int) -> LiveSequence:
        answer = Answer(
            ready.id, choice, ready.prompt_token_ids, ready.sampling, seed=ready.seed, max_tokens=ready.max_tokens,
            eos_ids=self.eos_ids, detokenizer=self.tokenizer.stream() if self.tokenizer is not None else None,
            matcher=ready.matcher.fresh() if ready.matcher is not None else None,
        )  # fmt: skip
        self._arrivals, asked = self._arrivals + 1, ready.request
        return LiveSequence(
            self._arrivals, list(ready.prompt_token_ids), len(ready.prompt_token_ids), answer, user=asked.user,
            weight=asked.weight, priority=asked.priority, reader=ready.reader(choice, lambda: self.weight_version),
            adapter=ready.adapter,
        )  # fmt: skip

    # Weights

    def swap(self, weights: Weights, mode: Mode = "wait") -> int:
        """Serves with `weights` from between two steps on, and returns their version. serve/swap.py tells the modes.

        The new model is made first, by the calling thread: an error (CheckpointError, ConfigError) leaves everything as it
        was. Under "wait" this returns before the swap has happened where something is in flight.
        """
        check_mode(mode)
        model = with_weights(self.model, self._plain_ops, weights)
        if self._plain_ops is not self.model.ops:
            loading.prepare_for_serving(model)
        return self._swap(model, mode) if self._thread is None else self._thread.call(lambda: self._swap(model, mode))

    def _swap(self, model: Decoder, mode: Mode) -> int:
        if self._pending is not None:
            raise ConfigError("a swap is waiting for its turn; wait for it, or cancel the requests that it waits for")
        if mode == "abort":
            for live in list(self._live.values()):
                self._end(live, "cancelled")
        self._pending = Pending(model, mode, self._arrivals)
        version = self.weight_version + 1
        self._swap_if_due()
        return version

    def _swap_if_due(self) -> None:
        pending = self._pending
        if pending is None:
            return
        before = (s for live in self._live.values() for s in live.sequences if s.arrival <= pending.last_arrival)
        if pending.mode == "wait" and next(before, None) is not None:
            return
        self.model, self._pending = pending.model, None
        self.weight_version += 1
        self.scheduler.renew(self.weight_version)
        for sequence in pending.held:
            if sequence.answer.request_id in self._live:  # not cancelled meanwhile
                self.scheduler.add(sequence)

    # The step

    @torch.inference_mode()
    def step(self, most: int = 1) -> list[Delta]:
        """Runs one batch and draws a token for every sequence that is ready for one. Returns what is new.

        Decodes may do so up to `most` times before this returns (stride.py): for callers who wait for no single token.
        """
        began = time.monotonic()
        for live in [live for live in self._live.values() if live.ends_s <= began]:
            self._end(live, "deadline")
        self._swap_if_due()
        deltas, self._outbox = self._outbox, []
        spans = self.scheduler.plan()
        if spans:
            self._mark(spans, began)
            decodes, rows = all(s.sequence.decoding for s in spans), list[float]()
            try:
                if most > 1 and self._undisturbed:
                    told = deltas, self._computed, self._draw
                    rows = stride.run(self.model, self.kv, self.drafts, spans, most, *told)
                if not rows:
                    spans = self.drafts.lengthen(spans)
                    self.kv.expect(self.pool.highest)
                    deltas += self._run(spans)
            except Exception as error:
                deltas += self._fail(spans, error)
            self._stats.steps(rows or [self.scheduler.ledger.tokens(spans)], took_s := time.monotonic() - began)
            if decodes and not rows:
                self.drafts.observe(spans, took_s)
        return deltas

    @property
    def _undisturbed(self) -> bool:
        """Whether nothing but its tokens ends a sequence."""
        timeless = all(live.ends_s == math.inf for live in self._live.values())
        return timeless and self._pending is None

    def _computed(self, spans: Sequence[Span]) -> None:
        advance(spans, len(self.model.config.layers))
        self.scheduler.index(spans)
        act(self.scheduler.ledger.kv_policy, spans, self.kv, self.pool)

    def _run(self, spans: list[Span]) -> list[Delta]:
        ready, logits = run_spans(self.model, self.kv, spans)
        whole = (s for s in spans if s.stop_layer == len(self.model.config.layers) and not s.sequence.decoding)
        self._stats.prompt_tokens += sum(s.num_tokens for s in whole)
        self._computed(spans)
        if logits is None:
            return []
        drawing: list[LiveSequence] = []
        rows: list[int] = []
        read: list[Delta] = []
        first_row = dict(zip((s.sequence.arrival for s in ready), accumulate((1 + len(s.draft) for s in ready), initial=0)))
        for sequence in [s.sequence for s in ready]:
            if sequence.answer.max_tokens == 0:
                read += [self._close(s, s.read(s.answer.end("length"))) for s in (sequence, *sequence.siblings)]
                continue
            for sibling in sequence.siblings:
                self.scheduler.fork(sequence, sibling, self.kv.copy)
            family = [sequence, *sequence.siblings]
            sequence.siblings = []
            drawing += family
            rows += [first_row[sequence.arrival]] * len(family)
        read += self._draw(logits, drawing, rows) if drawing else []
        return read + self.drafts.follow(spans, first_row, self._computed, partial(self._draw, logits))

    def _draw(self, logits: Tensor | Likeliest, sequences: Sequence[LiveSequence], rows: Sequence[int]) -> list[Delta]:
        """A token for each of `sequences` from its row of `logits`."""
        asks = [s.answer.ask(len(s.tokens)) for s in sequences]
        part = logits if list(rows) == [*range(len(logits))] else logits[list(rows)]
        draws = sample(part, asks, self.model.ops, self.weight_version)
        times = (logits.times if isinstance(logits, Likeliest) else ()) or [time.monotonic()] * len(draws)
        return list(map(self._take, sequences, draws, times))

    def _mark(self, spans: list[Span], now: float) -> None:
        """Notes whose first step it is."""
        for sequence in (s.sequence for s in spans if s.sequence.began_s is None):
            for choice in (sequence, *sequence.siblings):
                choice.began_s = now
                self._stats.queue_s.observe(now - self._live[sequence.answer.request_id].arrived_s)

    def _take(self, sequence: LiveSequence, draw: Draw, now: float) -> Delta:
        answer = sequence.answer
        delta = answer.take(draw)
        delta.at_s = now
        live = self._live[answer.request_id]
        if delta.tokens:
            sequence.tokens.append(draw.token_id)
            before = live.last_token_s.get(answer.choice)
            if before is None:
                assert sequence.began_s is not None, "it drew a token, so it ran"
                self._stats.time_to_first_token_s.observe(now - live.arrived_s)
                self._stats.prefill_s.observe(now - sequence.began_s)
                delta = replace(delta, queue_s=sequence.began_s - live.arrived_s, cached_tokens=sequence.cached_tokens)
                delta = sequence.read(delta)
            else:
                self._stats.inter_token_s.observe(now - before)
            live.last_token_s[answer.choice] = now
            self._stats.generated_tokens += 1
        return delta if delta.finish_reason is None else self._close(sequence, delta)

    def _fail(self, spans: list[Span], error: Exception) -> list[Delta]:
        """Ends every request that had a part in a step that failed."""
        reason = f"{type(error).__name__}: {error}"
        requests = dict.fromkeys(span.sequence.answer.request_id for span in spans)
        hit = [s for request in requests if request in self._live for s in list(self._live[request].sequences)]
        return [self._close(sequence, sequence.answer.end("error", error=reason)) for sequence in hit]

    def _close(self, sequence: LiveSequence, delta: Delta) -> Delta:
        self.scheduler.finish(sequence)
        self.drafts.forget(sequence)
        assert delta.finish_reason is not None
        self._stats.finished[delta.finish_reason] += 1
        live = self._live[delta.request_id]
        live.sequences.remove(sequence)
        if not live.sequences:
            del self._live[delta.request_id]
        return delta

    # Convenience

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | Sequence[Sampling] | None = None,
        adapter: str | None = None,
    ) -> list[Completion]:  # fmt: skip
        """Answers all `prompts` (texts or token ids) and returns when the last is done, in their order.

        One `sampling` for all, or one a prompt; `adapter` names a loaded adapter that answers. Raises before anything runs if
        one of them can never fit, and WaypostError if one failed. While a background thread steps the engine, the work is
        handed to that thread.
        """
        ready = [self.prepare(request) for request in requests(prompts, sampling, adapter)]
        return collect(ready, self._deltas(ready) if self._thread is None else self._thread.deltas(ready), self._abandon)

    def stream(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> AsyncIterator[Delta]:
        """Yields the deltas of all choices as they come. Leaving the loop early cancels the request.

        The engine is stepped by a background thread from the first call on; `close` ends it.
        """
        return self.background().stream(Request(prompt, sampling if sampling is not None else Sampling()))

    def background(self) -> EngineThread:
        """The thread that steps this engine, started on the first call; `submit`, `step` and `cancel` are then its alone."""
        if self._thread is None:
            self._thread = EngineThread(self)
        return self._thread

    def stats(self) -> Stats:
        """Counters and gauges, as of now. Any thread may call it."""
        ledger = self.scheduler.ledger
        return replace(
            self._stats, num_running=len(ledger.running), num_waiting=len(ledger.waiting),
            num_preemptions=self.scheduler.num_preemptions, pages_free=self.pool.free, pages_held=self.pool.held,
            pages_cached=self.pool.cached, prefix_queries=self.scheduler.prefix_queries, prefix_hits=self.scheduler.prefix_hits,
            finished=dict(self._stats.finished),
        )  # fmt: skip

    def close(self) -> None:
        """Ends the background thread; requests in flight end as cancelled. The engine can be used again afterwards."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _deltas(self, ready: Sequence[Prepared]) -> Iterator[Delta]:
        """Submits `ready` and steps until all of them are done."""
        mine = {self.submit(r) for r in ready}
        while mine & self._live.keys() or self._outbox:
            most = stride.in_time(self._stats.newest_step_s, stride.UNHEARD_S)
            yield from (delta for delta in self.step(most) if delta.request_id in mine)

    def _abandon(self, request_id: str) -> None:
        if self._thread is not None:
            self._thread.cancel(request_id)
        elif self.cancel(request_id):
            self._outbox = [delta for delta in self._outbox if delta.request_id != request_id]
