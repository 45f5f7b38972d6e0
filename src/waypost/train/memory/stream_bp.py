"""stream_bp: exact gradients, a chunk of tokens at a time through each layer and through the head.

Source    Luo et al. 2025, StreamBP: Memory-Efficient Exact Backpropagation for Long Sequence Training of LLMs,
          arXiv:2506.03077, sec. 3
Equation  for the rows c of a chunk, last chunk first: (dh_c, dK, dV, dW) += d layer(h_c, K[:c], V[:c]) . dout_c
Shapes    a batch of T tokens -> sums of the objective, detached
Acts on   every layer, and the rows of logits that the head holds at once; chunks are cut through documents wherever they fall
Differs   the authors project keys and values of the whole prefix again for every chunk; here they are projected once a
          layer and a chunk's attention adds to dK, dV, which enter the projections with the chunk that made the keys.
          Chunks lie on the token axis of the ragged batch, so that one length of chunk serves documents of any length
Exact     hidden states and log-probabilities have plain's bits (exact numerics), and where T <= chunk_tokens all has; beyond,
          sums over tokens are added by chunks: 1e-5 of a gradient's largest entry in float32, 3e-2 in bfloat16
"""

from __future__ import annotations

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
class _Streamed:
    """A layer's forward in chunks. `own` is its forward on the rows of one chunk."""

    layer: nn.Module
    own: Forward
    chunk_tokens: int

    def __call__(self, h: Tensor, rows: Rows) -> Tensor:
        weights = weights_of(self.layer)
        out: Tensor = _Stream.apply(h, self, chunks_of(rows, self.chunk_tokens), weights, *weights)
        return out

    def forward(self, h: Tensor, chunks: list[Chunk]) -> Tensor:
        keys, out = PrefixKv(h.shape[0]), torch.empty_like(h)
        for chunk in chunks:
            with torch.enable_grad():  # as plain's forward has it, for whoever watches modules; the graph is dropped at once
                out[chunk.rows] = self.own(h[chunk.rows].detach(), chunk.through(keys)).detach()
        return out

    def backward(self, h: Tensor, chunks: list[Chunk], weights: list[Tensor], grad: Tensor) -> tuple[Tensor, list[Any]]:
        keys, grad_h = PrefixKv(h.shape[0]), torch.empty_like(h)
        for chunk in chunks:
            keys.store(chunk, *self.layer.project_kv(h[chunk.rows], chunk.through(keys)))  # type: ignore[operator]
        sums: list[Tensor | None] = [None] * len(weights)
        for chunk in reversed(chunks):
            part = h[chunk.rows].detach().requires_grad_()
            with torch.enable_grad():
                out = self.own(part, chunk.through(keys))
            found = torch.autograd.grad(out, [part, *weights], grad[chunk.rows], allow_unused=True)
            grad_h[chunk.rows] = found[0]
            sums = [added(total, g, alone=len(chunks) == 1) for total, g in zip(sums, found[1:], strict=True)]
        return grad_h, rounded(sums, weights)


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, streamed: _Streamed, chunks: list[Chunk], weights: list[Tensor], *_: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        ctx.streamed, ctx.chunks, ctx.weights = streamed, chunks, weights
        return streamed.forward(h, chunks)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        grad_h, grads = ctx.streamed.backward(h, ctx.chunks, ctx.weights, grad[0])
        return grad_h, None, None, None, *grads


@contextmanager
def streamed(layers: list[nn.Module], chunk_tokens: int) -> Iterator[None]:
    """While open, `layers` run in chunks. Only `forward` is replaced: what shards a layer gathers its weights once for all
    chunks of a pass, and reduces their gradients once."""
    for layer in layers:
        layer.forward = _Streamed(layer, layer.forward, chunk_tokens)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own method shows again


@technique
class StreamBp:
    chunk_tokens: int = 512
    """Tokens whose activations of one layer, or whose logits, are held at once."""

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ConfigError(f"StreamBp.chunk_tokens={self.chunk_tokens}: must be at least 1; 512 is a good start")

    def pieces(self, tokens: int) -> int:
        return -(-tokens // self.chunk_tokens)

    def holds(self, layer: Sizes, tokens: int, index: int) -> Held:
        # input, output's and input's gradient; keys and values as they are stored and as a chunk reads them, with their sums
        chunk = min(tokens, self.chunk_tokens)
        prefix = tokens * (2 * layer.pairs + layer.wide_pairs) if chunk < tokens else 0.0
        at_work = tokens * 3 * layer.hidden + prefix + Plain().holds(layer, chunk, index).at_work
        return Held(tokens * layer.hidden, at_work, chunk, summed=chunk < tokens)

    def forward_backward(self, model: Decoder, batch: Batch, objective: Objective, divisor: float) -> dict[str, Tensor]:
        with streamed(list(model.model.layers), self.chunk_tokens), logits_of_at_most(self.chunk_tokens):
            return Plain().forward_backward(model, batch, objective, divisor)
