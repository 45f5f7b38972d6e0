"""One request as the log tells it: a JSON line when it has ended."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass
class Record:
    """Filled while a request is answered. Times in seconds from its arrival."""

    request_id: str
    method: str
    path: str
    client: str = ""
    """Its address; behind a proxy on this machine, the one that the proxy forwards."""
    caller: str = ""
    began_s: float = field(default_factory=time.monotonic)
    status: int = 0
    """0: it ended before anything was sent."""
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: list[str] = field(default_factory=list)
    """Why each choice ended, in the order in which they did."""
    queue_s: float | None = None
    """The longest that one of its choices waited for the engine."""
    first_token_s: float | None = None
    error: str | None = None
    """Code, or kind, of the error that it got."""

    def line(self) -> str:
        """One JSON object, without a line end; what is unknown is left out."""
        fields: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path[:1000],
            "status": self.status,
            "total_s": round(time.monotonic() - self.began_s, 6),
            "client": self.client[:100] or None,
            "caller": self.caller or None,
            "error": self.error,
        }
        if self.prompt_tokens:
            fields |= {
                "stream": self.stream,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "finished": self.finished,
                "queue_s": None if self.queue_s is None else round(self.queue_s, 6),
                "first_token_s": None if self.first_token_s is None else round(self.first_token_s, 6),
            }
        return json.dumps({name: value for name, value in fields.items() if value is not None})
