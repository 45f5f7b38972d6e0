"""Faults injected at every boundary, and what holds after each: `python -m waypost.testing.faults` writes docs/faults.md."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """One kind of fault. `play(folder, every)` injects it at every `every`-th place (1: at all), in an empty folder, and
    returns at how many; it raises AssertionError where the promise did not hold."""

    what: str
    promise: str
    code: str
    """module:function below this package."""

    def play(self, folder: Path, every: int = 1) -> int:
        """Injects the fault at every `every`-th place it can strike, in `folder`; the number of places tried. AssertionError
        where a promise broke."""
        module, _, name = self.code.partition(":")
        call: Callable[[Path, int], int] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return call(folder, every)


WHOLE = "every step that was complete is complete, `latest` names one of them, the next save goes through and clears the rest"

FAULTS: Mapping[str, Fault] = {
    "killed": Fault(
        "SIGKILL before every write, fsync, rename and removal of a save, a write half done", WHOLE, "saving:killed"
    ),
    "disk full": Fault("ENOSPC from every call of a save", f"CapacityError; {WHOLE}", "saving:disk_full"),
    "permission denied": Fault("EACCES from every call of a save", f"CheckpointError; {WHOLE}", "saving:permission_denied"),
    "input/output error": Fault("EIO from every call of a save", f"CheckpointError; {WHOLE}", "saving:io_error"),
    "slow disk": Fault("a disk that takes 700 bytes at a time, late", "the same bytes", "saving:slow_disk"),
    "clock jumps": Fault(
        "the clock jumps by decades between saves, files are dated at random",
        "the newest step is the latest, retention removes the oldest",
        "saving:clock_jumps",
    ),
    "two savers": Fault(
        "a process saves into a run in which another is in the middle of a save",
        "it is told so at once and changes nothing; the first one finishes",
        "saving:two_savers",
    ),
    "transform killed": Fault(
        "SIGKILL before every call of a transform's writer",
        "the same command goes on after the last tensor that was durable; the same bytes",
        "saving:stream_killed",
    ),
    "upload interrupted": Fault(
        "the end of the process before or after any object of an upload to an object store",
        "every step that was complete is complete, half of one is never seen, gc removes it, the next save goes through",
        "uploads:interrupted",
    ),
    "truncated": Fault("any one file cut short", "refused, by name; the step before is whole", "damage:truncated"),
    "deleted": Fault("any one file gone", "refused, by name; the step before is whole", "damage:deleted"),
    "bit flipped": Fault("one bit of any one file", "refused, by name; the step before is whole", "damage:flipped"),
    "lying latest": Fault(
        "`latest` empty, torn, or naming what is not there",
        "an error that lists the steps there are; none is chosen silently",
        "damage:lying_latest",
    ),
    "left-overs": Fault(
        "torn folders of saves, removals and replacements beside the steps",
        "never opened; gc removes them and nothing else",
        "damage:left_overs",
    ),
    "rank dies": Fault(
        "SIGKILL of one of three ranks in the middle of a save",
        "the others raise within seconds and name it; the steps before are whole",
        "group:rank_dies",
    ),
    "rank hangs": Fault(
        "SIGSTOP of one of three ranks in the middle of a save",
        "the others raise at the deadline and name it; the steps before are whole",
        "group:rank_hangs",
    ),
    "other number of ranks": Fault(
        "saved on W processes, loaded on W', for all W, W' in 1..4, uneven and empty shards",
        "the same bytes from every W; every rank's state equal to the bit",
        "group:matrix",
    ),
    "trainer killed": Fault(
        "SIGKILL of the trainer before every message to its keeper and every copy, from the first word to the third snapshot",
        "the keeper holds the last announced snapshot or the next, to the bit; a successor goes on from it",
        "keepers:trainer_killed",
    ),
    "keeper killed": Fault(
        "SIGKILL of the keeper before every call with which it writes two snapshots to disk, a write half done",
        "the trainer sees it at its next call; every step that was complete is complete; a new keeper takes over",
        "keepers:keeper_killed",
    ),
    "both killed": Fault(
        "the trainer gone, and SIGKILL of the keeper before every call with which it brings the newest snapshot to disk",
        "every step that was complete is complete, and the run goes on from the latest",
        "keepers:both_killed",
    ),
    "out of memory": Fault(
        "SIGKILL of a trainer that takes much memory; it stands for the system's out-of-memory killer",
        "the system rates the trainer above the keeper; the keeper lives and brings its snapshot to disk",
        "keepers:out_of_memory",
    ),
    "memory corrupted": Fault(
        "one bit of a snapshot in the keeper's memory, in every tensor",
        "seen before it is handed on and before it is written to disk; the next best is taken",
        "keepers:memory_corrupted",
    ),
    "peers lost": Fault(
        "SIGKILL of the keeper and of every subset of up to three of its 2 + 2 peers",
        "up to two lost: the newest spread snapshot comes back to the bit; three: refused, with how many are lost",
        "keepers:peers_lost",
    ),
    "machines lost": Fault(
        "the end of all trainers in the middle of a copy, and SIGKILL of every subset of up to three of the keepers of four "
        "machines with parity for two, over TCP",
        "up to two lost: the newest step that all machines held comes back to the bit; three: none is taken",
        "machines:lost",
    ),
    "machines corrupted": Fault(
        "one bit of every machine's share in its keeper's memory in turn, then every byte that every subset of up to three of "
        "the keepers of four machines hold, with parity for two",
        "up to two damaged: made up for by the others; three: seen before it is used",
        "machines:corrupted",
    ),
    "copy interrupted": Fault(
        "the end of the process before or after any object of a copy from the disk to the remote level",
        "half of a copy is never seen, the next one goes through, and the way back gives the same state",
        "keepers:copy_interrupted",
    ),
    "two trainers": Fault(
        "a second trainer in the folder of a first, and in that of one that was killed",
        "refused, naming the first one's process; after a death, let in",
        "keepers:two_trainers",
    ),
}
"""Name -> fault, in the order of the table."""


def table(tried: Mapping[str, int]) -> str:
    """docs/faults.md, from the number of places at which each fault was injected."""
    rows = [f"| {name} | {f.what} | {tried[name]} | {f.promise} |" for name, f in FAULTS.items()]
    return "\n".join(
        [
            "# Faults",
            "",
            "What was done to checkpoints, and what held. Written by `make faults`, which injects each fault at every place",
            "and fails, writing nothing, where a promise does not hold; `make test` injects a sample. The state: weights in",
            "bfloat16, masters and two moments in float32, uneven and empty tensors. `tests/keep/test_damage.py` looks for",
            "damage at random bytes besides, `tests/train` proves that a killed run resumes to the bit.",
            "",
            "| fault | what is done | places | what holds |",
            "| --- | --- | ---: | --- |",
            *rows,
            "",
        ]
    )
