"""Reading: a checkpoint, a plain Hugging Face folder or a run folder, opened with every claim about its bytes proved.

Opening proves, without reading data: the manifest's own digest, the headers of all files, that tensors lie side by side
without holes, that every listed file is there with its exact size, and that manifest, headers and folder agree. Data is
memory-mapped; the digests of all of it are checked with `verify=True` or by `findings`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waypost.core.errors import CheckpointError, nearest
from waypost.core.state import Entry, TensorSpec
from waypost.keep import disk, format
from waypost.keep import manifest as manifests
from waypost.keep.commit import INDEX, SCALARS
from waypost.keep.filling import THREADS, pread_all, read_entries
from waypost.keep.format import Placed, parse_json
from waypost.keep.lineage import Lineage, content_hash
from waypost.keep.manifest import Manifest
from waypost.keep.mapping import MappedFile
from waypost.keep.pieces import check_entry, digest_span
from waypost.keep.places import LATEST, plain_files, resolve, steps
from waypost.keep.remote import remote_url

if TYPE_CHECKING:
    from torch import Tensor

ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files of a plain Hugging Face folder that travel with the weights. A checkpoint's own are in its manifest."""

Key = tuple[str, str]

__all__ = ["LATEST", "Checkpoint", "resolve", "steps"]


class Checkpoint:
    """A checkpoint on disk.

        ckpt = Checkpoint("runs/tiny")                    # a run folder: the step that `latest` names
        ckpt.config["hidden_size"], ckpt.step, ckpt.names
        ckpt.tensor("model.norm.weight")                  # memory-mapped, (C,)
        ckpt.read(entry)                                  # fills entry.tensor from its box: any layout

    `path` is a checkpoint folder, a plain Hugging Face folder (`manifest` is then None), a run folder, or the URL of a step
    or a run in an object store (s3://bucket/run; `options` go to its fsspec file system). Raises
    CheckpointError that names file and tensor if anything does not add up; `verify=True` checks every digest too, and
    on a plain folder, which has none, checks what can be checked.
    """

    def __new__(cls, path: str | Path, **_: Any) -> Checkpoint:
        """For the URL of an object store, the reader of those."""
        if cls is Checkpoint and remote_url(path) is not None:
            from waypost.keep.object_reader import RemoteCheckpoint

            return super().__new__(RemoteCheckpoint)
        return super().__new__(cls)

    def __init__(self, path: str | Path, *, verify: bool = False, options: Mapping[str, Any] | None = None) -> None:
        if options:
            raise CheckpointError(f"{path}: options are for object stores, and this is a folder")
        self.path = resolve(Path(path))
        """The folder of the checkpoint itself."""
        self.manifest = self._read_manifest()
        """None for a plain Hugging Face folder."""
        self.config = parse_json(self._small("config.json"), f"{self.path / 'config.json'}")
        """The content of config.json."""
        self._mapped: dict[str, MappedFile] = {}
        self._headers: dict[str, int] = {}
        found = self._read_headers()
        self._placed = found if self.manifest is None else self._match(self.manifest, found)
        self.specs: dict[Key, TensorSpec] = {key: placed.spec for key, placed in self._placed.items()}
        """(role, name) -> TensorSpec, in the order of the files."""
        self._records: dict[Key, Sequence[str]] = {
            (r.placed.spec.role, r.placed.spec.name): r.digests for r in (self.manifest.tensors if self.manifest else ())
        }
        if verify:
            self._raise_findings()

    def __repr__(self) -> str:
        return f"Checkpoint('{self.path}', step={self.step}, tensors={len(self.specs)})"

    @property
    def step(self) -> int | None:
        return None if self.manifest is None else self.manifest.step

    @property
    def names(self) -> list[str]:
        """Names of the weights."""
        return [name for role, name in self.specs if role == "weight"]

    @property
    def lineage(self) -> Lineage | None:
        return None if self.manifest is None else self.manifest.lineage

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding itself."""
        if self.manifest is not None:
            return self.manifest.tied
        return bool(self.config.get("tie_word_embeddings", ("weight", "lm_head.weight") not in self.specs))

    @property
    def has_state(self) -> bool:
        """Whether it holds what training needs beside the weights."""
        return self.manifest is not None and SCALARS in self.manifest.files

    @property
    def scalars(self) -> dict[str, Any]:
        """The JSON part of the training state; empty without state."""
        return parse_json(self._small(SCALARS), f"{self.path / SCALARS}") if self.has_state else {}

    def assets(self) -> dict[str, bytes]:
        """Tokenizer, chat template and the like: path in the folder -> bytes."""
        if self.manifest is None:
            found = [name for name in ASSETS if (self.path / name).is_file()]
            found += sorted(f"{p.parent.name}/{p.name}" for p in self.path.glob("additional_chat_templates/*.jinja"))
            return {name: (self.path / name).read_bytes() for name in found}
        skip = {"config.json", INDEX, SCALARS, *self._headers}
        return {name: self._small(name) for name in self.manifest.files if name not in skip}

    def tensor(self, name: str, role: str = "weight") -> Tensor:
        """A whole tensor as a memory-mapped view of the file: nothing is copied, pages are read when touched.

        Read-only by convention: a write never reaches the file, yet later readers of this Checkpoint would see it.
        """
        placed = self.placed(name, role)
        if placed.file not in self._mapped:
            self._mapped[placed.file] = MappedFile(self.path / placed.file)
        return self._mapped[placed.file].tensor(placed)

    def release(self, name: str, role: str = "weight") -> None:
        """Gives a tensor's pages back to the system, so that walking through a large checkpoint does not fill memory.

        Views of it stay valid and read the file again; only for tensors that nobody has written to.
        """
        placed = self.placed(name, role)
        if placed.file in self._mapped:
            self._mapped[placed.file].release(placed.offset, placed.num_bytes)

    def read(self, entry: Entry) -> None:
        """Fills `entry.tensor` from its box; the dtype and the global shape must be the file's."""
        self.read_all([entry])

    def read_all(self, entries: Iterable[Entry], *, threads: int = THREADS) -> None:
        """`read` for many entries: several at a time, straight into their memory. Any layout, only the bytes it needs.

        Ranks do not share what they read: on one machine a second reader finds the pages in memory, and a copy from there
        is faster than one through a socket.
        """
        jobs = []
        for entry in entries:
            placed = self._check_asked(entry)
            check_entry(entry)
            jobs.append((self.path / placed.file, placed, entry))
        read_entries(jobs, threads)

    def _check_asked(self, entry: Entry) -> Placed:
        """The place of an entry's tensor, if its dtype and global shape are those asked for."""
        placed = self.placed(entry.spec.name, entry.spec.role)
        if (placed.spec.dtype, placed.spec.shape) != (entry.spec.dtype, entry.spec.shape):
            raise CheckpointError(
                f"{self.path}: {placed.spec.role} '{placed.spec.name}' is {placed.spec.dtype} "
                f"{list(placed.spec.shape)} here, {entry.spec.dtype} {list(entry.spec.shape)} was asked for"
            )
        return placed

    def placed(self, name: str, role: str = "weight") -> Placed:
        """Where a tensor lies; an unknown name is a CheckpointError with the nearest match."""
        if (role, name) in self._placed:
            return self._placed[role, name]
        names = [n for r, n in self._placed if r == role]
        if not names:
            roles = sorted({r for r, _ in self._placed})
            raise CheckpointError(f"{self.path}: holds no tensor of role '{role}'.{nearest(role, roles)}")
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise CheckpointError(f"{self.path}: no {role} '{name}' among {len(names)}.{hint}")

    def digests(self, name: str, role: str = "weight") -> list[str]:
        """Digests of a tensor's tiles, computed from its bytes."""
        return [self._tile_digest(self.placed(name, role), tile) for tile in range(format.num_tiles(self.specs[role, name]))]

    def recorded_digests(self, name: str, role: str = "weight") -> Sequence[str] | None:
        """Digests of a tensor's tiles as the manifest has them; None for a plain Hugging Face folder."""
        return None if self.manifest is None else self._records[role, name]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors: what `findings` reads."""
        return sum(placed.num_bytes for placed in self._placed.values())

    def verify_weights(self) -> None:
        """Checks the digests of config.json, of the headers and of every weight; CheckpointError names the first damage."""
        self._raise_findings(role="weight")

    def findings(self, on_bytes: Callable[[int], None] | None = None, *, role: str | None = None) -> Iterator[str]:
        """Reads everything (or the tensors of one role alone) and yields each damage, named by tensor, tile and file; calls
        `on_bytes` with bytes read.

        A plain Hugging Face folder has no digests: its bytes cannot be compared, and nothing is yielded.
        """
        if self.manifest is None:
            return
        for name, record in self.manifest.files.items():
            with (self.path / name).open("rb") as stream:
                data = stream.read(self._headers.get(name, record.num_bytes + 1))
            if format.digest(data) != record.digest:
                yield f"{self.path / name}: {'header' if name in self._headers else 'content'} does not match its digest"
        digests: dict[Key, Sequence[str]] = {}
        for tensor in self.manifest.tensors:
            digests[tensor.placed.spec.role, tensor.placed.spec.name] = tensor.digests
            if role not in (None, tensor.placed.spec.role):
                continue
            yield from self._damaged_tiles(tensor.placed, tensor.digests, on_bytes)
        weights = ((spec, digests[key]) for key, spec in self.specs.items() if spec.role in format.PUBLISHED)
        if content_hash(self.config, weights) != self.manifest.hash:
            yield f"{self.path / manifests.NAME}: hash is not that of config.json and the weights"

    def _damaged_tiles(self, placed: Placed, digests: Sequence[str], on_bytes: Callable[[int], None] | None) -> Iterator[str]:
        step = format.tile_rows(placed.spec)
        for tile, want in enumerate(digests):
            start, stop = format.tile_span(placed.spec, tile)
            if self._tile_digest(placed, tile) != want:
                rows = f"rows {tile * step} to {min((tile + 1) * step, *format.as_rows(placed.spec.shape)[:1])}"
                yield (
                    f"{self.path / placed.file}: {placed.spec.role} '{placed.spec.name}', tile {tile} of {len(digests)} "
                    f"({rows}, bytes {placed.offset + start} to {placed.offset + stop}) does not match its digest"
                )
            if on_bytes is not None:
                on_bytes(stop - start)

    def tile(self, placed: Placed, tile: int) -> memoryview:
        """The bytes of a tile, in a buffer of their own; not compared with their digest."""
        start, stop = format.tile_span(placed.spec, tile)
        buffer = memoryview(bytearray(stop - start))
        with disk.opened(self.path / placed.file, os.O_RDONLY) as fd:
            pread_all(self.path / placed.file, fd, buffer, placed.offset + start)
        return buffer

    def _tile_digest(self, placed: Placed, tile: int) -> str:
        start, stop = format.tile_span(placed.spec, tile)
        return digest_span(self.path / placed.file, placed.offset + start, stop - start)

    def _raise_findings(self, role: str | None = None) -> None:
        found = list(self.findings(role=role))
        if found:
            more = f" (and {len(found) - 1} more: run waypost verify)" if len(found) > 1 else ""
            raise CheckpointError(f"{found[0]}{more}; restore the file from a copy, or go back to an earlier checkpoint")

    def _read_manifest(self) -> Manifest | None:
        path = self.path / manifests.NAME
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk.explain(error, path) from error
        manifest = manifests.parse(raw, str(path))
        for name, record in manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: missing; the manifest lists it with {record.num_bytes} bytes, copy it again")
            if file.stat().st_size != record.num_bytes:
                raise CheckpointError(f"{file}: has {file.stat().st_size} bytes, the manifest says {record.num_bytes}; "
                                      f"{self._hit(manifest, name, file.stat().st_size)}copy it again")  # fmt: skip
        return manifest

    @staticmethod
    def _hit(manifest: Manifest, name: str, size: int) -> str:
        """Names the first tensor that a file cut at `size` does not hold in full, and its tile."""
        for record in manifest.tensors:
            placed = record.placed
            if placed.file == name and placed.offset + placed.num_bytes > size:
                spans = (format.tile_span(placed.spec, tile) for tile in range(len(record.digests)))
                tile = next(i for i, (_, stop) in enumerate(spans) if placed.offset + stop > size)
                return f"{placed.spec.role} '{placed.spec.name}' is cut off in tile {tile}; "
        return ""

    def _small(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path / name}: missing; the checkpoint is incomplete, copy it again") from error
        except OSError as error:
            raise disk.explain(error, self.path / name) from error

    def _read_headers(self) -> dict[Key, Placed]:
        """The tensors that the headers announce."""
        if self.manifest is None:
            roles = dict.fromkeys(plain_files(self.path), "weight")
        else:
            roles = {record.placed.file: record.placed.spec.role for record in self.manifest.tensors}
            roles.update(
                {name: "weight" for name in self.manifest.files if name.endswith(".safetensors") and name not in roles}
            )
        found: dict[Key, Placed] = {}
        for file, role in roles.items():
            tensors, self._headers[file] = format.read_header(self.path / file, file)
            for placed in tensors:
                spec = TensorSpec(placed.spec.name, placed.spec.dtype, placed.spec.shape, role)
                if (role, spec.name) in found:
                    raise CheckpointError(f"{self.path}: tensor '{spec.name}' lies in '{found[role, spec.name].file}' and "
                                          f"in '{file}'; remove the file that does not belong here")  # fmt: skip
                found[role, spec.name] = Placed(spec, file, placed.offset, placed.num_bytes)
        if self.manifest is None:
            self._check_index(found)
        return found

    def _check_index(self, found: Mapping[Key, Placed]) -> None:
        """The index of a sharded Hugging Face folder must name exactly the tensors of its files."""
        if not (self.path / INDEX).is_file():
            return
        listed = parse_json(self._small(INDEX), str(self.path / INDEX))["weight_map"]
        for name, file in listed.items():
            if ("weight", name) not in found or found["weight", name].file != file:
                raise CheckpointError(f"{self.path / file}: tensor '{name}' is not in it, {INDEX} says so; copy it again")
        for (_, name), placed in found.items():
            if name not in listed:
                raise CheckpointError(f"{self.path / placed.file}: tensor '{name}' is not in {INDEX}; copy it again")

    def _match(self, manifest: Manifest, found: Mapping[Key, Placed]) -> dict[Key, Placed]:
        """Proves that the manifest and the headers describe the same tensors at the same places."""
        for record in manifest.tensors:
            key = (record.placed.spec.role, record.placed.spec.name)
            if found.get(key) != record.placed:
                raise CheckpointError(f"{self.path / record.placed.file}: {key[0]} '{key[1]}' is {_show(found.get(key))}, "
                                      f"the manifest says {_show(record.placed)}; copy the file again")  # fmt: skip
        if len(found) != len(manifest.tensors):
            role, name = next(iter(set(found) - {(r.placed.spec.role, r.placed.spec.name) for r in manifest.tensors}))
            raise CheckpointError(f"{self.path / found[role, name].file}: holds {role} '{name}', which is not in the manifest")
        return dict(found)


def _show(placed: Placed | None) -> str:
    return "not in it" if placed is None else f"{placed.spec.dtype} {list(placed.spec.shape)} at byte {placed.offset}"
