"""The routes of who operates the server: / says what it is, /health whether it lives, /ready whether it takes requests;
/metrics, /version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from waypost import __version__
from waypost.serve.api import schemas
from waypost.serve.api.calls import service_of
from waypost.serve.api.described import Described
from waypost.serve.api.service import State

router = APIRouter(route_class=Described)

HEALTH: dict[int | str, dict[str, Any]] = {200: {"model": schemas.Health}, 503: {"model": schemas.Health}}


@router.get("/", responses={200: {"model": schemas.Index}})
async def index(request: Request) -> Response:
    """What answers here, and where its routes are described."""
    service = service_of(request)
    told: schemas.Index = {
        "server": "waypost",
        "version": __version__,
        "model": service.model_name,
        "status": service.state[0],
        "docs": "/docs",
        "openapi": "/openapi.json",
    }
    return JSONResponse(told)


@router.get("/health", responses=HEALTH)
async def health(request: Request) -> Response:
    """200 once the model is loaded, and until the server is gone; 503 with the reason before, and when the engine died: then it
    should be started again."""
    return _state(request, "ready", "stopping")


@router.get("/ready", responses=HEALTH)
async def ready(request: Request) -> Response:
    """200 while requests are taken; 503 with the reason while loading, when stopping, and when the engine died."""
    return _state(request, "ready")


def _state(request: Request, *good: State) -> Response:
    state, detail = service_of(request).state
    body: schemas.Health = {"status": state, "detail": detail} if detail else {"status": state}
    headers = {"Retry-After": "1"} if state == "loading" else None
    return JSONResponse(body, 200 if state in good else 503, headers)


@router.get("/version", responses={200: {"model": schemas.Version}})
async def version() -> Response:
    """Waypost's version."""
    return JSONResponse({"version": __version__})


@router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms in Prometheus' text format."""
    return Response(service_of(request).metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")
