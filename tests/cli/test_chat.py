"""`waypost chat`, with a checkpoint and with a server."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from waypost.cli import main
from waypost.model.tokenizer import Tokenizer
from waypost.serve.api.access import Caller, Callers
from waypost.serve.api.app import create_app
from waypost.serve.api.server import listen, url
from waypost.serve.engine import Engine
from waypost.serve.sampling import Sampling
from waypost.testing.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[str]:
    engine = Engine(checkpoint, num_pages=64)
    app = create_app(engine, Tokenizer.from_folder(checkpoint), "tiny", callers=Callers([Caller(name="me", key="k")]))
    sock = listen("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, ws="none"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    yield url(sock)
    running.should_exit = True
    thread.join(60)


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, *args: object) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    with pytest.raises(SystemExit) as caught:
        main.main(["chat", *map(str, args)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def want(checkpoint: Path, *turns: str, system: str | None = None) -> list[str]:
    engine, tokenizer = Engine(checkpoint, num_pages=64), Tokenizer.from_folder(checkpoint)
    history = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for turn in turns:
        history.append({"role": "user", "content": turn})
        answers.append(engine.generate([tokenizer.chat(history)], Sampling(temperature=0.0, max_tokens=8))[0].text)
        history.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_it_remembers_forgets_and_saves(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "talk.json"
    lines = f"one\ntwo\n/save {saved}\n/reset\ntwo\n//slash\n/save\n/rest\n/help\n/save {tmp_path}\n/quit\nnever\n"
    assert chat(monkeypatch, lines, checkpoint, "--system", "S", "--max-tokens", 8) == 0
    captured = capsys.readouterr()
    first, second = want(checkpoint, "one", "two", system="S")
    assert captured.out == "".join(f"{text}\n" for text in (first, second, *want(checkpoint, "two", "/slash", system="S")))
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[-1]["content"] == second
    for said in ("forgotten", "5 messages written", "/save needs a file", "Did you mean '/reset'?", "ends (so does"):
        assert said in captured.err


def test_an_answer_is_as_long_as_fits(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The context of 256 tokens is less than an answer may have by itself; what no longer fits is told with a way out."""
    assert chat(monkeypatch, "one\n" + "x" * 400 + "\n", checkpoint) == 1
    captured = capsys.readouterr()
    assert "1 turn of this conversation got no answer" in captured.err
    assert "CapacityError" in captured.err
    assert "or /reset" in captured.err


def test_ctrl_c_at_the_prompt_keeps_the_conversation(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        lines = iter(["one\n", "", "/quit\n"])

        def readline(self, size: int | None = -1, /) -> str:
            if not (line := next(self.lines)):
                raise KeyboardInterrupt
            return line

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(SystemExit) as caught:
        main.main(["chat", str(checkpoint), "--max-tokens", "3"])
    assert caught.value.code == 0
    assert "Ctrl-D or /quit ends the conversation" in capsys.readouterr().err


def test_a_server_answers_the_same(
    server: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for where in (server, server + "/v1/"):
        assert chat(monkeypatch, "one\ntwo\n", where, "--max-tokens", 8, "--api-key", "k") == 0
        captured = capsys.readouterr()
        assert captured.out == "".join(f"{text}\n" for text in want(checkpoint, "one", "two"))
    assert chat(monkeypatch, "x" * 400 + "\none\n", server, "--max-tokens", 8, "--api-key", "k", "--model", "tiny") == 1
    captured = capsys.readouterr()
    assert "shorten the prompt" in captured.err, "the long turn was refused, and forgotten"
    assert "1 turn of this conversation got no answer" in captured.err
    assert captured.out == want(checkpoint, "one")[0] + "\n"


def test_what_cannot_be_done_says_why(
    server: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, says in (
        ((server,), "401"),
        (("http://127.0.0.1:9",), "cannot be reached"),
        ((checkpoint, "--model", "x"), "belongs to a URL"),
        (("no-such-folder",), "no-such-folder"),
    ):
        assert chat(monkeypatch, "one\n", *args) == 1
        assert says in capsys.readouterr().err
