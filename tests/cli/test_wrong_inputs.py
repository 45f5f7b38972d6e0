"""What a hasty user gives each verb: the answer is one message that names it and says what to do, and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from waypost.cli.main import main
from waypost.testing.tiny import tiny_checkpoint

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = RECIPES / "tiny-cpu.yaml"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    tiny_checkpoint(folder / "model")
    (folder / "empty.txt").write_text("")
    (folder / "file").write_text("x")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00bad")
    (folder / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 60)
    (folder / "broken.jsonl").write_text('{"text": "a good line"}\n{"text": broken\n')
    (folder / "other.jsonl").write_text('{"txt": "a"}\n')
    (folder / "asked.jsonl").write_text('{"prompt": "Hello"}\n')
    return folder


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("inspect nowhere", "CheckpointError: nowhere: no such folder; give a checkpoint"),
        ("inspect file", "CheckpointError: file: is a file, a checkpoint is a folder"),
        ("import cut.gguf out", "CheckpointError: cut.gguf: cannot be read as GGUF: "),
        ("import model file", "ConfigError: file exists already, and import overwrites nothing"),
        ("export model file --weights-only", "ConfigError: file exists already, and export overwrites nothing"),
        ("export model it.gguf --weights-only", "it.gguf names a GGUF file: say --gguf for one, or give a folder"),
        ("train nowhere.yaml --out out", "ConfigError: nowhere.yaml: cannot be read (No such file or directory)"),
        ("train TINY --out file", "CheckpointError: file: File exists; check the path"),
        ("train TINY --out out --set steps=many", "ConfigError: steps: input should be a valid integer, given 'many'"),
        ("train TINY --out out --set tokens=-5", "ConfigError: recipe.tokens=-5: must be at least 1"),
        ("train TINY --out out --set optimiser.lr=1", "optimiser: unknown key. Did you mean 'optimizer'?"),
        ("train TINY --out out --set data.sources.0.path=empty.txt", "empty.txt: 1 file(s), all empty"),
        ("train TINY --out out --set data.sources.0.path=bytes.txt", "bytes.txt: not UTF-8 at byte 0; convert"),
        ("train TINY --out out --set data.sources.0.path=broken.jsonl", "broken.jsonl:2: not JSON"),
        ("train TINY --out out --set data.sources.0.path=other.jsonl", "no field 'text'. Did you mean 'txt'?"),
        ("select model --out out", "model: holds no recipe.yaml, so it is no run's folder; give the --out of a training run"),
        ("transform --recipe AVERAGE --set sources.0=nowhere --out made", "CheckpointError: nowhere: no such folder"),
        ("transform --recipe AVERAGE --set sources.0=model --out made", "is one checkpoint; give the run folder"),
        ("measure model empty.txt", "empty.txt: 1 file(s), all empty"),
        ("measure model file --metric logit_kl", "logit_kl.reference: field required; it has no default"),
        ("generate model Hi --kv h2o:bugdet=1", "--kv h2o.bugdet: unknown key. Did you mean 'budget'?"),
        ("generate model Hi --temperature -2", "Sampling.temperature=-2.0: must be 0 (greedy) or at least"),
        ("generate model Hi --lora nowhere", "nowhere: holds no adapter as there is no such folder; give"),
        ("generate model --batch asked.jsonl --out no/answers.jsonl", "--out no/answers.jsonl: there is no folder no; make it"),
        (
            "generate model --batch empty.txt --out answers.jsonl",
            "empty.txt: holds no request; give a file",
        ),
        ("serve model --lora nameless --port 0", "--lora nameless: give NAME=PATH"),
        ("serve model --port 0 --name= ", "--name is empty; requests name the model by it"),
        ("serve model --port 0 --cors chat.example", "--cors 'chat.example': must be * or an origin as browsers name it"),
        ("chat nowhere", "CheckpointError: nowhere: no such folder; give a checkpoint"),
        ("chat 127.0.0.1:8000", "127.0.0.1:8000: there is no such folder; did you mean http://127.0.0.1:8000?"),
        ("chat ftp://x/y", "ftp://x/y: there is no such folder; servers are spoken with over http:// or https://"),
        ("chat http:/127.0.0.1:9", "http:/127.0.0.1:9: there is no such folder; servers are spoken with over http:// or"),
        ("chat file:///nowhere", "CheckpointError: file:/nowhere: no such folder; give a checkpoint"),
        ("chat http://127.0.0.1:9 --dtype float32", "--dtype float32 belongs to a checkpoint; a server computes as it was"),
        ("diff model nowhere", "CheckpointError: nowhere: no such folder"),
        ("lineage model --svg no/tree.svg", "--svg no/tree.svg: No such file or directory; give a file in a folder"),
        ("bench no.such.claim", "no.such.claim"),
    ],
)
def test_it_is_named_and_nothing_is_made(
    line: str, says: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    args = [{"TINY": str(TINY), "AVERAGE": str(RECIPES / "average-last.yaml")}.get(word, word) for word in line.split()]
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code == 1
    told = capsys.readouterr().err
    assert says in told
    assert "Traceback" not in told
    assert not list(home.glob("out/step-*"))
    assert not (home / "made").exists()
