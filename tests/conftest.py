"""What every test runs under: two threads, fresh memory full of NaN, hypothesis that does not time, signals that end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from waypost.testing.memory import poisoned

torch.set_num_threads(2)
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup, and every process that a test starts inherits it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    with poisoned():
        yield


SLOW_FIRST = ("train/test_keeping", "train/test_crew", "train/test_parallel", "train/test_levels", "keep/test_faults")
"""Files whose few tests start many processes: begun last, they would run alone where `make test` has two workers."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(item.path.as_posix().endswith(f"{name}.py") for name in SLOW_FIRST))
