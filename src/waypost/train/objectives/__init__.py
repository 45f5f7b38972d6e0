"""Objectives: what a batch's loss is."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from waypost.core.batch import Batch
from waypost.model.decoder import Decoder
from waypost.train.objectives.causal import Causal
from waypost.train.objectives.ul2 import Ul2


class Objective(Protocol):
    """Turns a batch into a scalar. Changes neither the model nor the batch it is given; owns no memory between calls.

    `prepare` returns the batch to train on (corrupted inputs, targets, weights); the trainer sums its weights over all
    ranks and micro-batches of the step. `loss` returns the weighted *sum* over the rows, which the trainer divides by that
    total, and further sums to report (detached scalars). `losses` is what `loss` adds up: (T,) float32, one a row, before
    its weight, without gradient; a row of weight zero may hold anything.
    token_extras["bytes"], the text that a row's target stands for, goes along where all rows that count predict text;
    `prepare` leaves it out where others count too (sentinels), and no bits per byte are told.
    Invariants: what is prepared of a sequence is a function of the seed, of its row in the global order
    (token_extras["row"]) and of its place in that row, so a run may go on with other micro-batches on other ranks; splitting
    a batch by sequences and adding the losses gives the loss of the whole, to rounding.
    """

    def prepare(self, batch: Batch, seed: int) -> Batch: ...

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...

    def losses(self, model: Decoder, batch: Batch) -> Tensor: ...


OBJECTIVES: Mapping[str, type[Objective]] = {"causal": Causal, "ul2": Ul2}
