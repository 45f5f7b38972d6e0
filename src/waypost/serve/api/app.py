"""The server and its routes: /v1/models, /v1/completions, /v1/chat/completions; those that answer without drawing tokens are
in texts.py, those of who operates it in operating.py, that of the weights in weights.py.

    app = create_app(engine, engine.tokenizer, "my-model")      # an ASGI application, for uvicorn or any other server

The event loop does protocol only: text is encoded on threads of their own, and the engine steps on another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException

from waypost import __version__
from waypost.core.errors import ConfigError
from waypost.model.tokenizer import Tokenizer
from waypost.serve.api import adapters, chat_schemas, operating, schemas, texts, weights
from waypost.serve.api.access import Caller, Callers
from waypost.serve.api.admission import Limits
from waypost.serve.api.asgi import CLIENT_GONE, EventStream, read_body, refuse, unless_gone
from waypost.serve.api.calls import call_of, refusals, service_of, takes
from waypost.serve.api.described import Described
from waypost.serve.api.errors import ApiError
from waypost.serve.api.gate import Gate
from waypost.serve.api.jobs import Job, chat_job, completion_job, num_choices
from waypost.serve.api.protocol import ChatRequest, CompletionRequest, parse
from waypost.serve.api.service import Service
from waypost.serve.engine import Engine

router = APIRouter(route_class=Described)


def create_app(
    engine: Engine | None,
    tokenizer: Tokenizer | None,
    model_name: str,
    *,
    callers: Callers | None = None,
    admin_key: str | None = None,
    limits: Limits | None = None,
    cors_origins: Sequence[str] = (),
    log: Callable[[str], object] | None = None,
) -> FastAPI:
    """A server for `engine` under the name `model_name`; it closes the engine when it shuts down.

    Without an engine it answers 503 until `app.state.service.attach(engine, tokenizer)` is called, from any thread.
    `callers`: whose API keys it asks for; None lets everybody in. `admin_key` opens /admin; None: nothing does. `limits`:
    what it takes on. `cors_origins`: web pages that may call it, "*" for all. `log` gets a JSON line for every request that
    has ended.
    """
    service = Service(model_name, limits)
    if engine is not None:
        if tokenizer is None:
            raise ConfigError("create_app: the server needs a tokenizer; give the one that belongs to the model")
        service.attach(engine, tokenizer)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="Waypost", version=__version__, lifespan=lifespan, docs_url="/docs", redoc_url=None)
    app.state.service = service
    app.include_router(router)
    app.include_router(operating.router)
    app.include_router(texts.router)
    app.include_router(weights.router)
    app.include_router(adapters.router)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_mistake)
    admin = None if admin_key is None else Caller(name="admin", key=admin_key)
    app.add_middleware(Gate, service=service, callers=callers if callers is not None else Callers([]), admin=admin, log=log)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _gives(reply: Any, chunk: Any) -> dict[int | str, dict[str, Any]]:
    text = f"With stream: true, server-sent events, each of them a {chunk.__name__}; the last is [DONE]."
    ok = {"model": reply, "description": text, "content": {"text/event-stream": {"schema": {"type": "string"}}}}
    return {200: ok, **refusals(400, 401, 404, 413, 429, 500, 503, 504)}


@router.post(
    "/v1/completions",
    responses=_gives(schemas.Completion, schemas.Completion),
    openapi_extra=takes("CompletionRequest"),
)
async def completions(request: Request) -> Response:
    """Lets a text, or several, go on."""
    asked = parse(CompletionRequest, await read_body(request))
    return await _answer(request, asked, completion_job, "cmpl")


@router.post(
    "/v1/chat/completions",
    responses=_gives(chat_schemas.ChatCompletion, chat_schemas.ChatChunk),
    openapi_extra=takes("ChatRequest"),
)
async def chat_completions(request: Request) -> Response:
    """Answers a chat."""
    asked = parse(ChatRequest, await read_body(request))
    return await _answer(request, asked, chat_job, "chatcmpl")


async def _answer(
    request: Request, asked: Any, plan: Callable[[Any, Engine, Tokenizer, int | None, str | None], Job], prefix: str
) -> Response:
    service = service_of(request)
    engine, tokenizer = service.require(asked.model)
    call = call_of(request, num_choices(asked), asked.user, asked.priority, asked.deadline_s)
    call.record.stream = bool(asked.stream)
    adapter = service.adapter(asked.model)
    job = await service.think(plan, asked, engine, tokenizer, service.admission.limits.max_tokens, adapter)
    head = service.head(f"{prefix}-{request.state.request_id}", adapter)
    if asked.stream:
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return EventStream(service.chunks(job, head, call, include_usage))
    reply = await unless_gone(request, service.whole(job, head, call))
    return Response(status_code=CLIENT_GONE) if reply is None else JSONResponse(reply)


@router.get("/v1/models", responses={200: {"model": schemas.ModelList}, **refusals(401, 503)})
async def models(request: Request) -> Response:
    """The model that is served here, and its adapters."""
    service = service_of(request)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.model_names]})


@router.get("/v1/models/{model_id:path}", responses={200: {"model": schemas.Model}, **refusals(401, 404, 503)})
async def model(model_id: str, request: Request) -> Response:
    """One model by its name."""
    service = service_of(request)
    if not model_id:  # /v1/models/, as some clients write it
        return await models(request)
    service.require(model_id)
    return JSONResponse(_model(service, model_id))


def _model(service: Service, name: str) -> schemas.Model:
    engine, _ = service.require(None)
    found: schemas.Model = {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "waypost",
        "max_model_len": engine.max_seq_len,
    }
    return found if name == service.model_name else {**found, "parent": service.model_name}


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), error
    request.state.record.error = error.code
    return refuse(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), error
    what = {404: "There is no such route", 405: "This route does not take that method"}.get(error.status_code)
    message = f"{what or error.detail}: {request.method} {request.url.path[:200]}"
    return refuse(ApiError(error.status_code, message, headers=error.headers))


async def _on_mistake(_: Request, error: Exception) -> Response:
    """Our own mistake: the traceback goes to the log, the client learns the kind."""
    return refuse(ApiError(500, f"The server made a mistake ({type(error).__name__}); its log holds the details"))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description of the routes; what `protocol.parse` reads and what streams is put in."""
    if app.openapi_schema is None:
        for route in app.routes:
            if isinstance(route, Described):
                route.describe()
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        kinds: list[tuple[str, Literal["validation"], TypeAdapter[Any]]] = [
            (kind.__name__, "validation", TypeAdapter(kind))
            for kind in (
                CompletionRequest,
                ChatRequest,
                *texts.BODIES,
                *weights.BODIES,
                *adapters.BODIES,
                chat_schemas.ChatChunk,
            )
        ]
        _, bodies = TypeAdapter.json_schemas(kinds, ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"] |= bodies["$defs"]
        app.openapi_schema = schema
    return app.openapi_schema
