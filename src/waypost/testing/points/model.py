"""Token mixers and channel mixers: one module on a few rows, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from waypost.core.batch import Batch
from waypost.kernels import select
from waypost.measure.live import LiveBytes
from waypost.model.ffn import FFNS
from waypost.model.mixer import MIXERS
from waypost.model.rows import Rows
from waypost.testing.contracts import Size
from waypost.testing.frozen import same_bits
from waypost.testing.points._shared import Stateless, filled, gradients, noise, token_batch
from waypost.testing.tiny import tiny_config

LENGTHS: dict[Size, tuple[int, ...]] = {"some": (7, 20), "one": (1,)}


class Mixers(Stateless):
    """(T, C) -> (T, C). Causal, each sequence alone; bits of a row do not depend on the batch. Dtypes are kept."""

    table = MIXERS
    sizes: tuple[Size, ...] = ("some", "one")

    def inputs(self, size: Size) -> Any:
        batch = token_batch(*LENGTHS[size])
        return {"batch": batch, "h": noise(batch.num_tokens, tiny_config().hidden_size)}

    def run(self, technique: Any, inputs: Any) -> Any:
        module = filled(technique.build(tiny_config(), 0))
        return forward_backward(module, inputs["h"], inputs["batch"])

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        h, batch = inputs["h"], inputs["batch"]
        check_rows(technique, h, batch, result["out"])
        module = filled(technique.build(tiny_config(), 0))
        first = int(batch.starts[1])
        for length in (first, max(1, first // 2)):
            part = forward(module, h[:length], Batch.of([batch.tokens[:length]]))
            assert same_bits(part, result["out"][:length]), f"the first {length} rows depend on what comes after them"
        check_kept(technique)


class Ffns(Mixers):
    """(T, C) -> (T, C). Each row alone: its bits do not depend on the others. No rows give no rows."""

    table = FFNS
    sizes: tuple[Size, ...] = ("some", "one", "none")

    def inputs(self, size: Size) -> Any:
        if size != "none":
            return super().inputs(size)
        return {"batch": token_batch(), "h": noise(0, tiny_config().hidden_size)}

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        h, batch = inputs["h"], inputs["batch"]
        check_rows(technique, h, batch, result["out"])
        module = filled(technique.build(tiny_config(), 0))
        for row in range(0, len(h), 5):
            alone = forward(module, h[row : row + 1], Batch.of([batch.tokens[row : row + 1]]))
            assert same_bits(alone, result["out"][row : row + 1]), f"row {row} depends on other rows"
        check_kept(technique)


def forward(module: nn.Module, h: Tensor, batch: Batch) -> Tensor:
    """h (T, C) through one mixer or feed-forward over `batch`, nothing cached, on the specification's operators."""
    with torch.no_grad():
        out: Tensor = module(h, Rows(batch, select(kernel="naive")))
    return out


def forward_backward(module: nn.Module, h: Tensor, batch: Batch) -> dict[str, Any]:
    """The output, and the gradients of a fixed functional of it."""
    leaf = h.clone().requires_grad_()
    out = module(leaf, Rows(batch, select(kernel="naive")))
    (out * noise(*out.shape, name="functional")).sum().backward()
    return {"out": out.detach(), "grad_h": leaf.grad, **gradients(module)}


def check_kept(technique: Any) -> None:
    """Asserts that the numbers that `keeps` tells are those that are counted behind a forward pass, its output left out."""
    assert hasattr(technique, "keeps"), "there is no keeps(hidden_size) -> Kept, which plans of memory add up"
    ops, batch, config = select(kernel="auto"), token_batch(256), tiny_config()
    if ops.name != "cpu":  # the specification's operators keep more
        return
    module, h, rows = filled(technique.build(config, 0)), noise(256, config.hidden_size).requires_grad_(), Rows(batch, ops)
    module(h, rows)  # what the rows remember of positions is the batch's, not the part's
    with LiveBytes([h, *module.parameters()]) as live:
        before = live.now
        out = module(h, rows)
        counted = live.now - before - out.nbytes
    told = technique.keeps(config.hidden_size)
    want = 4 * 256 * (told.narrow + told.wide)
    assert abs(counted / want - 1) <= 0.1, f"keeps: {want:.0f} bytes of 256 tokens in float32, counted {counted}"


def check_rows(technique: Any, h: Tensor, batch: Batch, out: Tensor) -> None:
    """Asserts shape and dtype, in float32 and in bfloat16, and that the function is about the same in both."""
    assert (out.shape, out.dtype) == (h.shape, h.dtype), f"(T, C) float32 became {tuple(out.shape)} {out.dtype}"
    module = filled(technique.build(tiny_config(), 0)).to(torch.bfloat16)
    half = forward(module, h.bfloat16(), batch)
    assert (half.shape, half.dtype) == (h.shape, torch.bfloat16), f"bfloat16 became {tuple(half.shape)} {half.dtype}"
    wide = forward(filled(technique.build(tiny_config(), 0)).double(), h.double(), batch)
    assert wide.dtype == torch.float64
    if out.numel():  # float32 against float64: some tens of roundings of the largest value
        assert float((wide - out).abs().max()) <= 1e-5 * max(1.0, float(wide.abs().max())), "float64 gives another function"
