"""A socket, uvicorn, and an end that lets running requests finish.

`listen` and `url` import nothing heavy, so that an occupied port is found before a model is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from waypost.core.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from waypost.serve.api.service import Service

LAST_WORDS_S = 5
"""Time for the last answers, and for errors to what was cut off, to reach their clients."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at `host`:`port` (port 0: a free one); early clients wait in its queue.

    ConfigError where the port is taken, may not be used, or the host is not an address of this machine.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(f"--host {host}: not an address ({error.strerror}); 127.0.0.1 is this machine alone") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise ConfigError(_why_not(error, host, port)) from error
    return sock


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; stop what listens there, or choose another with --port (0 takes a free one)"
    if error.errno == errno.EACCES:
        return f"port {port} of {host} needs privileges that this process has not; choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: no address of this machine; 127.0.0.1 is this machine alone, 0.0.0.0 every network it is on"
    return f"cannot listen at {host}:{port}: {error.strerror}"


def url(sock: socket.socket) -> str:
    """Where a client on this machine finds the server."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Ending:
    """From the first SIGTERM, SIGINT or SIGHUP on: no new requests, running ones may finish until the deadline; a second signal
    ends them now. While there is no engine yet, a signal is `at_once`'s, for nothing runs that could finish."""

    def __init__(
        self, service: Service, stop: Callable[[], None], drain_s: float, say: Callable[[str], None],
        at_once: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._service, self._stop, self._drain_s, self._say, self._at_once = service, stop, drain_s, say, at_once
        self._task: asyncio.Task[None] | None = None
        self._now = asyncio.Event()

    def begin(self, number: int) -> None:
        """The first signal starts the end, the second hurries it."""
        if self._service.state[0] == "loading":
            self._at_once(number)
        elif self._task is not None:
            self._now.set()
        else:
            self._service.stop()
            self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            if self._service.in_flight:
                self._tell(
                    f"stopping; in flight: {self._service.in_flight}, with {self._drain_s:g} s to finish (again: stop now)"
                )
            deadline = asyncio.get_running_loop().time() + self._drain_s
            while self._service.in_flight and not self._now.is_set() and asyncio.get_running_loop().time() < deadline:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._now.wait(), 0.05)
            cut_off = self._service.in_flight
            await asyncio.to_thread(self._service.close)  # what is cut off gets an error that says so
            self._tell(f"stopped; cut off: {cut_off}" if cut_off else "stopped")
        finally:
            self._stop()

    def _tell(self, words: str) -> None:
        """Says `words`, also where nobody reads them any more: stderr was a pipe and its reader is gone, or it is closed."""
        with contextlib.suppress(OSError, ValueError):
            self._say(words)


def complete_routes(app: FastAPI) -> None:
    """FastAPI derives what its routes take and give when a request first passes them: 20 ms, better while weights are read."""
    scope = {"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": []}
    for route in app.routes:
        route.matches(scope)


def run(
    app: FastAPI, sock: socket.socket, load: Callable[[], None], *, drain_s: float, say: Callable[[str], None],
    at_once: Callable[[int], None],
) -> None:  # fmt: skip
    """Serves `app` on `sock` until SIGTERM, SIGINT or SIGHUP, and returns when everything has ended. For the main thread alone.

    `load` attaches the engine; it runs on a thread of its own while the server answers 503. What it raises ends the
    server and is raised here. A signal meanwhile is `at_once`'s, which gets its number and ends the process.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            yield  # signals are the business of Ending

    server = Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="on", ws="none", timeout_graceful_shutdown=LAST_WORDS_S
        )
    )
    failure: list[BaseException] = []

    def stop() -> None:
        server.should_exit = True

    def loading() -> None:
        try:
            load()
        except BaseException as error:  # raised again below, on the main thread
            failure.append(error)
            stop()

    async def main() -> None:
        ending = Ending(app.state.service, stop, drain_s, say, at_once)
        for number in before:
            asyncio.get_running_loop().add_signal_handler(number, ending.begin, number)
        thread.start()
        complete_routes(app)
        await server.serve(sockets=[sock])

    thread = threading.Thread(target=loading, name="waypost-load", daemon=True)
    ends = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's server outlives its terminal
        ends.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in ends}
    asyncio.run(main())
    for number, handler in before.items():
        if handler is not None:  # one that Python did not set, and cannot set again
            signal.signal(number, handler)
    thread.join()  # native code that is cut off while it loads would abort the process
    if failure:
        raise failure[0]
