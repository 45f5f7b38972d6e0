"""How the event loop hears of what the engine's thread computes.

    with closing(Subscription(mailbox, thread, prepared, on_delta)) as subscription:   # cancels what has not finished
        async for news in subscription:                    # everything that has arrived since, in order
            for index, delta in news: ...                  # index = prompt * n + choice

Invariant: every choice gets one last delta with a finish_reason, or the loop raises ApiError.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from waypost.core.errors import WaypostError
from waypost.serve.api.errors import FAILED, ApiError, cut_off, deadline_missed, unavailable
from waypost.serve.loop import EngineThread
from waypost.serve.prepare import Prepared
from waypost.serve.request import Delta


class Mailbox:
    """Takes deltas on the engine's thread and delivers them on the event loop, one wake-up for all that have gathered."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._post: list[tuple[Subscription, int, Delta]] = []

    def put(self, subscription: Subscription, index: int, delta: Delta) -> None:
        """Called on any thread; does not wait. Raises RuntimeError once the loop is closed."""
        with self._lock:
            self._post.append((subscription, index, delta))
            first = len(self._post) == 1
        if first:
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            post, self._post = self._post, []
        for subscription, index, delta in post:
            subscription.deliver(index, delta)


class Subscription:
    """The engine requests of one HTTP request. Made, read and closed on the event loop."""

    def __init__(
        self,
        mailbox: Mailbox,
        thread: EngineThread,
        requests: Sequence[Prepared],
        on_delta: Callable[[int, Delta], None],
        stopping: Callable[[], bool],
        heeded: bool = True,
    ) -> None:
        """Submits `requests`: all of them, or none and an ApiError. `heeded`: somebody waits for every token.

        `on_delta` sees every delta when it arrives, whether or not anyone still reads. What ends as cancelled while the
        server is `stopping` is an ApiError; otherwise an exchange of weights has ended it, and what it has is its answer.
        """
        self._thread, self._on_delta, self._stopping = thread, on_delta, stopping
        self._items: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._open = [request.id for request in requests for _ in range(request.sampling.n)]
        self._num_open = len(self._open)
        submitted: list[str] = []
        first = 0
        try:
            for request in requests:
                sink = partial(self._put, mailbox, first)
                thread.submit(request, sink, heeded)
                submitted.append(request.id)
                first += request.sampling.n
        except WaypostError as error:
            for request_id in submitted:
                thread.cancel(request_id)
            raise (cut_off() if stopping() else unavailable(FAILED, str(error))) from error

    def _put(self, mailbox: Mailbox, first: int, delta: Delta) -> None:
        mailbox.put(self, first + delta.choice, delta)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        num_tokens = 0
        while self._num_open:
            news = [await self._items.get()]
            while not self._items.empty():
                news.append(self._items.get_nowait())
            for index, delta in news:
                if delta.finish_reason is not None:
                    self._open[index] = ""
                    self._num_open -= 1
                num_tokens += len(delta.tokens)
                if delta.finish_reason == "deadline":
                    raise deadline_missed(num_tokens)
                if delta.finish_reason == "error":
                    raise ApiError(500, f"The request failed: {delta.error}", code="engine_error")
                if delta.finish_reason == "cancelled" and self._stopping():
                    raise cut_off()
            yield news

    def close(self) -> None:
        """Cancels what has not finished. May be called more than once."""
        for request_id in dict.fromkeys(self._open):
            if request_id:
                self._thread.cancel(request_id)
        self._open, self._num_open = [], 0

    def deliver(self, index: int, delta: Delta) -> None:
        """Takes what choice `index` has, at the moment it arrives."""
        self._on_delta(index, delta)
        self._items.put_nowait((index, delta))
