"""How a training step is computed: precision, memory, parallel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from waypost.core.state import local_box
from waypost.kernels import select
from waypost.measure.live import LiveBytes
from waypost.model import hf
from waypost.model.decoder import Decoder
from waypost.plan.memory import layer_sizes, memory_plan
from waypost.testing.contracts import Size
from waypost.testing.frozen import difference, frozen, same_bits
from waypost.testing.points._shared import Stateless, assert_near, gradients, model, token_batch
from waypost.testing.tiny import tiny_config, tiny_model
from waypost.train.balancing import BALANCINGS
from waypost.train.memory import MEMORIES, Plain
from waypost.train.objectives import Causal
from waypost.train.parallel import PARALLELS, Share, Single, World
from waypost.train.precision import PRECISIONS
from waypost.train.recipe import resolve
from waypost.train.reweighting import REWEIGHTINGS

BATCHES: dict[Size, tuple[int, ...]] = {"some": (7, 12, 3), "one": (1,)}


class Precisions(Stateless):
    """Every parameter keeps its name and shape, has the precision's dtype, and may have been on the meta device."""

    table = PRECISIONS
    sizes: tuple[Size, ...] = ("some",)

    def inputs(self, size: Size) -> Any:
        return {"batch": token_batch(*BATCHES[size])}

    def run(self, technique: Any, inputs: Any) -> Any:
        decoder = model()
        technique.apply(decoder)
        with torch.no_grad():
            return {"model": decoder, "dtype": str(technique.dtype), "logits": decoder(inputs["batch"])}

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        shapes = {name: p.shape for name, p in model().named_parameters()}
        assert {name: p.shape for name, p in result["model"].named_parameters()} == shapes
        assert {p.dtype for p in result["model"].parameters()} == {technique.dtype}
        with torch.device("meta"):
            absent = Decoder(tiny_config(), result["model"].ops)
        technique.apply(absent)
        assert {(p.dtype, p.device.type) for p in absent.parameters()} == {(technique.dtype, "meta")}


class Memories(Stateless):
    """The gradient of loss / divisor is added to what is there, and is that of plain autograd; nothing else stays. It holds
    the bytes that it says."""

    table = MEMORIES
    sizes: tuple[Size, ...] = ("some", "one")

    def inputs(self, size: Size) -> Any:
        return {"model": tiny_model(tiny_config(num_hidden_layers=3)), "batch": token_batch(*BATCHES[size])}

    def run(self, technique: Any, inputs: Any) -> Any:
        sums = technique.forward_backward(inputs["model"], inputs["batch"], Causal(), 4.0)
        return {"sums": sums, **gradients(inputs["model"])}

    def cost(self, technique: Any, inputs: Any) -> Any:
        with counted(inputs["model"]) as calls:
            self.run(technique, inputs)
        return calls

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        assert not any(value.requires_grad for value in result["sums"].values()), "sums are detached"
        fresh = tiny_model(tiny_config(num_hidden_layers=3))
        loss, _ = Causal().loss(fresh, inputs["batch"])
        (loss / 4.0).backward()
        assert_near(result["sums"]["loss"], loss.detach(), "the loss, before the division")
        for name, gradient in gradients(fresh).items():
            assert gradient is not None
            assert_near(result[name], gradient, f"the gradient of {name}")
        if inputs["batch"].num_tokens > 1 and select(kernel="auto").name == "cpu":  # the specification's operators keep more
            check_counted(technique)
        again = self.run(technique, inputs)  # onto the gradients of the first run
        for name, gradient in result.items():
            if name != "sums":
                assert_near(again[name], 2 * gradient, f"the gradient of {name} after two micro-batches")


def check_counted(technique: Any) -> None:
    """Asserts that the bytes that `holds` tells are those that are counted: what waits at the end of the layers' forward
    pass, beside weights and at most two rows of hidden states, and the most there is at once."""
    config, batch = tiny_config(**COUNTED), token_batch(128)
    decoder, waiting = tiny_model(config, kernel="auto"), []
    with LiveBytes(decoder.parameters()) as live:
        before = live.now
        handle = decoder.model.norm.register_forward_pre_hook(lambda *_: waiting.append(live.now - before))
        technique.forward_backward(decoder, batch, Causal(), 4.0)
        handle.remove()
    tree = {"model": {}, "tokenizer": {"vocab_size": 300}, "data": {"sources": [{"path": "builtin:kjv"}]}, "steps": 1}
    recipe = replace(resolve(tree), memory=technique)  # type: ignore[type-var]  # `recipe` makes it one
    told = memory_plan(recipe, config, batch.num_tokens, 1)
    kept = sum(technique.holds(of_layer, batch.num_tokens, i).kept for i, of_layer in enumerate(layer_sizes(config, 4)))
    row = batch.num_tokens * config.hidden_size * 4
    assert 0.9 * kept <= waiting[0] <= 1.1 * (kept + 2 * row), f"holds: kept {kept:.0f} bytes, counted {waiting[0]}"
    peak = told.peak - told.optimizer
    assert abs(peak / live.peak - 1) <= 0.1, f"holds: {peak} bytes at the most, counted {live.peak}"


COUNTED = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "initializer_range": 0.02}
"""Of the model whose bytes are counted: of a size at which what grows with the tokens is not lost beside the rest."""


@contextmanager
def counted(decoder: Decoder) -> Iterator[dict[str, int]]:
    """While open, counts how often the layers' norms run: once forward, and again where a layer is recomputed."""
    calls = {"norms": 0}

    def count(module: nn.Module, args: Any) -> None:
        calls["norms"] += 1

    norms = [module for name, module in decoder.named_modules() if name.endswith("input_layernorm")]
    handles = [norm.register_forward_pre_hook(count) for norm in norms]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class Reweightings(Stateless):
    """Finite factors that are not negative and keep the sum of weights; equal losses get ones; the order does not matter."""

    table = REWEIGHTINGS
    sizes: tuple[Size, ...] = ("some", "one")

    def inputs(self, size: Size) -> Any:
        losses = [2.0] if size == "one" else [3.0, 1.5, 4.0, 2.0, 3.6, 1.0]
        weights = [7.0] if size == "one" else [5.0, 128.0, 1.0, 0.5, 64.0, 128.0]
        return {"losses": torch.tensor(losses).double(), "weights": torch.tensor(weights).double(), "tokens": [0, 1000, 10**9]}

    def run(self, technique: Any, inputs: Any) -> Any:
        active = [technique.active(tokens) for tokens in inputs["tokens"]]
        return {"active": active, "factors": technique.factors(inputs["losses"], inputs["weights"])}

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        losses, weights, factors = inputs["losses"], inputs["weights"], result["factors"]
        assert (factors.shape, factors.dtype) == (losses.shape, torch.float64)
        assert bool((factors.isfinite() & (factors >= 0)).all()), f"{factors}: finite and not negative"
        assert_near((factors * weights).sum(), weights.sum(), "the sum of the weights", 1e-12)
        assert_near(technique.factors(losses.flip(0), weights.flip(0)).flip(0), factors, "in another order", 1e-12)
        same = technique.factors(torch.full_like(losses, 2.5), weights)
        assert same_bits(same, torch.ones_like(losses)), f"equal losses get factors {same}, not ones"
        assert all(isinstance(value, bool) for value in result["active"])


class Balancings(Stateless):
    """A finite gradient for every expert; an even load pushes none more than another; what is given is not changed."""

    table = BALANCINGS
    sizes: tuple[Size, ...] = ("some", "one")

    def inputs(self, size: Size) -> Any:
        if size == "one":
            return {"here": torch.ones(1, dtype=torch.float64), "step": torch.ones(1, dtype=torch.float64)}
        here, step = torch.tensor([5.0, 1.0, 0.0, 2.0]).double(), torch.tensor([9.0, 9.0, 4.0, 2.0]).double()
        return {"here": here / here.sum(), "step": step / step.sum()}

    def run(self, technique: Any, inputs: Any) -> Any:
        return technique.pressure(inputs["here"], inputs["step"])

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        assert result.shape == inputs["here"].shape
        assert bool(result.isfinite().all())
        even = torch.full_like(inputs["here"], 1 / len(result))
        pushed = technique.pressure(even, even)
        assert bool((pushed == pushed[0]).all()), f"an even load pushes experts differently: {pushed.tolist()}"
        nothing = technique.pressure(torch.zeros_like(even), torch.zeros_like(even))
        assert bool(nothing.isfinite().all()), "nothing was routed"


class Parallels(Stateless):
    """One rank: `single` to the bit, all rows are its own, the gradient of two micro-batches is that of both together, and
    the state table is the model's.

    Several ranks need several processes: tests/train/test_two_ranks.py and test_parallel.py.
    """

    table = PARALLELS
    sizes: tuple[Size, ...] = ("some",)

    def inputs(self, size: Size) -> Any:
        return {"model": model(), "batches": [token_batch(7, 4), token_batch(5)]}

    def run(self, technique: Any, inputs: Any) -> Any:
        decoder = inputs["model"]
        technique.apply(decoder, World())
        technique.begin(decoder, len(inputs["batches"]))
        for index, batch in enumerate(inputs["batches"]):
            technique.micro_batch(decoder, index == len(inputs["batches"]) - 1)
            Plain().forward_backward(decoder, batch, Causal(), 4.0)
        technique.settle(decoder)
        grads = {name: local_box(p.grad)[0].clone() for name, p in decoder.named_parameters() if p.grad is not None}
        return {"gradients": grads, "table": [[e.spec.name, e.spec.dtype, list(e.spec.shape)] for e in hf.entries(decoder)]}

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        whole = model()
        Plain().forward_backward(whole, token_batch(7, 4, 5), Causal(), 4.0)
        for name, gradient in gradients(whole).items():
            assert gradient is not None
            assert_near(result["gradients"][name], gradient, f"the gradient of {name}")
        alone = self.run(Single(), self.inputs("some"))
        assert same_bits(result, alone), f"on one rank it is not single: {difference(frozen(result), frozen(alone))}"
        assert technique.share(World()) == Share(), "one rank computes all rows"
        half = self.run(technique, {**inputs, "model": model().to(torch.bfloat16)})
        assert {g.dtype for g in half["gradients"].values()} == {torch.float32}, "micro-batches are added in float32"
        assert result["table"] == [[e.spec.name, e.spec.dtype, list(e.spec.shape)] for e in hf.entries(whole)]
