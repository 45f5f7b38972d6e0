"""Quantising a checkpoint: layer by layer into a folder of few bits, measured against the original, then committed.

Memory   a few times the largest weight, and the hidden states of the calibration text where the quantiser asks for one
Crash    killed anywhere and run again, it goes on behind the tensors that are durable and gives the same bytes
Kept     norms, biases, the embedding, routers, and the output head unless the recipe's `head` stores it in few bits; a head
         tied to the embedding then gets weights of its own. What is kept is rounded to bfloat16, in which it is served
State    optimizer state is dropped: a quantised folder is for inference
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waypost.core.config import to_tree
from waypost.core.errors import CheckpointError, ConfigError, NumericsError
from waypost.core.progress import progress, say
from waypost.core.state import TensorSpec
from waypost.keep import disk
from waypost.keep.format import num_bytes
from waypost.keep.lineage import Lineage
from waypost.transform import invariant
from waypost.transform.agreement import check_adapters
from waypost.transform.calibration import Calibration
from waypost.transform.quantizing import Quantizer
from waypost.transform.quantizing._receipt import receipt_of
from waypost.transform.quantizing._recipe import QuantizeRecipe, resolve
from waypost.transform.run import STATE_RULE, held_out_batches, parents_of

if TYPE_CHECKING:
    from torch import Tensor

    from waypost.keep.reader import Checkpoint
    from waypost.keep.streaming import StreamingWriter
    from waypost.kernels.linear.quantized import QuantizedWeight
    from waypost.model.decoder import Decoder
    from waypost.model.linear.scheme import Scheme

__all__ = ["QuantizeRecipe", "Result", "quantize", "resolve"]

HEAD = "lm_head"
ROUTERS = ("*.mlp.gate", "*.block_sparse_moe.gate", "*.shared_expert_gate")
"""Linears that choose experts: small, and a wrong choice costs more than their bytes."""


@dataclass(frozen=True)
class Result:
    """What was done."""

    path: Path
    recipe: QuantizeRecipe
    receipt: Mapping[str, Any]
    """As the manifest holds it."""
    seconds: float
    resumed_tensors: int


@dataclass(frozen=True)
class Linear:
    """A linear that will be stored in few bits."""

    module: str
    """Its name in the model; the head has none where it is tied."""
    stem: str
    """Its name in the folder."""
    shape: tuple[int, int]
    quantizer: Quantizer

    def specs(self) -> list[TensorSpec]:
        """The tensors it becomes, as compressed-tensors names them."""
        from waypost.model.linear import stored

        return stored.specs(self.quantizer.scheme(), self.stem, self.shape)

    def read_back(self, writer: StreamingWriter) -> QuantizedWeight:
        """The weight as it was written."""
        from waypost.model.linear import stored

        return stored.read(self.quantizer.scheme(), self.stem, writer.tensor)


def quantize(given: QuantizeRecipe | Mapping[str, Any] | str | Path, out: str | Path) -> Result:
    """Makes the quantised folder `out`, which must not exist.

        quantize({"source": "smollm2", "quantizer": {"name": "round_to_nearest", "bits": 4, "group_size": 32}}, "smollm2-int4")

    Raises ConfigError, CheckpointError, CapacityError or NumericsError; what was there before is untouched.
    """
    from waypost.keep.reader import Checkpoint
    from waypost.keep.streaming import StreamingWriter

    began, chosen = time.monotonic(), resolve(given)
    if disk.occupied(Path(out)):
        raise CheckpointError(f"{out} exists already; name another folder or remove it")
    checkpoint = Checkpoint(Path(chosen.source).expanduser())
    check_adapters([checkpoint])
    work = Work.of(checkpoint, chosen)
    lineage = Lineage(parents_of([checkpoint]), "quantize", {**to_tree(chosen), "state": STATE_RULE})
    specs = work.specs()
    disk.require_space(out, sum(map(num_bytes, specs)))
    with StreamingWriter(out, specs, work.config(), lineage=lineage, assets=checkpoint.assets()) as writer:
        resumed = len(writer.written)
        work.write(writer)
        receipt = receipt_of(work, writer)
        path = writer.commit(receipts=[receipt])
    return Result(path, chosen, receipt, time.monotonic() - began, resumed)


class Work:
    """The source as a model whose weights lie in the file, and what becomes of each of its tensors."""

    def __init__(self, checkpoint: Checkpoint, chosen: QuantizeRecipe, model: Decoder, weights: invariant.Weights) -> None:
        from waypost.model import hf

        self.checkpoint, self.chosen, self.model, self.weights = checkpoint, chosen, model, weights
        rename, kept = hf.hf_renamer(model.config), ROUTERS if chosen.keep is None else chosen.keep
        self.plain: list[str] = []
        self.linears: list[Linear] = []
        for name, quantizer, shape in self._candidates():
            stem = rename(f"{name or HEAD}.weight").removesuffix(".weight")
            if stem == HEAD and quantizer is not None and quantizer.scheme().rows is not None:
                raise ConfigError(
                    f"quantize: head={type(quantizer).__name__}: the output head takes rows as they are; choose another"
                )
            if quantizer is None or any(fnmatch.fnmatchcase(stem, pattern) for pattern in kept):
                self.plain.append(stem)
            else:
                self.linears.append(Linear(name, stem, shape, quantizer))
        if not self.linears:
            raise ConfigError(f"quantize: keep={chosen.keep} leaves no linear of {checkpoint.path} to quantise")
        asked = {"calibration": chosen.calibration, "held_out": chosen.held_out}
        self.texts = {key: held_out_batches(checkpoint, text) for key, text in asked.items() if text.path is not None}
        packed = {f"{linear.stem}.weight" for linear in self.linears}
        self.kept = {e.spec.name: e.tensor for e in hf.entries(model) if e.spec.name not in packed}

    @staticmethod
    def of(checkpoint: Checkpoint, chosen: QuantizeRecipe) -> Work:
        """The work that `chosen` makes of a checkpoint: its weights are mapped, none is read yet; its texts are."""
        from waypost.kernels import select
        from waypost.model import hf

        config = hf.config_from_hf(checkpoint.config)
        weights = invariant.Weights.of(checkpoint)
        half = any(spec.dtype == "F16" for spec in checkpoint.specs.values())
        ops = select("exact", "naive" if half else "auto")  # the compiled set has no float16
        return Work(checkpoint, chosen, hf.assemble(config, weights, ops=ops, where=str(checkpoint.path), copy=False), weights)

    def _candidates(self) -> Iterator[tuple[str, Quantizer | None, tuple[int, int]]]:
        """(name in the model, quantiser, (N, K)) of every linear; the head last, and without a name where it is tied."""
        from waypost.model.linear.dense import Linear as Module

        for name, module in self.model.named_modules():
            if isinstance(module, Module) and name != HEAD:
                yield name, self.chosen.quantizer, (module.weight.shape[0], module.weight.shape[1])
        head = self.model.output_weight.shape
        yield "" if self.model.lm_head is None else HEAD, self.chosen.head, (head[0], head[1])

    def specs(self) -> list[TensorSpec]:
        """The tensors of the output, in the order of the model."""
        kept = [TensorSpec(name, "BF16", tuple(tensor.shape), "weight") for name, tensor in self.kept.items()]
        return [*kept, *(spec for linear in self.linears for spec in linear.specs())]

    def config(self) -> dict[str, Any]:
        """The source's config.json, with what was packed and how, in compressed-tensors' words."""
        from waypost.model.linear.scheme import KEY, to_config

        schemes: dict[str, Scheme] = {linear.stem: linear.quantizer.scheme() for linear in self.linears}
        tree = {**self.checkpoint.config, "dtype": "bfloat16", "torch_dtype": "bfloat16", KEY: to_config(schemes, self.plain)}
        return {**tree, "tie_word_embeddings": False} if self.has_head else tree

    @property
    def has_head(self) -> bool:
        """Whether the output head has packed weights of its own."""
        return any(linear.stem == HEAD for linear in self.linears)

    def write(self, writer: StreamingWriter) -> None:
        """Every tensor that is not there yet, layer by layer."""
        done = {name for _, name in writer.written}
        if done:
            say(f"going on behind {len(done)} of {len(self.specs())} tensors that are written already")
        calibration = self._calibration(done)
        layers = [f"model.layers.{index}." for index in range(len(self.model.model.layers))]
        with progress("quantising", total=sum(map(num_bytes, self.specs())), unit="bytes") as bar:
            for name, tensor in self.kept.items():
                if name not in done:
                    writer.write(name, "weight", tensor.detach().bfloat16())
                bar.advance(tensor.numel() * 2, note=name)
            for index, prefix in enumerate(layers):
                here = [linear for linear in self.linears if linear.module.startswith(prefix)]
                self._stage(writer, done, here, bar, calibration, index)
            self._stage(writer, done, [linear for linear in self.linears if linear.stem == HEAD], bar, calibration, None)

    def _stage(
        self, writer: StreamingWriter, done: set[str], here: Sequence[Linear], bar: Any, calibration: Calibration | None,
        layer: int | None,
    ) -> None:  # fmt: skip
        """The linears of one layer, or (layer None) the head."""
        from torch import nn

        from waypost.model.linear.int8 import put

        missing = [linear for linear in here if any(spec.name not in done for spec in linear.specs())]
        seen = {linear.stem: linear.quantizer.observe(linear.shape[1]) for linear in missing}
        asked = {linear.module: watch for linear in missing if (watch := seen[linear.stem]) is not None}
        if calibration is not None and layer is not None:
            calibration.observe(layer, asked)
        elif calibration is not None:
            for watch in asked.values():
                calibration.observe_head(watch)
        for linear in missing:
            try:
                made = linear.quantizer.quantize(self._weight(linear).detach().float(), seen.pop(linear.stem))
            except NumericsError as error:
                raise NumericsError(f"{linear.stem}: {error}") from error
            _write(writer, done, linear, made)
        for linear in here:
            if calibration is not None and layer is not None:
                put(self.model, linear.module, linear.read_back(writer), linear.quantizer.scheme())
            bar.advance(sum(map(num_bytes, linear.specs())), note=linear.stem)
        if calibration is not None and layer is not None:
            calibration.advance(layer)
        if layer is not None:
            self.model.model.layers[layer] = nn.Module()  # what was put in place goes with the layer
            self.weights.release(f"model.layers.{layer}.")

    def _weight(self, linear: Linear) -> Tensor:
        return self.model.get_submodule(linear.module).weight if linear.module else self.model.output_weight  # type: ignore[return-value]

    def _calibration(self, done: set[str]) -> Calibration | None:
        """The text on its way, where a linear that is not written yet asks for it."""
        missing = [linear for linear in self.linears if any(spec.name not in done for spec in linear.specs())]
        if all(linear.quantizer.observe(linear.shape[1]) is None for linear in missing):
            return None
        return Calibration(self.model, self.texts["calibration"])


def _write(writer: StreamingWriter, done: set[str], linear: Linear, made: QuantizedWeight) -> None:
    import torch

    from waypost.model.linear import stored

    if not bool(torch.isfinite(made.scale).all()):
        raise NumericsError(f"{linear.stem}: a scale is not finite; the source's weights are broken")
    for spec, tensor in zip(linear.specs(), stored.tensors(linear.quantizer.scheme(), made), strict=True):
        if spec.name not in done:
            writer.write(spec.name, spec.role, tensor)
