"""The HTTP that FastAPI leaves to us: bounded bodies, event streams, clients that hang up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from waypost.serve.api.errors import ApiError, cut_off
from waypost.serve.api.record import Record

T = TypeVar("T")

MAX_BODY_BYTES = 32 * 2**20
"""Longest body that is read; a context of a million tokens fits."""
CLIENT_GONE = 499
"""Status for a request whose client hung up before the answer; nobody reads it but the log."""
GONE = "client_gone"
"""What the log calls it, also of a stream, whose status was sent before."""


def refuse(error: ApiError) -> Response:
    """The answer to a refused request."""
    return JSONResponse(error.body, error.status, error.headers)


async def read_body(request: Request) -> bytes:
    """The whole body; ApiError 413 beyond MAX_BODY_BYTES, CLIENT_GONE where the client hangs up before its end, 503 where the
    server stops before it."""
    service = request.app.state.service
    parts, size = [], 0
    try:
        async with asyncio.timeout(0.0 if service.stopping else None) as limit:
            service.reading.add(limit)
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise ApiError(413, f"The body is longer than {MAX_BODY_BYTES} bytes", code="body_too_long")
                parts.append(part)
    except ClientDisconnect as error:
        raise ApiError(CLIENT_GONE, "The client hung up before the end of the body", code=GONE) from error
    except TimeoutError as error:
        raise cut_off() from error
    finally:
        service.reading.discard(limit)
    return b"".join(parts)


async def hang_up(receive: Receive) -> None:
    """Returns when the client is gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns, or None, with `work` cancelled, if the client hangs up first."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(hang_up(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        request.state.record.error = GONE
        return None
    finally:
        await _end(working, gone)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def event(payload: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(Response):
    """Sends what `batches` yields, one write a batch, then [DONE]. An ApiError on the way becomes a last event.

    When the client hangs up, `batches` is closed, wherever it waits.
    """

    media_type = "text/event-stream"

    def __init__(self, batches: AsyncGenerator[list[Any], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._batches = batches

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(scope["state"]["record"], send))
        gone = asyncio.ensure_future(hang_up(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                scope["state"]["record"].error = GONE
        finally:
            await _end(sending, gone)

    async def _send_all(self, record: Record, send: Send) -> None:
        async def write(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        with suppress(OSError):  # the client is gone: closing the batches is all that is left to do
            async with aclosing(self._batches) as batches:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    async for batch in batches:
                        if batch:
                            await write("".join(map(event, batch)))
                except ApiError as error:
                    record.error = error.code
                    await write(event(error.body))
                await write("data: [DONE]\n\n", more=False)
