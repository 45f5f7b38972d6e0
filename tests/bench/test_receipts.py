"""What a receipt says of how it was taken: the commit, the command that takes it again, and the rates that were chosen."""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from waypost.bench import CAVEATS, CLAIMS
from waypost.bench.plans import direction
from waypost.bench.pretraining import Tuned, chosen, tuned
from waypost.bench.receipt import PACKAGE, Options, Receipt, commit, latest, series
from waypost.cli.bench import command
from waypost.cli.help import explained
from waypost.core.errors import NumericsError

RECEIPT = Receipt(
    claim="a.claim",
    statement="one against two",
    numerics="exact",
    ours=series("waypost", "s", [1.0, 1.0]),
    baseline=series("it", "s", [2.0, 2.0]),
    higher_is_better=False,
    floor=None,
    agreement="equal",
    command="waypost bench a.claim --model CHECKPOINT",
    versions={"transformers": "5"},
)


def test_the_commit_of_a_receipt_knows_of_changes_anywhere_in_the_package(tmp_path: Path) -> None:
    package = tmp_path / "house"
    for name in ("bench", "serve"):
        (package / name).mkdir(parents=True)
        (package / name / "it.py").write_text("")
    assert commit(tmp_path) == "", "no checkout"
    me = ("-c", "user.name=it", "-c", "user.email=it@it", "-c", "commit.gpgsign=false")
    for arguments in (("init", "-q"), ("add", "."), (*me, "commit", "-qm", "it")):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    assert re.fullmatch(r"[0-9a-f]{4,}", commit(package))
    (tmp_path / "notes.txt").write_text("of no account")
    assert not commit(package).endswith("+")
    (package / "serve" / "it.py").write_text("changed = True")
    assert commit(package).endswith("+")
    assert (PACKAGE / "serve").is_dir()


def test_the_command_has_every_option_that_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CAVEATS, "a.claim", "beware")
    plain = RECEIPT.stamped(Options())
    assert (plain.command, plain.caveat, plain.machine["threads"]) == (RECEIPT.command, "beware", 2)
    asked = Options(repeats=3, threads=1, rivals={"transformers": "/x", "mergekit": "/y"})
    assert RECEIPT.stamped(asked).command == f"{RECEIPT.command} --rival transformers=ENV -n 3 --threads 1"
    named = replace(RECEIPT, command="waypost bench a.claim --rival transformers=ENV", caveat="measured")
    assert named.stamped(asked).command == f"{named.command} -n 3 --threads 1"
    assert named.stamped(asked).caveat == "measured; beware", "what a claim found out goes before what is said of it in general"
    assert named.stamped(asked).stamped(asked).caveat == "measured; beware"


def test_claims_leave_the_options_to_the_stamp() -> None:
    for path in (PACKAGE / "bench").rglob("*.py"):
        commands = re.findall(r'command=f?"([^"]*)"', path.read_text(encoding="utf-8"))
        assert not [c for c in commands if re.search(r"-n \d|--threads", c)], path
    assert set(CAVEATS) <= set(CLAIMS)


def test_a_rate_is_not_chosen_at_the_edge_of_what_was_tried() -> None:
    def loss(best: float) -> Tuned:
        return tuned((1.0, 2.0, 4.0), lambda rate: abs(math.log(rate / best)))

    assert loss(2.0).tried.keys() == {1.0, 2.0, 4.0}
    assert (loss(8.0).rate, max(loss(8.0).tried), loss(8.0).at_edge) == (8.0, 16.0, False)
    assert (loss(0.5).rate, min(loss(0.5).tried), loss(0.5).at_edge) == (0.5, 0.25, False)
    far = loss(1e6)
    assert (far.rate, len(far.tried), far.at_edge) == (64.0, 7, True)
    assert chosen({"it": far}) == {"it_lr": 64.0, "it_lrs_tried": 7.0, "it_lr_is_the_last_tried": 1.0}


def test_rates_that_diverge_have_lost() -> None:
    def loss(rate: float) -> float:
        if rate > 2:
            raise NumericsError("diverged")
        return -rate

    found = tuned((1.0, 2.0, 4.0), loss)
    assert (found.rate, found.tried[4.0], found.at_edge) == (2.0, math.inf, False)
    with pytest.raises(NumericsError, match="every learning rate diverges: 8, 16"):
        tuned((8.0, 16.0), loss)


def test_the_direction_of_errors_is_said() -> None:
    assert direction([-0.25, 0.1, -0.05]) == "the worst is 0.250 too low, and 2 of 3 are too low"
    assert direction([0.3, -0.1]) == "the worst is 0.300 too high, and 1 of 2 are too low"


def test_the_commands_of_receipts_are_commands() -> None:
    """Of receipts that were stamped with all their options: each is `waypost bench` of the claim, with options that it has."""
    known = latest(PACKAGE.parent.parent / "benchmarks" / "receipts")
    stamped = {claim: receipt for claim, receipt in known.items() if "over" in receipt}
    assert stamped
    bench = explained(command, no_args_is_help=False)
    for claim, receipt in stamped.items():
        words = receipt["command"].split()
        assert words[:3] == ["waypost", "bench", claim]
        given = bench.make_context("bench", words[2:]).params
        assert given["threads"] == receipt["machine"]["threads"], claim
        if receipt["over"] in ("rounds", "seeds"):
            assert given["repeats"] == receipt["n"], claim
