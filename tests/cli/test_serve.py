"""`waypost serve` as a process: its ports, its story, its end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from waypost.cli import main
from waypost.cli._serving import callers_of, check_room
from waypost.cli._story import invitation
from waypost.core.errors import ConfigError
from waypost.serve.api.server import listen, url
from waypost.serve.engine import Engine
from waypost.serve.sampling import Sampling
from waypost.testing.tiny import tiny_checkpoint

ASK = {"model": "tiny", "prompt": "a", "seed": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("serve") / "tiny")


def command(*args: object) -> list[str]:
    return [sys.executable, "-c", "from waypost.cli.main import main; main()", "serve", *map(str, args)]


@contextmanager
def serving(*args: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process that is ready, and its URL; killed at the end if it still runs."""
    argv = command(*args, "--port", 0, "--json", "--threads", 1, "--num-pages", 512)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr is not None else ""
            yield process, json.loads(line)["url"]
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_it_tells_its_story_serves_and_ends_on_sigterm(checkpoint: Path) -> None:
    with serving(checkpoint, "--name", "tiny") as (process, where):
        assert httpx.get(where + "/health").json() == {"status": "ready"}
        assert httpx.post(where + "/v1/completions", json=ASK).status_code == 200
        process.send_signal(signal.SIGTERM)
        code, err = end_of(process)
    assert code == 0
    told = [line.split()[0] for line in err.splitlines() if line.startswith("  ") and " s  " in line]
    assert told == ["import", "load", "check", "ready"]
    assert f"curl {where}/v1/chat/completions" in err
    assert err.endswith("stopped\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_running_request_may_finish(checkpoint: Path, number: signal.Signals) -> None:
    with serving(checkpoint) as (process, where):
        request = {**ASK, "max_tokens": 250, "stream": True, "n": 16}
        with httpx.stream("POST", where + "/v1/completions", json=request, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(number)
            rest = [line for line in lines if line]
        code, _ = end_of(process)
    assert rest[-1] == "data: [DONE]"
    ends = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
    assert ends.count("length") == 16
    assert code == 0


def test_a_server_under_nohup_outlives_its_terminal(checkpoint: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the server inherits
    try:
        with serving(checkpoint) as (process, where):
            process.send_signal(signal.SIGHUP)
            assert httpx.post(where + "/v1/completions", json=ASK).status_code == 200
            assert httpx.get(where + "/ready").status_code == 200
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_outlives_the_deadline_is_cut_off_and_told_so(checkpoint: Path) -> None:
    with serving(checkpoint, "--drain", 0) as (process, where):
        request = {**ASK, "max_tokens": 250, "stream": True, "n": 64, "prompt": ["a"] * 16}
        with httpx.stream("POST", where + "/v1/completions", json=request, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        code, err = end_of(process)
    assert "shutting down" in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert (code, err.splitlines()[-1]) == (0, "stopped; cut off: 1")


def test_an_occupied_port_is_found_before_anything_is_loaded(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(command(checkpoint, "--port", port), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"ConfigError: port {port} of 127.0.0.1 is in use; stop what listens there, "
        "or choose another with --port (0 takes a free one)\n"
    )


def test_a_checkpoint_that_cannot_be_loaded_ends_the_server(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    done = subprocess.run(command(broken, "--port", 0), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "CheckpointError" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_key_that_is_empty_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert callers_of(None, None) is None
    monkeypatch.setenv("WAYPOST_API_KEY", "")
    with pytest.raises(ConfigError, match="would be open to everybody"):
        callers_of(None, None)
    with pytest.raises(ConfigError, match="not empty"):
        callers_of("", None)


def test_what_never_sends_its_body_keeps_no_server(checkpoint: Path) -> None:
    with serving(checkpoint, "--drain", 300) as (process, where):
        host, port = where.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"model": ')
            assert httpx.get(where + "/health").status_code == 200  # it came later, so the other is being read
            process.send_signal(signal.SIGTERM)
            answer = connection.recv(4096).decode()
            code, err = end_of(process)
    assert answer.startswith("HTTP/1.1 503 ")
    assert (code, err.splitlines()[-1]) == (0, "stopped")
    assert "Traceback" not in err


def test_a_missing_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["serve", "no-such-folder", "--port", "0"])
    assert caught.value.code == 1
    assert "no-such-folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "says"), [("no.such.host.invalid", "not an address"), ("192.0.2.1", "no address of this machine")]
)
def test_a_host_that_is_not_ours_is_refused(host: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        listen(host, 0)


def test_the_url_is_one_that_a_client_can_use() -> None:
    with listen("0.0.0.0", 0) as sock:
        assert url(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_the_first_request_is_shown_ready_to_paste() -> None:
    text = invitation("http://h:1", "it", chat=False, keyed=True)
    assert "http://h:1/v1/completions" in text
    assert "Authorization: Bearer YOUR_KEY" in text
    body = text[text.index("-d '") + 4 : text.rindex("'")]
    assert (json.loads(body)["model"], json.loads(body)["max_tokens"]) == ("it", 64)
    assert '"max_tokens": 20' in invitation("http://h:1", "it", chat=True, keyed=False, most_tokens=20)


def test_a_cache_too_small_for_the_context_is_refused_with_what_to_do(checkpoint: Path) -> None:
    says = r"holds 16 tokens \(num_pages=1\).*may have 256: give --num-pages of at least 16, or --max-seq-len of at most 16"
    with pytest.raises(ConfigError, match=says):
        check_room(Engine(checkpoint, num_pages=1))
    check_room(Engine(checkpoint, num_pages=16))
    check_room(Engine(checkpoint, num_pages=1, max_seq_len=16))


def test_arithmetic_no_prefix_cache_and_an_admin_who_exchanges_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    half, other = (tiny_checkpoint(tmp_path / name, seed=seed, dtype=torch.bfloat16) for name, seed in (("half", 0), ("b", 1)))
    ask = {**ASK, "prompt": "a prompt that fills more than a page or two", "logprobs": 0, "model": "half"}
    admin = {"Authorization": "Bearer top"}
    want = [
        Engine(path, arithmetic=torch.float32, num_pages=16, threads=1).generate(
            [ask["prompt"]], Sampling(seed=1, max_tokens=16, logprobs=0, ignore_eos=True)
        )[0].choices[0].logprobs
        for path in (half, other)
    ]  # fmt: skip
    with serving(half, "--arithmetic", "float32", "--no-prefix-cache", "--admin-key", "top") as (process, where):
        for version, logprobs in enumerate(want):
            if version:
                reply = httpx.post(where + "/admin/weights", json={"checkpoint": str(other)}, headers=admin, timeout=60)
                assert (reply.status_code, reply.json()["weight_version"]) == (200, 1)
            for _ in range(2):
                reply = httpx.post(where + "/v1/completions", json=ask, timeout=60).json()
                assert reply["choices"][0]["logprobs"]["token_logprobs"] == logprobs
                assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert 'enable_prefix_caching="False"' in httpx.get(where + "/metrics").text
        process.send_signal(signal.SIGTERM)
        code, _ = end_of(process)
    assert code == 0
