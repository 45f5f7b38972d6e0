"""The door: every request gets a name, is counted, must show its key on guarded routes, and leaves a line in the log."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from waypost.serve.api.access import ANYONE, Caller, Callers
from waypost.serve.api.asgi import CLIENT_GONE, refuse
from waypost.serve.api.errors import ApiError, bad_request
from waypost.serve.api.record import Record
from waypost.serve.api.service import Service

GUARDED = ("/v1", "/tokenize", "/detokenize")
"""Where a key is asked for, if the server has any."""
ADMIN = "/admin"
"""Where the admin's key is asked for, whatever the others."""
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class Gate:
    """Middleware. `log` gets each request's line when it has ended."""

    def __init__(
        self, app: ASGIApp, service: Service, callers: Callers, admin: Caller | None, log: Callable[[str], object] | None
    ) -> None:
        self.app, self._service, self._callers, self._log = app, service, callers, log
        self._admin = None if admin is None else Callers([admin])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, headers = scope["method"], Headers(scope=scope)
        if method == "HEAD":  # as GET; the server below sends no body
            scope = {**scope, "method": "GET"}
        given = headers.get("x-request-id")
        request_id = given if given and _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        record = Record(request_id, method, scope["path"], (scope.get("client") or ("",))[0])
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "record": record, "caller": ANYONE}

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                record.status = message["status"]
            await send(message)

        self._service.in_flight += 1
        try:
            error = self._examine(scope, headers, given)
            if error is None:
                await self.app(scope, receive, named)
            else:
                record.error = error.code
                await refuse(error)(scope, receive, named)
        finally:
            self._service.in_flight -= 1
            route = getattr(scope.get("route"), "path", "none")
            self._service.metrics.answered(method, route, record.status or CLIENT_GONE)
            if "ticket" in state:
                state["ticket"].close()
            if self._log is not None:
                self._log(record.line())

    def _examine(self, scope: Scope, headers: Headers, given: str | None) -> ApiError | None:
        state = scope["state"]
        if given and given != state["request_id"]:
            return bad_request("x-request-id must be 1 to 128 printable ASCII characters without spaces", "x-request-id")
        callers, what = self._callers, "API key"
        if scope["path"].startswith(ADMIN):
            if self._admin is None:
                message = "This server has no admin key, and so takes no such requests; start it with one (--admin-key)"
                return ApiError(403, message, kind="permission_error", code="admin_disabled")
            callers, what = self._admin, "admin key"
        elif not scope["path"].startswith(GUARDED) or scope["method"] == "OPTIONS":
            return None
        caller = callers.find(headers.get("authorization", ""))
        if caller is None:
            message = f"Wrong or missing {what}: send the header Authorization: Bearer KEY"
            headers_out = {"WWW-Authenticate": "Bearer"}
            return ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers_out)
        state["caller"], state["record"].caller = caller, caller.name
        return None
