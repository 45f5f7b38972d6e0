"""The end of a server, where nobody is there to hear of it."""

from __future__ import annotations

import asyncio
import signal

import pytest

from waypost.serve.api.server import Ending
from waypost.serve.api.service import Service


@pytest.mark.parametrize("silence", [BrokenPipeError, ValueError("I/O operation on closed file")])
def test_a_server_ends_though_nobody_reads_what_it_says(silence: Exception) -> None:
    """As in `waypost serve ... 2>&1 | head`: its words then raise. Running requests still finish, and the first SIGTERM is
    enough."""
    events: list[str] = []

    def say(_: str) -> None:
        raise silence

    class Watched(Service):
        state = ("ready", "")

        def close(self) -> None:
            events.append(f"closed with {self.in_flight} in flight")
            super().close()

    async def main() -> None:
        service = Watched("m")
        service.in_flight = 3
        ending = Ending(service, lambda: events.append("stopped"), 60.0, say, lambda _: pytest.fail("it is not loading"))
        ending.begin(signal.SIGTERM)
        assert ending._task is not None
        for _ in range(10):  # turns of the loop, of which the words take the first
            await asyncio.sleep(0)
        assert events == []
        service.in_flight = 0
        await ending._task

    asyncio.run(main())
    assert events == ["closed with 0 in flight", "stopped"]
