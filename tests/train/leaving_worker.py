"""Run by torchrun on two ranks: collectives, and the end, with gloo's threads run by the system only when nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from waypost.train.parallel import World

KEPT: list[object] = []
"""Alive until the interpreter ends, as sharded modules keep their group alive: destroying it does not end its threads."""


def main() -> None:
    world, core = World.join(), {min(os.sched_getaffinity(0))}
    group = world.mesh(shard=2).get_group()
    KEPT.append(group)
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), core)
        if (task / "comm").read_text().startswith("pt_gloo"):
            os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    for _ in range(20):
        ones = torch.ones(8)
        ones.note = "an attribute"  # type: ignore[attr-defined]  # which keeps the Python object as long as the tensor
        dist.all_reduce(ones, group=group)
    world.leave()


if __name__ == "__main__":
    main()
