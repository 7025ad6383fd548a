"""A folder under seal: one record of every file's size and CRC-32, so that damage is found before it is read.

Files are hashed, not the arrays in them. What is read back is then covered to the last byte, descriptions and indices
too; the devices and processes may be others than those that wrote; and several processes can share the reading.
CRC-32 is zlib's: it finds every flipped bit and every burst of up to 32, and misses one in 4e9 of other accidents, at
several times the speed of cryptographic hashes, which guard against people and not against disks.
"""

import errno
import json
import os
import zlib
from pathlib import Path
from typing import Any

from jaxrlhf.runtime.run_dir import sync

RECORD = "record.json"
_CHUNK = 1 << 22
# Reading again will not help: the medium is at fault. Others (no permission, stale handles) are no damage.
_LOST = (errno.ENOENT, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class Damaged(Exception):
    """A sealed folder that is not what was sealed: what, and in which file."""


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Forces every file and folder to disk, and writes `record.json`: their sizes and checksums, and `content`.

    Everything in the folder is part of it from here on. Raises `OSError` where that cannot be written.
    """
    files = {}
    for above, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = Path(above, name)
            files[path.relative_to(folder).as_posix()] = _measured(path, to_disk=True)
        sync(Path(above))
    text = json.dumps({"files": files, "content": content})
    path = folder / RECORD
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps({"crc32": _text_sum(text), "sealed": text}))
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def read_record(folder: Path) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """(files, content) of a sealed folder: size and CRC-32 by file name, and what was given to `seal`.

    Raises `Damaged` where the record is missing or not as it was written, `OSError` where it cannot be read.
    """
    try:
        outer = json.loads(_read(folder / RECORD))
        text = outer["sealed"]
        if outer["crc32"] != _text_sum(text):
            raise Damaged(f"{RECORD} is not as it was written")
        record = json.loads(text)
        return record["files"], record["content"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{RECORD} is not as it was written") from None


def check_files(folder: Path, files: dict[str, list[int]], share: int = 0, shares: int = 1) -> str:
    """What is wrong with the first file that is not as it was sealed; "" where all are.

    Only every `shares`-th file is read, by size, so that several processes can share the work. Raises `OSError` where
    a file cannot be read for a reason that is no damage.
    """
    for name in sorted(files, key=lambda name: (-files[name][0], name))[share::shares]:
        size, crc = files[name]
        try:
            found = _measured(folder / name)
        except Damaged as error:
            return str(error)
        if found[0] != size:
            return f"{name} has {found[0]} bytes instead of {size}"
        if found[1] != crc:
            return f"{name} is not as it was written"
    return ""


def _measured(path: Path, to_disk: bool = False) -> list[int]:
    """[size, CRC-32] of a file."""
    size, crc = 0, 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                crc = zlib.crc32(chunk, crc)
            if to_disk:
                os.fsync(file.fileno())
    except OSError as error:
        raise error if to_disk else _judged(path, error) from error
    return [size, crc]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _judged(path, error) from error


def _judged(path: Path, error: OSError) -> Exception:
    if error.errno == errno.ENOENT:
        return Damaged(f"{path.name} is missing")
    return Damaged(f"{path.name}: {error.strerror}") if error.errno in _LOST else error


def _text_sum(text: Any) -> int:
    return zlib.crc32(text.encode("utf-8"))
