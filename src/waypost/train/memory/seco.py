"""seco: exact gradients, a chunk of tokens at a time through all layers, over keys and values that a first pass stored.

Source    Li et al. 2025, Training Long-Context LLMs Efficiently via Chunk-wise Optimization, arXiv:2505.16710, sec. 4, alg. 1
Equation  m_i = keys and values of chunk i, i ascending, no activation kept; then, i descending: (J_i, m_i) = f(x_i; m_1 ..
          m_i-1) again, and backward of J_i with dm_i as later chunks left it, which adds to dW and to dm_1 .. dm_i-1
Shapes    a batch of T tokens -> sums of the objective, detached
Acts on   all layers at once; chunks are cut through documents wherever they fall, and see their own document's keys alone
Differs   the head is not run twice: all rows' last hidden states are kept, and their gradient is there before the first
          chunk goes backward. Gradients of keys and weights are added in float32. Layers sharded by fsdp are gathered all
          together, once a pass, and their gradients reduced once: a rank holds the whole model meanwhile. SpaCO (sec. 5),
          which leaves out chunks at random, is not here: this contract promises plain's gradient
Exact     StreamBP's bits for the same chunk_tokens; hidden states and log-probabilities have plain's (exact numerics), and
          where T <= chunk_tokens all has; beyond, 1e-5 of a gradient's largest entry in float32, 3e-2 in bfloat16
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from waypost.core.batch import Batch
from waypost.core.config import technique
from waypost.core.errors import ConfigError
from waypost.model.decoder import Decoder
from waypost.model.head import logits_of_at_most
from waypost.model.rows import Rows
from waypost.train.memory._chunks import Chunk, PrefixKv, added, chunks_of, rounded, weights_of
from waypost.train.memory._held import Held, Sizes
from waypost.train.memory.plain import Plain
from waypost.train.objectives import Objective

Forward = Callable[[Tensor, Rows], Tensor]


@dataclass
class _Through:
    """All layers in chunks. `own` are their forwards, on the rows of one chunk."""

    layers: list[nn.Module]
    own: list[Forward]
    chunk_tokens: int

    def __call__(self, h: Tensor, rows: Rows) -> Tensor:
        weights = [weights_of(layer) for layer in self.layers]
        out: Tensor = _Seco.apply(h, self, chunks_of(rows, self.chunk_tokens), weights, *itertools.chain(*weights))
        return out

    def forward(self, h: Tensor, chunks: list[Chunk]) -> tuple[Tensor, list[PrefixKv]]:
        keys, out = [PrefixKv(h.shape[0]) for _ in self.own], torch.empty_like(h)
        for chunk in chunks:
            part = h[chunk.rows]
            for own, held in zip(self.own, keys, strict=True):
                with torch.enable_grad():  # as plain's forward has it, for whoever watches modules; dropped layer by layer
                    part = own(part.detach(), chunk.through(held)).detach()
            out[chunk.rows] = part
        return out, keys

    def backward(
        self, h: Tensor, chunks: list[Chunk], keys: list[PrefixKv], weights: list[list[Tensor]], grad: Tensor
    ) -> tuple[Tensor, list[Any]]:
        grad_h = torch.empty_like(h)
        sums: list[list[Tensor | None]] = [[None] * len(learned) for learned in weights]
        for chunk in reversed(chunks):
            graphs, out = [], h[chunk.rows]
            for own, held in zip(self.own, keys, strict=True):
                part = out.detach().requires_grad_()
                with torch.enable_grad():
                    out = own(part, chunk.through(held))
                graphs.append((part, out))
            found = grad[chunk.rows]
            for index, learned in reversed(list(enumerate(weights))):  # a layer at a time: its graph and gradients go at once
                part, out = graphs.pop()
                found, *parts = torch.autograd.grad(out, [part, *learned], found, allow_unused=True)
                sums[index] = [added(total, g, alone=len(chunks) == 1) for total, g in zip(sums[index], parts, strict=True)]
            grad_h[chunk.rows] = found
        return grad_h, [g for total, learned in zip(sums, weights, strict=True) for g in rounded(total, learned)]


class _Seco(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, through: _Through, chunks: list[Chunk], weights: list[list[Tensor]], *_: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        out, ctx.keys = through.forward(h, chunks)
        ctx.through, ctx.chunks, ctx.weights = through, chunks, weights
        return out

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        grad_h, grads = ctx.through.backward(h, ctx.chunks, ctx.keys, ctx.weights, grad[0])
        return grad_h, None, None, None, *grads


@contextmanager
def chunked(model: Decoder, chunk_tokens: int) -> Iterator[None]:
    """While open, the layers run in chunks, all of them a chunk. Each layer is called once, around those behind it and the
    work: what shards layers gathers all of them for the pass, and reduces each one's gradient once."""
    layers: list[nn.Module] = list(model.model.layers)
    work = _Through(layers, [layer.forward for layer in layers], chunk_tokens)
    inner: list[Forward] = [*(layer.__call__ for layer in layers[1:]), work]
    for layer, call in zip(layers, inner, strict=True):
        layer.forward = call
    model.run = lambda h, _, rows: layers[0](h, rows)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.run
        for layer in layers:
            del layer.forward  # the class's own method shows again


@technique
class Seco:
    chunk_tokens: int = 512
    """Tokens whose activations of all layers, or whose logits, are held at once."""

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ConfigError(f"Seco.chunk_tokens={self.chunk_tokens}: must be at least 1; 512 is a good start")

    def pieces(self, tokens: int) -> int:
        return -(-tokens // self.chunk_tokens)

    def holds(self, layer: Sizes, tokens: int, index: int) -> Held:
        chunk, keys = min(tokens, self.chunk_tokens), tokens * layer.pairs
        # as a chunk reads them, with their sums; one layer's passing gradients are little beside what all have at work
        prefix = keys + tokens * layer.wide_pairs if chunk < tokens else 0.0
        return Held(keys, keys + prefix + chunk * layer.kept, chunk, summed=chunk < tokens, together=True)

    def forward_backward(self, model: Decoder, batch: Batch, objective: Objective, divisor: float) -> dict[str, Tensor]:
        with chunked(model, self.chunk_tokens), logits_of_at_most(self.chunk_tokens):
            return Plain().forward_backward(model, batch, objective, divisor)
