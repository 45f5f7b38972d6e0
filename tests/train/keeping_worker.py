"""A training process that can be made to die at a chosen moment: `recipe.json out moment step`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from waypost.keep.image import Copy
from waypost.keep.keeper import Keeper
from waypost.keep.store import Store
from waypost.train import run
from waypost.train.across import Across
from waypost.train.parallel import World
from waypost.train.trainer import Trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def settle(out: Path, copied: bool) -> None:
    """Until the keeper has nothing to write and, with `copied`, every rank's copies, so that death comes when it should."""
    keeper = Keeper(out)
    while any((s["due"] if s["whole"] else copied and s["step"]) for s in keeper.call("status")["slots"]):
        time.sleep(0.005)
    keeper.close()


def whole(out: Path, step: int) -> None:
    """Until every rank has copied the steps before, so that there is room for `step` and it is not left out."""
    keeper = Keeper(out)
    while any(s["step"] and s["step"] < step and not s["whole"] for s in keeper.call("status")["slots"]):
        time.sleep(0.005)
    keeper.close()


def spread(out: Path, step: int) -> None:
    """Until the peers hold the step."""
    keeper = Keeper(out)
    while keeper.call("status")["spread"] < step:
        time.sleep(0.005)
    keeper.close()


def home_here(out: Path) -> Path:
    """Where this machine's keeper is, on one machine or on several."""
    hosts = json.loads(Path(sys.argv[1]).read_text()).get("keep", {}).get("peers", {}).get("hosts")
    return out if hosts is None else out / "keepers" / hosts[int(os.environ["GROUP_RANK"])]


def sent(out: Path) -> None:
    """Until the newest step on disk is at the remote level beside the run."""
    while Store(out).steps() != [3] or Store(out.parent / "there").steps() != [3]:
        time.sleep(0.005)


def arrange(moment: str, at: int, out: Path) -> None:
    """In the step after `at` steps: between two steps, in the middle of a copy, or while the keeper writes."""
    step, copy, begin = Trainer.step, Copy.run, Keeper.begin
    trainer: list[Trainer] = []
    copied: list[int] = []

    def stepping(self: Trainer) -> Any:
        trainer[:] = [self]
        if moment != "writing" and (moment == "machines" or World().rank == 0) and self.position.step > 0:
            if moment == "between" and self.position.step == at:
                settle(out, copied=True)
                die()
            if moment == "spread" and self.position.step == at:
                settle(out, copied=True)
                spread(out, at)
                die()
            if moment == "machines" and self.position.step == at:  # every rank, each with its own keeper
                spread(home_here(out), at)
                World().gather(None)
                die()
            if moment == "sent" and self.position.step == at:
                sent(out)
                die()
            if moment == "keeper" and self.position.step == at:
                settle(home_here(out), copied=True)
                os.kill(Keeper(home_here(out)).pid, signal.SIGKILL)
        return step(self)

    def copying(self: Copy) -> Any:
        copied.append(trainer[0].position.step)
        if moment == "copying" and copied.count(at) == 5:
            die()
        return copy(self)

    def beginning(self: Keeper, number: int, facts: Any, **how: bool) -> Any:
        if moment in ("copying", "between", "spread", "machines"):
            settle(home_here(out), copied=False)
        if moment == "between":
            whole(out, number)
        if moment == "writing" and number == at + 1:
            die()  # step `at` was due: its write has just begun
        return begin(self, number, facts, **how)

    def in_step(self: Across, keeper: Keeper | None) -> bool:
        while keeper is not None:  # so that no step is left out because the one before is still on its way
            said = keeper.call("status")
            if said["newest"] in (None, said["spread"]) and all(s["whole"] or s["step"] is None for s in said["slots"]):
                break
            time.sleep(0.005)
        return agreed(self, keeper)

    if moment == "machines":
        agreed = Across.in_step
        Across.in_step = in_step  # type: ignore[method-assign]
    Trainer.step = stepping  # type: ignore[method-assign]
    Copy.run = copying  # type: ignore[method-assign]
    Keeper.begin = beginning  # type: ignore[method-assign]


def main() -> None:
    recipe, out, moment, at = sys.argv[1:5]
    run.matmul_flops = lambda dtype: 1e11
    run.draw_curve = lambda folder: None
    if moment != "never":
        arrange(moment, int(at), Path(out))
    result = run.train(json.loads(Path(recipe).read_text()), out)
    assert result.complete
    assert Store(out).steps()[-1] == result.step
    World().leave()


if __name__ == "__main__":
    main()
