"""Reads and writes safetensors files, one tensor at a time.

The library of the format maps whole files into memory (every page touched counts as resident) and writes only complete
dicts. Here a tensor is read with one allocation of its own size and written as soon as it exists, so a shard of 70B
parameters passes through a worker that never holds more than one layer. Files are byte-stable: the same tensors give
the same bytes, and they appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from raymem.errors import ModelError
from raymem.storage.errors import writing
from raymem.storage.inside import is_inside
from raymem.storage.json_files import as_object, parse, read_object
from raymem.text import shown

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX = "model.safetensors.index.json"
"""The index of a model of several files, unless its config names another."""
_SINGLE = "model.safetensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT_BYTES = 100_000_000
_SAMPLE_BYTES = 4096


class Directory(Protocol):
    """A directory whose files can be read; see :func:`raymem.storage.remote.files.directory_at`."""

    def __truediv__(self, file: str, /) -> Any:
        """Return a file: of :class:`pathlib.Path` what reading takes, ``open``, ``stat`` and ``is_file``."""


@dataclass(frozen=True)
class Entry:
    """The position of one tensor in the files of a directory."""

    file: str
    """The file, relative to the directory."""
    key: str
    """The tensor's name in the file."""
    dtype: str
    """The dtype as the format spells it, for example ``BF16``."""
    shape: tuple[int, ...]
    begin: int
    """The first byte, from the start of the file."""
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def read_header(directory: Directory, file: str) -> tuple[dict[str, str], dict[str, Entry]]:
    """Read metadata, and the tensors of a safetensors file by key.

    Raises:
        ModelError: missing, truncated or malformed.
    """
    path = directory / file
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= _HEADER_LIMIT_BYTES:
                raise ValueError("the header has no sensible length")
            header = as_object(parse(stream.read(length), "its header", ValueError), "its header", ValueError)
        metadata = header.pop("__metadata__", {})
        start = 8 + length
        entries = {}
        for key, value in header.items():
            begin, end = value["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (begin, end - begin, *value["shape"])):
                raise ValueError(f"tensor {shown(key)} has no sensible place or shape")
            entries[key] = Entry(file, key, value["dtype"], tuple(value["shape"]), start + begin, start + end)
        size, needed = path.stat().st_size, max([start, *(entry.end for entry in entries.values())])
        if size < needed:
            raise ValueError(f"it has {size} bytes of {needed}")
        for entry in entries.values():
            if entry.dtype in DTYPES and entry.num_bytes != math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
                raise ValueError(f"tensor {entry.key} has {entry.num_bytes} bytes for shape {list(entry.shape)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a complete safetensors file ({error}); fetch it again") from None
    return metadata, entries


def read_tensor(directory: Directory, entry: Entry, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Read one tensor to the CPU; its own bytes are all that is allocated.

    Args:
        memory: uint8, 1-D and long enough; gets the tensor instead of new memory.

    Raises:
        ModelError: the file is gone or shorter than its header said.
    """
    path = directory / entry.file
    raw = torch.empty(entry.num_bytes, dtype=torch.uint8) if memory is None else memory[: entry.num_bytes]
    view = raw.numpy().data  # shares the memory of raw
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(entry.begin)
            filled = 0
            while filled < len(view):
                count = stream.readinto(view[filled:])
                if not count:
                    raise ModelError(f"{path}: tensor {entry.key} ends early; fetch the file again")
                filled += count
    except OSError as error:
        raise ModelError(f"{path}: tensor {entry.key} cannot be read ({error}); fetch the file again") from None
    return raw.view(DTYPES[entry.dtype]).view(entry.shape)


def fingerprint(directory: Directory, file: str) -> dict[str, Any]:
    """Return size and a digest of the header and of two pages of every tensor: {"bytes": int, "sample_sha256": str}.

    Names and shapes alone would not tell two trainings of one architecture apart; all bytes would take as long as the
    pruning itself.

    Raises:
        ModelError: not a complete safetensors file.
    """
    _, entries = read_header(directory, file)
    path = directory / file
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            digest.update(stream.read(int.from_bytes(stream.read(8), "little")))
            for entry in sorted(entries.values(), key=lambda entry: entry.begin):
                for position in (entry.begin, entry.begin + entry.num_bytes // 2):
                    stream.seek(position)
                    digest.update(stream.read(min(_SAMPLE_BYTES, entry.end - position)))
        return {"bytes": path.stat().st_size, "sample_sha256": digest.hexdigest()}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error}); fetch it again") from None


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor that will be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def write_tensors(
    path: Path,
    specs: Mapping[str, Spec],
    make: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
    *,
    sha256_at: Path | None = None,
    behind: bool = False,
) -> None:
    """Write a safetensors file tensor by tensor; it appears under ``path`` when whole and on the disk.

    Args:
        specs: key -> what ``make(key)`` will return.
        make: called once per key, in the order of the file and in the caller's thread.
        sha256_at: gets the file's SHA-256, as JSON, before the file appears.
        behind: hash and write a tensor while the next one is made. Two are then held instead of one, and ``make``
            must leave the tensor that it returned last as it is.
        metadata: strings stored in the header, ``format`` and others.

    Raises:
        StorageError: it cannot be written (space, permissions).
    """
    order = sorted(specs, key=lambda key: (-specs[key].dtype.itemsize, key))  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for key in order:
        size = math.prod(specs[key].shape) * specs[key].dtype.itemsize
        header[key] = {
            "dtype": _NAMES[specs[key].dtype],
            "shape": list(specs[key].shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    with atomic_file(path) as stream, ThreadPoolExecutor(1, "write_tensors") as writer:

        def write(data: Any) -> None:
            stream.write(data)
            if sha256_at is not None:
                sha256.update(data)

        write(len(text).to_bytes(8, "little") + text)
        written: Future[None] | None = None
        for key in order:
            tensor = make(key).contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (specs[key].shape, specs[key].dtype), key
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            if written is not None:
                written.result()
            if behind:
                written = writer.submit(write, data)
            else:
                write(data)
            del tensor, data
        if written is not None:
            written.result()
        if sha256_at is not None:
            write_json(sha256_at, sha256.hexdigest())


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that exist already; see :func:`write_tensors`."""
    specs = {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    write_tensors(path, specs, lambda key: tensors[key].detach().cpu(), metadata or {})


def write_json(path: Path, value: Any) -> None:
    """Write JSON that appears whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    with atomic_file(path) as stream:
        stream.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream whose contents appear under ``path`` at the end of the block, after they reached the disk.

    Raises:
        StorageError: the file system refuses; nothing appears and nothing is left.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(path, then="run the same command again: finished layers are not repeated"):
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Bring renames inside a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(value: Any) -> str:
    """Return the hex SHA-256 of a value of plain JSON types; equal values give equal digests on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def shard_files(directory: Path, weights: Directory | None = None) -> list[str]:
    """List the safetensors files of a model directory that transformers would read, in its order.

    What ``config.json`` names as ``transformers_weights`` comes first, then the single file, then the index: of several
    sets of files that lie together only one is the model.

    Args:
        directory: holds ``config.json`` and the index, if there is one.
        weights: holds the weights, where that is another directory.

    Raises:
        ModelError: there is none, or the index is malformed.
    """
    index = index_file(directory, weights)
    if index is None:
        return [_named_file(directory) or _SINGLE]
    names = read_object(index, ModelError, "fetch it again", {"weight_map": (dict,)})["weight_map"].values()
    if odd := [name for name in names if not is_inside(name)]:
        raise ModelError(f"{index}: {shown(odd[0])} is no file of the directory; fetch it again")
    return sorted(set(names))


def index_file(directory: Path, weights: Directory | None = None) -> Path | None:
    """Return the index of a model directory's weights; None if they are one file.

    Raises:
        ModelError: there are no weights that can be read.
    """
    named = _named_file(directory)
    single = named or _SINGLE
    if single.endswith(".safetensors") and (named or ((weights or directory) / single).is_file()):
        return None
    index = directory / (named or INDEX)
    if index.is_file() or named:
        return index
    raise ModelError(
        f"model.name: {directory} holds no model.safetensors and no index of such files; raymem reads no pickled "
        "weights: convert them with transformers' save_pretrained"
    )


def _named_file(directory: Path) -> str | None:
    try:
        name = read_object(directory / "config.json", ModelError).get("transformers_weights")
    except ModelError:  # who reads the config says what is wrong with it
        return None
    if name is None or (isinstance(name, str) and Path(name).name == name):
        return name
    raise ModelError(
        f"{directory}/config.json: transformers_weights: {shown(name)} is no file of the directory; name one"
    )
