"""Merging a LoRA adapter: its product is added to the weights, once and for good.

Source    Hu et al. 2021, LoRA, arXiv:2106.09685, sec. 4.1 ("no additional inference latency"); PEFT's merge_and_unload
Equation  W' = round(W + s B A),   s = alpha / r, with rslora alpha / sqrt(r)
Shapes    W (N, K), A (r, K), B (N, r)  ->  (N, K)
Acts on   each projection that the adapter changes; all other tensors are copied
Differs   arithmetic is float64, component by component, and is rounded once (PEFT's is in the weights' dtype)
Exact     B = 0 gives the weights back, bit for bit; in 16 bits the rounding of W' is a change that the adapter beside it has
          not: keep the adapter where that matters
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from waypost.core.config import PathText, technique
from waypost.core.errors import ConfigError, ShapeError
from waypost.core.state import TensorSpec
from waypost.keep.format import DTYPES
from waypost.transform.agreement import weight_names
from waypost.transform.expression import FLOATS, Expression, Part, Read, TileReader
from waypost.transform.plan import Plan, Services, Target

if TYPE_CHECKING:
    from torch import Tensor

    from waypost.keep.reader import Checkpoint
    from waypost.model.peft import LoraFile


@functools.lru_cache(maxsize=2)
def adapter_of(path: str) -> LoraFile:
    """The adapter of a folder, read once a process."""
    from waypost.model.peft import read

    return read(path)


@technique
class LowRankSum:
    """base + s B A of one projection of an adapter, in float64: components are added in their order."""

    base: Part
    adapter: PathText
    """The adapter's folder."""
    projection: str
    """What it changes, e.g. "model.layers.0.self_attn.q_proj"."""

    def spec(self, reader: TileReader) -> TensorSpec:
        base = self.base.spec(reader)
        a, b = adapter_of(self.adapter).pairs[self.projection]
        if base.dtype not in FLOATS or base.shape != (b.shape[0], a.shape[1]):
            changed = (b.shape[0], a.shape[1])
            raise ShapeError(
                f"{base.name}: {base.dtype} {base.shape}, and the adapter {self.adapter} changes {changed} of floats; give the "
                "model that it was trained with"
            )
        return TensorSpec(base.name, "F64", base.shape, base.role)

    def reads(self) -> Iterator[Read]:
        yield from self.base.reads()

    def rows(self, reader: TileReader, start: int, stop: int) -> Tensor:
        file = adapter_of(self.adapter)
        a, b = file.pairs[self.projection]
        change = b.new_zeros((stop - start, a.shape[1])).double()
        for column, row in zip(b[start:stop].double().t(), a.double(), strict=True):
            change += column[:, None] * row
        return self.base.rows(reader, start, stop).double() + file.scales[self.projection] * change


@technique
class LoraMerge:
    adapter: PathText | None = None
    """The adapter's folder, as PEFT writes it; null: the one that the source itself holds, where a run trained it."""

    def plan(self, sources: Sequence[Checkpoint], services: Services) -> Plan:
        if len(sources) != 1:
            raise ConfigError(f"lora: an adapter is merged into one model, {len(sources)} sources were given; name one")
        source = sources[0]
        where = str(source.path) if self.adapter is None else self.adapter
        file = adapter_of(where)
        names = weight_names(source)
        missing = [site for site in file.pairs if f"{site}.weight" not in names]
        if missing:
            raise ConfigError(f"lora: the adapter {file.path} changes {missing[0]}, which {source.path} has not")
        targets = []
        for name in names:
            spec, value = source.specs["weight", name], Read(source=0, tensor=name)
            site = name.removesuffix(".weight")
            changed: Expression = LowRankSum(base=value, adapter=where, projection=site) if site in file.pairs else value
            dtype = services.dtype if services.dtype is not None and spec.dtype in FLOATS else spec.dtype
            targets.append(Target(name=name, dtype=dtype, shape=list(spec.shape), value=changed))
        config = {} if services.dtype is None else dict.fromkeys(("dtype", "torch_dtype"), DTYPES[services.dtype][0])
        return Plan(
            sources=[str(source.path)], targets=targets, config=config, invariant="lossy", carry=services.carry,
            absorbs=[0] if self.adapter is None else [], notes={"adapter": str(file.path), "changed": len(file.pairs)},
        )  # fmt: skip
