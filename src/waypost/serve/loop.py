"""A thread that steps the engine while there is work, so that an event loop or other threads never wait for a step."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from waypost.core.errors import ConfigError, WaypostError
from waypost.serve import stride
from waypost.serve.request import Delta, Request

if TYPE_CHECKING:
    from waypost.serve.engine import Engine
from waypost.serve.prepare import Prepared

Sink = Callable[[Delta], object]
"""Called in the engine's thread with each delta of one request; must not block. One that raises loses its request."""


T = TypeVar("T")


@dataclass
class _Call(Generic[T]):
    work: Callable[[], T]
    result: Future[T] = field(default_factory=Future)

    def run(self) -> None:
        try:
            self.result.set_result(self.work())
        except Exception as error:
            self.result.set_exception(error)


class EngineThread:
    """Owns the stepping of `engine` until `close`. `submit` and `cancel` may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        self._inbox: list[Prepared | str | _Call[Any]] = []  # requests to submit, ids to cancel, other work, in order
        self._sinks: dict[str, tuple[Sink, set[int]]] = {}  # id -> who listens, choices still open
        self._heeded: set[str] = set()  # ids of those whose every token somebody waits for
        self._closing = False
        self._died: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="waypost-engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread before its time; None while it lives, and after `close`."""
        return self._died

    def submit(self, request: Request | Prepared, sink: Sink, heeded: bool = True) -> Prepared:
        """Accepts a request; its deltas go to `sink`: each token as it comes, or some at a time while nobody is `heeded`.
        Prompts are encoded here, in the caller's thread.

        Raises what `Engine.prepare` raises, ConfigError for an id in flight, WaypostError after `close`.
        """
        ready = self._engine.prepare(request) if isinstance(request, Request) else request
        with self._wake:
            self._check_alive()
            if ready.id in self._sinks:
                raise ConfigError(f"a request with the id '{ready.id}' is in flight; give each its own")
            self._sinks[ready.id] = (sink, set(range(ready.sampling.n)))
            if heeded:
                self._heeded.add(ready.id)
            self._inbox.append(ready)
            self._wake.notify()
        return ready

    def call(self, work: Callable[[], T]) -> T:
        """Does `work` in the engine's thread, between two steps, and returns what it returns or raises what it raises."""
        call = _Call(work)
        with self._wake:
            self._check_alive()
            self._inbox.append(call)
            self._wake.notify()
        return call.result.result()

    def _check_alive(self) -> None:
        if self._closing or self._died is not None:
            raise WaypostError("the engine has stopped and takes no requests" + (f": {self._died}" if self._died else ""))

    def cancel(self, request_id: str) -> None:
        """Ends a request soon; its choices get their last deltas. One that is not in flight is left alone."""
        with self._wake:
            self._inbox.append(request_id)
            self._wake.notify()

    def deltas(self, ready: Sequence[Prepared]) -> Iterator[Delta]:
        """Submits `ready` and yields their deltas until all are done; blocks the calling thread."""
        arrived: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        unfinished = sum(r.sampling.n for r in ready)
        for r in ready:
            self.submit(r, arrived.put, heeded=False)
        while unfinished:
            delta = arrived.get()
            unfinished -= delta.finish_reason is not None
            yield delta

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        """The deltas of all choices as they come, in the caller's event loop. Leaving the loop early cancels the request."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Delta] = asyncio.Queue()
        ready = self.submit(request, lambda delta: loop.call_soon_threadsafe(queue.put_nowait, delta))
        unfinished = ready.sampling.n
        try:
            while unfinished:
                delta = await queue.get()
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            if unfinished:
                self.cancel(ready.id)

    def close(self) -> None:
        """Cancels what is in flight, delivers the last deltas and ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # a mistake of ours: nobody may be left waiting for an answer
            with self._wake:
                self._died = error
                left, self._sinks = self._sinks, {}
                calls = [item for item in self._inbox if isinstance(item, _Call)]
            for call in calls:
                call.result.set_exception(WaypostError(f"the engine has stopped: {error!r}"))
            for request_id, (sink, unfinished) in left.items():
                for choice in unfinished:
                    _tell(sink, Delta(request_id, choice, finish_reason="error", error=f"the engine has stopped: {error!r}"))

    def _turn(self) -> bool:
        """One step, or a wait for work. False: closed, and everything was delivered."""
        engine = self._engine
        with self._wake:
            if engine.idle and not (self._inbox or self._closing):
                engine.scheduler.check()
                self._wake.wait()
            inbox, self._inbox = self._inbox, []
            closing, heeded = self._closing, bool(self._heeded)
        for item in inbox:
            if isinstance(item, str):
                engine.cancel(item)
            elif isinstance(item, _Call):
                item.run()
            else:
                engine.submit(item)
        if closing:
            for request_id in list(self._sinks):
                engine.cancel(request_id)
        for delta in engine.step(1 if heeded else stride.in_time(engine.stats().newest_step_s, stride.UNHEEDED_S)):
            self._deliver(delta)
        return not (closing and engine.idle)

    def _deliver(self, delta: Delta) -> None:
        entry = self._sinks.get(delta.request_id)
        if entry is None:
            return
        sink, unfinished = entry
        if delta.finish_reason is not None:
            unfinished.discard(delta.choice)
        taken = _tell(sink, delta)
        if not unfinished or not taken:
            with self._wake:
                del self._sinks[delta.request_id]
                self._heeded.discard(delta.request_id)
            self._engine.cancel(delta.request_id)  # finds nothing where all choices are done


def _tell(sink: Sink, delta: Delta) -> bool:
    """Whether the listener took the delta; one that is gone (its event loop closed) is no reason to stop."""
    try:
        sink(delta)
    except Exception:
        return False
    return True
