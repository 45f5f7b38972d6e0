"""What a keeper answers to those of other machines, and to trainers that look for a state: reading, and the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from waypost.core.errors import CheckpointError
from waypost.keep.image import read_into
from waypost.keep.ledger import Slot
from waypost.keep.machines import Machines
from waypost.keep.vault import Vault

WAIT_S = 30.0
"""How long the snapshot of a step that is asked for may take to become whole."""

Answer = tuple[dict[str, Any], memoryview | None]


def _others(vault: Vault) -> Machines | None:
    return vault.peers if isinstance(vault.peers, Machines) else None


def holdings(vault: Vault) -> Answer:
    """Which share this is, of how many steps there is room for, and the steps of which it is whole, and its parity there."""
    with vault.changed:
        others = _others(vault)
        if others is None:
            return {"layout": None}, None
        told = {"layout": others.agreed["layout"], "index": others.index, "length": others.grid.length}
        steps = [slot.step for slot in vault.ledger.slots if slot.whole]
        return {**told, **vars(others.code), "slots": len(vault.fds), "steps": steps, "spread": sorted(others.held)}, None


def _slot(vault: Vault, step: int) -> Slot:
    """The whole snapshot of a step; waits while a trainer may still bring it."""
    vault.changed.wait_for(lambda: vault.ledger.whole(step) is not None or vault.clients == 0, WAIT_S)
    slot = vault.ledger.whole(step)
    if slot is None:
        why = "its trainer is gone" if vault.clients == 0 else f"nor within {WAIT_S:.0f} s"
        raise CheckpointError(f"no whole snapshot of step {step} here ({why})")
    return slot


def part(vault: Vault, step: int) -> Answer:
    """The table and the proofs of this machine's share."""
    with vault.changed:
        return {"specs": vault.table, "proofs": _slot(vault, step).proofs}, None


def facts(vault: Vault, step: int) -> Answer:
    """Everything of a step beside tensors."""
    with vault.changed:
        slot = _slot(vault, step)
        return {"step": step, **slot.facts}, None


def others(vault: Vault, step: int) -> Answer:
    """`part` of the other machines, as they answered when this one coded its parity."""
    with vault.changed:
        known = _others(vault)
        return {"parts": known.held[step][1] if known is not None and step in known.held else {}}, None


def piece(vault: Vault, step: int, kind: str, offset: int, size: int) -> Answer:
    """Bytes of this machine's share, with zeros behind its end, or of its parity."""
    if not 0 < size <= 1 << 30:
        raise CheckpointError(f"size={size}: from 1 byte to 1 GiB")
    out, known = memoryview(bytearray(size)), _others(vault)
    if kind == "parity":
        if known is None:
            raise CheckpointError("no parity here")
        known.read(step, offset, out)
    else:
        with vault.changed:
            fd, end = vault.fds[_slot(vault, step).index], vault.image.num_bytes if vault.image is not None else 0
        read_into(fd, offset, out[: max(0, end - offset)])
    return {"bytes": size}, out


def finish(vault: Vault) -> Answer:
    """Asks for the end."""
    vault.end()
    return {}, None


ANSWERS: Mapping[str, Callable[..., Answer]] = {
    "holdings": holdings, "part": part, "facts": facts, "others": others, "piece": piece, "finish": finish,
}  # fmt: skip
"""Call -> handler."""
