"""The decoder: embed, run, head. Parameters carry Hugging Face's names.

Pipelines, layered prefill, early exit and shared keys and values are orders of the same three calls; parallelism,
quantised linears, adapters and caches are applied from outside.

Shapes: T tokens, C hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from waypost.core import rng
from waypost.core.batch import Batch
from waypost.kernels import Ops, select
from waypost.kernels.layers.ops import Guessing, Passed, Text
from waypost.model.config import LayerSpec, ModelConfig
from waypost.model.linear.dense import Linear
from waypost.model.norm import build_norm
from waypost.model.norm.projected import ProjectedNorm, Projection
from waypost.model.rows import Rows


class Layer(nn.Module):
    """One token mixer and one channel mixer with their norms and residual sums."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.spec = spec
        self.self_attn = spec.mixer.build(config, index)
        self.mlp = spec.ffn.build(config, index)
        norm = (config.hidden_size, config.rms_norm_eps, config.norm_gain)
        if spec.norm == "pre":
            self.input_layernorm = build_norm(*norm)
            self.post_attention_layernorm = build_norm(*norm)
        else:
            self.post_attention_layernorm = build_norm(*norm)
            self.post_feedforward_layernorm = build_norm(*norm)

    def forward(self, h: Tensor, rows: Rows) -> Tensor:  # (T, C) -> (T, C)
        if self.spec.norm == "pre":
            h = h + self.self_attn(self.input_layernorm(h, rows), rows)
            return h + self.mlp(self.post_attention_layernorm(h, rows), rows)
        h = h + self.post_attention_layernorm(self.self_attn(h, rows), rows)
        return h + self.post_feedforward_layernorm(self.mlp(h, rows), rows)

    def project_kv(self, h: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The keys and values that `forward` stores, alone: (T, C) -> 2 x (T, G, D)."""
        kv: tuple[Tensor, Tensor] = self.self_attn.project_kv(
            self.input_layernorm(h, rows) if self.spec.norm == "pre" else h, rows
        )
        return kv


class Backbone(nn.Module):
    """The part that Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=_empty(config))
        self.layers = nn.ModuleList(Layer(spec, config, index) for index, spec in enumerate(config.layers))
        norm = build_norm(config.hidden_size, config.rms_norm_eps, config.norm_gain)
        projects, width = config.embedding_projection, config.hidden_size
        self.embed_projection = Projection(width) if projects else None
        self.norm = ProjectedNorm(norm, width) if projects else norm
        """The last norm, and what projects its output where the model has that."""


class AtOnce(Protocol):
    """Layers in one call, with the bits of one by one (model/linear/at_once.py); None: this pass is not for it."""

    def __call__(self, h: Tensor, layers: Sequence[int], rows: Rows) -> Tensor | None: ...

    def logits(self, rows: Rows, wanted: Tensor | None = None) -> Tensor | None:
        """The whole model: (n, V) of the rows `wanted` (n,), None: of all."""
        ...

    @property
    def screened(self) -> bool:
        """Whether `largest` and `passes` are to be had of a pass over pages; else they are None."""
        ...

    def largest(self, rows: Rows, wanted: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Of each row of `logits` the largest (n,), in float32, NaN where there is one, and the first place (n,) with it."""
        ...

    def passes(self, rows: Rows, texts: Sequence[Text], positions: Tensor, passes: int, guessing: Guessing) -> Passed | None:
        """RunPassesOp (kernels/layers/ops.py); `rows` is the first pass without guesses, a row a sequence, positions (S, R)."""
        ...


class Decoder(nn.Module):
    """A decoder-only language model. Fresh parameters are uninitialised: call `initialise`, or load a checkpoint."""

    def __init__(self, config: ModelConfig, ops: Ops | None = None) -> None:
        super().__init__()
        self.config = config
        self.ops = ops if ops is not None else select()
        self.model = Backbone(config)
        self.at_once: AtOnce | None = None
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, False)

    def embed(self, batch: Batch) -> Tensor:
        """(T,) tokens -> (T, C), in `dtype`."""
        h = self.ops.vocabulary.embed(batch.tokens, self.model.embed_tokens.weight).to(self.dtype)
        return h if self.model.embed_projection is None else self.model.embed_projection(h, self.ops)

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, keys and values: that of the norms, which may be wider than the matrices."""
        return self.model.norm.weight.dtype

    def run(self, h: Tensor, layers: Iterable[int], rows: Rows) -> Tensor:
        """Applies the layers named by `layers`, in that order. (T, C) -> (T, C)."""
        layers = list(layers)
        done = self.at_once(h, layers, rows) if self.at_once is not None else None
        if done is not None:
            return done
        for index in layers:
            h = self.model.layers[index](h, rows)
        return h

    def head(self, h: Tensor, rows: Rows) -> Tensor:
        """Final norm and projection to the vocabulary. (n, C) -> (n, V)."""
        return rows.ops.vocabulary.logits(self.model.norm(h, rows), self.output_weight, rows.ops)

    @property
    def output_weight(self) -> Tensor:
        """(V, C): the head's weight, the embedding itself where the two are tied; of it, the rows that are here."""
        return self.ops.vocabulary.held(self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)

    def forward(self, batch: Batch, tail: Callable[[Tensor, Rows], Tensor] | None = None) -> Tensor:
        """embed, run and head over a batch with nothing cached: (T, V) logits.

        `tail` takes the place of `head`: it gets the last hidden states (T, C), before the final norm, while the head's
        parameters are gathered; an objective computes its loss there without ever holding (T, V).
        """
        rows = Rows(batch, self.ops)
        h = self.run(self.embed(batch), range(len(self.model.layers)), rows)
        return self.head(h, rows) if tail is None else tail(h, rows)

    @torch.no_grad()
    def initialise(self, seed: int) -> Decoder:
        """Gives every parameter its `initial_value`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, tuple(parameter.shape), seed, self.config.initializer_range))
        return self


def initial_value(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """Float32: norms one, biases zero, projections orthogonal, the rest normal(0, std), each from a stream of its name."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    generator = rng.generator(seed, "init", name)
    if name.endswith("projection.weight"):
        return nn.init.orthogonal_(torch.empty(shape), generator=generator)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _empty(config: ModelConfig) -> Tensor:
    return torch.empty(config.vocab_size, config.hidden_size)
