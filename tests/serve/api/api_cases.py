"""A server on loopback over a tiny model, as a client meets it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import uvicorn
from fastapi import FastAPI

from waypost.model.tokenizer import Tokenizer
from waypost.serve.api.app import create_app
from waypost.serve.api.server import listen, url
from waypost.serve.engine import Engine

MODEL = "tiny"
PATIENCE_S = 60.0


@dataclass
class Live:
    """A running server and what stands behind it."""

    url: str
    engine: Engine
    app: FastAPI

    @property
    def tokenizer(self) -> Tokenizer:
        assert isinstance(self.engine.tokenizer, Tokenizer)
        return self.engine.tokenizer

    @contextmanager
    def client(self, **options: Any) -> Iterator[openai.OpenAI]:
        ours = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "http_client": httpx.Client(verify=False)}
        with openai.OpenAI(**{**ours, **options}) as client:
            yield client

    def async_client(self) -> openai.AsyncOpenAI:
        http = httpx.AsyncClient(verify=False)
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return request("POST", f"{self.url}{path}", json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return request("GET", f"{self.url}{path}", **options)


def request(method: str, url: str, **options: Any) -> httpx.Response:
    """As httpx.request, without reading the machine's certificates for every call, which takes longer than the call."""
    with httpx.Client(verify=False, timeout=PATIENCE_S) as client:
        return client.request(method, url, **options)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Runs `app` under uvicorn in a thread; yields its URL."""
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield url(sock)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def eventually(holds: Callable[[], object]) -> None:
    """Waits until `holds` does; fails after a bound that no machine should need."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.005)


@contextmanager
def stepped(live: Live) -> Iterator[threading.Semaphore]:
    """The engine of `live` makes a step only for each permit, so that a test decides how far a request gets."""
    permits, step = threading.Semaphore(0), live.engine.step

    def one_step(_: int = 1) -> Any:
        permits.acquire(timeout=PATIENCE_S)
        return step()

    live.engine.step = one_step  # type: ignore[method-assign]
    try:
        yield permits
    finally:
        permits.release(10_000)


def make_live(checkpoint: str, num_pages: int = 512, **options: Any) -> Any:
    """A context manager that serves a fresh engine; `options` go to create_app."""

    @contextmanager
    def run() -> Iterator[Live]:
        engine = Engine(checkpoint, num_pages=num_pages, max_batch_tokens=64)
        app = create_app(engine, engine.tokenizer, MODEL, **options)
        with serving(app) as where:
            yield Live(where, engine, app)

    return run()
