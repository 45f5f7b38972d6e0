"""The command line as a shell sees it: exit codes, streams, and what is imported for what."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import waypost
from waypost import __version__
from waypost.cli import main as cli
from waypost.cli._shared import print_result, require_extra, torch_dtype
from waypost.core.errors import CheckpointError, ConfigError

HEAVY = ("torch", "transformers", "fastapi", "pydantic", "uvicorn", "tokenizers", "safetensors", "numpy", "rich", "jinja2")


def imported_by(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after `code`."""
    script = f"{code}\nimport sys, json\nsys.stderr.write(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr))


@pytest.mark.parametrize(
    "code",
    [
        "import waypost; dir(waypost)",
        "import waypost.cli.main as m\ntry: m.main(['--help'])\nexcept SystemExit: pass",
        "import waypost.cli.main as m\ntry: m.main(['--version'])\nexcept SystemExit: pass",
    ],
)
def test_the_package_and_its_help_import_nothing_heavy(code: str) -> None:
    assert not imported_by(code) & {*HEAVY, "typer"}


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_the_help_of_a_verb_does_not_import_torch(verb: str) -> None:
    loaded = imported_by(f"import waypost.cli.main as m\ntry: m.main([{verb!r}, '--help'])\nexcept SystemExit: pass")
    assert not loaded & ({*HEAVY} - {"rich"})


def code_of(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--help") == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in cli.VERBS)
    assert code_of() == 2
    assert capsys.readouterr().out == text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--version") == 0
    assert capsys.readouterr().out == f"waypost {__version__}\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["servee"], "Did you mean 'serve'?"),
        (["--frobnicate"], "no option '--frobnicate'"),
        (["serve", "--frobnicate"], "No such option"),
        (["serve"], "CHECKPOINT"),
        (["serve", "x", "--port", "99999"], "65535"),
        (["generate", "x", "y", "--numerics", "sloppy"], "sloppy"),
    ],
)
def test_wrong_usage_exits_2(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(*args) == 2
    captured = capsys.readouterr()
    assert says in captured.err + captured.out


def verb_that_raises(error: BaseException) -> types.ModuleType:
    module = types.ModuleType("waypost.cli.doctor")

    def command() -> None:
        """Fails."""
        raise error

    module.command = command  # type: ignore[attr-defined]
    return module


def test_a_waypost_error_is_one_line_and_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "waypost.cli.doctor", verb_that_raises(CheckpointError("it is torn")))
    assert code_of("doctor") == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "CheckpointError: it is torn\n")


@pytest.mark.parametrize("mistake", [ZeroDivisionError("ours"), OSError("of no file")])
def test_our_own_mistakes_keep_their_traceback(mistake: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "waypost.cli.doctor", verb_that_raises(mistake))
    with pytest.raises(type(mistake)):
        cli.main(["doctor"])


def test_a_file_that_cannot_be_opened_is_one_line_and_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "waypost.cli.doctor", verb_that_raises(PermissionError(13, "Permission denied", "/x.svg")))
    assert code_of("doctor") == 1
    said = "CheckpointError: /x.svg: Permission denied; check the path, its permissions and the disk\n"
    assert capsys.readouterr().err == said


def test_results_are_text_or_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"path": Path("a/b"), "loss": float("nan"), "list": (1, {"x": None}), "text": "\u00e9"}
    print_result(result, True, "for a person")
    line = capsys.readouterr().out
    assert json.loads(line) == {"path": "a/b", "loss": None, "list": [1, {"x": None}], "text": "\u00e9"}
    assert line.count("\n") == 1
    print_result(result, False, "for a person")
    print_result(result, False)
    assert capsys.readouterr().out == "for a person\n"


def test_a_missing_extra_is_named() -> None:
    require_extra("serve", "json")
    with pytest.raises(ConfigError, match=r'pip install "waypost\[serve\]"'):
        require_extra("serve", "json", "no_such_module_anywhere")


def test_dtypes_by_name() -> None:
    import torch

    assert [torch_dtype(name) for name in (None, "float32", "bfloat16", "float16")] == [
        None,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]


@pytest.mark.parametrize(
    "args",
    [
        ["train", "recipe.yaml", "--out", ""],
        ["train", "", "--out", "x"],
        ["import", "", "x"],
        ["import", "x", " "],
        ["export", "x", "", "--gguf"],
        ["transform", "--recipe", "x.yaml", "--out="],
        ["serve", ""],
        ["inspect", ""],
        ["diff", "x", ""],
        ["doctor", "--quick", "--folder", ""],
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert code_of(*args) == 2
    assert "is empty (a variable of the shell that is not set?): give a path, or '.'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_empty_path_is_refused_from_python_and_in_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from waypost.transform.converting.exporting import export_folder, export_gguf
    from waypost.transform.converting.importing import import_model

    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: waypost.train({}, ""),
        lambda: waypost.transform({}, ""),
        lambda: import_model("", "x"),
        lambda: import_model("x", ""),
        lambda: export_folder("x", ""),
        lambda: export_gguf("x", ""),
    ):
        with pytest.raises(ConfigError, match=r"^(out|source) is empty"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting", ["init.checkpoint=''", "init.chat_template=''", "data.cache=''", "data.sources.0.path=''", "tokenizer.path=' '"]
)
def test_an_empty_path_in_a_training_recipe(setting: str) -> None:
    from waypost.train.recipe import resolve

    tree = {"data": {"sources": [{"path": "x"}]}, "init": {"checkpoint": "x"}, "steps": 1}
    path = re.escape(setting.partition("=")[0].replace("sources.0", "sources[0]"))
    with pytest.raises(ConfigError, match=rf"^{path}: is empty \(a variable of the shell that is not set\?\): give a path"):
        resolve(tree, [setting])


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_the_help_of_a_verb_fits_and_ends_with_examples(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert code_of(verb, "--help") == 0
    said = capsys.readouterr().out
    explained, mark, examples = said.partition("\n  Examples:\n")
    assert mark, "a docstring that ends with Examples:"
    assert examples.strip()
    assert all(f"waypost {verb}" in line or line.startswith("      ") for line in examples.rstrip().splitlines())
    assert max(map(len, explained.splitlines())) <= 88, "a table that may not be wrapped may be a little wider"
    types_of_python = re.search(r"<(str|int|float|bool)[ >]", explained.partition("Options:")[2])
    assert not types_of_python, "an option's value is named in the user's words"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("option", ["--version", "--help"])
def test_a_full_disk_behind_the_simplest_answers_is_said(option: str, buffered: bool) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "waypost.cli.main", option],
            stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "OSError: no space is left where the output goes, and some of it is missing there\n"
