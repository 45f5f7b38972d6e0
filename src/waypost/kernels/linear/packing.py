"""Weights packed by their addresses before PyTorch is imported, for the import takes a second or two and leaves a core idle.

    begin(executor, products, keep)   # returns at once; a thread of `executor` packs them one after another
    panels = take(weights)            # in linear.cpu.pack: the panels, if these very weights were begun; None: pack them now
    settle()                          # what nobody took is given back, and what was reserved and is left

Only a head start: what cannot be begun, or was not by the time it is asked for, is packed as it always was. Of this file,
`take` alone needs PyTorch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from ctypes import Structure, c_long, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING

from waypost.kernels import build, memory

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 48
"""Outputs that lie together in the packed layout."""

BATCH = 16
"""Products that are packed in one call: between two calls the thread waits for the interpreter, which is importing."""


@dataclass(frozen=True)
class Lying:
    """A weight (outputs, inputs) in bfloat16 as it lies in memory, row after row."""

    address: int
    outputs: int
    inputs: int


Product = tuple[Lying, ...]
"""Weights of one input, one below the other."""


class _Job(Structure):
    """Job of linear.cpp: a weight, and where its panels go."""

    _fields_ = [("weight", c_void_p), ("outputs", c_long), ("pairs", c_long), ("panels", c_void_p)]


@dataclass(frozen=True)
class _Begun:
    claim: memory.Claim
    batch: Future[None]
    keep: object
    """What the addresses belong to: while it is there, nothing else can lie at them."""


_lock = threading.Lock()
_begun: dict[Product, _Begun] = {}


def shape(product: Sequence[tuple[int, int]]) -> tuple[int, int, int, int]:
    """(panels, pairs, PANEL, 2): that of the panels of weights (outputs, inputs)."""
    return sum(-(-outputs // PANEL) for outputs, _ in product), -(-product[0][1] // 2), PANEL, 2


def fits(product: Sequence[tuple[int, int]]) -> bool:
    """Whether weights (outputs, inputs) are packed as they lie: all have one even number of inputs, and no panel would hold the
    end of one weight and the beginning of the next."""
    inputs = {each for _, each in product}
    return len(inputs) == 1 and not inputs.pop() % 2 and all(outputs % PANEL == 0 for outputs, _ in product[:-1])


def begin(executor: Executor, products: Sequence[Product], keep: object) -> None:
    """Packs `products` on `executor`, where kernels are there already, into memory that was reserved; `keep` is what their
    addresses belong to."""
    fitting = [product for product in products if fits([(w.outputs, w.inputs) for w in product])]
    with _lock:
        claim = memory.claim(sum(map(_bytes, fitting))) if build.built("pass", "bf16") else None
        if claim is None:
            return
        at = 0
        for first in range(0, len(fitting), BATCH):
            parts = {}
            for product in fitting[first : first + BATCH]:
                parts[product] = claim.part(at, _bytes(product))
                at += parts[product].num_bytes
            batch = executor.submit(_pack, [job for product, part in parts.items() for job in _jobs(product, part.address)])
            _begun.update({product: _Begun(part, batch, keep) for product, part in parts.items()})


def take(weights: Sequence[Tensor]) -> Tensor | None:
    """The panels of `weights` (N_i, K) in bfloat16 if they were begun ahead; then they are the caller's."""
    if not _begun or not all(w.is_contiguous() for w in weights):
        return None
    with _lock:
        begun = _begun.pop(tuple(Lying(w.data_ptr(), *w.shape) for w in weights), None)
    if begun is None:
        return None
    if not _done(begun.batch):
        begun.claim.give_back()
        return None
    import torch

    return begun.claim.tensor().view(torch.bfloat16).view(shape([(len(w), w.shape[1]) for w in weights]))


def settle() -> None:
    """Gives back what was begun and not taken, and what was reserved for more."""
    with _lock:
        left = list(_begun.values())
        _begun.clear()
    for begun in left:
        _done(begun.batch)
        begun.claim.give_back()
    memory.settle()


def _done(batch: Future[None]) -> bool:
    """Whether a batch was packed: one that nobody has begun never will be, one that is under way is waited for."""
    if batch.cancel():
        return False
    return batch.exception() is None


def _bytes(product: Product) -> int:
    panels, pairs, *_ = shape([(w.outputs, w.inputs) for w in product])
    return panels * pairs * PANEL * 4  # a multiple of memory.ALIGN_BYTES


def _jobs(product: Product, address: int) -> list[_Job]:
    jobs = []
    for weight in product:
        jobs.append(_Job(weight.address, weight.outputs, weight.inputs // 2, address))
        address += _bytes((weight,))
    return jobs


def _pack(jobs: Sequence[_Job]) -> None:
    function = build.library("pass", "bf16").waypost_pack_each_bf16
    function.argtypes, function.restype = [c_void_p, c_long], None
    function((_Job * len(jobs))(*jobs), len(jobs))
