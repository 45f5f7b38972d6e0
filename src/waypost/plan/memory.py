"""How many bytes of tensors a training step holds at its fullest moment, from shapes alone, on one rank.

    peak = weights + optimizer state + the largest of
           head:    what all layers keep, the logits of a piece of rows with their gradients, the head's gradient
           layer:   what the layers up to one keep, that one's own passing values, the gradients of those behind it
           update:  every gradient
What a layer's parts keep of a token is theirs to say (`keeps`, model/kept.py), and what of that is held at a time the memory
technique's (`holds`, train/memory). Gradients that several micro-batches add are in float32 and there all the time.

Error: within 10% of the counted peak (measure/live.py) over the models of tests/plan. Not counted: what kernels allocate for
themselves while they run, and what lies between tensors in the process (plan/process.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from waypost.core.errors import ConfigError
from waypost.kernels import select
from waypost.model import hf
from waypost.model.config import ModelConfig
from waypost.model.decoder import Decoder
from waypost.model.head import chunk_rows
from waypost.plan.process import hole_bytes
from waypost.train.memory import Held, Sizes, sizes
from waypost.train.recipe import TrainRecipe


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of tensors, on one rank."""

    weights: int
    optimizer: int
    gradients: int
    """All of them, as they stand when the optimizer reads them."""
    activations: int
    """What the fullest moment holds beside weights, optimizer and the gradients that are there then."""
    peak: int
    holes: int
    """What the heap keeps of tensors that came and went, beside the peak; see waypost.plan.process."""


def memory_plan(recipe: TrainRecipe, config: ModelConfig, micro_tokens: int, micro_batches: int) -> MemoryPlan:
    """Bytes of a step of `micro_batches` of `micro_tokens` each. ConfigError where a part of a layer counts nothing."""
    with torch.device("meta"):
        model = Decoder(config, select(recipe.numerics, recipe.kernel))
        recipe.precision.apply(model)
        rename = hf.hf_renamer(config)
        table = recipe.optimizer.build([(rename(name), p) for name, p in model.named_parameters()]).entries()
    item = recipe.precision.dtype.itemsize
    weights = sum(p.nbytes for p in model.parameters())
    gradients = weights if micro_batches == 1 else weights // item * 4
    state = sum(entry.tensor.nbytes for entry in table)
    layers = [
        (recipe.memory.holds(of_layer, micro_tokens, index), sum(p.nbytes for p in model.model.layers[index].parameters()))
        for index, of_layer in enumerate(layer_sizes(config, item))
    ]
    head_rows = min(micro_tokens, chunk_rows(config.vocab_size), layers[0][0].head_rows)
    before = gradients if micro_batches > 1 else 0
    passing = _passing(config, layers, micro_tokens, head_rows, item, before)
    most = max(passing + before, float(gradients))
    passes = sum(held.at_work - held.kept for held, _ in layers)
    rounded = weights if before and item < 4 else 0  # each gradient as it comes, before it is added in float32
    holes = hole_bytes(passes + rounded, layers[0][0].head_rows * config.hidden_size * item)
    return MemoryPlan(weights, state, gradients, int(most) - before, weights + state + int(most), holes)


def layer_sizes(config: ModelConfig, item: int) -> list[Sizes]:
    """Of every layer, in bytes a token; ConfigError for a mixer or a feed-forward that does not say what it keeps."""
    for part in [part for spec in config.layers for part in (spec.mixer, spec.ffn)]:
        if not hasattr(part, "keeps"):
            raise ConfigError(f"plan: {type(part).__qualname__} has no `keeps(hidden_size)`; see waypost.model.kept.Kept")
    return [sizes(spec, config.hidden_size, item) for spec in config.layers]


def _passing(config: ModelConfig, layers: list[tuple[Held, int]], tokens: int, head_rows: int, item: int, before: int) -> float:
    """The most bytes, beside gradients that are there `before`, of the head's moment and of every layer's."""
    rows, head = tokens * config.hidden_size * item, config.vocab_size * config.hidden_size * item
    kept = sum(held.kept for held, _ in layers)
    piece = head_rows * (config.vocab_size + 2 * config.hidden_size) * item
    pieces = -(-tokens // head_rows)
    most = kept + 3 * rows + piece + head * (1 if pieces == 1 else 1 + max(4, item) // item)
    done = float(head)
    wide = max(4, item) // item
    waiting = [held.at_work if held.together else held.kept for held, _ in layers]
    done += sum(own * wide for held, own in layers if held.together and held.summed)  # of chunks before the last one
    for index, (held, own) in reversed(list(enumerate(layers))):
        there = held.together and held.summed
        sums = own * wide if held.summed and not there else 0
        most = max(most, sum(waiting[:index]) + held.at_work + 2 * rows + done + sums + own)
        done += 0 if there or before else own
    return most
