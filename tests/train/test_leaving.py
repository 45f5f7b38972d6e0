"""How ranks end: a rank that had done all its work must not abort while the interpreter ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="only Linux has the idle scheduling class")
def test_a_rank_ends_well_though_gloos_threads_are_starved() -> None:
    """A thread of gloo lets go of a tensor after it has said that a collective is done. Here a busy process on the same core
    keeps it from running in between, as a loaded machine does now and then."""
    core = min(os.sched_getaffinity(0))
    busy = subprocess.Popen([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"])
    try:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*launch, str(Path(__file__).with_name("leaving_worker.py"))], capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}, check=False,
        )  # fmt: skip
    finally:
        busy.kill()
        busy.wait()
    assert done.returncode == 0, done.stderr[-4000:]
