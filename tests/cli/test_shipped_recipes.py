"""Every shipped recipe is one that the commands in its own head accept, up to the models that they are about."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from waypost.cli.main import main

ROOT = Path(__file__).parents[2]


def commands(recipe: Path) -> list[list[str]]:
    """The arguments of `waypost train` and `waypost transform` in the recipe's comments that name it."""
    comments = "\n".join(line[1:] for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    lines = re.findall(r"\bwaypost ((?:train|transform) .*)", comments.replace("\\\n", " "))
    return [args for args in (shlex.split(line, comments=True) for line in lines) if f"recipes/{recipe.name}" in args]


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_its_own_commands_are_accepted(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    found = commands(recipe)
    assert found, f"{recipe}: its comments show no command that takes it"
    for args in found:
        with pytest.raises(SystemExit) as left:
            main([*args, "--dry-run"])
        said = capsys.readouterr().err
        assert not left.value.code or re.match("CheckpointError: .*: no such folder; ", said), (args, said)
