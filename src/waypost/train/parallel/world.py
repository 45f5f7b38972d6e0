"""The processes of one run, as the launcher (torchrun) started them; one process needs no launcher."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from waypost.core.errors import ConfigError
from waypost.keep.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Share:
    """What a rank computes of a step's rows. Ranks with the same `index` compute the same rows."""

    index: int = 0
    count: int = 1
    """Into how many shares the rows of a micro-batch are cut."""
    speaks: bool = True
    """Whether this rank is the first of those with its index: what is added up over rows takes its numbers alone."""
    meets: bool = False
    """Whether ranks with other rows meet this one inside layers, so that all of them must call a layer equally often."""


class World(Ranks):
    """All ranks of the run. Every collective is called by all of them, in the same order."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}

    @staticmethod
    def join() -> World:
        """Joins the process group that torchrun describes, if it started more than one process."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        return World()

    def leave(self) -> None:
        """Ends the process group, once all ranks are here: one that left early would break a connection still in use.

        After success alone; a rank that failed exits, and its launcher stops the others. When this returns, the
        interpreter may end: no thread of the group holds a tensor any more.
        """
        if self.running:
            dist.barrier()
            dist.destroy_process_group()
            _threads_at_rest()

    def mesh(self, **axes: int) -> DeviceMesh:
        """All ranks, laid out on axes of these lengths, the last one fastest; without any, on one. Made once each."""
        from torch.distributed.device_mesh import init_device_mesh

        key = tuple(axes.items()) or (("shard", self.size),)
        if key not in self._meshes:
            names, lengths = zip(*key, strict=True)
            self._meshes[key] = init_device_mesh("cpu", lengths, mesh_dim_names=names)
        return self._meshes[key]

    def groups(self, what: str, ranks: int | None) -> int:
        """The length of an axis of `ranks` ranks, all of them by default; ConfigError where the world does not divide."""
        length = self.size if ranks is None else ranks
        if length < 1 or self.size % length:
            fits = ", ".join(str(n) for n in range(1, self.size + 1) if self.size % n == 0)
            raise ConfigError(f"{what}.ranks={length}: {self.size} rank(s) were started, so it must be one of {fits}")
        return length

    def sum(self, *values: float) -> list[float]:
        """Each value added over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]


def _threads_at_rest(within_s: float = 60.0) -> None:
    """Waits until gloo's threads have let go of what they worked on; after `within_s` seconds they are left to it.

    A thread of gloo says that a collective is done, and then lets go of its tensors, for which it needs the interpreter's
    lock. One that the system did not run in between and that asks for the lock while the interpreter is ending is unwound
    through C++ that must not be, and the rank that had done all its work aborts (seen under load; PyTorch's issue 190489).
    Destroying the group does not end its threads as long as a mesh, a sharded module or a tensor knows it.
    """
    tasks = Path("/proc/self/task")
    asleep, deadline = 0, time.monotonic() + within_s
    while tasks.is_dir() and asleep < 10 and time.monotonic() < deadline:
        time.sleep(0.002)  # without the lock: who waits for it has many of Python's turns (5 ms) to get it, and is seen running
        asleep = asleep + 1 if all(_state(task) in ("S", "") for task in tasks.iterdir()) else 0


def _state(task: Path) -> str:
    """The letter by which Linux names what a thread of gloo is doing (S: sleeps); "" for any other thread."""
    try:
        name, state = (task / "stat").read_text(errors="replace").split("(", 1)[1].rsplit(") ", 1)
    except OSError:  # it has ended
        return ""
    return state[0] if name.startswith("pt_gloo") else ""
