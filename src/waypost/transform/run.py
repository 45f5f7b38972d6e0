"""Running a transform: plan it, stream it into a new checkpoint, verify what it promised, commit.

Memory   one block of one target and of its sources (`Plan.peak_bytes`), whatever the size of the models: blocks go to their
         final offset in the file, and the sources' pages are given back as they are used
Rounding an expression is evaluated in its own precision (float64 for sums) and rounded once, to the target's dtype. From
         float64 to a 16-bit dtype PyTorch passes through float32: at most 2^-13 of a unit in the last place beyond a half
Crash    killed anywhere and run again, it goes on behind the tensors that are durable and gives the same bytes. The output
         folder appears at once, complete and verified, or not at all; an existing folder is never touched
State    optimizer state is dropped: no rule makes the moments of several checkpoints those of their combination
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waypost.core.config import to_tree
from waypost.core.errors import CheckpointError, ConfigError, NumericsError
from waypost.core.paths import given
from waypost.core.progress import progress, say
from waypost.core.state import TensorSpec
from waypost.keep import disk
from waypost.keep.format import as_rows, digest, torch_dtype
from waypost.keep.lineage import Lineage, checkpoint_hash
from waypost.keep.pieces import rows_of
from waypost.transform import invariant
from waypost.transform.agreement import assets_of, check_adapters, check_agreement
from waypost.transform.expression import FLOATS, TileReader
from waypost.transform.plan import Plan, Score, Services, Target
from waypost.transform.recipe import HeldOut, TransformRecipe, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from waypost.keep.reader import Checkpoint
    from waypost.keep.streaming import StreamingWriter

STATE_RULE = "optimizer state is dropped"


@dataclass(frozen=True)
class Result:
    """What a transform did."""

    path: Path
    plan: Plan
    receipt: Mapping[str, Any]
    """The function-preservation receipt, as the manifest holds it."""
    seconds: float
    resumed_tensors: int
    """Tensors that an interrupted run had finished already."""
    bytes_read: int
    peak_bytes: int
    """What the plan said it would hold at once."""


class Sources:
    """The source checkpoints as a TileReader over their memory maps. `release` gives their pages back."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self.checkpoints = checkpoints
        self._open: dict[tuple[int, str], Tensor] = {}

    def spec(self, source: int, name: str) -> TensorSpec:
        if not 0 <= source < len(self.checkpoints):
            raise ConfigError(f"plan: reads source {source} of {len(self.checkpoints)}; sources count from 0")
        spec = self.checkpoints[source].specs.get(("weight", name))
        if spec is None:
            raise ConfigError(f"plan: {self.checkpoints[source].path} has no tensor '{name}'")
        return spec

    def rows(self, source: int, name: str, start: int, stop: int) -> Tensor:
        key = (source, name)
        if key not in self._open:
            tensor = self.checkpoints[source].tensor(name)
            self._open[key] = rows_of(tensor)
        return self._open[key][start:stop]

    def release(self) -> None:
        """Gives the pages that were touched back to the system, whose cache keeps them, and forgets the open tensors."""
        for source, name in self._open:
            self.checkpoints[source].release(name)
        self._open.clear()


def transform(
    plan_or_recipe: Plan | TransformRecipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
) -> Path:
    """Makes the checkpoint `out` (which must not exist) and returns its folder.

    `plan_or_recipe` is a Plan, a recipe, its mapping, or the path of a YAML file (mergekit's is read too). That the sources of
    a recipe agree is checked here; a Plan answers for its own. Raises ConfigError, ShapeError, CheckpointError, CapacityError
    or NumericsError; what was there before is untouched.
    """
    return run(plan_or_recipe, out, overrides=overrides).path


def run(
    plan_or_recipe: Plan | TransformRecipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    verify: bool | None = None,
) -> Result:
    """As `transform`, and tells what it did. `verify` overrides the recipe's."""
    began = time.monotonic()
    if disk.occupied(given(out, "out")):
        raise CheckpointError(f"{out} exists already; name another folder or remove it")
    if isinstance(plan_or_recipe, Plan):
        plan, tree, probe_tokens = plan_or_recipe, {}, 64
        checkpoints = open_sources(plan.sources)
        check_adapters(checkpoints, plan.absorbs)
        verify = True if verify is None else verify
    else:
        recipe = resolve(plan_or_recipe, overrides)
        tree, probe_tokens = to_tree(recipe), recipe.probe_tokens
        verify = recipe.verify if verify is None else verify
        checkpoints, plan = make_plan(recipe)
    return _execute(plan, checkpoints, Path(out), tree, probe_tokens if verify else None, began)


def open_sources(paths: Sequence[str | Path]) -> list[Checkpoint]:
    """The checkpoints at `paths`; a path that is named twice is opened once."""
    from waypost.keep.reader import Checkpoint

    opened = {str(path): Checkpoint(path) for path in dict.fromkeys(map(str, paths))}
    for path, checkpoint in opened.items():
        if checkpoint.config.get("quantization_config"):
            raise ConfigError(
                f"{path}: its weights are quantised, and a transform needs full ones; take the folder it was made from, or "
                f"widen it: waypost export {path} OUT --weights-only --dtype bf16"
            )
    return [opened[str(path)] for path in paths]


def make_plan(recipe: TransformRecipe) -> tuple[list[Checkpoint], Plan]:
    """The sources of a recipe, found to agree, and the plan of its method, found to be computable. Writes nothing."""
    folders = [Path(path).expanduser() for path in recipe.sources]
    checkpoints = open_sources(folders if recipe.select is None else recipe.select.select(folders))
    carry = check_agreement(checkpoints, recipe.carry, recipe.dtype)
    services = services_of(checkpoints, recipe.held_out, recipe.dtype, carry)
    plan = recipe.method.plan(checkpoints, services)
    check_adapters(checkpoints, plan.absorbs)
    return checkpoints, plan.check(Sources(checkpoints))


def services_of(checkpoints: Sequence[Checkpoint], held_out: HeldOut, dtype: str | None, carry: int) -> Services:
    """What a planner may ask for; what needs a text only where there is one."""
    from waypost.transform.squares import GradientSquares, WeightSquares

    weights = WeightSquares(checkpoints[0])
    if held_out.path is None:
        return Services(weight_squares=weights, dtype=dtype, carry=carry)
    score, gradients = make_score(checkpoints, held_out, carry), GradientSquares(checkpoints[0], held_out)
    return Services(score, weights, gradients, dtype, carry)


def _execute(
    plan: Plan, checkpoints: Sequence[Checkpoint], out: Path, tree: dict[str, Any], probe: int | None, began: float
) -> Result:
    from waypost.keep.streaming import StreamingWriter

    sources = Sources(checkpoints)
    plan.check(sources)
    carried = checkpoints[plan.carry]
    config = {**carried.config, **plan.config}
    if probe is not None:
        invariant.check_supported(config)
    made = {"invariant": plan.invariant, "notes": plan.notes, "state": STATE_RULE, "digest": digest(plan.to_json().encode())}
    lineage = Lineage(parents_of(checkpoints), "transform", {**tree, "plan": made})
    specs = [target.weight_spec for target in plan.targets]
    with StreamingWriter(out, specs, config, lineage=lineage, assets=assets_of(carried)) as writer:
        resumed = len(writer.written)
        _write(plan, sources, writer)
        receipt = _receipt(plan, checkpoints, writer, config, probe)
        path = writer.commit(receipts=[receipt])
    return Result(path, plan, receipt, time.monotonic() - began, resumed, plan.bytes_read(sources), plan.peak_bytes(sources))


def parents_of(checkpoints: Sequence[Checkpoint]) -> list[dict[str, str]]:
    """Path and hash of every source; one that is named more than once is hashed once."""
    hashes: dict[Path, str] = {}
    for checkpoint in checkpoints:
        if checkpoint.path not in hashes:
            if checkpoint.manifest is None:
                say(f"hashing {checkpoint.path}, which has no manifest")
            hashes[checkpoint.path] = checkpoint_hash(checkpoint)
    return [{"path": str(checkpoint.path), "hash": hashes[checkpoint.path]} for checkpoint in checkpoints]


def _write(plan: Plan, sources: Sources, writer: StreamingWriter) -> None:
    """Evaluates and writes every target that is not there yet, in the plan's order."""
    done = {name for role, name in writer.written}
    if done:
        say(f"going on behind {len(done)} of {len(plan.targets)} tensors that are written already")
    with progress("transforming", total=plan.bytes_written, unit="bytes") as bar:
        for target in plan.targets:
            if target.name not in done:
                writer.write_blocks(target.name, "weight", functools.partial(_block, target, sources))
            bar.advance(target.num_bytes, note=target.name)


def _block(target: Target, sources: Sources, start: int, stop: int) -> Tensor:
    rows = evaluate(target, sources, start, stop)
    sources.release()
    return rows


def evaluate(target: Target, reader: TileReader, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows start .. stop of a target (a scalar has one), rounded once to its dtype, a tile at a time.

    NumericsError where a value is not finite, or overflows that dtype.
    """
    import torch

    shape = as_rows(target.shape)
    stop = shape[0] if stop is None else stop
    out = torch.empty((stop - start, *shape[1:]), dtype=torch_dtype(target.dtype))
    for at in range(start, stop, target.tile_rows):
        end = min(at + target.tile_rows, stop)
        tile = out[at - start : end - start]
        tile.copy_(target.value.rows(reader, at, end))
        if target.dtype in FLOATS and tile.numel() and not all(map(math.isfinite, _extremes(tile))):
            raise NumericsError(
                f"{target.name}: rows {at} to {end} hold a value that is not finite in {target.dtype}; a source is broken, "
                "or its values need a wider dtype in the recipe"
            )
    return out


def _extremes(tile: Tensor) -> tuple[float, float]:
    """Smallest and largest value; NaN where there is one."""
    import torch

    low, high = torch.aminmax(tile)
    return float(low), float(high)


def _receipt(
    plan: Plan, checkpoints: Sequence[Checkpoint], writer: StreamingWriter, config: dict[str, Any], probe: int | None
) -> dict[str, Any]:
    """Measures the invariant on the bytes that were written; what breaks its promise is removed."""
    if probe is None:
        return invariant.unverified(plan.invariant, "verification was turned off")
    writer.sync()
    try:
        output = invariant.Weights(
            writer.folder, config, [target.name for target in plan.targets], writer.tensor, writer.release
        )
        return invariant.measure(checkpoints[plan.reference], output, plan.invariant, probe, plan.equality)
    except NumericsError:
        writer.close()
        disk.remove_tree(writer.unfinished)
        raise


def make_score(checkpoints: Sequence[Checkpoint], held_out: HeldOut, carry: int) -> Score:
    """Plan -> held-out loss, nats per token, of the model it would write; candidates are built in memory, never on disk."""
    from waypost.kernels import select
    from waypost.measure.perplexity import evaluate as measure_loss
    from waypost.model.hf import assemble

    batches = functools.cache(lambda: held_out_batches(checkpoints[carry], held_out))
    ops, sources = select("exact"), Sources(checkpoints)
    config = invariant.check_supported(dict(checkpoints[carry].config))

    def score(plan: Plan) -> float:
        weights = {t.name: evaluate(t, sources).reshape(t.shape) for t in plan.targets}
        sources.release()
        loss = float(measure_loss(assemble(config, weights, ops=ops, copy=False), batches()).loss)
        say(f"held-out loss {loss:.4f}: {_members(plan)}")
        return loss

    return score


def _members(plan: Plan) -> str:
    """The sources that a plan reads, by name; of many, how many."""
    used = sorted({read.source for target in plan.targets for read in target.value.reads()})
    if len(used) > 3:
        return f"a combination of {len(used)}"
    return " + ".join(Path(plan.sources[index]).name for index in used)


def held_out_batches(checkpoint: Checkpoint, held_out: HeldOut) -> list[Any]:
    """The beginning of the held-out text in pieces of `seq_tokens`, a few to a batch, with the bytes of their targets.

    ConfigError where there is no text, or a piece is longer than the model's context: beyond it a loss says nothing.
    """
    import torch

    from waypost.core.batch import Batch
    from waypost.data.reading import read_documents
    from waypost.data.sources import Source, find_files
    from waypost.model.linear.quantized import architecture
    from waypost.model.tokenizer import Tokenizer

    source = Source(path=str(held_out.path))
    tokenizer = Tokenizer.from_assets(checkpoint.assets())
    pieces: list[list[int]] = []
    left = held_out.max_tokens
    for document in (d for file in find_files(source) for d in read_documents(file, source)):
        tokens = tokenizer.encode(document.text)[:left]
        left -= len(tokens)
        cut = (tokens[at : at + held_out.seq_tokens] for at in range(0, len(tokens), held_out.seq_tokens))
        pieces.extend(piece for piece in cut if len(piece) > 1)
        if left <= 0:
            break
    if not pieces:
        raise ConfigError(f"held_out.path: {held_out.path} holds no text to measure a loss on")
    longest, context = max(map(len, pieces)), architecture(checkpoint.config).max_position_embeddings
    if longest > context:
        raise ConfigError(
            f"seq_tokens={held_out.seq_tokens}: cuts {held_out.path} into pieces of up to {longest} tokens, and the context of "
            f"{checkpoint.path} is {context}; give seq_tokens of at most {context}"
        )
    sizes = {token: float(len(tokenizer.token_bytes(token))) for piece in pieces for token in piece}
    batches = []
    for group in (pieces[at : at + 4] for at in range(0, len(pieces), 4)):
        targets = [piece[1:] for piece in group]
        batch = Batch.of([piece[:-1] for piece in group], targets=targets, weights=[[1.0] * len(row) for row in targets])
        num_bytes = torch.tensor([sizes[token] for row in targets for token in row])
        batches.append(replace(batch, token_extras={"bytes": num_bytes}))
    return batches


def peak_rss_bytes() -> int:
    """The largest resident memory that this process has had."""
    import resource

    scale = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
