"""A server of OpenAI's protocol, spoken with over HTTP."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from waypost.core.errors import CapacityError, ConfigError, WaypostError

Message = dict[str, str]


class Remote:
    """Answers a conversation (chat.py); `wishes` are the fields of the request that are not None."""

    def __init__(self, url: str, model: str | None, api_key: str | None, wishes: dict[str, Any]) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._wishes = {name: value for name, value in wishes.items() if value is not None}
        self._model = model if model is not None else self._first_model()

    def answer(self, messages: list[Message], show: Callable[[str], None]) -> tuple[str, str]:
        began, text, reason = time.monotonic(), "", "cut off"
        body = {"model": self._model, "messages": messages, "stream": True, **self._wishes}
        try:
            for event in self._events("/chat/completions", body):
                for choice in event.get("choices", ()):
                    piece = choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
                    text += piece
                    show(piece)
        except KeyboardInterrupt:  # leaving the loop hangs up, which ends the answer there too
            reason = "interrupted"
        return text, f"[{time.monotonic() - began:.2f} s, {reason}]"

    def _first_model(self) -> str:
        with self._open("/models", None) as reply:
            listed = json.loads(reply.read())["data"]
        if not listed:
            raise ConfigError(f"{self._url} lists no model; name one with --model")
        return str(listed[0]["id"])

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._open(path, body) as reply:
            for line in reply:
                data = line.decode("utf-8").strip().removeprefix("data:").strip()
                if not data or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise WaypostError(f"the server: {event['error']['message']}")
                yield event

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(self._url + path, data, self._headers))
        except urllib.error.HTTPError as error:
            with error:
                said = error.read()
            kind = CapacityError if b"context_length_exceeded" in said else WaypostError
            raise kind(f"{self._url}{path}: {error.code}: {_message(said)}") from error
        except (urllib.error.URLError, ValueError, OSError) as error:
            raise ConfigError(f"{self._url}: cannot be reached ({error}); is a server running there?") from error


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")
