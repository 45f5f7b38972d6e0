"""A subset of a run's training data, chosen by what the run's checkpoints make of each document, as files to train on.

    runs/proxy/selected/
      losses/step-00000100-1f0c2a77d4e1.npy   (2, documents) sums of loss and of tokens under one checkpoint
      0-kjv.jsonl                             a source's chosen documents, in its order, and those that it holds out
      selection.json                          what was asked, from which checkpoints, and what was kept

Invariants
- The files under losses/ are named by the checkpoint's weights and the rows it read: a call that was killed, or one that keeps
  another share or asks another selector, computes only what is missing.
- Held-out documents are written too, all of them: also those that are too long for a row and dropped there. They are held out
  by the hash of their content, so a run on the files, with the same `held_out`, evaluates on the same documents, whatever its
  tokenizer.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from waypost.core.config import to_tree
from waypost.core.errors import ConfigError
from waypost.core.progress import progress
from waypost.data.reading import read_documents
from waypost.data.selectors import Documents, Losses, Selector, best
from waypost.data.shards import prepare as prepare_shards
from waypost.data.sources import Source, find_files
from waypost.data.split import HeldOut, held_out_mask
from waypost.data.stream import DataStream
from waypost.data.token_shards import TokenShards
from waypost.keep.disk import make_parents, replace_file
from waypost.keep.lineage import checkpoint_hash
from waypost.keep.reader import Checkpoint
from waypost.keep.store import Store
from waypost.kernels import select as select_kernels
from waypost.measure.documents import DocumentSums
from waypost.model import hf
from waypost.model.decoder import Decoder
from waypost.model.head import token_log_probs
from waypost.model.tokenizer import Tokenizer
from waypost.train.recipe import TrainRecipe

Floats = NDArray[np.float64]
GROUP_TOKENS = 8192
"""Tokens that are scored at once."""


@dataclass(frozen=True)
class Selection:
    """What was chosen."""

    sources: list[dict[str, Any]]
    """To be the `data.sources` of a recipe."""
    documents: int
    """Chosen, of `of_documents` that could have been."""
    of_documents: int
    tokens: int
    of_tokens: int
    held_out: int
    """Documents that stay held out, in the files too."""
    checkpoints: int
    """Whose losses were read; 0 where the selector asked for none."""

    def summary(self) -> str:
        """What was chosen of how much, and the line of a recipe that trains on it."""
        share = self.tokens / self.of_tokens
        sources, by = json.dumps(self.sources), f", by {self.checkpoints} checkpoints" if self.checkpoints else ""
        return (
            f"{self.documents:,} of {self.of_documents:,} documents, {self.tokens:,} of {self.of_tokens:,} tokens "
            f"({share:.1%}){by}; {self.held_out:,} held-out documents stay with them\n"
            f"  train on them: waypost train RECIPE --set 'data.sources={sources}'"
        )


def select(
    recipe: TrainRecipe, run: str | Path, out: str | Path, selector: Selector, keep: float, reference: str | None = None
) -> Selection:
    """Writes the best `keep` (a share of each source's tokens) of `recipe`'s training data to `out`.

    Losses are those of all checkpoints that the folder `run` keeps, on documents cut every `data.seq_len` tokens (chats as
    the recipe's packer has it), once the selector asks for them. The reference is the held-out split, source by source, or
    the texts at `reference`, for all of them. Raises ConfigError for a share outside (0, 1], a run without checkpoints, or
    losses asked for without a reference.
    """
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"keep={keep}: a share of the tokens, above 0 and at most 1")
    store, folder, data = Store(run), Path(out), recipe.data
    steps = store.steps()
    if not steps:
        raise ConfigError(f"{run}: holds no checkpoint; give the folder of a run: waypost select runs/tiny --out ...")
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    checkpoints = [store.checkpoint(step) for step in steps]
    tokenizer = Tokenizer.from_assets(checkpoints[-1].assets())
    cache = Path(data.cache) if data.cache is not None else Path(run) / "data"
    shards = prepare_shards(data.sources, tokenizer, cache, settings=data.documents)
    pool = DataStream(shards, split="train_once", seq_len=data.seq_len, held_out=data.held_out, packer=data.packer)
    ids = pool.kept_documents
    ids = ids[np.concatenate([s.num_targets for s in shards.sources])[ids] > 0]  # a document of one token predicts nothing
    if not len(ids):
        raise ConfigError("data: no document has a token to learn from; in chats only what the assistant says counts")
    read: list[Checkpoint] = []

    def losses() -> Losses:
        wanted, rows = _reference(recipe, reference, shards, tokenizer, cache)
        sums = _all_sums(checkpoints, recipe, {"documents": (pool, shards), "reference": (rows, wanted)}, folder / "losses")
        read[:] = checkpoints
        return _losses(sums, ids, _domains(wanted), len(shards.sources))

    lengths = np.concatenate([s.lengths for s in shards.sources])[ids]
    documents = Documents(lengths, _domains(shards)[ids], len(checkpoints), losses)
    scores = selector.score(documents)
    chosen = best(scores, documents, keep)
    aside = np.concatenate([held_out_mask(s.hashes, data.held_out, s.source.path) for s in shards.sources])
    told = _told(shards, dict(zip(ids[chosen].tolist(), scores[chosen].tolist(), strict=True)), np.flatnonzero(aside))
    found = Selection(
        [_write(folder, n, source, told[n]) for n, source in enumerate(data.sources)], int(chosen.sum()), len(ids),
        int(lengths[chosen].sum()), int(lengths.sum()), int(aside.sum()), len(read),
    )  # fmt: skip
    asked = {"selector": type(selector).__name__, **to_tree(selector), "keep": keep, "reference": reference}
    made = [{"path": str(c.path), "hash": checkpoint_hash(c)} for c in read]
    replace_file(folder / "selection.json", json.dumps({**asked, **vars(found), "made_by": made}, indent=2).encode())
    return found


def _reference(
    recipe: TrainRecipe, path: str | None, shards: TokenShards, tokenizer: Tokenizer, cache: Path
) -> tuple[TokenShards, DataStream]:
    """What the reference's documents lie in, and the stream of them: the held-out split of `shards`, or the texts at `path`."""
    data = recipe.data
    if path is not None:
        wanted = prepare_shards([Source(path=path)], tokenizer, cache, settings=data.documents)
        return wanted, DataStream(wanted, split="train_once", seq_len=data.seq_len, held_out=HeldOut(frac=0.0))
    if data.held_out.frac == 0 and data.held_out.documents is None:
        raise ConfigError("data.held_out.frac=0: nothing is held out to refer to; give --reference, texts like those wanted")
    return shards, DataStream(shards, split="held_out", seq_len=data.seq_len, held_out=data.held_out, packer=data.packer)


def _all_sums(
    checkpoints: Sequence[Checkpoint], recipe: TrainRecipe, parts: Mapping[str, tuple[DataStream, TokenShards]], folder: Path
) -> dict[str, Floats]:
    """Part -> (checkpoints, 2, documents): sums of loss and of tokens under each checkpoint, oldest first."""
    ops = select_kernels(recipe.numerics, recipe.kernel)
    found: dict[str, list[Floats]] = {name: [] for name in parts}
    total = len(checkpoints) * sum(stream.num_tokens for stream, _ in parts.values())
    with progress("scoring documents", total=total, unit="tokens") as bar:
        for checkpoint in checkpoints:
            model: Decoder | None = None
            for name, (stream, shards) in parts.items():
                parts_of_key = [checkpoint_hash(checkpoint), stream.fingerprint]
                key = hashlib.blake2b(json.dumps(parts_of_key).encode(), digest_size=6).hexdigest()
                path = folder / f"{checkpoint.path.name}-{key}.npy"
                if not path.exists():
                    model = model if model is not None else hf.load(checkpoint.path, ops=ops)
                    make_parents(path)
                    content = io.BytesIO()
                    np.save(content, _sums(model, stream, shards.num_documents), allow_pickle=False)
                    replace_file(path, content.getvalue())
                found[name].append(np.load(path, allow_pickle=False))
                bar.advance(stream.num_tokens, f"step {checkpoint.step}")
    return {name: np.stack(arrays) for name, arrays in found.items()}


def _sums(model: Decoder, stream: DataStream, num_documents: int) -> Floats:
    """(2, documents) sums of loss and of weight; zeros for documents that are not in the stream."""
    sums, out = DocumentSums(), np.zeros((2, num_documents))
    model.eval()
    for batch in stream.batches(max(1, GROUP_TOKENS // stream.seq_len)):
        sums.add(batch, -token_log_probs(model, batch))
    for document, value in sums.value.items():
        out[:, document] = value, sums.weight[document]
    return out


def _losses(sums: Mapping[str, Floats], ids: NDArray[np.int64], domains: NDArray[np.int64], num_domains: int) -> Losses:
    """Means of documents; of the reference, the mean over each domain's documents, or over all where it has one domain."""
    value, weight = (sums["reference"][:, part] for part in (0, 1))
    known = (weight > 0).all(axis=0)
    each = value / np.where(weight > 0, weight, 1.0)
    of_domain = [known & (domains == d) for d in range(int(domains.max()) + 1)]
    empty = [d for d, members in enumerate(of_domain) if not members.any()]
    if empty:
        raise ConfigError(f"reference: source {empty[0]} has no document of two tokens or more to refer to; hold out more")
    reference = np.stack([each[:, members].mean(axis=1) for members in of_domain], axis=1)
    if reference.shape[1] == 1:
        reference = np.repeat(reference, num_domains, axis=1)
    documents = sums["documents"][:, :, ids]
    return Losses(documents=documents[:, 0] / documents[:, 1], reference=reference)


def _domains(shards: TokenShards) -> NDArray[np.int64]:
    """(documents,) the source of each, by its place."""
    return np.repeat(np.arange(len(shards.sources)), [s.num_documents for s in shards.sources])


def _told(shards: TokenShards, scores: Mapping[int, float], held_out: NDArray[np.int64]) -> list[dict[str, dict[str, Any]]]:
    """Of each source: origin -> what its line tells of a document that stays. Two sources may read one file."""
    domains, found = _domains(shards), [dict[str, dict[str, Any]]() for _ in shards.sources]
    says: dict[int, dict[str, Any]] = {d: {"score": score} for d, score in scores.items()}
    says |= {d: {"held_out": True} for d in held_out.tolist()}
    for document, line in says.items():
        found[domains[document]][shards.where(document)] = line
    return found


def _write(folder: Path, number: int, source: Source, told: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The source's chosen and held-out documents as JSON lines: what the new source is, for a recipe."""
    stem = source.path.rstrip("/").rsplit("/", 1)[-1].replace("builtin:", "").split(".")[0].replace("*", "") or "source"
    path = folder / f"{number}-{stem}.jsonl"
    make_parents(path)
    fresh = path.with_name(f"{path.name}.tmp")
    with fresh.open("w", encoding="utf-8") as stream:
        stream.writelines(_lines(source, told))
    fresh.replace(path)
    tree: dict[str, Any] = {"path": str(path)}
    if source.messages_field is not None:
        tree["messages_field"] = "messages"
    return tree if source.weight is None else {**tree, "weight": source.weight}


def _lines(source: Source, told: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for file in find_files(source):
        for document in read_documents(file, source):
            origin = f"{file.path}:{document.number}"
            if origin in told:
                content = {"text": document.text} if document.messages is None else {"messages": document.messages}
                yield json.dumps({**content, "origin": origin, **told[origin]}, ensure_ascii=False) + "\n"
