"""Reads and writes safetensors files, single or sharded. A tensor is read as a numpy view of its file.

The numpy reader of the safetensors library does not support bfloat16, and returns full tensors. A view of the
memory-mapped file lets each device read only its slice. Pickle files are not read.
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
# Other dtypes in a file -> bytes per number. Old checkpoints hold weights, and also causal masks as U8 or BOOL.
OTHER_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4}
OTHER_SIZES |= {"U64": 8, "I64": 8, "F64": 8}
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library has the same limit


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its location, dtype and shape."""

    name: str
    file: Path
    dtype: str  # name of the dtype in safetensors: F32, BF16, ...
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    end: int  # offset of the first byte after the tensor

    def check_dtype(self) -> None:
        """Raises `UserError` if the dtype is not one of `DTYPES`."""
        if self.dtype not in DTYPES:
            raise UserError(
                f"{self.file}: tensor {self.name} must be stored as one of {', '.join(DTYPES)}, not as {self.dtype}"
            )

    def check_shape(self, shape: tuple[int, ...], source: str) -> None:
        """Raises `UserError` if the tensor's shape is not `shape`. `source` says what requires `shape`."""
        if self.shape != shape:
            found, required = list(self.shape), list(shape)
            raise UserError(
                f"{self.file}: tensor {self.name} must have shape {required} according to {source}, not {found}"
            )

    def refuse_not_finite(self) -> None:
        """Raises the `UserError` that says that the tensor holds NaN or infinite values."""
        raise UserError(
            f"{self.file}: tensor {self.name} has NaN or infinite values, because the training diverged or the file "
            "is damaged; use other weights"
        )

    def view(self) -> np.ndarray:
        """Returns the tensor as a read-only view of the file. Bytes of the file are read when the view is sliced."""
        return np.memmap(self.file, DTYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape)


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor to write. `fetch` copies the tensor to the host just before it is written."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_json(file: Path) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises `UserError` if the file is missing or does not hold a JSON object."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent}: this folder has no {file.name}") from None
    except (OSError, ValueError, RecursionError) as error:  # too deep nesting is a RecursionError
        raise UserError(f"{file}: cannot be read as JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(document, dict):
        raise UserError(f"{file}: must hold a JSON object, not a {type(document).__name__}")
    return document


def write_json(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """Returns name -> `StoredTensor` for a safetensors file. Reads only the header; the data is read later.

    Raises `UserError` if the file is truncated or its header is inconsistent. The error names the file and the tensor.
    This function does not check dtypes; `StoredTensor.check_dtype` does.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # The length of the header is checked before the header is read. In a file of another kind, these 8 bytes
            # may be any number.
            header = json.loads(stream.read(length)) if 8 + length <= size and length <= HEADER_LIMIT else None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(
            f"{file}: the file has no safetensors header; the file of {size} bytes is truncated or corrupt"
        )
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_cover(file, list(tensors.values()), 8 + length, size)
    return tensors


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Returns all tensors of a model folder. They are in `model.safetensors`, or in the shards that the index lists."""
    if (folder / SINGLE).exists():
        return read_tensors(folder / SINGLE)
    if not (folder / INDEX).exists():
        pickles = sorted(f.name for ending in ("bin", "pt", "pth", "ckpt") for f in folder.glob(f"*.{ending}"))
        if pickles:
            raise UserError(f"{folder / pickles[0]}: pickle files are not read; convert the file to safetensors")
        raise UserError(f"{folder}: the folder has no weights; {SINGLE} or {INDEX} must be in the folder")
    index = folder / INDEX
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) and Path(v).name == v for v in shards.values()):
        raise UserError(f"{index}: weight_map must be an object that maps tensor names to file names in this folder")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(shards.values())):
        if not shard.endswith(".safetensors"):
            raise UserError(f"{index}: lists {shard}, but only safetensors files are read; convert {shard}")
        if not (folder / shard).exists():
            raise UserError(f"{index}: lists {shard}, but this file is not in the folder")
        tensors.update(read_tensors(folder / shard))
    for name, shard in shards.items():
        if name not in tensors:
            raise UserError(f"{folder / shard}: tensor {name} is missing, but {INDEX} lists it")
    return tensors


def main_dtype(tensors: Iterable[StoredTensor]) -> str:
    """Returns the dtype of most numbers in the checkpoint: "float32", "bfloat16" or "float16".

    A checkpoint may store a few small tensors (for example norms) in a wider dtype than its kernels.
    """
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return DTYPES[max(sizes, key=sizes.__getitem__)].name


def write_checkpoint(folder: Path, tensors: dict[str, Pending], max_shard_bytes: int, primary: bool = True) -> None:
    """Writes the tensors to `model.safetensors`, or to several shards and an index.

    A shard has at most `max_shard_bytes` bytes, or holds one tensor. Only one shard is on the host at a time. Every
    process fetches the tensors, because `fetch` may be a collective operation. Only the `primary` process writes.
    """
    shards: list[list[str]] = [[]]
    bytes_left = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > bytes_left and shards[-1]:
            shards.append([])
            bytes_left = max_shard_bytes
        shards[-1].append(name)
        bytes_left -= tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: tensors[name] for name in shard}, primary)
        weight_map |= dict.fromkeys(shard, file)
    if primary and len(shards) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})


def write_tensors(file: Path, tensors: dict[str, Pending], primary: bool = True) -> None:
    """Writes one safetensors file. Every process fetches the tensors; only the `primary` process writes."""
    from safetensors.numpy import save_file

    fetched = {name: np.asarray(tensor.fetch(), order="C") for name, tensor in tensors.items()}
    if primary:
        save_file(fetched, file, metadata={"format": "pt"})  # transformers requires this entry
        umask = os.umask(0)  # there is no other way to read the umask
        os.umask(umask)
        file.chmod(0o666 & ~umask)  # the library makes files that only their owner can read


def _stored(file: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(dtype, str) and all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise UserError(f"{file}: the header's entry for tensor {name} is malformed; the file is corrupt")
    size_of = DTYPES[dtype].itemsize if dtype in DTYPES else OTHER_SIZES.get(dtype)
    if size_of is not None and end - begin != math.prod(shape) * size_of:
        raise UserError(
            f"{file}: tensor {name} of shape {list(shape)} cannot have {end - begin} bytes; the file is corrupt"
        )
    if start + end > size:
        raise UserError(
            f"{file}: tensor {name} ends at byte {start + end}, but the file has {size} bytes; the file is truncated"
        )
    return StoredTensor(name, file, dtype, shape, start + begin, start + end)


def _check_cover(file: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """Raises `UserError` if there are gaps between the tensors of the file, or if tensors overlap."""
    at = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.end)):
        if tensor.offset != at:
            raise UserError(
                f"{file}: tensor {tensor.name} begins at byte {tensor.offset}, but must begin at byte {at}; "
                "the file is corrupt"
            )
        at = tensor.end
    if at != size:
        raise UserError(f"{file}: no tensor uses the {size - at} bytes after the last tensor; the file is corrupt")
