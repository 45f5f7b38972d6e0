"""`waypost generate` on a tiny checkpoint."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from waypost.cli import _answer, main
from waypost.core.errors import ConfigError
from waypost.model.adapter_sites import sites
from waypost.model.adapters import Lora
from waypost.model.peft import LoraFile, write
from waypost.model.tokenizer import Tokenizer
from waypost.serve.engine import Engine
from waypost.serve.sampling import Sampling
from waypost.testing.points._shared import noise
from waypost.testing.tiny import tiny_checkpoint, tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("generate") / "tiny")


def want(checkpoint: Path, ids: list[int], sampling: Sampling) -> str:
    (completion,) = Engine(checkpoint, num_pages=64).generate([ids], sampling)
    return completion.text


def waypost(*args: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main.main([str(arg) for arg in args])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_chat_template_is_used_where_there_is_one(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.from_folder(checkpoint)
    assert waypost("generate", checkpoint, "Hello", "--system", "Be brief", "--max-tokens", 12) == 0
    captured = capsys.readouterr()
    ids = tokenizer.chat([{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}])
    assert captured.out == want(checkpoint, ids, Sampling(temperature=0.0, max_tokens=12)) + "\n"
    assert f"[{len(ids)} prompt tokens, first token after" in captured.err
    assert "tokens/s" in captured.err


def test_json_holds_the_answer_and_its_seed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("generate", checkpoint, "Hello", "--no-chat", "--temperature", 1, "--max-tokens", 9, "--json")
    assert waypost(*args, "--top-p", 0.9, "--top-k", 50, "--min-p", 0.01, "--repetition-penalty", 1.1) == 0
    first = json.loads(capsys.readouterr().out)
    sampling = Sampling(
        seed=first["seed"], max_tokens=9, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, temperature=1.0
    )
    ids = Tokenizer.from_folder(checkpoint).encode("Hello", special=True)
    assert first["text"] == want(checkpoint, ids, sampling)
    assert (first["prompt_tokens"], first["completion_tokens"]) == (len(ids), len(first["token_ids"]))
    assert first["finish_reason"] in ("stop", "length")


PROCESS = """
import atexit, sys

import waypost.cli.main as cli

atexit.register(lambda: print("at the end", file=sys.stderr))
cli.entry()
"""


@pytest.mark.parametrize(
    ("args", "code"),
    [(["Hello"], 0), (["Hello", "--json"], 0), (["Hello", "--top-p", "7"], 1), (["Hello", "--max-tokens", "0"], 2)],
)
def test_a_process_that_ends_at_once_has_said_everything(checkpoint: Path, args: list[str], code: int) -> None:
    command = [sys.executable, "-c", PROCESS, "generate", str(checkpoint), "--max-tokens", "12", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code
    assert done.stderr.endswith("at the end\n")
    ids = Tokenizer.from_folder(checkpoint).chat([{"role": "user", "content": "Hello"}])
    text = want(checkpoint, ids, Sampling(temperature=0.0, max_tokens=12))
    if code != 0:
        assert done.stdout == ""
    else:
        assert (json.loads(done.stdout)["text"] if "--json" in args else done.stdout) == text + (
            "" if "--json" in args else "\n"
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("how", [[], ["--json"]])
def test_a_full_disk_behind_the_output_is_said(checkpoint: Path, how: list[str]) -> None:
    command = [sys.executable, "-m", "waypost.cli.main", "generate", str(checkpoint), "Hello", "--max-tokens", "2", *how]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "no space is left where the output goes" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dash_reads_standard_input(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert waypost("generate", checkpoint, "from a pipe", "--max-tokens", 5) == 0
    direct = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert waypost("generate", checkpoint, "-", "--max-tokens", 5) == 0
    assert capsys.readouterr().out == direct


def test_a_stop_text_ends_the_answer_before_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("generate", checkpoint, "Hello", "--max-tokens", 30)
    assert waypost(*args) == 0
    whole = capsys.readouterr().out.rstrip("\n")
    stop = whole[len(whole) // 2]
    assert waypost(*args, "--stop", stop) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_conversation_remembers_what_was_said(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("one\n\n" + "x" * 300 + "\ntwo\n"))
    assert waypost("generate", checkpoint, "--max-tokens", 8) == 0
    captured = capsys.readouterr()
    tokenizer = Tokenizer.from_folder(checkpoint)
    sampling = Sampling(temperature=0.0, max_tokens=8)
    history: list[Any] = [{"role": "user", "content": "one"}]
    first = want(checkpoint, tokenizer.chat(history), sampling)
    history += [{"role": "assistant", "content": first}, {"role": "user", "content": "two"}]
    assert captured.out == first + "\n" + want(checkpoint, tokenizer.chat(history), sampling) + "\n"
    assert "CapacityError" in captured.err  # the long turn was refused, and forgotten


def test_control_c_ends_the_answer_and_keeps_what_was_said(checkpoint: Path) -> None:
    engine = Engine(checkpoint, num_pages=64)
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    answer = _answer.run(engine, [5, 6, 7], Sampling(seed=1, max_tokens=200, ignore_eos=True), show)
    assert answer.interrupted
    assert "interrupted" in answer.summary
    assert 0 < len(answer.choice.tokens) < 200
    stats = engine.stats()
    assert (stats.num_running, stats.pages_free) == (0, stats.pages_total)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("no-such-folder", "hi"), 1, "no-such-folder"),
        (("{}", ""), 1, "the prompt is empty"),
        (("{}", "hi", "--system", "x", "--no-chat"), 1, "--no-chat turns it off"),
        (("{}", "hi", "--temperature", "-1"), 1, "temperature=-1.0"),
        (("{}", "x" * 400, "--no-chat"), 1, "the context has 256"),
        (("{}",), 2, "a conversation needs a"),
        (("{}", "--json"), 2, "a conversation needs a"),
    ],
)
def test_what_cannot_be_done_says_why(
    checkpoint: Path, args: tuple[str, ...], code: int, says: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert waypost("generate", *(arg.replace("{}", str(checkpoint)) for arg in args)) == code
    assert says in capsys.readouterr().err


def test_a_conversation_needs_a_template(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    for name in ("chat_template.jinja", "waypost.json"):  # without its manifest it is a plain Hugging Face folder
        (bare / name).unlink()
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert waypost("generate", bare) == 1
    assert "this checkpoint has none" in capsys.readouterr().err
    assert waypost("generate", bare, "Hello", "--max-tokens", 3) == 0  # goes on with the text as it stands
    assert waypost("generate", bare, "Hello", "--chat") == 1
    assert "no chat template" in capsys.readouterr().err
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        _answer.tokenizer_of(Engine(bare, num_pages=8), "bare")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = {name: linear.weight.shape for name, linear in sites(tiny_model()).items()}
    pairs = {n: (noise(2, s[1], name=n), 0.3 * noise(s[0], 2, name=n)) for n, s in shapes.items()}
    folder = tmp_path_factory.mktemp("lora") / "mine"
    return write(folder, LoraFile(folder, pairs, {}, Lora(r=2, alpha=2.0).file_config("base")))


def test_an_adapter_answers_as_it_does_in_a_server(
    checkpoint: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.from_folder(checkpoint)
    with Engine(checkpoint, num_pages=64) as engine:
        engine.adapters.add("mine", adapter)
        ids, turn = tokenizer.encode("Hello", special=True), tokenizer.chat([{"role": "user", "content": "Hello"}])
        greedy = Sampling(temperature=0.0, max_tokens=12)
        plain, adapted, chatted = (
            engine.generate([prompt], greedy, name)[0].text for prompt, name in ((ids, None), (ids, "mine"), (turn, "mine"))
        )
    assert plain != adapted
    args = ("generate", checkpoint, "--max-tokens", 12, "--lora", adapter)
    assert waypost(*args, "Hello", "--no-chat") == 0
    assert capsys.readouterr().out == adapted + "\n"
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Hello"}\n')
    assert waypost(*args, "--batch", tmp_path / "asked.jsonl", "--out", tmp_path / "answers.jsonl") == 0
    answer = json.loads((tmp_path / "answers.jsonl").read_text())
    assert answer["response"]["body"]["choices"][0]["text"] == adapted
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert waypost("chat", checkpoint, "--max-tokens", 12, "--lora", adapter) == 0
    assert chatted in capsys.readouterr().out
    assert waypost("chat", "http://127.0.0.1:1", "--lora", adapter) == 1
    assert "a server names its adapters itself" in capsys.readouterr().err
    assert waypost("generate", checkpoint, "Hello", "--lora", checkpoint) == 1
    assert "holds no adapter" in capsys.readouterr().err
    assert waypost("generate", checkpoint, "Hello", "--lora", tmp_path / "nowhere") == 1
    assert "nowhere: holds no adapter as there is no such folder; give" in capsys.readouterr().err
    assert waypost(*args, "--batch", tmp_path / "asked.jsonl", "--out", tmp_path / "nowhere" / "answers.jsonl") == 1
    assert "there is no folder" in capsys.readouterr().err
