"""Batch mode: a file of requests in, a file of answers out, and what was answered already is kept.

A line of the input is a request of OpenAI's batch format, {"custom_id", "method", "url", "body"}, or a body alone, with
`prompt` or `messages`; its id is then line-N. A line of the output is {"id", "custom_id", "response", "error"}, in the
order in which they were finished. Lines that fail say why and leave the others alone; asked again, they are tried again.

Invariant: at every moment the output holds whole answers, but for the last line, which a crash may tear; the next run
cuts it off.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from waypost.core.errors import ConfigError, WaypostError
from waypost.core.progress import Progress, progress, say
from waypost.keep.disk import replace_file
from waypost.model.tokenizer import Tokenizer
from waypost.serve import stride
from waypost.serve.api.access import ANYONE
from waypost.serve.api.errors import ApiError, bad_request, unknown_model
from waypost.serve.api.jobs import Job, chat_job, completion_job, head_of
from waypost.serve.api.protocol import ChatRequest, CompletionRequest, parse
from waypost.serve.api.replies import Part, usage
from waypost.serve.engine import Engine
from waypost.serve.request import Delta

ROUTES = ("/v1/chat/completions", "/v1/completions")
AHEAD = 2
"""Requests given to the engine at a time, in multiples of the sequences that it runs: enough to keep it full."""


@dataclass(frozen=True)
class Line:
    """One request of the input, or why it is none."""

    custom_id: str
    url: str = ""
    body: Mapping[str, Any] | None = None
    problem: str | None = None


@dataclass
class Tally:
    """What a run did. `kept`: answered before; `failed`: answered with an error."""

    total: int = 0
    kept: int = 0
    answered: int = 0
    failed: int = 0
    completion_tokens: int = 0


def read_lines(path: Path) -> list[Line]:
    """The requests of a file; blank lines do not count. ConfigError: no such file, or an id that stands twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a file of JSON lines") from error
    lines = [_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    seen: set[str] = set()
    for line in lines:
        if line.custom_id in seen:
            raise ConfigError(f"{path}: the custom_id '{line.custom_id}' stands twice; give each request its own")
        seen.add(line.custom_id)
    return lines


def _line(number: int, text: str) -> Line:
    name = f"line-{number}"
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(name, problem=f"not JSON ({error})")
    if not isinstance(tree, dict):
        return Line(name, problem="not a JSON object")
    name = tree.get("custom_id", name)
    if not isinstance(name, str) or not name:
        return Line(f"line-{number}", problem="custom_id must be a text, and not empty")
    if "url" not in tree:
        body = {key: value for key, value in tree.items() if key != "custom_id"}
        return Line(name, ROUTES[0] if "messages" in body else ROUTES[1], body)
    unknown = sorted(set(tree) - {"custom_id", "method", "url", "body"})
    if unknown:
        return Line(name, problem=f"unknown field '{unknown[0]}'; a request has custom_id, method, url and body")
    if tree.get("method", "POST") != "POST" or tree["url"] not in ROUTES or not isinstance(tree.get("body"), dict):
        return Line(name, problem=f"method must be POST, url one of {', '.join(ROUTES)}, and body an object")
    return Line(name, tree["url"], tree["body"])


def take_up(path: Path, lines: list[Line]) -> set[str]:
    """The ids that `path` answers already. Cuts off a torn last line and drops errors, which are tried again.

    ConfigError: it is damaged elsewhere, or holds answers to other requests.
    """
    if not path.exists():
        return set()
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    known = {line.custom_id for line in lines}
    kept: dict[str, bytes] = {}
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            answer = json.loads(text)
            custom_id, response = answer["custom_id"], answer["response"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: is no answer of a batch ({error!r}); name another --out") from error
        if custom_id not in known:
            raise ConfigError(f"{path}:{number}: answers '{custom_id}', which the batch does not ask; name another --out")
        if response is not None and response["status_code"] == 200:
            kept[custom_id] = text + b"\n"
    if b"".join(kept.values()) != raw:
        replace_file(path, b"".join(kept.values()))
    return set(kept)


class Batch:
    """Answers requests on one engine, which nobody else uses meanwhile. `defaults` fill fields that a body leaves out;
    `adapter` answers all of them, None: the model itself."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, model_name: str, defaults: Mapping[str, Any], adapter: str | None = None
    ) -> None:
        self._engine, self._tokenizer, self._model_name, self._adapter = engine, tokenizer, model_name, adapter
        self._defaults = dict(defaults)
        self._running: dict[str, _Running] = {}  # engine's request id -> its line

    def run(self, source: Path, out: Path) -> Tally:
        """Answers what `out` does not answer yet."""
        lines = read_lines(source)
        done = take_up(out, lines)
        tally = Tally(total=len(lines), kept=len(done))
        try:
            with out.open("a", encoding="utf-8") as stream, progress("batch", len(lines), "requests") as bar:
                bar.advance(len(done))
                for answer in self._answers([line for line in lines if line.custom_id not in done], tally, bar):
                    failed = answer["response"] is None or answer["response"]["status_code"] != 200
                    tally.failed += failed
                    tally.answered += not failed
                    if not failed:
                        tally.completion_tokens += answer["response"]["body"]["usage"]["completion_tokens"]
                    _write(stream, answer)
                    bar.advance()
                os.fsync(stream.fileno())
        except KeyboardInterrupt:
            say(f"interrupted: {out} holds {tally.kept + tally.answered} of {tally.total} answers; the same command goes on")
            raise
        return tally

    def _answers(self, lines: list[Line], tally: Tally, bar: Progress) -> Iterator[dict[str, Any]]:
        room = AHEAD * self._engine.scheduler.ledger.max_sequences
        todo = iter(lines)
        exhausted, num_tokens = False, 0
        while not (exhausted and not self._running):
            while not exhausted and len(self._running) < room:
                line = next(todo, None)
                if line is None:
                    exhausted = True
                    break
                refusal = self._start(line)
                if refusal is not None:
                    yield refusal
            deltas = self._engine.step(stride.MOST)
            num_tokens += sum(len(delta.tokens) for delta in deltas)
            failed = f", {tally.failed} failed" if tally.failed else ""
            bar.advance(0, note=f"{num_tokens:,} tokens{failed}")
            for delta in deltas:
                finished = self._take(delta)
                if finished is not None:
                    yield finished

    def _start(self, line: Line) -> dict[str, Any] | None:
        """Gives a line to the engine; the answer, where it is refused at once."""
        if line.body is None:
            return _answer(line, None, {"code": "invalid_line", "message": line.problem})
        try:
            job = self._plan(line, line.body)
        except ApiError as error:
            return _answer(line, _response(error.status, error.body))
        except WaypostError as error:
            return _answer(line, _response(400, bad_request(str(error)).body))
        running = _Running(line, job)
        for index, request in enumerate(job.requests):
            self._running[self._engine.submit(request)] = running
            running.first[request.id] = index * job.n
        return None

    def _plan(self, line: Line, given: Mapping[str, Any]) -> Job:
        defaults = {k: v for k, v in self._defaults.items() if k != "max_tokens" or "max_completion_tokens" not in given}
        if given.get("stream"):
            raise bad_request("a batch does not stream; leave stream out", "stream")
        body = json.dumps({"model": self._model_name, **defaults, **given}).encode()
        model = given.get("model", self._model_name)
        if model != self._model_name:
            raise unknown_model(str(model), self._model_name)
        asked: ChatRequest | CompletionRequest
        if line.url == ROUTES[0]:
            asked = chat = parse(ChatRequest, body)
            job = chat_job(chat, self._engine, self._tokenizer, None, self._adapter)
        else:
            asked = text = parse(CompletionRequest, body)
            job = completion_job(text, self._engine, self._tokenizer, None, self._adapter)
        return replace(job, requests=job.requests_of(asked.user or "", ANYONE, asked.priority, asked.deadline_s))

    def _take(self, delta: Delta) -> dict[str, Any] | None:
        running = self._running.get(delta.request_id)
        if running is None:
            return None
        if delta.finish_reason not in (None, "stop", "length"):
            for request in running.job.requests:
                self._running.pop(request.id, None)
                self._engine.cancel(request.id)
            failure = ApiError(500, delta.error or f"the request ended: {delta.finish_reason}", code="engine_error")
            return _answer(running.line, _response(500, failure.body))
        running.parts[running.first[delta.request_id] + delta.choice].add(delta)
        if any(part.finish_reason is None for part in running.parts):
            return None
        job = running.job
        for request in job.requests:
            self._running.pop(request.id, None)
        prefix = "chatcmpl" if running.line.url == ROUTES[0] else "cmpl"
        head = head_of(self._engine, self._model_name, f"{prefix}-{job.requests[0].id}", int(time.time()))
        total = usage(job.prompts, sum(len(part.draws) for part in running.parts))
        return _answer(running.line, _response(200, job.form.whole(head, running.parts, total)))


class _Running:
    def __init__(self, line: Line, job: Job) -> None:
        self.line, self.job = line, job
        self.parts = [Part() for _ in range(job.num_choices)]
        self.first: dict[str, int] = {}


def _response(status: int, body: Any) -> dict[str, Any]:
    return {"status_code": status, "body": body}


def _answer(line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"id": f"batch-{line.custom_id}", "custom_id": line.custom_id, "response": response, "error": error}


def _write(stream: TextIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer, ensure_ascii=False) + "\n")
    stream.flush()
