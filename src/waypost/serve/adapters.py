"""S-LoRA: requests with different adapters in one batch, their weights in the pages of the cache beside keys and values.

Source    Sheng et al. 2023, S-LoRA, arXiv:2311.03285, sec. 5 (unified paging, eq. in 4.1: x W + x A_i B_i apart, never merged)
Equation  y_t = W x_t + b + s_i B_i A_i x_t   for row t of a request with adapter i; rows without one keep y_t = W x_t + b
Shapes    x (T, K) -> (T, N);  A_i (r_i, K), B_i (N, r_i), ranks of any size in one batch
Acts on   every projection that an adapter changes, all rows of the batch in one product
Differs   a page is that of the cache (16 tokens, all layers) and holds segments of many vectors of A and B, where the paper's
          holds one vector of hidden size; weights come from memory when their request is admitted, not ahead of time
          (a copy inside one memory has nothing to overlap with); admission is the scheduler's own
Exact     a request's bits do not depend on its neighbours' adapters, nor on where its own lie or whether they were evicted;
          they are those of the trainer's forward pass with the adapter

Invariants: an adapter's pages are held once by every running sequence that uses it; when nobody does they stay, as cached
prefixes stay, until the pool needs one of them: then all of them are given up.

Shapes: T rows; r rank, K inputs, N outputs of a projection.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from waypost.core.errors import CapacityError, ConfigError, nearest
from waypost.kernels.low_rank.factors import LANES, Factors, gathered, wide
from waypost.model.adapter_sites import sites
from waypost.model.decoder import Decoder
from waypost.model.peft import LoraFile, read
from waypost.model.rows import Rows
from waypost.serve.adapter_places import Place, first_fit, layer_of, segments
from waypost.serve.pages import PagedKv, PagePool

_numbers = itertools.count(1)


@dataclass(eq=False)
class ServedAdapter:
    """One adapter that requests can name, and where its weights lie now."""

    name: str
    key: str
    """Unlike that of every adapter before it, in any engine: the prefix cache knows by it what it computes, and a model that
    several engines share where its weights lie."""
    file: LoraFile
    num_pages: int
    places: Mapping[str, Sequence[Place]]
    """Projection -> the segments of A, then of B, vector by vector."""
    store: AdapterStore = field(repr=False)
    times_settled: int = 0
    pages: list[int] = field(default_factory=list)
    """Empty: its weights are not in the cache."""
    factors: dict[str, Factors] = field(default_factory=dict, repr=False)

    @property
    def missing(self) -> int:
        """Pages that it needs before it can be used."""
        return 0 if self.pages else self.num_pages

    def settle(self) -> None:
        """Takes its pages, held once, and writes its weights into them."""
        self.store.settle(self)


class AdapterStore:
    """The adapters of one engine by name, and the pages that they lie in. `add`, `remove` and `find` may be called from any
    thread, the rest by whoever steps the engine."""

    def __init__(self, model: Decoder, kv: PagedKv, pool: PagePool) -> None:
        self._kv, self._pool, self._wide = kv, pool, wide(model.dtype)
        self._named: dict[str, ServedAdapter] = {}
        self._owners: dict[int, ServedAdapter] = {}
        self._sites: tuple[Decoder, dict[nn.Module, str]] = (model, {})
        self._shapes = {name: tuple(linear.weight.shape) for name, linear in sites(model).items()}
        self._others = pool.on_evict
        pool.on_evict = self._evict

    @property
    def names(self) -> list[str]:
        return list(self._named)

    def add(self, name: str, path: str | Path) -> ServedAdapter:
        """Lets requests name the adapter of `path` (a folder as PEFT writes it, or a checkpoint that holds one).

        ConfigError for a name in use, or an adapter of another model; CheckpointError for files that are damaged or not to be
        honoured; CapacityError where the cache is too small for it. Nothing changes then.
        """
        if name in self._named:
            raise ConfigError(f"there is an adapter '{name}' already; remove it first, or choose another name")
        file = read(path)
        for site, (a, b) in file.pairs.items():
            shape = self._shapes.get(site)
            if shape is None:
                raise ConfigError(f"{file.path}: changes {site}, which this model has not, or not for all rows (an expert)."
                                  f"{nearest(site, self._shapes)}")  # fmt: skip
            if shape != (b.shape[0], a.shape[1]):
                raise ConfigError(f"{file.path}: {site} is {b.shape[0]} x {a.shape[1]} there, {shape[0]} x {shape[1]} in this "
                                  "model; the adapter belongs to another one")  # fmt: skip
        places, num_pages = self._lay_out(file)
        if num_pages >= self._pool.total:
            raise CapacityError(f"{file.path}: its weights take {num_pages} pages, the cache has {self._pool.total} in all; "
                                "raise num_pages")  # fmt: skip
        adapter = ServedAdapter(name, f"{name}#{next(_numbers)}", file, num_pages, places, self)
        self._named[name] = adapter
        return adapter

    def remove(self, name: str) -> None:
        """Takes no more requests for `name`; those that were accepted end with it. ConfigError where there is none."""
        self.find(name)
        self._named.pop(name, None)

    def find(self, name: str) -> ServedAdapter:
        """The adapter `name`; ConfigError, with the nearest name, where there is none."""
        found = self._named.get(name)
        if found is None:
            raise ConfigError(f"there is no adapter '{name}'.{nearest(name, self._named)}")
        return found

    def room(self, name: str | None) -> tuple[int, ServedAdapter | None]:
        """Pages that an empty cache has for a request with the adapter `name`, and that adapter; None: with none."""
        adapter = None if name is None else self.find(name)
        return self._pool.total - (0 if adapter is None else adapter.num_pages), adapter

    def step(self, model: Decoder, users: Sequence[ServedAdapter | None], counts: Sequence[int]) -> StepAdapters | None:
        """What the rows of a batch add, sequence i having `counts[i]` rows and the adapter `users[i]`; None: nothing."""
        if self._sites[0] is not model or not self._sites[1]:
            self._sites = (model, {linear: name for name, linear in sites(model).items()})
        used = sorted({user for user in users if user is not None}, key=lambda user: user.key)
        index = torch.tensor([-1 if user is None else used.index(user) for user in users], dtype=torch.int32)
        return StepAdapters(self._sites[1], used, index.repeat_interleave(torch.tensor(counts)))

    # Pages

    def settle(self, adapter: ServedAdapter) -> None:
        """See ServedAdapter."""
        assert not adapter.pages, f"adapter {adapter.key} is there already"
        adapter.pages = self._pool.take(adapter.num_pages)
        adapter.times_settled += 1
        for page in adapter.pages:
            self._pool.keep(page)
            self._owners[page] = adapter
        for site, pair in adapter.file.pairs.items():
            adapter.factors[site] = self._write(adapter, site, pair)

    def _write(self, adapter: ServedAdapter, site: str, pair: tuple[Tensor, Tensor]) -> Factors:
        layer, size = layer_of(site), self._wide.itemsize
        width, halves = self._width(layer), (self._kv.k_pages[layer], self._kv.v_pages[layer])
        step = halves[0].stride(0) * halves[0].itemsize
        where = iter(adapter.places[site])
        sides: list[list[int]] = []
        for vectors in (pair[0].to(self._wide), pair[1].t().to(self._wide)):
            vectors = vectors.contiguous()
            length, addresses = vectors.shape[1], []
            for row in range(len(vectors)):
                for begin in range(0, length, width):
                    half, offset = next(where)
                    address = halves[half % 2].data_ptr() + adapter.pages[half // 2] * step + offset * size
                    source = vectors.data_ptr() + (row * length + begin) * size
                    ctypes.memmove(address, source, min(width, length - begin) * size)
                    addresses.append(address)
            sides.append(addresses)
        a, b = sides
        inputs, outputs, dtype = pair[0].shape[1], pair[1].shape[0], self._wide

        def dense() -> tuple[Tensor, Tensor]:
            return gathered(a, width, inputs, dtype), gathered(b, width, outputs, dtype)

        return Factors(len(pair[0]), width, adapter.file.scales[site], a, b, dense)

    def _evict(self, page: int) -> None:
        adapter = self._owners.get(page)
        if adapter is None:
            self._others(page)
            return
        pages, adapter.pages = adapter.pages, []
        adapter.factors.clear()
        for each in pages:
            del self._owners[each]
            if each != page:
                self._pool.forget(each)

    def _width(self, layer: int) -> int:
        """Elements of the longest segment: what half a page of `layer` holds, in whole lanes."""
        half = self._kv.k_pages[layer]
        return half[0].nbytes // self._wide.itemsize // LANES * LANES

    def _lay_out(self, file: LoraFile) -> tuple[dict[str, list[Place]], int]:
        """Where each segment lies, and the pages that this takes: layers lie above each other in the same pages."""
        places: dict[str, list[Place]] = {}
        most = 0
        for layer in sorted({layer_of(site) for site in file.pairs}):
            here = [site for site in file.pairs if layer_of(site) == layer]
            width = self._width(layer)
            if not width:
                raise CapacityError(
                    f"{file.path}: half a page of layer {layer} holds fewer than {LANES} elements of an adapter"
                )
            lengths = {site: list(segments(file.pairs[site], width)) for site in here}
            found, halves = first_fit([n for site in here for n in lengths[site]], width)
            rest = iter(found)
            places |= {site: [next(rest) for _ in lengths[site]] for site in here}
            most = max(most, -(-halves // 2))
        return places, most


class StepAdapters:
    """The adapters of one forward pass (model/rows.py): `which` (T,) int32 says whose each row is, -1 nobody's."""

    def __init__(self, names: Mapping[nn.Module, str], used: Sequence[ServedAdapter], which: Tensor) -> None:
        self._names, self._used, self.which = names, used, which
        self._renumbered: dict[tuple[bool, ...], Tensor] = {}

    @property
    def key(self) -> tuple[tuple[str, int], ...]:
        """The adapters, and where they lie: an adapter that comes back to the cache lies elsewhere."""
        return tuple((user.key, user.times_settled) for user in self._used)

    def factors(self, linear: nn.Module) -> list[Factors | None]:
        """What each adapter adds to `linear`; None: nothing."""
        name = self._names.get(linear, "")
        return [user.factors.get(name) for user in self._used]

    def add(self, linears: Sequence[nn.Module], x: Tensor, out: Tensor, rows: Rows) -> Tensor:
        """out (T, N) of `linears`, side by side, over x (T, K) -> with what each row's adapter adds."""
        found = [self.factors(linear) for linear in linears]
        if not any(each is not None for part in found for each in part):
            return out
        parts = out.split([linear.get_parameter("weight").shape[0] for linear in linears], dim=1)
        done = [self._part(x, part, factors, rows) for part, factors in zip(parts, found, strict=True)]
        return done[0] if len(done) == 1 else torch.cat(done, dim=1)

    def _part(self, x: Tensor, y: Tensor, factors: Sequence[Factors | None], rows: Rows) -> Tensor:
        has = tuple(each is not None for each in factors)
        if not any(has):
            return y
        if has not in self._renumbered:
            number = torch.tensor([sum(has[:i]) if has[i] else -1 for i in range(len(has))] + [-1], dtype=torch.int32)
            self._renumbered[has] = number[self.which.long()]  # -1 takes the last, which is -1
        return rows.ops.low_rank(x, y, self._renumbered[has], [each for each in factors if each is not None])
