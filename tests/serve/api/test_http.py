"""The HTTP around the protocol: bodies, ids, keys, health, metrics, clients that hang up."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from api_cases import MODEL, Live, eventually, make_live, request, serving, stepped
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter

from waypost.core.errors import ConfigError
from waypost.serve.api import asgi, chat_schemas, schemas
from waypost.serve.api.access import Caller, Callers
from waypost.serve.api.app import create_app
from waypost.serve.api.server import complete_routes
from waypost.serve.api.watch import Watch
from waypost.serve.engine import Engine
from waypost.serve.loop import EngineThread
from waypost.serve.request import Delta

ASK = {"model": MODEL, "prompt": "a", "max_tokens": 2, "seed": 1}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
LONG = {"model": MODEL, "prompt": "a", "max_tokens": 250, "seed": 1, "ignore_eos": True}


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error object of a refusal, which must be in OpenAI's form."""
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"", "invalid_json"), (b"{", "invalid_json"), (b"[]", "invalid_type"), (b'{"model": "\xff"}', "invalid_json")],
)
def test_a_body_that_is_not_a_json_object_is_refused(live: Live, body: bytes, code: str) -> None:
    for route in ("/v1/completions", "/v1/chat/completions"):
        reply = request("POST", live.url + route, content=body)
        assert (reply.status_code, error_of(reply)["code"]) == (400, code)


def test_a_body_is_read_whatever_its_content_type(live: Live) -> None:
    reply = request("POST", live.url + "/v1/completions", content=json.dumps(ASK))
    assert reply.status_code == 200


def test_tokens_are_heeded_where_they_are_streamed(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is answered as a whole may be computed several steps at a time."""
    seen: list[bool] = []
    submit = EngineThread.submit

    def watched(self: EngineThread, request: Any, sink: Any, heeded: bool = True) -> Any:
        seen.append(heeded)
        return submit(self, request, sink, heeded)

    monkeypatch.setattr(EngineThread, "submit", watched)
    for stream in (False, True):
        assert live.post("/v1/completions", {**ASK, "stream": stream}).status_code == 200
        assert live.post("/v1/chat/completions", {**CHAT, "stream": stream}).status_code == 200
    assert seen == [False, False, True, True]


def test_the_tokens_of_a_whole_answer_have_the_times_of_their_passes(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though some of them arrive together."""
    times: list[float] = []
    see = Watch.see

    def watched(self: Watch, index: int, delta: Delta) -> None:
        times.extend([delta.at_s] if delta.tokens and delta.at_s is not None else [])
        see(self, index, delta)

    monkeypatch.setattr(Watch, "see", watched)
    name = "waypost:inter_token_latency_seconds_sum"

    def between() -> float:
        families = text_string_to_metric_families(live.get("/metrics").text)
        return next(sample.value for family in families for sample in family.samples if sample.name == name)

    before = between()
    assert live.post("/v1/completions", {**LONG, "temperature": 0}).status_code == 200
    assert len(times) == 250
    assert times == sorted(times)
    assert between() - before == pytest.approx(times[-1] - times[0], abs=1e-9)


def test_an_endless_body_is_cut_off(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "MAX_BODY_BYTES", 1000)
    reply = live.post("/v1/completions", {**ASK, "prompt": "x" * 1000})
    assert (reply.status_code, error_of(reply)["code"]) == (413, "body_too_long")


def test_unknown_routes_and_methods_answer_in_openais_form(live: Live) -> None:
    assert error_of(live.get("/v1/nothing"))["message"] == "There is no such route: GET /v1/nothing"
    reply = live.get("/v1/completions")
    assert reply.status_code == 405
    assert "method" in error_of(reply)["message"]
    assert reply.headers["allow"] == "POST"
    assert len(live.get("/" + 10_000 * "a").content) < 500
    assert error_of(live.get("/v1/models/other"))["code"] == "model_not_found"


def test_head_answers_as_get_without_the_body(live: Live) -> None:
    for path, status in (("/health", 200), ("/ready", 200), ("/", 200), ("/v1/nothing", 404), ("/v1/completions", 405)):
        reply, full = request("HEAD", live.url + path), live.get(path)
        assert (reply.status_code, reply.content) == (status, b"")
        assert reply.headers["content-type"] == full.headers["content-type"]


def test_request_ids_go_in_and_out(live: Live) -> None:
    reply = live.post("/v1/completions", ASK, headers={"x-request-id": "my-id-7"})
    assert reply.headers["x-request-id"] == "my-id-7"
    assert reply.json()["id"] == "cmpl-my-id-7"
    ids = {live.post("/v1/completions", ASK).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    reply = live.get("/health", headers={"x-request-id": "two words"})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "x-request-id")


def test_the_same_request_id_may_be_in_flight_twice(live: Live) -> None:
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: live.post("/v1/completions", ASK, headers={"x-request-id": "same"}), range(4)))
    assert {reply.status_code for reply in replies} == {200}


def test_answers_have_the_described_shape(live: Live) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "return_token_ids": True}
    cases: list[tuple[Any, httpx.Response]] = [
        (schemas.ModelList, live.get("/v1/models")),
        (schemas.Model, live.get(f"/v1/models/{MODEL}")),
        (schemas.ModelList, live.get("/v1/models/")),
        (schemas.Index, live.get("/")),
        (schemas.Health, live.get("/health")),
        (schemas.Health, live.get("/ready")),
        (schemas.Version, live.get("/version")),
        (schemas.Completion, live.post("/v1/completions", {**ASK, "logprobs": 2, "return_token_ids": True})),
        (chat_schemas.ChatCompletion, live.post("/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 1})),
        (schemas.ErrorBody, live.post("/v1/completions", {})),
    ]
    for shape, reply in cases:
        assert_shape(shape, reply.content)
    for route, shape, body in (
        ("/v1/completions", schemas.Completion, ASK),
        ("/v1/chat/completions", chat_schemas.ChatChunk, chat),
    ):
        events = live.post(route, {**body, "stream": True, "stream_options": {"include_usage": True}})
        assert events.headers["content-type"].startswith("text/event-stream")
        *chunks, end, rest = events.text.split("\n\n")
        assert (end, rest) == ("data: [DONE]", "")
        for chunk in chunks:
            assert_shape(shape, chunk.removeprefix("data: "))


def assert_shape(shape: Any, content: str | bytes) -> None:
    """The answer has the members that its type names, of their types, and no others (validation would drop them)."""
    assert TypeAdapter(shape).validate_json(content, strict=True) == json.loads(content)


def test_the_description_of_the_routes_is_complete(live: Live) -> None:
    spec = live.get("/openapi.json").json()
    named = spec["components"]["schemas"]

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    assert {ref.removeprefix("#/components/schemas/") for ref in references(spec)} <= set(named)
    post = spec["paths"]["/v1/chat/completions"]["post"]
    assert post["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert {"200", "400", "404", "503"} <= set(post["responses"])
    assert named["ChatRequest"]["additionalProperties"] is False
    assert {"model", "messages"} <= set(named["ChatRequest"]["required"])
    assert "ChatChunk" in named
    assert set(spec["paths"]) >= {"/v1/models", "/v1/completions", "/health", "/ready", "/metrics", "/version"}


def test_the_api_key_guards_v1_alone(checkpoint: str) -> None:
    with make_live(checkpoint, callers=Callers([Caller(name="it", key="s3cret")]), cors_origins=["http://page"]) as live:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            reply = live.get("/v1/models", headers=headers)
            assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key")
        with live.client() as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert live.get("/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200
        assert live.get("/health").status_code == 200
        ask = {"origin": "http://page", "access-control-request-method": "POST"}
        allowed = request("OPTIONS", live.url + "/v1/completions", headers=ask)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] in ("*", "http://page")
        refused = request("OPTIONS", live.url + "/v1/completions", headers={**ask, "origin": "http://other"})
        assert "access-control-allow-origin" not in refused.headers


def samples(live: Live) -> dict[str, float]:
    """Metric (and its one interesting label) -> value."""
    out = {}
    for family in text_string_to_metric_families(live.get("/metrics").text):
        for sample in family.samples:
            if not sample.name.startswith("waypost:"):
                continue
            assert sample.labels["model_name"] == MODEL
            label = sample.labels.get("finished_reason") or sample.labels.get("le")
            out[f"{sample.name}[{label}]" if label else sample.name] = sample.value
    return out


def test_metrics_add_up(checkpoint: str) -> None:
    with make_live(checkpoint) as live:
        before = samples(live)
        assert before["waypost:generation_tokens_total"] == 0
        with live.client() as client:
            replies = [
                client.completions.create(model=MODEL, prompt=["a", "b c"], n=3, max_tokens=5, extra_body={"ignore_eos": True}),
                client.completions.create(model=MODEL, prompt="a", max_tokens=9, extra_body={"ignore_eos": True}),
            ]
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model=MODEL, prompt="a", temperature=-1)
        after = samples(live)
    usages = [reply.usage for reply in replies if reply.usage is not None]
    assert after["waypost:prompt_tokens_total"] == sum(usage.prompt_tokens for usage in usages)
    assert after["waypost:generation_tokens_total"] == sum(usage.completion_tokens for usage in usages) == 39
    assert after["waypost:request_success_total[length]"] == 7
    assert after["waypost:request_success_total[stop]"] == 0
    assert after["waypost:time_to_first_token_seconds_count"] == 7
    assert after["waypost:inter_token_latency_seconds_count"] == 39 - 7
    assert after["waypost:e2e_request_latency_seconds_count"] == 7
    assert after["waypost:request_decode_time_seconds_count"] == 7
    assert after["waypost:e2e_request_latency_seconds_sum"] >= after["waypost:request_decode_time_seconds_sum"] > 0
    assert after["waypost:request_prompt_tokens_count"] == 3
    assert after["waypost:request_generation_tokens_sum"] == 39
    assert after["waypost:num_requests_running"] == after["waypost:num_requests_waiting"] == 0
    assert after["waypost:kv_cache_usage_perc"] == 0
    assert "waypost:num_preemptions_total" in after
    for name in ("request_inference_time_seconds", "request_time_per_output_token_seconds"):
        assert after[f"waypost:{name}_count"] == 7
    assert after["waypost:request_inference_time_seconds_sum"] >= after["waypost:request_decode_time_seconds_sum"]
    assert after["waypost:request_max_num_generation_tokens_count"] == 2
    assert after["waypost:request_max_num_generation_tokens_sum"] == 5 + 9
    assert (after["waypost:request_params_n_count"], after["waypost:request_params_n_sum"]) == (3, 3 + 3 + 1)
    assert after["waypost:request_params_max_tokens_sum"] == 5 + 5 + 9
    assert after["waypost:prompt_tokens_cached_total"] == after["waypost:prefix_cache_hits_total"] == 0


DASHBOARD = """
e2e_request_latency_seconds_bucket prompt_tokens_total generation_tokens_total inter_token_latency_seconds_bucket
request_time_per_output_token_seconds_bucket num_requests_running num_requests_waiting time_to_first_token_seconds_bucket
kv_cache_usage_perc request_prompt_tokens_bucket request_generation_tokens_bucket request_success_total
request_queue_time_seconds_sum request_prefill_time_seconds_sum request_decode_time_seconds_sum
request_inference_time_seconds_sum request_max_num_generation_tokens_sum prefix_cache_queries_total prefix_cache_hits_total
num_preemptions_total iteration_tokens_total_bucket request_params_n_bucket request_params_max_tokens_bucket
prompt_tokens_cached_total cache_config_info
"""
"""What the panels of dashboards for vLLM ask for, without its prefix."""


def test_a_dashboard_made_for_vllm_finds_its_names(live: Live) -> None:
    live.post("/v1/completions", ASK)
    live.get("/v1/nothing/of/the/kind")
    request("BREW", live.url + "/v1/models")
    families = list(text_string_to_metric_families(live.get("/metrics").text))
    found = {sample.name: sample for family in families for sample in family.samples}
    assert {f"waypost:{name}" for name in DASHBOARD.split()} <= set(found)
    assert all(family.documentation for family in families)
    config = found["waypost:cache_config_info"].labels
    assert (config["block_size"], config["num_gpu_blocks"], config["enable_prefix_caching"]) == ("16", "512", "True")
    assert found["process_resident_memory_bytes"].value > 1e6
    reasons = {s.labels["finished_reason"] for f in families if f.name == "waypost:request_success" for s in f.samples}
    assert {"stop", "length", "abort", "error"} <= reasons
    requests = {tuple(sorted(s.labels.items())) for f in families if f.name == "http_requests" for s in f.samples}
    assert (("handler", "/v1/completions"), ("method", "POST"), ("status", "2xx")) in requests
    assert {dict(r)["method"] for r in requests} <= {"GET", "POST", "OPTIONS", "HEAD", "other"}
    routes = {"none", *live.get("/openapi.json").json()["paths"], "/openapi.json", "/docs"}
    assert {dict(r)["handler"].replace(":path}", "}") for r in requests} <= routes, "no made-up paths"


@pytest.fixture
def gated(checkpoint: str) -> Iterator[tuple[Live, threading.Semaphore]]:
    """A server whose engine makes a step only for each permit, so that a test decides how far a request gets."""
    with make_live(checkpoint) as live, stepped(live) as permits:
        yield live, permits


def comes_to_run(live: Live, permits: threading.Semaphore, num_choices: int) -> None:
    """Lets the engine step, slowly, until it runs `num_choices`, which may reach it one after another."""

    def running() -> bool:
        if live.engine.stats().num_running == num_choices:
            return True
        permits.release()
        time.sleep(0.05)
        return False

    eventually(running)


def comes_to_rest(live: Live, permits: threading.Semaphore) -> None:
    """Lets the engine step until it runs nothing, far fewer times than the requests would need to finish."""

    def idle() -> bool:
        permits.release()
        stats = live.engine.stats()
        return stats.num_running == stats.num_waiting == 0

    eventually(idle)


@pytest.mark.parametrize("body", [{**LONG, "n": 3}, {**LONG, "prompt": ["a", "b", "c"]}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_the_engine(checkpoint: str, stream: bool, body: dict[str, Any]) -> None:
    lines: list[str] = []
    with make_live(checkpoint, log=lines.append) as live, stepped(live) as permits:
        hang_up(live, permits, {**body, "stream": stream})
    line = json.loads(lines[0])
    assert (line["status"], line["error"]) == (200 if stream else 499, "client_gone")


def test_a_client_that_hangs_up_in_its_body_is_no_mistake_of_ours(checkpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    with make_live(checkpoint, log=lines.append) as live:
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"model": ')
            eventually(lambda: live.app.state.service.in_flight == 1)
        eventually(lambda: lines)
        assert live.post("/v1/completions", ASK).status_code == 200
    line = json.loads(lines[0])
    assert (line["status"], line["error"]) == (499, "client_gone")
    assert "Traceback" not in caplog.text


def hang_up(live: Live, permits: threading.Semaphore, body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw)
        comes_to_run(live, permits, 3)
        if body["stream"]:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    comes_to_rest(live, permits)
    stats = live.engine.stats()
    assert stats.finished["cancelled"] == 3
    assert stats.pages_free == stats.pages_total
    eventually(lambda: live.app.state.service.in_flight == 0)
    permits.release(10_000)
    assert live.post("/v1/completions", ASK).status_code == 200


def test_the_first_request_waits_for_no_route_to_be_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    plain = TypeAdapter.__init__

    def counted(self: TypeAdapter[Any], *args: Any, **options: Any) -> None:
        made.append(self)
        plain(self, *args, **options)

    monkeypatch.setattr(TypeAdapter, "__init__", counted)
    app = create_app(None, None, MODEL)
    with serving(app) as url:
        complete_routes(app)
        assert made
        made.clear()
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            assert request("POST", url + path, json=ASK).status_code in (400, 503)
        assert not made


def test_health_follows_the_engine(checkpoint: str) -> None:
    app = create_app(None, None, MODEL)
    with serving(app) as url:

        def state(path: str) -> tuple[int, str]:
            reply = request("GET", url + path)
            assert reply.headers.get("retry-after") == ("1" if reply.json()["status"] == "loading" else None)
            return reply.status_code, reply.json()["status"]

        assert state("/health") == state("/ready") == (503, "loading")
        reply = request("POST", url + "/v1/completions", json=ASK)
        assert (reply.status_code, reply.headers["retry-after"], error_of(reply)["code"]) == (503, "1", "model_loading")
        assert "loaded" in error_of(reply)["message"]
        assert list(text_string_to_metric_families(request("GET", url + "/metrics").text))
        engine = Engine(checkpoint, num_pages=64)
        app.state.service.attach(engine, engine.tokenizer)
        assert state("/health") == state("/ready") == (200, "ready")
        assert request("POST", url + "/v1/completions", json=ASK).status_code == 200
        app.state.service.stopping = True
        assert state("/health") == (200, "stopping"), "it lives while running requests finish"
        assert state("/ready") == (503, "stopping")
        reply = request("POST", url + "/v1/completions", json=ASK)
        assert (reply.status_code, reply.headers.get("retry-after"), error_of(reply)["code"]) == (503, None, "server_stopping")


def test_an_engine_that_dies_fails_what_waits_and_the_health(gated: tuple[Live, threading.Semaphore]) -> None:
    live, permits = gated

    def broken(_: int) -> Any:
        raise RuntimeError("a wire came loose")

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(live.post, "/v1/completions", LONG)
        comes_to_run(live, permits, 1)
        live.engine.step = broken  # type: ignore[method-assign]
        permits.release(10)
        reply = waiting.result()
    assert reply.status_code == 500
    assert "a wire came loose" in error_of(reply)["message"]
    health = live.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert live.get("/ready").json() == health.json()
    reply = live.post("/v1/completions", ASK)
    assert (reply.status_code, error_of(reply)["code"]) == (503, "engine_failed")


def test_what_the_server_cuts_off_is_told_so(gated: tuple[Live, threading.Semaphore]) -> None:
    live, permits = gated
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(live.post, "/v1/completions", LONG)
        stream = pool.submit(live.post, "/v1/completions", {**LONG, "stream": True})
        comes_to_run(live, permits, 2)
        closing = threading.Thread(target=live.app.state.service.close, daemon=True)
        closing.start()
        permits.release(10_000)
        closing.join()
    assert whole.result().status_code == 503
    assert "shutting down" in error_of(whole.result())["message"]
    assert error_of(whole.result())["code"] == "server_stopping"
    *_, last, end, _ = stream.result().text.split("\n\n")
    assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert end == "data: [DONE]"


def test_a_server_needs_a_tokenizer(checkpoint: str) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        create_app(Engine(checkpoint, num_pages=8), None, MODEL)
