"""What a forward pass carries beside the hidden states: the batch, the operators, the keys and values."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from torch import Tensor, nn

from waypost.core.batch import Batch
from waypost.kernels.low_rank.factors import Factors
from waypost.kernels.ops import Ops, Pages
from waypost.model.position.rope import Rope, angles


class KvStore(Protocol):
    """Keeps keys and values of each layer and attends over them; serving has pages, training has none."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, rows: Rows) -> Tensor:
        """Stores k, v (T, G, D) of the rows for `layer`, then attends with q (T, H, D) -> (T, H, D)."""
        ...

    @property
    def pages(self) -> Pages | None:
        """What `attend` works on, where it is no more than storing and attending over pages; None where it is more."""
        ...


class FreshKv:
    """No cache: each sequence of the batch is whole, and attends to itself. Differentiable."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, rows: Rows) -> Tensor:
        return rows.ops.ragged_attention(q, k, v, rows.batch.starts, scale, window)

    @property
    def pages(self) -> Pages | None:
        return None


class RowAdapters(Protocol):
    """What the rows of a batch add to projections, each by an adapter of its own; serving has them, training has modules."""

    @property
    def which(self) -> Tensor:
        """(T,) int32: the adapter of each row, -1: none."""
        ...

    @property
    def key(self) -> Hashable:
        """Two with one key have the same `factors`."""
        ...

    def factors(self, linear: nn.Module) -> Sequence[Factors | None]:
        """What each adapter adds to `linear`; None: nothing."""
        ...

    def add(self, linears: Sequence[nn.Module], x: Tensor, out: Tensor, rows: Rows) -> Tensor:
        """out (T, N) of `linears`, side by side, over x (T, K), with what each row adds."""
        ...


class Rows:
    """One forward pass. Every module of the model is called as `module(x, rows)`."""

    def __init__(self, batch: Batch, ops: Ops, kv: KvStore | None = None, adapters: RowAdapters | None = None) -> None:
        self.batch, self.ops, self.adapters = batch, ops, adapters
        self.kv: KvStore = kv if kv is not None else FreshKv()
        self._angles: dict[tuple[Rope, int], tuple[Tensor, Tensor]] = {}

    def adapted(self, linears: Sequence[nn.Module], x: Tensor, out: Tensor) -> Tensor:
        """out (T, N) of `linears` over x, and what the rows' adapters add to it. Every projection passes its output here."""
        return out if self.adapters is None else self.adapters.add(linears, x, out, self)

    def angles(self, rope: Rope, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos, sin (T, D / 2) of the batch's positions; computed once a pass."""
        key = (rope, head_dim)
        if key not in self._angles:
            self._angles[key] = angles(rope, head_dim, self.batch.positions)
        return self._angles[key]
