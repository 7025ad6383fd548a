"""Safetensors files, one or sharded, read lazily as numpy views of the file and written back.

The library's own numpy reader knows no bfloat16 and hands out whole tensors; a view of the mapped file lets
each device's slice be read alone. Pickle files are refused.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxrlhf.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
# Bytes per number of what else a file may hold: old checkpoints keep causal masks as U8 or BOOL beside their weights.
OTHER_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4}
OTHER_SIZES |= {"U64": 8, "I64": 8, "F64": 8}
HEADER_LIMIT = 100_000_000  # bytes, the library's own


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where, not what."""

    name: str
    file: Path
    dtype: str  # the file's name for it: F32, BF16, ...
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    end: int  # the byte behind its last one

    def check_dtype(self) -> None:
        """`UserError` where its numbers are none that weights may be."""
        if self.dtype not in DTYPES:
            raise UserError(
                f"{self.file}: tensor {self.name} is stored as {self.dtype}; one of {', '.join(DTYPES)} can be read"
            )

    def view(self) -> np.ndarray:
        """The tensor as a read-only view of the file; nothing is read until it is sliced."""
        return np.memmap(self.file, DTYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape)


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor that is to be written; `fetch` brings it to the host when its turn comes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; `UserError` where there is none."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent}: no {file.name} in this folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(document, dict):
        raise UserError(f"{file}: must hold a JSON object, not a {type(document).__name__}")
    return document


def write_json(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, by name, from its header alone.

    Raises `UserError` naming file and tensor where the file is truncated or its header contradicts itself. Which
    tensors can be used is for the caller to ask: `StoredTensor.check_dtype`.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # Checked before it is read: a file that is not safetensors would ask for any amount of memory.
            header = json.loads(stream.read(length)) if 8 + length <= size and length <= HEADER_LIMIT else None
    except OSError as error:
        raise UserError(f"{file}: not readable ({error.strerror})") from None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{file}: no safetensors header: a truncated or corrupt file of {size} bytes")
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_cover(file, list(tensors.values()), 8 + length, size)
    return tensors


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder: `model.safetensors`, or the shards that its index names."""
    if (folder / SINGLE).exists():
        return read_tensors(folder / SINGLE)
    if not (folder / INDEX).exists():
        pickles = sorted(f.name for ending in ("bin", "pt", "pth", "ckpt") for f in folder.glob(f"*.{ending}"))
        if pickles:
            raise UserError(f"{folder / pickles[0]}: pickle files are not read; convert to safetensors")
        raise UserError(f"{folder}: no weights: {SINGLE} or {INDEX} must be there")
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) and Path(v).name == v for v in places.values()):
        raise UserError(f"{index}: weight_map must be an object of tensor names and file names of this folder")
    for shard in set(places.values()):
        if not shard.endswith(".safetensors"):
            raise UserError(f"{index}: names {shard}: only safetensors files are read; convert it")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        if not (folder / shard).exists():
            raise UserError(f"{index}: names {shard}, which is not in the folder")
        tensors.update(read_tensors(folder / shard))
    for name, shard in places.items():
        if name not in tensors:
            raise UserError(f"{folder / shard}: tensor {name} is missing, though {INDEX} says it is there")
    return tensors


def main_dtype(tensors: Iterable[StoredTensor]) -> str:
    """The dtype that holds most of the tensors' numbers: "float32", "bfloat16" or "float16".

    A checkpoint may keep norms or a router wider than its kernels, and they are few.
    """
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return DTYPES[max(sizes, key=sizes.__getitem__)].name


def write_checkpoint(folder: Path, tensors: dict[str, Pending], max_shard_bytes: int, primary: bool = True) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` (or one tensor) each, and their index.

    One shard is on the host at a time. Every process fetches, because fetching may gather over all of them;
    only the `primary` one writes.
    """
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: tensors[name] for name in shard}, primary)
        places |= dict.fromkeys(shard, file)
    if primary and len(shards) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": dict(sorted(places.items()))})


def write_tensors(file: Path, tensors: dict[str, Pending], primary: bool = True) -> None:
    """Writes one safetensors file; see `write_checkpoint` for `primary`."""
    from safetensors.numpy import save_file

    fetched = {name: np.asarray(tensor.fetch(), order="C") for name, tensor in tensors.items()}
    if primary:
        save_file(fetched, file, metadata={"format": "pt"})  # transformers opens no other format entry
        file.chmod(0o666 & ~_umask())  # the library makes files that only their owner can read


def _umask() -> int:
    """What new files are not allowed; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _stored(file: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(dtype, str) and all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise UserError(f"{file}: the header's entry for tensor {name} is malformed: a corrupt file")
    size_of = DTYPES[dtype].itemsize if dtype in DTYPES else OTHER_SIZES.get(dtype)
    if size_of is not None and end - begin != math.prod(shape) * size_of:
        raise UserError(f"{file}: tensor {name} of shape {list(shape)} has {end - begin} bytes: a corrupt file")
    if start + end > size:
        raise UserError(f"{file}: tensor {name} ends at byte {start + end}, the file at {size}: a truncated file")
    return StoredTensor(name, file, dtype, shape, start + begin, start + end)


def _check_cover(file: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """`UserError` unless the tensors lie side by side to the file's end: offsets that overlap give wrong weights."""
    at = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.end)):
        if tensor.offset != at:
            raise UserError(f"{file}: tensor {tensor.name} begins at byte {tensor.offset}, not {at}: a corrupt file")
        at = tensor.end
    if at != size:
        raise UserError(f"{file}: {size - at} bytes after its last tensor belong to none: a corrupt file")
