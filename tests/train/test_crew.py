"""Runs on several machines, which processes with addresses of the loopback stand for: any one of them may be lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from test_keeping import KEEP, WORKER, common, gone, no_keeper_left
from train_cases import same_state

from waypost.core.errors import CheckpointError, ConfigError
from waypost.keep.keeper import Keeper
from waypost.keep.reader import Checkpoint
from waypost.keep.snapshot import Snapshots
from waypost.keep.store import Store
from waypost.keep.wire import alive, read_record
from waypost.train import across, keeping
from waypost.train.across import Across
from waypost.train.crew import Crew
from waypost.train.keep_recipe import KeepRecipe, PeersRecipe
from waypost.train.parallel import World
from waypost.train.recipe import resolve
from waypost.train.run import train

if TYPE_CHECKING:
    from waypost.keep.machines import Found
    from waypost.train.crew import Share

__all__ = ["common", "no_keeper_left"]  # fixtures
pytest.importorskip("zfec")

HOSTS = ("127.0.0.2", "127.0.0.3")


def several(common: dict[str, Any], hosts: Sequence[str] = HOSTS, **changes: Any) -> dict[str, Any]:
    """A recipe for a rank on each of these machines."""
    peers = {"data": len(hosts) - 1, "parity": 1, "hosts": list(hosts)}
    return {**common, "steps": 6, "keep": {**KEEP, "peers": peers}, **changes}


def machines(folder: Path, tree: dict[str, Any], moment: str, at: int, count: int = len(HOSTS)) -> Any:
    """A process for each machine, as a launcher starts them: the exit codes, and everything that was said."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(tree))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0",
              "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder / "recipe.json"), str(folder / "run"), moment, str(at)],
            env={**os.environ, **common, "RANK": str(rank), "GROUP_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return SimpleNamespace(codes=[process.returncode for process in started], said="\n".join(said))


@pytest.fixture(scope="module")
def straight(common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without keepers, never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    done = machines(folder, several(common, keep={}), "never", 0)
    assert done.codes == [0] * 2, done.said
    return folder / "run"


def killed(folder: Path, tree: dict[str, Any]) -> Path:
    """A run whose trainers all die after step 4, and whose disk loses what it had."""
    done = machines(folder, tree, "machines", 4)
    assert done.codes == [-signal.SIGKILL] * 2, done.said
    assert "on each of 2 machines; any 1 of them may be lost" in done.said
    run = folder / "run"
    for name in ("step-00000003", "latest"):
        assert (run / name).exists()
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    return run


def kill(run: Path, host: str) -> None:
    os.kill(read_record(run / "keepers" / host)["pid"], signal.SIGKILL)
    gone(run / "keepers" / host)


@pytest.mark.faults
def test_all_trainers_die_and_the_keepers_hand_on(common: dict[str, Any], straight: Path, tmp_path: Path) -> None:
    tree = several(common)
    run = killed(tmp_path, tree)
    again = machines(tmp_path, tree, "never", 0)
    assert again.codes == [0] * 2, again.said
    assert "resuming at step 4, from the keeper's memory" in again.said
    assert Store(run).steps() == [6], "the same keepers go on with what they hold: nothing had to go to disk first"
    same_state(run, straight)
    assert not any(alive(run / "keepers" / host) for host in HOSTS)


def test_a_machine_is_lost_and_another_takes_its_place(common: dict[str, Any], straight: Path, tmp_path: Path) -> None:
    """Its address is another, and so is the order; the state goes to disk before the old keepers end."""
    run = killed(tmp_path, several(common))
    kill(run, HOSTS[1])
    now = ("127.0.0.5", HOSTS[0])
    again = machines(tmp_path, several(common, now), "never", 0)
    assert again.codes == [0] * 2, again.said
    assert "1 of 2 machines' keepers are lost; step 4 comes from the others" in again.said
    assert "resuming at step 4, from the keeper's memory" in again.said
    assert Store(run).steps() == [4, 6]
    same_state(run, straight)
    assert not any(alive(run / "keepers" / host) for host in (*now, *HOSTS))


@pytest.mark.faults
def test_more_machines_lost_than_parity_and_the_disk_is_taken(common: dict[str, Any], straight: Path, tmp_path: Path) -> None:
    assert machines(tmp_path, several(common), "machines", 4).codes == [-signal.SIGKILL] * 2
    for host in HOSTS:
        kill(tmp_path / "run", host)
    again = machines(tmp_path, several(common), "never", 0)
    assert again.codes == [0] * 2, again.said
    assert again.said.count("does not answer") == 2
    assert "resuming at step 3, from disk" in again.said
    same_state(tmp_path / "run", straight)


@pytest.mark.faults
def test_a_keeper_dies_and_training_goes_on(common: dict[str, Any], straight: Path, tmp_path: Path) -> None:
    done = machines(tmp_path, several(common), "keeper", 2)
    assert done.codes == [0] * 2, done.said
    assert "Training goes on, and no more snapshots are taken in memory" in done.said
    assert Store(tmp_path / "run").steps() == [3, 6]
    same_state(tmp_path / "run", straight)


@pytest.mark.faults
def test_one_machine_goes_on_with_what_several_held(common: dict[str, Any], tmp_path: Path) -> None:
    """Without keepers of its own: to disk first, then those of the machines end."""
    run = killed(tmp_path, several(common))
    train(several(common, keep={}), run)
    assert Store(run).steps() == [4, 6]
    assert not any(alive(run / "keepers" / host) for host in HOSTS)


@pytest.mark.faults
def test_a_run_that_is_over_by_its_new_recipe_is_on_disk_before_the_keepers_end(common: dict[str, Any], tmp_path: Path) -> None:
    run = killed(tmp_path, several(common))
    again = machines(tmp_path, several(common, steps=4), "never", 0)
    assert again.codes == [0] * 2, again.said
    assert "complete already" in again.said
    assert Store(run).steps() == [4]
    assert not any(alive(run / "keepers" / host) for host in HOSTS)


def test_nothing_is_left_to_train_and_what_the_machines_held_is_on_disk_before_they_end(
    common: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same machines too, which have no disk of their own; and none is started for that."""
    folder, elsewhere, ended = tmp_path / "run", tmp_path / "elsewhere", []
    tree = {**common, "steps": 2, "keep": {}}
    train(tree, folder)
    (folder / "step-00000002").rename(elsewhere)  # stands for what the machines hold
    (folder / "latest").unlink()

    def newest(self: Across, store: Store) -> Any:
        self.found, self.metrics = cast("Found", object()), {"loss": 3.5}
        return Checkpoint(elsewhere)

    def connect(self: Across, entries: Any) -> None:
        self.share = cast("Share", SimpleNamespace(kept=True, agreed={"addresses": []}))

    monkeypatch.setattr(Across, "newest", newest)
    monkeypatch.setattr(Across, "connect", connect)
    monkeypatch.setattr(keeping, "end_across", lambda folder: ended.append(Store(folder).steps()))
    assert train(tree, folder).complete
    assert ended == [[2]]
    same_state(folder / "step-00000002", elsewhere)
    written = Checkpoint(folder / "step-00000002").manifest
    assert written is not None
    assert written.metrics == {"loss": 3.5}


def test_keepers_stay_while_a_run_trains_on_without_snapshots(common: dict[str, Any], tmp_path: Path) -> None:
    """They would end after keep.idle_minutes without a trainer, with the last step that all machines hold."""
    kept = keeping.Keeping(resolve({**common, "keep": {}}), tmp_path, Store(tmp_path), World())
    kept.across.in_step = lambda keeper: False  # type: ignore[method-assign]  # and `share` is None: one cannot go on
    Keeper.start(tmp_path, 60.0).close()
    kept.keeper = Keeper(tmp_path)
    kept.snapshots = Snapshots(kept.keeper)
    assert not kept._take_in_step({})
    assert kept.snapshots is None
    assert kept.keeper is not None
    assert kept.keeper.call("status")["alone"] is None
    kept.close()


class Held:
    """What a keeper of another machine answers."""

    def __init__(self, number: int, slots: int) -> None:
        self.address, self.slots = (HOSTS[number], 7), slots

    def call(self, name: str, **fields: Any) -> dict[str, Any]:
        return {"holdings": {"slots": self.slots}, "part": {"specs": []}}[name]


def test_keepers_go_on_with_what_they_hold_if_they_keep_as_many_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another keep.copies they take new memory, which is empty."""
    world: Any = SimpleNamespace(size=2, rank=0, gather=lambda value: ["0", "1"])
    for name, value in {"LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    peers = PeersRecipe(data=1, parity=1, hosts=list(HOSTS))
    for copies, slots, kept in [(2, (2, 2), True), (3, (3, 3), True), (3, (2, 2), False), (2, (2, 3), False)]:
        crew = Crew.of(KeepRecipe(memory="on", peers=peers, copies=copies), tmp_path, world)
        assert crew is not None
        keepers = {number: Held(number, count) for number, count in enumerate(slots)}
        found: Any = SimpleNamespace(lost=0, grid=SimpleNamespace(code=crew.code), whole=keepers, step=1)
        assert crew._kept(found, [(host, 7) for host in HOSTS], [[], []]) == kept


def test_a_keeper_that_ends_while_it_is_looked_for_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in HOSTS:
        (tmp_path / "keepers" / host).mkdir(parents=True)
        (tmp_path / "keepers" / host / "keeper.json").write_text(json.dumps({"network": [host, 7]}))
    read = across.read_record

    def just_gone(home: Path) -> dict[str, Any]:
        if home.name == HOSTS[0]:
            (home / "keeper.json").unlink()
        return read(home)

    monkeypatch.setattr(across, "read_record", just_gone)
    assert across.addresses_of(tmp_path) == [(HOSTS[1], 7)]


def test_a_rank_that_finds_no_way_to_the_keepers_stops_the_others_too(
    common: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait for it until the deadline."""

    def find(*_: Any) -> None:
        raise CheckpointError("this rank alone cannot")

    told: list[Any] = []
    world = World()
    monkeypatch.setattr(across, "find_across", find)
    monkeypatch.setattr(world, "gather", lambda value, what="": told.append(value) or [value])
    with pytest.raises(CheckpointError, match="this rank alone cannot"):
        Across(resolve({**common, "keep": {}}), tmp_path, world).newest(Store(tmp_path))
    assert told == [(None, ("CheckpointError", "this rank alone cannot"))]


@pytest.mark.parametrize(
    ("peers", "message"),
    [
        (None, r"on 2 machines, whose keepers must find each other: .* \{data: 1, parity: 1, hosts:"),
        (PeersRecipe(data=2, parity=1), "on 2 machines, whose keepers must find each other"),
        (PeersRecipe(data=2, parity=1, hosts=["a", "b", "c"]), r"2 \+ 1 keepers on 3 hosts, and this run is on 2 machines"),
    ],
)
def test_the_recipe_s_machines_are_those_that_were_started(
    peers: PeersRecipe | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world: Any = SimpleNamespace(size=4, rank=0, gather=lambda value: ["0", "0", "1", "1"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=message):
        Crew.of(KeepRecipe(memory="on", peers=peers), tmp_path, world)
    assert Crew.of(KeepRecipe(), tmp_path, world) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Crew.of(KeepRecipe(memory="on"), tmp_path, world) is None
    with pytest.raises(ConfigError, match=r"names 2 machines, and all 4 ranks are on one"):
        Crew.of(KeepRecipe(memory="on", peers=PeersRecipe(data=1, parity=1, hosts=["a", "b"])), tmp_path, world)
    with pytest.raises(ConfigError, match=r"one address for each of 2 \+ 1 keepers, none twice"):
        PeersRecipe(hosts=["a", "a", "b"])
