"""The trainer: what happens in one step, and the state that a step changes.

Invariants
- Everything a step does is a function of the model, the optimizer's state and three integers: step, tokens, row.
- `taken` tells the size of every step taken, so that what a schedule said of them can be asked again.
- The loss is divided by the weights of all rows of the step, over all ranks and micro-batches, before any backward.
- Nothing is changed before the loss and the gradient are known to be finite; then `before_state_mutation` is called.
- Every rank takes the same decisions: they follow from sums over all ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from waypost.core.batch import Batch
from waypost.core.errors import CheckpointError, ConfigError, NumericsError
from waypost.core.rng import stream_seed
from waypost.core.state import Entry, TensorSpec, local_box
from waypost.model import hf
from waypost.model.decoder import Decoder
from waypost.train.balancing import Balancing
from waypost.train.batch_sizes import BatchSize
from waypost.train.evening import evened
from waypost.train.memory import Memory
from waypost.train.objectives import Objective
from waypost.train.optimizers import Optimizer
from waypost.train.parallel import Parallel, World
from waypost.train.reweighing import Reweigher
from waypost.train.reweighting import Reweighting
from waypost.train.routing import Routing
from waypost.train.schedules import Schedule
from waypost.train.statistics import Watch
from waypost.train.steps import Position, Taken, counted, middle, split_step, taken_of


class Stream(Protocol):
    """One global order of rows of `seq_len` tokens; see waypost.data.stream.DataStream."""

    seq_len: int

    def batch(self, first_row: int, num_rows: int) -> Batch: ...

    def where(self, document: int) -> str: ...


@dataclass
class StepReport:
    """What one step was."""

    loss: float
    """Mean over the step's weights, nats."""
    grad_norm: float
    lr: float
    weight: float
    """Sum of the loss weights: the tokens that were learned from, where weights are 0 and 1."""
    tokens: int
    """Tokens that went through the model."""
    bytes: float
    """Bytes of text that the learned tokens stand for; 0 where unknown, or where not all of them are text."""
    attended: float
    """Keys that the tokens attended to, all together; for the count of operations."""
    seconds: float
    interrupted: bool
    """Whether any rank was asked to stop."""
    extra: dict[str, float] = field(default_factory=dict)
    """The objective's further sums, divided by `weight`; what experts, statistics and reweighting report."""


class Trainer:
    """Owns a run's live state. `step` takes one step; `entries` and `scalars` are the state, to save and to restore."""

    def __init__(
        self, *, model: Decoder, optimizer: Optimizer, stream: Stream, objective: Objective, schedule: Schedule,
        batch_size: BatchSize, memory: Memory, parallel: Parallel, world: World, micro_tokens: int | None = None,
        clip_norm: float | None = 1.0, seed: int = 0, balancing: Balancing | None = None,
        reweighting: Reweighting | None = None,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.stream = model, optimizer, stream
        self.objective, self.schedule, self.batch_size = objective, schedule, batch_size
        self.memory, self.parallel, self.world = memory, parallel, world
        self.share = parallel.share(world)
        self._counted = self._first_holders()
        self.routing = Routing(model, balancing, world, self.share)
        self.reweigh = Reweigher(model, objective, reweighting, world, self.share)
        counted = zip(model.parameters(), self._counted, strict=True)
        self.watch = Watch(batch_size.reads, [parameter for parameter, mine in counted if mine])
        self.micro_tokens, self.clip_norm, self.seed = micro_tokens, clip_norm, seed
        self.position = Position()
        self.taken: tuple[Taken, ...] = ()
        """The steps so far, those of a branched-from run included."""
        self.stats: dict[str, float] = {}
        self.stop_asked = False
        """Set by a signal handler; the step under way is finished, and every rank learns of it in its report."""
        self.before_state_mutation: Callable[[], None] = lambda: None
        """Called in each step after the backward passes, before the first parameter changes."""

    def step(self) -> StepReport:
        """Takes one step. NumericsError, with nothing changed, where the loss or the gradient is not finite."""
        began = time.perf_counter()
        step_tokens = self.batch_size.next(self.stats)
        batches, reweighed = self.reweigh(self._batches(step_tokens), self.position.tokens)
        weight, tokens, num_bytes, attended = self.world.sum(*self._said(*self._weigh(batches)))
        if weight <= 0:
            raise ConfigError(
                f"step {self.position.step + 1}: none of its {tokens:.0f} tokens has a loss weight; check the data"
            )
        self.watch.begin(len(batches), step_tokens // len(batches))
        losses, sums = self._gradient(batches, weight)
        names = sorted(sums)
        here = (self._squared_norm(), self.stop_asked, *self._said(sum(losses), *(sums[name] for name in names)))
        square, interrupted, loss, *extra = self.world.sum(*here)
        norm = math.sqrt(square) if square >= 0 else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(loss, norm, losses, batches)

        watched = self.watch.found(self.world, norm)
        loads = self.routing.report()
        self.before_state_mutation()
        factor = self.schedule.at(self.position.step, middle(self.position.tokens, step_tokens))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        scale = 1.0 if self.clip_norm is None or norm <= self.clip_norm else self.clip_norm / norm
        self.optimizer.step(gradient_scale=scale)
        self.optimizer.zero_grad(set_to_none=True)
        self.taken = counted(self.taken, step_tokens)
        self.position.step += 1
        self.position.tokens += step_tokens
        self.position.row += step_tokens // self.stream.seq_len
        self.stats = {
            **vars(self.position), "step_tokens": step_tokens, "loss": loss / weight, "grad_norm": norm, **watched
        }  # fmt: skip
        return StepReport(
            loss=loss / weight,
            grad_norm=norm,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            weight=weight,
            tokens=int(tokens),
            bytes=num_bytes,
            attended=attended,
            seconds=time.perf_counter() - began,
            interrupted=interrupted > 0,
            extra={name: value / weight for name, value in zip(names, extra, strict=True)} | loads | watched | reweighed,
        )

    def _batches(self, step_tokens: int) -> list[Batch]:
        """This rank's micro-batches of the step; micro-batch i of share s is block i * shares + s of the step's rows."""
        share = self.share
        rows, count = split_step(step_tokens, self.stream.seq_len, share.count, self.micro_tokens)
        firsts = [self.position.row + (i * share.count + share.index) * rows for i in range(count)]
        seed = stream_seed(self.seed, "objective")
        return [self.objective.prepare(self.stream.batch(first, rows), seed) for first in firsts]

    def _weigh(self, batches: list[Batch]) -> tuple[float, float, float, float]:
        """(sum of weights, tokens, bytes of the learned tokens, keys attended to) of this rank's micro-batches."""
        weight = num_bytes = attended = 0.0
        for batch in batches:
            if batch.weights is None:
                raise ConfigError(f"{type(self.objective).__name__}.prepare: gave a batch without weights")
            weight += batch.weights.sum(dtype=torch.float64).item()
            attended += float((batch.positions + 1).sum())
            if "bytes" in batch.token_extras:
                num_bytes += float(batch.token_extras["bytes"].sum())
        return weight, float(sum(batch.num_tokens for batch in batches)), num_bytes, attended

    def _gradient(self, batches: list[Batch], weight: float) -> tuple[list[float], dict[str, float]]:
        """Forward and backward over all micro-batches: (the loss of each, the objective's other sums), undivided."""
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        batches = evened(batches, self.memory, self.world) if self.share.meets else batches
        self.parallel.begin(self.model, len(batches))
        self.routing.begin(weight)
        for index, batch in enumerate(batches):
            self.parallel.micro_batch(self.model, last=self.watch.each or index == len(batches) - 1)
            self.routing.micro_batch()
            found = dict(self.memory.forward_backward(self.model, batch, self.objective, weight))
            self.watch.micro_batch()
            losses.append(found.pop("loss"))
            for name, value in found.items():
                sums[name] = value if name not in sums else sums[name] + value
        return [float(loss) for loss in losses], {name: float(value) for name, value in sums.items()}

    def _squared_norm(self) -> float:
        """Square of the 2-norm of what this rank counts of the gradient, added up in float64."""
        pairs = zip(self.model.parameters(), self._counted, strict=True)
        grads = [local_box(p.grad)[0] for p, counted in pairs if counted and p.grad is not None]
        return sum(self.model.ops.squared_norm(g) for g in grads if g.numel())

    def _first_holders(self) -> list[bool]:
        """For each parameter, whether this rank is the first that holds its box: what several hold is counted once."""
        mine = [(entry.spec.name, entry.box) for entry in hf.entries(self.model)]
        before = {place for table in self.world.gather(mine)[: self.world.rank] for place in table}
        return [place not in before for place in mine]

    def _said(self, *values: float) -> tuple[float, ...]:
        """`values` of rows, where this rank speaks for those that compute the same rows; zeros elsewhere."""
        return values if self.share.speaks else (0.0,) * len(values)

    def _not_finite(self, loss: float, norm: float, losses: list[float], batches: list[Batch]) -> NumericsError:
        """Drops the gradient; the error names what the step was made of: its bad micro-batches, or else all of them."""
        self.optimizer.zero_grad(set_to_none=True)
        bad = [b for value, b in zip(losses, batches, strict=True) if not math.isfinite(value)]
        found = [b.token_extras["document"].unique().tolist() for b in bad or batches if "document" in b.token_extras]
        mine = (bool(bad), sorted({document for group in found for document in group}))
        everyone = self.world.gather(mine)
        guilty = any(flag for flag, _ in everyone)
        documents = sorted({d for flag, group in everyone if flag == guilty for d in group})
        shown = ", ".join(self.stream.where(d) for d in documents[:8]) + (" ..." if len(documents) > 8 else "")
        whose = "The failed micro-batches'" if guilty else "The step's"
        what = f"loss is {loss}" if not math.isfinite(loss) else f"loss is finite, the gradient's norm is {norm}"
        return NumericsError(
            f"step {self.position.step + 1} (tokens {self.position.tokens}): {what}. The step was not taken: weights, moments "
            f"and data position are still those after step {self.position.step}, in memory. {whose} documents "
            f"({len(documents)}): {shown}"
        )

    def entries(self) -> list[Entry]:
        """Weights and the optimizer's state, as live views."""
        self.parallel.settle(self.model)
        return [*hf.entries(self.model), *self.optimizer.entries()]

    def specs(self) -> list[TensorSpec]:
        """Every tensor of the state, whoever holds parts of it. Collective."""
        tables = self.world.gather([entry.spec for entry in self.entries()])
        return list({(spec.role, spec.name): spec for table in tables for spec in table}.values())

    def scalars(self) -> dict[str, Any]:
        """The rest of the state, as JSON data."""
        return {
            "position": dict(vars(self.position)),
            "taken": [list(run) for run in self.taken],
            "stats": dict(self.stats),
            "optimizer": self.optimizer.scalars(),
        }

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        try:
            self.position = Position(**scalars["position"])
            self.taken = taken_of(scalars)
            self.stats = dict(scalars["stats"])
            self.optimizer.load_scalars(scalars["optimizer"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the checkpoint's training state is not one of this trainer: {error!r}") from error
