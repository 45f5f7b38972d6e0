"""Folders of torch.distributed.checkpoint (DCP): read without trusting them, and written.

Format    a pickle `.metadata` (names, shapes, chunks, where each lies), and files of zip archives, one for each chunk
Safe      this is the one file of Waypost that opens a pickle. `.metadata` is read by an unpickler that knows a dozen names
          and turns them into inert records of ours: no class of torch is built, no function is called, anything else is
          refused. Chunks and values are read by torch's own `weights_only` reader, which refuses code too.
Checked   chunks of a tensor are disjoint and cover it; each lies inside its file and has the shape and dtype announced
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waypost.core.errors import CheckpointError, nearest
from waypost.core.state import Box, TensorSpec
from waypost.keep import boxes, format

if TYPE_CHECKING:
    from torch import Tensor

METADATA = ".metadata"
_META = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"


class _Record:
    """Whatever a pickled object held, and nothing that it could do."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.args = state

    def __hash__(self) -> int:  # a key of the pickle's own tables, hashed before its state is there
        return id(self)

    def field(self, name: str) -> Any:
        if name not in self.__dict__:
            raise CheckpointError(f"{METADATA}: a {type(self).__name__} without '{name}'; it is damaged or of another version")
        return self.__dict__[name]


def _text(*parts: Any) -> str:
    return "/".join(map(str, parts))


def _sizes(values: Any = ()) -> tuple[int, ...]:
    return tuple(int(n) for n in values)


def _member(of: Any, name: Any) -> _Record:
    """`getattr` as Pythons up to 3.11.3 pickle the member of an enumeration; of what is no record of the list, refused."""
    if not (isinstance(of, type) and issubclass(of, _Record)):
        raise CheckpointError("it names builtins.getattr of what is no memory format, which may run a program; refused")
    return _Record(name)


class Metadata(_Record):
    """The root record: what is stored, and in which file each part lies."""


class TensorStorage(_Record):
    """A tensor: its properties, its size, and the chunks it was cut into."""


class BytesStorage(_Record):
    """A value that is no tensor. Its bytes are pickle, and stay unread."""


class Chunk(_Record):
    """A box of a tensor: where it begins and how far it goes, in elements a dimension."""


class Properties(_Record):
    """The dtype, and what else torch notes of a tensor."""


class StorageInfo(_Record):
    """A part's file, relative to the folder, with its offset and length in bytes."""


ALLOWED: Mapping[tuple[str, str], Any] = {
    (_META, "Metadata"): Metadata,
    (_META, "TensorStorageMetadata"): TensorStorage,
    (_META, "BytesStorageMetadata"): BytesStorage,
    (_META, "ChunkStorageMetadata"): Chunk,
    (_META, "MetadataIndex"): _Record,
    (_META, "TensorProperties"): Properties,
    (_META, "StorageMeta"): _Record,
    (_META, "_MEM_FORMAT_ENCODING"): _Record,
    ("builtins", "getattr"): _member,
    (_FILES, "_StorageInfo"): StorageInfo,
    ("torch", "Size"): _sizes,
    ("torch.serialization", "_get_layout"): _text,
    ("collections", "OrderedDict"): dict,
    **{(f"pathlib{m}", name): _text for m in ("", "._local") for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")},
    **{("torch", theirs): spelling for spelling, (theirs, _) in format.DTYPES.items()},
}
"""(module, name) -> what stands for it here. Nothing else may be named by a .metadata file."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise CheckpointError(f"it names {module}.{name}, which no checkpoint needs and which may run a program; refused")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise CheckpointError("it refers to objects outside of itself")


@dataclass(frozen=True)
class Stored:
    """A chunk of a tensor, or a value: its archive in a file."""

    box: Box | None
    file: str
    offset: int
    num_bytes: int


class DcpFolder:
    """A checkpoint that torch.distributed.checkpoint wrote.

    `specs`: flattened name -> TensorSpec (role ""), `values`: the names of what is no tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        tree = _read_metadata(self.path / METADATA)
        places: dict[str, list[Stored]] = {}
        for index, info in tree.field("storage_data").items():
            places.setdefault(index.field("fqn"), []).append(self._stored(index, info))
        self.specs: dict[str, TensorSpec] = {}
        self.values: list[str] = []
        self._chunks: dict[str, list[Stored]] = {}
        for name, kind in tree.field("state_dict_metadata").items():
            if name not in places:
                raise CheckpointError(f"{self.path}: '{name}' is announced and lies nowhere; the checkpoint is incomplete")
            if isinstance(kind, BytesStorage):
                self.values.append(name)
                self._chunks[name] = places[name]
            else:
                self.specs[name], self._chunks[name] = self._tensor(name, kind, places[name])

    def _stored(self, index: _Record, info: _Record) -> Stored:
        file, offset, length = info.field("relative_path"), info.field("offset"), info.field("length")
        where = self.path / str(file)
        if info.__dict__.get("transform_descriptors"):
            raise CheckpointError(f"{where}: was written with transforms (compression), which are not read here")
        if "/" in str(file) or not where.is_file():
            raise CheckpointError(f"{where}: missing; the checkpoint is incomplete, copy it again")
        if not 0 <= offset <= offset + length <= where.stat().st_size:
            raise CheckpointError(f"{where}: is cut off: it has {where.stat().st_size} bytes, '{index.field('fqn')}' lies at "
                                  f"{offset} to {offset + length}")  # fmt: skip
        start = index.__dict__.get("offset")  # a value has none
        return Stored(None if start is None else tuple((n, n) for n in start), str(file), offset, length)

    def _tensor(self, name: str, kind: _Record, places: list[Stored]) -> tuple[TensorSpec, list[Stored]]:
        dtype, shape = (kind.field("properties").args or [None])[0], kind.field("size")
        if dtype not in format.DTYPES:
            raise CheckpointError(f"{self.path}: '{name}' is of dtype {dtype!r}.{nearest(str(dtype), format.DTYPES)}")
        spec = TensorSpec(name, dtype, shape, "")
        lie = {tuple(a for a, _ in place.box or ()): place for place in places}
        chunks = []
        for chunk in kind.field("chunks"):
            offsets, sizes = chunk.field("offsets"), chunk.field("sizes")
            if offsets not in lie:
                raise CheckpointError(f"{self.path}: '{name}' lacks its part at {list(offsets)}; the checkpoint is incomplete")
            box = tuple((o, o + n) for o, n in zip(offsets, sizes, strict=True))
            chunks.append(Stored(box, lie[offsets].file, lie[offsets].offset, lie[offsets].num_bytes))
        boxes.check_cover(spec, [chunk.box for chunk in chunks if chunk.box is not None])
        return spec, chunks

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, put together from its chunks; in host memory."""
        import torch

        spec = self.specs[name]
        out = torch.empty(spec.shape, dtype=format.torch_dtype(spec.dtype))
        for chunk in self._chunks[name]:
            assert chunk.box is not None
            part = self._load(name, chunk)
            want = tuple(b - a for a, b in chunk.box)
            if not isinstance(part, torch.Tensor) or part.dtype != out.dtype or tuple(part.shape) != want:
                raise CheckpointError(f"{self.path / chunk.file}: '{name}' holds something else than {spec.dtype} {list(want)}")
            out[boxes.slices(chunk.box)] = part.detach()
        return out

    def value(self, name: str) -> Any:
        """What is no tensor: numbers, text, lists and mappings of them, or tensors; never code."""
        return self._load(name, self._chunks[name][0])

    def num_bytes(self, name: str) -> int:
        """Bytes of the tensor's data; KeyError for a name that is not there."""
        return format.num_bytes(self.specs[name])

    def _load(self, name: str, place: Stored) -> Any:
        import torch

        with (self.path / place.file).open("rb") as stream:
            stream.seek(place.offset)
            raw = io.BytesIO(stream.read(place.num_bytes))
        try:
            return torch.load(raw, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{self.path / place.file}: '{name}' is damaged, or not plain data: {line}") from error


def _read_metadata(path: Path) -> _Record:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); a DCP folder has it, written last") from error
    try:
        tree = _Unpickler(io.BytesIO(raw)).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path}: no metadata of torch.distributed.checkpoint, or damaged ({error})") from error
    if not isinstance(tree, Metadata):
        raise CheckpointError(f"{path}: holds no Metadata of torch.distributed.checkpoint")
    return tree


def write_dcp(out: Path, tensors: Iterator[tuple[tuple[str, ...], Tensor]], values: Mapping[str, Any]) -> None:
    """Writes tensors, named by their path in the state dict, and plain `values`, with DCP's own writer, in one process."""
    import warnings

    import torch.distributed.checkpoint as dcp

    state: dict[str, Any] = dict(values)
    for path, tensor in tensors:
        place = state
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to save in a single process": it is
        dcp.save(state, checkpoint_id=str(out), no_dist=True)
