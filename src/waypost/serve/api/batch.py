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

from waypost.core.errors import WaypostError
from waypost.core.progress import Progress, progress, say
from waypost.model.tokenizer import Tokenizer
from waypost.serve import stride
from waypost.serve.api.access import ANYONE
from waypost.serve.api.batch_file import ROUTES, Line, id_of, read_lines, take_up
from waypost.serve.api.errors import ApiError, bad_request, unknown_model
from waypost.serve.api.jobs import Job, chat_job, completion_job, head_of
from waypost.serve.api.protocol import ChatRequest, CompletionRequest, parse
from waypost.serve.api.replies import Part, usage
from waypost.serve.engine import Engine
from waypost.serve.request import Delta

AHEAD = 2
"""Requests given to the engine at a time, in multiples of the sequences that it runs: enough to keep it full."""


@dataclass
class Tally:
    """What a run did. `kept`: answered before; `failed`: answered with an error."""

    total: int = 0
    kept: int = 0
    answered: int = 0
    failed: int = 0
    completion_tokens: int = 0


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
        done = take_up(out, {line.custom_id: self._id(line) for line in lines})
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
            deltas = self._engine.step(stride.in_time(self._engine.stats().newest_step_s, stride.UNHEARD_S))
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
            return self._answer(line, None, {"code": "invalid_line", "message": line.problem})
        try:
            job = self._plan(line, line.body)
        except ApiError as error:
            return self._answer(line, _response(error.status, error.body))
        except WaypostError as error:
            return self._answer(line, _response(400, bad_request(str(error)).body))
        running = _Running(line, job)
        for index, request in enumerate(job.requests):
            self._running[self._engine.submit(request)] = running
            running.first[request.id] = index * job.n
        return None

    def _id(self, line: Line) -> str:
        return id_of(line.custom_id, self._model_name, self._adapter, line.url, {**self._defaults, **(line.body or {})})

    def _answer(self, line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"id": self._id(line), "custom_id": line.custom_id, "response": response, "error": error}

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
            return self._answer(running.line, _response(500, failure.body))
        running.parts[running.first[delta.request_id] + delta.choice].add(delta)
        if any(part.finish_reason is None for part in running.parts):
            return None
        job = running.job
        for request in job.requests:
            self._running.pop(request.id, None)
        prefix = "chatcmpl" if running.line.url == ROUTES[0] else "cmpl"
        head = head_of(self._engine, self._model_name, f"{prefix}-{job.requests[0].id}", int(time.time()))
        total = usage(job.prompts, sum(len(part.draws) for part in running.parts))
        return self._answer(running.line, _response(200, job.form.whole(head, running.parts, total)))


class _Running:
    def __init__(self, line: Line, job: Job) -> None:
        self.line, self.job = line, job
        self.parts = [Part() for _ in range(job.num_choices)]
        self.first: dict[str, int] = {}


def _response(status: int, body: Any) -> dict[str, Any]:
    return {"status_code": status, "body": body}


def _write(stream: TextIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer, ensure_ascii=False) + "\n")
    stream.flush()
