"""What decides a training step: objectives, optimizers, schedules, batch sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from waypost.core.batch import Batch
from waypost.core.state import Entry
from waypost.testing.contracts import Size
from waypost.testing.frozen import difference, frozen, same_bits
from waypost.testing.points._shared import Stateless, assert_near, gradients, model, noise, token_batch
from waypost.train.batch_sizes import BATCH_SIZES
from waypost.train.objectives import OBJECTIVES
from waypost.train.optimizers import OPTIMIZERS
from waypost.train.schedules import SCHEDULES
from waypost.train.statistics import STATISTICS

BATCHES: dict[Size, tuple[int, ...]] = {"some": (7, 12, 3), "one": (1,)}


class Objectives(Stateless):
    """The same seed and row prepare the same sequence, in any batch; the loss of a batch is the sum of its sequences', and of
    its rows' losses."""

    table = OBJECTIVES
    sizes: tuple[Size, ...] = ("some", "one")

    def inputs(self, size: Size) -> Any:
        batch = token_batch(*BATCHES[size])
        rows = torch.repeat_interleave(7 + torch.arange(batch.num_sequences), batch.starts.diff().long())
        extras = {"row": rows, "bytes": torch.full((batch.num_tokens,), 3.0, dtype=torch.float64)}
        return {"model": model(), "batch": replace(batch, token_extras=extras)}

    def run(self, technique: Any, inputs: Any) -> Any:
        decoder = inputs["model"]
        batch = technique.prepare(inputs["batch"], 5)
        loss, sums = technique.loss(decoder, batch)
        loss.backward()
        losses = technique.losses(decoder, batch)
        return {"batch": batch, "loss": loss.detach(), "losses": losses, "sums": sums, **gradients(decoder)}

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        batch = result["batch"]
        assert batch.check().weights is not None, "a prepared batch carries weights: the trainer divides by their sum"
        told = batch.token_extras.get("bytes", 1.0 * (batch.weights > 0))
        assert bool(((told > 0) == (batch.weights > 0)).all()), "rows count that stand for no bytes, or the reverse"
        assert result["loss"].shape == ()
        assert result["loss"].dtype == torch.float32
        assert not any(value.requires_grad for value in result["sums"].values()), "sums to report are detached"
        parts = [technique.loss(inputs["model"], part)[0].detach() for part in one_by_one(batch)]
        assert_near(torch.stack(parts).sum(), result["loss"], "the losses of the sequences alone")
        assert not result["losses"].requires_grad, "the losses of rows carry no gradient"
        counted = torch.where(batch.weights > 0, result["losses"], 0.0) * batch.weights
        assert_near(counted.sum(), result["loss"], "the losses of the rows, weighted")
        alone = [technique.prepare(part, 5) for part in one_by_one(inputs["batch"])]
        for part, whole in zip(alone, one_by_one(batch), strict=True):
            found = difference(frozen(part), frozen(whole))
            assert found is None, f"prepared alone, a sequence is another than among others: {found}"


def one_by_one(batch: Batch) -> Iterator[Batch]:
    """Each sequence of `batch` as a batch of its own."""
    for start, stop in zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True):
        rows = slice(start, stop)
        targets, weights = batch.targets, batch.weights
        assert targets is not None
        assert weights is not None
        yield Batch(
            tokens=batch.tokens[rows],
            positions=batch.positions[rows],
            starts=torch.tensor([0, stop - start], dtype=torch.int32),
            context=torch.zeros(1, dtype=torch.int32),
            targets=targets[rows],
            weights=weights[rows],
            token_extras={name: extra[rows] for name, extra in batch.token_extras.items()},
        )


class Optimizers(Stateless):
    """Gradients are read, never changed; the parameter is its master, rounded; the state is there before the first step."""

    table = OPTIMIZERS
    sizes: tuple[Size, ...] = ("some", "one", "none")
    steps = 4

    def inputs(self, size: Size) -> Any:
        shapes: dict[Size, dict[str, tuple[int, ...]]] = {
            "some": {"matrix": (5, 7), "vector": (7,), "half": (4, 6)},
            "one": {"matrix": (1, 1)},
            "none": {"matrix": (0, 3)},
        }
        values = {name: noise(*shape, name=name) for name, shape in shapes[size].items()}
        grads = [{name: noise(*v.shape, name=f"{name}{step}") for name, v in values.items()} for step in range(self.steps)]
        if "half" in values:
            values["half"] = values["half"].bfloat16()
            grads = [{**step, "half": step["half"].bfloat16()} for step in grads]
        return {"values": values, "gradients": grads}

    def run(self, technique: Any, inputs: Any) -> Any:
        named, optimizer = self._build(technique, inputs["values"])
        self._walk(optimizer, named, inputs["gradients"], 0)
        return self._result(named, optimizer)

    def resume(self, technique: Any, inputs: Any) -> Any:
        named, optimizer = self._build(technique, inputs["values"])
        self._walk(optimizer, named, inputs["gradients"][:2], 0)
        table = [(e.spec, e.tensor.clone()) for e in optimizer.entries()]
        scalars = json.loads(json.dumps(optimizer.scalars()))
        again, fresh = self._build(technique, {name: p.detach().clone() for name, p in named.items()})
        places = {(e.spec.role, e.spec.name): e.tensor for e in fresh.entries()}
        assert set(places) == {(s.role, s.name) for s, _ in table}, "the table of the state depends on the steps taken"
        for spec, tensor in table:
            places[spec.role, spec.name].copy_(tensor)
        fresh.load_scalars(scalars)
        self._walk(fresh, again, inputs["gradients"][2:], 2)
        return self._result(again, fresh)

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        for name, value in inputs["values"].items():
            got = result["parameters"][name]
            assert (got.shape, got.dtype) == (value.shape, value.dtype), f"{name} became {tuple(got.shape)} {got.dtype}"
            master = result["state"].get(f"master {name}")
            assert master is None or same_bits(master.to(value.dtype), got), f"{name} is not its master, rounded"
        named, optimizer = self._build(technique, inputs["values"])
        specs = [e.spec for e in optimizer.entries()]
        assert len({(s.role, s.name) for s in specs}) == len(specs), "(role, name) is unique in the table"
        assert {s.name for s in specs} <= set(named), "state goes by the names of parameters"
        assert len(specs) == len(result["state"]), "the state is there before the first step"

    def _build(self, technique: Any, values: dict[str, Tensor]) -> tuple[dict[str, nn.Parameter], Any]:
        named = {name: nn.Parameter(value.clone()) for name, value in values.items()}
        return named, technique.build(list(named.items()))

    def _walk(self, optimizer: Any, named: dict[str, nn.Parameter], grads: list[dict[str, Tensor]], first: int) -> None:
        for index, step in enumerate(grads, first):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1.0 - 0.1 * index)
            for name, parameter in named.items():
                parameter.grad = step[name].clone()
            optimizer.step(gradient_scale=0.5 if index == 1 else 1.0)
            for name, parameter in named.items():
                assert same_bits(parameter.grad, step[name]), f"step {index} changed the gradient of {name}"

    def _result(self, named: dict[str, nn.Parameter], optimizer: Any) -> Any:
        entries: list[Entry] = optimizer.entries()
        state = {f"{e.spec.role} {e.spec.name}": e.tensor.clone() for e in entries}
        parameters = {name: p.detach().clone() for name, p in named.items()}
        return {"parameters": parameters, "state": state, "scalars": optimizer.scalars()}


class Schedules(Stateless):
    """A pure function: finite and in [0, 1] at every number of tokens, far beyond its end too."""

    table = SCHEDULES
    sizes: tuple[Size, ...] = ("some", "one")

    def inputs(self, size: Size) -> Any:
        return {"tokens": [n + 0.5 for n in range(0, 2000, 13)] if size == "some" else [0.0]}

    def run(self, technique: Any, inputs: Any) -> Any:
        return [float(technique.at(step, tokens)) for step, tokens in enumerate(inputs["tokens"])]

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        for tokens in (0.0, 0.5, 1e6, 1e15):
            assert 0.0 <= technique.at(3, tokens) <= 1.0, f"{technique.at(3, tokens)} at {tokens} tokens, not in [0, 1]"
        assert all(0.0 <= factor <= 1.0 for factor in result), f"{min(result)} to {max(result)}, not in [0, 1]"


def after(step: int) -> dict[str, float]:
    """Statistics of a run of 512 tokens a step after `step` steps, those that are gathered when declared among them."""
    of_run = {"step": step, "tokens": 512.0 * step, "step_tokens": 512, "loss": 5.0 - 0.1 * step}
    return {**of_run, "grad_norm": 1.0 + 0.2 * step, "gradient_variance": 4.0 * step, "micro_batch_tokens": 64.0}


class BatchSizes(Stateless):
    """A pure function of the statistics, positive whatever they are; what it declares to read can be gathered."""

    table = BATCH_SIZES
    sizes: tuple[Size, ...] = ("some", "one")

    def inputs(self, size: Size) -> Any:
        steps = range(0, 40, 5) if size == "some" else range(1)
        return [after(k) if k else {} for k in steps]

    def run(self, technique: Any, inputs: Any) -> Any:
        return [technique.next(stats) for stats in inputs]

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        assert all(isinstance(tokens, int) and tokens > 0 for tokens in result), f"{result}: whole numbers of tokens above 0"
        assert set(technique.reads) <= set(STATISTICS), f"{technique.reads}: only {sorted(STATISTICS)} can be declared"
