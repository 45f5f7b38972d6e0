"""Batch mode: what it answers, what it keeps, and what a crash leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api_cases import MODEL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from waypost.cli import main
from waypost.core.errors import ConfigError
from waypost.model.tokenizer import Tokenizer
from waypost.serve.api.batch import Batch, Tally
from waypost.serve.api.batch_file import read_lines, take_up
from waypost.serve.engine import Engine
from waypost.serve.request import Delta
from waypost.serve.sampling import Sampling

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "seed": 1}
LINES: list[Any] = [
    {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": {"model": MODEL, **CHAT}},
    {"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": {"prompt": ["a", "b"], "n": 2, "seed": 1}},
    {"prompt": "bare", "seed": 2},
    {"messages": CHAT["messages"], "seed": 2, "custom_id": "bare chat"},
]
BAD: list[tuple[Any, str]] = [
    ("{nonsense", "not JSON"),
    ("[1]", "not a JSON object"),
    ({"custom_id": "", "prompt": "x"}, "custom_id must be"),
    ({"custom_id": "u1", "url": "/v1/embeddings", "body": {}}, "url one of"),
    ({"custom_id": "u2", "url": "/v1/completions", "body": [], "method": "POST"}, "body an object"),
    ({"custom_id": "u3", "url": "/v1/completions", "body": {}, "more": 1}, "unknown field 'more'"),
    ({"custom_id": "u4", "prompt": "x", "tmperature": 1}, "Did you mean 'temperature'?"),
    ({"custom_id": "u5", "prompt": "x", "stream": True}, "does not stream"),
    ({"custom_id": "u6", "prompt": "x", "model": "other"}, "does not exist"),
    ({"custom_id": "u7", "prompt": "x" * 999}, "context"),
    ({"custom_id": "u8", "prompt": [5], "deadline_s": 1e-9}, "deadline"),
    ({"custom_id": "u9", "prompt": [5], "logit_bias": {"400": 1}}, "this model knows"),
]


@pytest.fixture(scope="module")
def engine(checkpoint: str) -> Engine:
    return Engine(checkpoint, num_pages=64, max_batch_tokens=64, max_sequences=2)


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def run(engine: Engine, source: Path, out: Path, **defaults: Any) -> tuple[Tally, dict[str, Any]]:
    assert isinstance(engine.tokenizer, Tokenizer)
    tally = Batch(engine, engine.tokenizer, MODEL, {"max_tokens": 3, "ignore_eos": True, **defaults}).run(source, out)
    assert engine.idle
    engine.scheduler.check()
    return tally, {answer["custom_id"]: answer for answer in map(json.loads, out.read_text().splitlines())}


def test_every_line_is_answered_as_the_server_would(engine: Engine, tmp_path: Path) -> None:
    tally, answers = run(engine, write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl")
    assert (tally.total, tally.answered, tally.failed, tally.kept) == (4, 4, 0, 0)
    assert set(answers) == {"chat", "text", "line-3", "bare chat"}
    assert all(answer["response"]["status_code"] == 200 and answer["error"] is None for answer in answers.values())
    body = answers["text"]["response"]["body"]
    want = engine.generate(["a", "b"], Sampling(n=2, seed=1, max_tokens=3, ignore_eos=True))
    assert [c["text"] for c in body["choices"]] == [c.text for w in want for c in w.choices]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] == 12
    assert answers["chat"]["response"]["body"]["usage"]["completion_tokens"] == 4, "a line's own field goes first"
    assert answers["chat"]["response"]["body"]["object"] == "chat.completion"


def test_a_line_that_fails_says_why_and_harms_no_other(engine: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line for line, _ in BAD] + LINES)
    tally, answers = run(engine, source, tmp_path / "out.jsonl")
    assert (tally.answered, tally.failed) == (4, len(BAD))
    assert len({answer["id"] for answer in answers.values()}) == len(BAD) + 4
    for number, (line, says) in enumerate(BAD, 1):
        named = line.get("custom_id") if isinstance(line, dict) else None
        answer = answers[named or f"line-{number}"]
        assert says in json.dumps(answer), answer
        assert answer["response"] is None or answer["response"]["status_code"] >= 400


def test_what_was_answered_is_kept_and_errors_are_tried_again(engine: Engine, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    run(engine, write(source, [LINES[0], BAD[6][0]]), out)
    before = out.read_text().splitlines()
    tally, answers = run(engine, write(source, [LINES[0], {**BAD[6][0], "prompt": "y"}, *LINES[1:]]), out)
    assert (tally.kept, tally.answered, tally.failed) == (1, 3, 1)
    assert out.read_text().splitlines()[0] == next(line for line in before if '"chat"' in line)
    assert len(answers) == 5
    tally, _ = run(engine, source, out)
    assert (tally.kept, tally.answered, tally.failed) == (4, 0, 1)


@pytest.mark.parametrize(
    ("change", "defaults"), [({"prompt": "other"}, {}), ({"temperature": 0.5}, {}), ({}, {"max_tokens": 2}), ({}, {"seed": 7})]
)
def test_an_answer_to_another_request_of_the_same_name_is_not_kept(
    engine: Engine, tmp_path: Path, change: dict[str, Any], defaults: dict[str, Any]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"custom_id": "a", "prompt": "x"}
    run(engine, write(source, [line]), out)
    assert run(engine, source, out)[0].kept == 1
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=r"out\.jsonl:1: answers 'a' as it was asked before.*name another --out"):
        run(engine, write(source, [{**line, **change}]), out, **defaults)
    assert out.read_bytes() == before


def test_interrupted_it_says_what_there_is_and_goes_on_with_the_rest(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    _, whole = run(engine, source, tmp_path / "whole.jsonl")
    step = engine.step

    def step_until_one_is_done(most: int) -> list[Delta]:
        if out.exists() and out.read_text():
            raise KeyboardInterrupt
        return step(most)

    with monkeypatch.context() as here:
        here.setattr(engine, "step", step_until_one_is_done)
        with pytest.raises(KeyboardInterrupt):
            run(engine, source, out)
    kept = len(out.read_text().splitlines())
    assert f"interrupted: {out} holds {kept} of 4 answers; the same command goes on" in capsys.readouterr().err
    for request_id in list(engine._live):
        engine.cancel(request_id)
    tally, again = run(engine, source, out)
    assert (tally.kept, tally.answered) == (kept, 4 - kept)
    assert choices(again) == choices(whole)


def choices(answers: dict[str, Any]) -> dict[str, Any]:
    return {name: answer["response"]["body"]["choices"] for name, answer in answers.items()}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_torn_anywhere_it_is_repaired_and_gives_the_same_answers(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    source, out = write(folder / "in.jsonl", LINES), folder / "out.jsonl"
    _, whole = run(engine, source, out)
    raw = out.read_bytes()
    out.write_bytes(raw[: round(share * len(raw))])
    complete = raw[: round(share * len(raw))].count(b"\n")
    tally, again = run(engine, source, out)
    assert (tally.kept, tally.answered) == (complete, 4 - complete)
    assert out.read_bytes().startswith(b"".join(raw.splitlines(keepends=True)[:complete]))
    assert choices(again) == choices(whole)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"id": "batch-1", "custom_id": "other", "response": null, "error": null}\n', "does not ask"),
        ("my notes\n", "is no answer of a batch"),
        ('{"a": 1}\n', "is no answer of a batch"),
    ],
)
def test_another_file_is_not_written_over(content: str, says: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    with pytest.raises(ConfigError, match=says):
        take_up(out, {"a": "batch-1"})
    assert out.read_text() == content


def test_an_id_that_stands_twice_and_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stands twice"):
        read_lines(write(tmp_path / "in.jsonl", [{"custom_id": "a", "prompt": "x"}] * 2))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_lines(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="holds no request"):
        read_lines(write(tmp_path / "blank.jsonl", ["", "  "]))


def test_a_mark_at_the_beginning_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\n')
    assert [line.problem for line in read_lines(path)] == [None]


def waypost(*args: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main.main([str(arg) for arg in args])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.jsonl", [LINES[2], LINES[3]]), tmp_path / "out.jsonl"
    args = ("generate", checkpoint, "--batch", source, "--out", out, "--max-tokens", 5)
    assert waypost(*args, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["answered"], result["failed"], result["total"]) == (2, 0, 2)
    assert waypost(*args) == 0
    assert "0 answered, 0 failed, 2 kept of 2" in capsys.readouterr().out
    write(source, [LINES[2], LINES[3], BAD[4][0]])
    assert waypost(*args) == 1
    assert "1 of 3 requests failed" in capsys.readouterr().err
    assert waypost("generate", checkpoint, "--batch", source) == 2
    assert waypost("generate", checkpoint, "hi", "--batch", source, "--out", out) == 2
