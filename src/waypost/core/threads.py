"""How long threads without work wait awake. To be said before PyTorch is imported."""

from __future__ import annotations

from collections.abc import MutableMapping


def wait_less(environment: MutableMapping[str, str]) -> None:
    """A thread of PyTorch that has nothing to do looks around for 15 ms before it sleeps and keeps others from its core
    meanwhile: beside a busy program, the thread that it waits for. From now on half a millisecond, for nothing between 0.05 and
    1 made a difference alone (docs/log.md); what is set stays."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "10000")
