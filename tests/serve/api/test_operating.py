"""Operating the server: who is let in, who waits, who is sent away and how, and what the log says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from api_cases import MODEL, Live, eventually, make_live
from prometheus_client.parser import text_string_to_metric_families

from waypost.core.errors import ConfigError
from waypost.serve.api.access import ANYONE, Caller, Callers
from waypost.serve.api.admission import Admission, Limits
from waypost.serve.api.errors import ApiError

ASK = {"model": MODEL, "prompt": "a", "max_tokens": 2, "seed": 1}
LONG = {"model": MODEL, "prompt": "a", "max_tokens": 250, "seed": 1, "ignore_eos": True}


class Log:
    """Takes the log's lines; they come on the server's thread."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __call__(self, line: str) -> None:
        self.lines.append(json.loads(line))

    def of(self, request_id: str) -> dict[str, Any]:
        eventually(lambda: any(line["request_id"] == request_id for line in self.lines))
        return next(line for line in self.lines if line["request_id"] == request_id)


LOG = Log()
CALLERS = [
    Caller(name="alice", key="sk-a"),
    Caller(name="bob", key="sk-b", max_in_flight=1, priority=3, weight=0.5),
]


@pytest.fixture(scope="module")
def operated(checkpoint: str) -> Iterator[Live]:
    limits = Limits(max_waiting=4, max_tokens=250, max_choices=3)
    with make_live(checkpoint, callers=Callers(CALLERS), limits=limits, log=LOG) as live:
        yield live


def auth(key: str, request_id: str = "") -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **({"x-request-id": request_id} if request_id else {})}


# Keys


def test_every_key_opens_and_no_other(operated: Live) -> None:
    for key, status in (("sk-a", 200), ("sk-b", 200), ("sk-c", 401), ("sk-", 401)):
        assert operated.get("/v1/models", headers=auth(key)).status_code == status
        assert operated.post("/tokenize", {"prompt": "x"}, headers=auth(key)).status_code == status
    assert operated.get("/health").status_code == 200


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("alice: sk-1\nbob: {key: sk-2, weight: 2.0, priority: -1, max_in_flight: 4}\n")
    callers = Callers.read(path)
    assert callers.find("Bearer sk-1") == Caller(name="alice", key="sk-1")
    assert callers.find("Bearer sk-2") == Caller(name="bob", key="sk-2", weight=2.0, priority=-1, max_in_flight=4)
    for same in ("bearer sk-1", "BEARER sk-1"):  # RFC 9110, section 11.1: the scheme's case says nothing
        assert callers.find(same) == callers.find("Bearer sk-1")
    for wrong in ("Bearer sk-3", "sk-1", "", "Bearer", "Bearer ", "Basic sk-1", "Bearer SK-1", "Bearer sk-1 ", "Bearer \xff"):
        assert callers.find(wrong) is None
    assert Callers([]).find("") is ANYONE


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "names no API key"),
        ("a: 12", "in quotes"),
        ("a: {key: x, wieght: 2}", "weight"),
        ("a: {key: x, name: b}", "before the colon"),
        ("a: {weight: 2.0}", "not empty"),
        ("a: 'two words'", "without spaces"),
        ("a: {key: x, weight: 0.0}", "positive"),
        ("a: {key: x, max_in_flight: 0}", "at least 1"),
        ("a: x\nb: x", "another holder's"),
    ],
)
def test_a_wrong_file_of_keys_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        Callers.read(path)


# Admission


def test_a_full_queue_says_when_to_come_back_and_is_empty_again_afterwards(operated: Live) -> None:
    admission = operated.app.state.service.admission
    tickets = [admission.enter(ANYONE, 2), admission.enter(ANYONE, 2)]
    reply = operated.post("/v1/completions", ASK, headers=auth("sk-a", "full-1"))
    for ticket in tickets:
        ticket.close()
        ticket.close()
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "requests")
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert "at most 4 may" in error["message"]
    assert LOG.of("full-1")["error"] == "rate_limit_exceeded"
    assert operated.post("/v1/completions", ASK, headers=auth("sk-a")).status_code == 200
    eventually(lambda: admission.waiting == 0)
    text = operated.get("/metrics").text
    assert "waypost:num_requests_refused_total" in text


def test_the_openai_client_knows_the_refusal_and_comes_back(operated: Live) -> None:
    admission = operated.app.state.service.admission
    ticket = admission.enter(ANYONE, 3)
    extra = admission.enter(ANYONE, 1)
    with openai.OpenAI(base_url=f"{operated.url}/v1", api_key="sk-a", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError, match="try again in"):
            client.completions.create(model=MODEL, prompt="a", max_tokens=1)
        ticket.close()
        extra.close()
        assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).usage.completion_tokens == 1


def test_a_key_has_its_own_limit(operated: Live) -> None:
    ticket = operated.app.state.service.admission.enter(CALLERS[1], 1)
    reply = operated.post("/v1/completions", ASK, headers=auth("sk-b"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert operated.post("/v1/completions", ASK, headers=auth("sk-a")).status_code == 200
    ticket.close()
    assert operated.post("/v1/completions", ASK, headers=auth("sk-b")).status_code == 200


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"n": 4}, "too_many_choices"),
        ({"prompt": ["a", "b"], "n": 2}, "too_many_choices"),
        ({"max_tokens": 251}, "too_many_tokens"),
    ],
)
def test_what_one_request_may_ask_for_is_limited(operated: Live, change: dict[str, Any], code: str) -> None:
    reply = operated.post("/v1/completions", {**ASK, **change}, headers=auth("sk-a"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)


def test_the_limit_of_tokens_is_the_default_too(checkpoint: str) -> None:
    with make_live(checkpoint, limits=Limits(max_tokens=3)) as live:
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
        assert live.post("/v1/chat/completions", chat).json()["usage"]["completion_tokens"] == 3


def test_more_choices_than_may_ever_wait_are_refused_for_good() -> None:
    with pytest.raises(ApiError) as caught:
        Admission(Limits(max_waiting=2)).enter(ANYONE, 3)
    assert caught.value.status == 400


@pytest.mark.parametrize("field", ["max_waiting", "max_tokens", "max_choices", "deadline_s"])
def test_a_limit_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Limits(**{field: 0})


def test_a_first_token_after_the_client_is_gone_frees_nothing_twice() -> None:
    admission = Admission(Limits())
    ticket = admission.enter(ANYONE, 2)
    ticket.began(0.5)
    ticket.close()
    ticket.began(0.5)
    assert admission.waiting == 0


def test_places_are_given_back_whatever_happens(operated: Live) -> None:
    bodies = [ASK, {**ASK, "prompt": ""}, {**ASK, "prompt": [9999]}, {**ASK, "model": "x"}, {**ASK, "deadline_s": 1e-9}]
    bodies += [{**ASK, "stream": True}, {**ASK, "n": 3}]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda body: operated.post("/v1/completions", body, headers=auth("sk-a")), bodies * 2))
    admission = operated.app.state.service.admission
    eventually(lambda: admission.waiting == 0 and not admission._in_flight and operated.app.state.service.in_flight == 0)


# Deadlines


@pytest.mark.parametrize("stream", [False, True])
def test_a_missed_deadline_is_told_and_frees_everything(operated: Live, stream: bool) -> None:
    body = {**LONG, "n": 3, "deadline_s": 0.05, "stream": stream}
    reply = operated.post("/v1/completions", body, headers=auth("sk-a", f"late-{stream}"))
    error = json.loads(reply.text.split("data: ")[-2])["error"] if stream else reply.json()["error"]
    assert error["code"] == "deadline_exceeded"
    if not stream:
        assert (reply.status_code, reply.headers["x-should-retry"]) == (504, "false")
    assert LOG.of(f"late-{stream}")["error"] == "deadline_exceeded"
    eventually(lambda: operated.engine.idle)
    assert operated.engine.pool.held == 0


def test_a_deadline_in_the_header_and_one_that_is_kept(operated: Live) -> None:
    for given, status in (("1e-9", 504), ("60", 200), ("soon", 400), ("-1", 400), ("inf", 400)):
        reply = operated.post("/v1/completions", ASK, headers={**auth("sk-a"), "x-deadline-s": given})
        assert reply.status_code == status, given


def test_the_servers_deadline_is_that_of_requests_without_one(checkpoint: str) -> None:
    with make_live(checkpoint, limits=Limits(deadline_s=1e-9)) as live:
        assert live.post("/v1/completions", ASK).status_code == 504
        assert live.post("/v1/completions", {**ASK, "deadline_s": 60.0}).status_code == 200


# The log and the metrics


def test_a_line_for_every_request(operated: Live) -> None:
    operated.post("/v1/completions", {**ASK, "n": 2, "ignore_eos": True}, headers=auth("sk-b", "line-1"))
    line = LOG.of("line-1")
    assert line.pop("total_s") >= line.pop("first_token_s") >= line.pop("queue_s") >= 0
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "request_id": "line-1", "method": "POST", "path": "/v1/completions", "status": 200, "client": "127.0.0.1",
        "caller": "bob", "stream": False, "prompt_tokens": 1, "completion_tokens": 4, "finished": ["length", "length"],
    }  # fmt: skip
    operated.post("/v1/completions", {**ASK, "prompt": 3}, headers=auth("sk-a", "line-2"))
    line = LOG.of("line-2")
    assert (line["status"], line["error"]) == (400, "invalid_value")
    operated.get("/nowhere", headers={"x-request-id": "line-3", "x-forwarded-for": "10.1.2.3"})
    line = LOG.of("line-3")
    assert (line["status"], line["client"]) == (404, "10.1.2.3"), "a proxy on this machine says whom it speaks for"


def test_the_engines_times_are_in_the_metrics(operated: Live) -> None:
    operated.post("/v1/completions", {**ASK, "ignore_eos": True}, headers=auth("sk-a"))
    families = {f.name: f for f in text_string_to_metric_families(operated.get("/metrics").text)}
    for name in ("request_queue_time_seconds", "request_prefill_time_seconds", "iteration_tokens_total"):
        samples = {s.name.removeprefix(f"waypost:{name}_"): s.value for s in families[f"waypost:{name}"].samples}
        buckets = [s.value for s in families[f"waypost:{name}"].samples if s.name.endswith("_bucket")]
        assert buckets == sorted(buckets)
        assert samples["count"] == buckets[-1] > 0


def test_whose_turn_it_is_reaches_the_engine(operated: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    submit = operated.engine.submit
    monkeypatch.setattr(operated.engine, "submit", lambda ready: (seen.append(ready.request), submit(ready))[1])
    operated.post("/v1/completions", {**ASK, "priority": 4, "user": "ignored"}, headers=auth("sk-b"))
    assert [(r.user, r.weight, r.priority) for r in seen] == [("bob", 0.5, 7)]


def test_without_keys_users_take_turns_by_the_name_they_give(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    submit = live.engine.submit
    monkeypatch.setattr(live.engine, "submit", lambda ready: (seen.append(ready.request.user), submit(ready))[1])
    live.post("/v1/completions", {**ASK, "user": "carol"})
    live.post("/v1/completions", ASK)
    assert seen == ["carol", ""]
