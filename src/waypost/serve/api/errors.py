"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}, and where each kind of error comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from waypost.core.errors import CapacityError, ConfigError, WaypostError, nearest

LOADING, STOPPING, FAILED = "model_loading", "server_stopping", "engine_failed"
"""Codes of a server that cannot answer: not yet, not any more, and not before somebody restarts it."""


class ApiError(Exception):
    """A refused request: an HTTP status and the four members of OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, kind: str | None = None, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers
        default = "invalid_request_error" if status < 500 else "server_error"
        self.error = {"message": message, "type": kind or default, "param": param, "code": code}

    @property
    def code(self) -> str | None:
        """The short name of what was wrong, or its type where it has none."""
        return self.error["code"] or self.error["type"]

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be honoured as given."""
    return ApiError(400, message, param=param, code=code)


def unknown_model(given: str, served: str) -> ApiError:
    """404 model_not_found, naming the model that is served here."""
    message = f"The model '{given}' does not exist. This server serves '{served}'"
    return ApiError(404, message, param="model", code="model_not_found")


def context_exceeded(max_seq_len: int, prompt_tokens: int, max_tokens: int | None, param: str) -> ApiError:
    """400 context_length_exceeded, with the numbers a client needs in order to shorten its request."""
    asked = f", max_tokens asks for {max_tokens} more" if max_tokens is not None else ""
    room = max_seq_len - prompt_tokens
    todo = f"; ask for at most {room} new tokens, or shorten the prompt" if room > 0 else "; shorten the prompt"
    message = (
        f"This model's context is {max_seq_len} tokens, the prompt and the answer together. "
        f"The prompt takes {prompt_tokens} of them{asked}{todo}"
    )
    return bad_request(message, param, "context_length_exceeded")


def unavailable(code: str, message: str) -> ApiError:
    """503: nothing that this request could change. The client of a server that loads is told when to ask again."""
    return ApiError(503, message, code=code, headers={"Retry-After": "1"} if code == LOADING else None)


def cut_off() -> ApiError:
    """503 to what was not finished when the time of a server that shuts down was over."""
    return unavailable(STOPPING, "The server is shutting down and did not finish this request; send it again")


def deadline_missed(completion_tokens: int) -> ApiError:
    """504, and the client is asked not to try the same again by itself."""
    message = f"The deadline has passed after {completion_tokens} tokens; give the request more time, or ask for fewer tokens"
    return ApiError(504, message, code="deadline_exceeded", headers={"x-should-retry": "false"})


def of_waypost(error: WaypostError) -> ApiError:
    """What the engine or the tokenizer refused: the request's fault, except a capacity that frees itself again."""
    if isinstance(error, CapacityError):
        return bad_request(str(error), code="capacity_exceeded")
    if isinstance(error, ConfigError):
        return bad_request(str(error))
    return ApiError(500, f"{type(error).__name__}: {error}")


def of_validation(error: ValidationError, known: Iterable[str], why: Mapping[str, str], shapes: Mapping[str, str]) -> ApiError:
    """The first problem of a body that does not fit its model.

    `known` are the fields of the request, `why` says why most values of a field are refused, `shapes` what it may be.
    """
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first["msg"].removeprefix("Invalid JSON: ")
        return bad_request(f"The body is not valid JSON ({reason})", code="invalid_json")
    if not first["loc"]:
        return bad_request("The body must be a JSON object", code="invalid_type")
    # Of a union, the branch that got furthest is the one that was meant.
    item = max((p for p in problems if p["loc"][0] == first["loc"][0]), key=lambda p: len(p["loc"]))
    place = [part for before, part in zip((None, *item["loc"]), item["loc"], strict=False) if before not in _TAGGED]
    path = [
        part for part in place if isinstance(part, int) or (part not in _BRANCHES and (part.isidentifier() or part.isdigit()))
    ]
    path = path or [item["loc"][0]]  # a name that is no identifier: the client made it up
    param, field = ".".join(map(str, path)), str(path[0])
    if item["type"] == "extra_forbidden":
        hint = nearest(field, [name for name in known if name not in why]) if len(path) == 1 else ""
        return bad_request(f"Unknown field '{param}'.{hint}", param, "unknown_field")
    if item["type"] == "missing":
        return bad_request(f"The field '{param}' is missing", param, "missing_field")
    given = _short(item["input"])
    if field in why:
        return bad_request(f"{param}={given} cannot be honoured: {why[field]}", param, "unsupported_value")
    allowed = shapes.get(field) or item["msg"][:1].lower() + item["msg"][1:]
    return bad_request(f"{param}={given}: {allowed}", param, "invalid_value")


_BRANCHES = {"str", "int", "float", "bool", "list", "dict", "none"}
"""Names that pydantic puts into a path to say which branch of a union it tried."""
_TAGGED = {"response_format"}
"""Fields behind which it puts the `type` by which it chose a branch, which may be the name of a field in it too."""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
