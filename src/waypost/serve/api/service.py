"""The state behind the routes: an engine that may still be loading, the threads around it, and what they count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Literal, TypeVar

from waypost.kernels.ops import PAGE_TOKENS
from waypost.model.tokenizer import Tokenizer
from waypost.serve.api.admission import Admission, Limits
from waypost.serve.api.errors import FAILED, LOADING, STOPPING, deadline_missed, unavailable, unknown_model
from waypost.serve.api.jobs import Job, Work, head_of
from waypost.serve.api.metrics import Metrics, Reading
from waypost.serve.api.replies import Head, Part, usage
from waypost.serve.api.subscription import Mailbox, Subscription
from waypost.serve.api.watch import Call, Watch
from waypost.serve.engine import Engine
from waypost.serve.loop import EngineThread

T = TypeVar("T")
State = Literal["loading", "ready", "stopping", "failed"]

TEXT_THREADS = 2
"""Threads that render and tokenise, beside the event loop and the engine."""


class Service:
    """One model under one name. `attach` makes it ready, from any thread; the rest is called on the event loop."""

    def __init__(self, model_name: str, limits: Limits | None = None) -> None:
        self.model_name = model_name
        self.admission = Admission(limits if limits is not None else Limits())
        self.created = int(time.time())
        self.metrics = Metrics(model_name, self._readings)
        self.stopping = False
        """Whether new requests are refused because the server is on its way out."""
        self.swapping = False
        """Whether other weights are on their way in."""
        self.checkpoint = model_name
        """Where the weights in use come from."""
        self.in_flight = 0
        """Requests that are being answered."""
        self.reading: set[asyncio.Timeout] = set()
        """Of the requests whose body is still on its way."""
        self._ready: tuple[Engine, Tokenizer] | None = None
        self._thread: EngineThread | None = None
        self._mailbox: Mailbox | None = None
        self._pool = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="waypost-text")

    def attach(self, engine: Engine, tokenizer: Tokenizer) -> None:
        """Serves `engine` from now on, unless the server is on its way out already."""
        if self.stopping:
            return
        self._thread = engine.background()
        self._ready = engine, tokenizer

    @property
    def state(self) -> tuple[State, str]:
        """What the server can do now, and why it cannot do more."""
        if self._thread is not None and self._thread.failure is not None:
            return "failed", f"the engine has stopped: {self._thread.failure!r}; restart the server"
        if self.stopping:
            return "stopping", "the server is shutting down and takes no requests"
        return ("ready", "") if self._ready is not None else ("loading", "the model is still being loaded")

    def stop(self) -> None:
        """Refuses new requests from now on, and those whose body has not come yet: who knows whether it ever will."""
        self.stopping = True
        for limit in self.reading:
            limit.reschedule(asyncio.get_running_loop().time())

    def require(self, model: str | None) -> tuple[Engine, Tokenizer]:
        """What answers a request for `model`; ApiError 503 if nothing does now, 404 if it never will."""
        state, detail = self.state
        if self._ready is None or state != "ready":
            raise unavailable({"loading": LOADING, "stopping": STOPPING}.get(state, FAILED), detail)
        if model not in (None, self.model_name, *self._ready[0].adapters.names):
            raise unknown_model(str(model), self.model_name)
        return self._ready

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a request for `model`, which `require` took, means; None: the model itself."""
        return None if model == self.model_name else model

    @property
    def model_names(self) -> list[str]:
        """What requests may name: the model, then its adapters."""
        return [self.model_name, *self.require(None)[0].adapters.names]

    async def think(self, work: Callable[..., T], *args: Any) -> T:
        """Runs `work(*args)` on a text thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    def head(self, reply_id: str, adapter: str | None = None) -> Head:
        """What every reply of a request begins with: id, model, time, fingerprint. ApiError 503 while no engine is ready."""
        engine, _ = self.require(None)
        return head_of(engine, adapter or self.model_name, reply_id, int(time.time()))

    async def finished(self, work: Work, call: Call) -> list[Part]:
        """What every choice has when it has ended. Cancelling this coroutine cancels the work."""
        parts = [Part() for _ in range(work.num_choices)]
        with closing(self._subscribe(work, call, heeded=False)) as subscription:
            async for news in subscription:
                for index, delta in news:
                    parts[index].add(delta)
        return parts

    async def whole(self, job: Job, head: Head, call: Call) -> Any:
        """The finished answer. Cancelling this coroutine cancels the work."""
        parts = await self.finished(job, call)
        cached = sum(part.cached_tokens for part in parts[:: job.num_choices // len(job.prompts)])  # each prompt once
        head = head.after(parts)
        return job.form.whole(head, parts, usage(job.prompts, sum(len(part.draws) for part in parts), cached))

    async def chunks(self, job: Job, head: Head, call: Call, include_usage: bool) -> AsyncGenerator[list[Any], None]:
        """The answer piece by piece: each item is what is to be sent now. Closing this generator cancels the work."""

        def mark(chunks: list[Any]) -> list[Any]:  # "usage": null, as OpenAI sends where the usage comes last
            return [{**chunk, "usage": None} for chunk in chunks] if include_usage else chunks

        num_tokens = num_cached = 0
        with closing(self._subscribe(job, call)) as subscription:
            began = [job.form.opening(head, index) for index in range(job.num_choices)]
            yield mark([chunk for chunk in began if chunk is not None])
            async for news in subscription:
                parts: dict[int, Part] = {}  # what gathered while the client was slow goes out as one chunk a choice
                for index, delta in news:
                    parts.setdefault(index, Part()).add(delta)
                head = head.after(parts.values())
                num_tokens += sum(len(part.draws) for part in parts.values())
                first = range(0, job.num_choices, job.num_choices // len(job.prompts))  # each prompt once
                num_cached += sum(parts[index].cached_tokens for index in first if index in parts)
                yield mark([chunk for index, part in parts.items() for chunk in job.form.chunks(head, index, part)])
        if include_usage:
            yield [job.form.closing(head, usage(job.prompts, num_tokens, num_cached))]

    def close(self) -> None:
        """Ends the engine's thread, after the step that runs; what is in flight ends as cancelled. May be called twice,
        from any thread."""
        self.stopping = True
        if self._ready is not None:
            self._ready[0].close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _subscribe(self, work: Work, call: Call, heeded: bool = True) -> Subscription:
        self.require(None)
        assert self._thread is not None, "what is ready has a thread"
        if self._mailbox is None:
            self._mailbox = Mailbox()
        deadline_s = call.deadline_s if call.deadline_s is not None else self.admission.limits.deadline_s
        if deadline_s is not None:
            deadline_s -= time.monotonic() - call.record.began_s
            if deadline_s <= 0:
                raise deadline_missed(0)
        requests = work.requests_of(call.caller.name or call.user, call.caller, call.priority, deadline_s)
        watch = Watch(self.metrics, work, call, heeded)
        subscription = Subscription(self._mailbox, self._thread, requests, watch.see, lambda: self.stopping, heeded)
        for prompt in work.prompts:
            self.metrics.prompt_tokens.inc(len(prompt.token_ids))
            self.metrics.request_prompt_tokens.observe(len(prompt.token_ids))
        for request in work.requests:
            self.metrics.asked_choices.observe(request.sampling.n)
            if request.max_tokens:
                self.metrics.asked_tokens.observe(request.max_tokens)
        return subscription

    def _readings(self) -> Mapping[str, Reading]:
        if self._ready is None:
            return {}
        stats = self._ready[0].stats()
        used = stats.pages_held / stats.pages_total
        return {
            "num_requests_running": Reading("gauge", "Choices that hold pages of the cache.", stats.num_running),
            "num_requests_waiting": Reading("gauge", "Choices that wait for pages or a turn.", stats.num_waiting),
            "kv_cache_usage_perc": Reading("gauge", "Share of the cache's pages in use, 0 to 1.", used),
            "prefix_cache_queries": Reading("counter", "Tokens of admitted choices.", stats.prefix_queries),
            "prefix_cache_hits": Reading("counter", "Tokens that the prefix cache had.", stats.prefix_hits),
            "num_preemptions": Reading("counter", "Times a choice lost its pages.", stats.num_preemptions),
            "spec_decode_num_drafts": Reading("counter", "Decodes that verified guesses.", stats.num_drafts),
            "spec_decode_num_draft_tokens": Reading("counter", "Tokens guessed.", stats.draft_tokens),
            "spec_decode_num_accepted_tokens": Reading("counter", "Guesses that were drawn too.", stats.accepted_tokens),
            "num_steps": Reading("counter", "Batches that the engine ran.", stats.num_steps),
            "iteration_tokens_total": Reading("histogram", "Tokens computed in a batch.", stats.step_tokens),
            "request_queue_time_seconds": Reading("histogram", "From a choice's submission to its first batch.", stats.queue_s),
            "request_prefill_time_seconds": Reading(
                "histogram", "From a choice's first batch to its first token.", stats.prefill_s
            ),
            "weight_version": Reading("gauge", "Times the weights were exchanged.", self._ready[0].weight_version),
            "cache_config_info": Reading("gauge", "The cache of keys and values; always 1.", 1, self._cache_config()),
            "num_requests_refused": Reading("counter", "Requests answered with 429.", self.admission.refused.total()),
            "num_requests_unanswered": Reading("gauge", "Choices without a first token.", self.admission.waiting),
        }

    def _cache_config(self) -> dict[str, str]:
        assert self._ready is not None, "nothing is read before it is there"
        engine = self._ready[0]
        known = {
            "block_size": PAGE_TOKENS,
            "num_gpu_blocks": engine.pool.total,
            "enable_prefix_caching": engine.scheduler.ledger.prefix is not None,
            "cache_dtype": str(engine.dtype).removeprefix("torch."),
        }
        return {name: str(value) for name, value in known.items()}
