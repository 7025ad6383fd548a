"""Checksums of a folder. `record.json` holds the size and CRC-32 of every file, so that damage is found before loading.

There is a checksum for each file, not for each array. So checksums also protect metadata and indices, they do not
depend on devices and processes, and several processes can share the work. CRC-32 (from zlib) finds every change of up
to 32 neighbouring bits. Of all other random changes, CRC-32 misses about one in 4e9. CRC-32 is several times faster
than a cryptographic hash.
"""

import contextlib
import errno
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrlhf.checkpoint.files import atomic_write, sync

RECORD = "record.json"
# Errors that mean lost data. Other errors, such as a missing permission, are not damage.
_LOST = (errno.ENOENT, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class Damaged(Exception):
    """Raised if a folder has changed since `seal`. The message names the file and the change."""


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Syncs every file and folder to disk, and writes `record.json` with `content` and the checksums of all files.

    Raises `OSError` if the disk refuses a write.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = _size_and_crc(path)
        sync(path)
    text = json.dumps({"files": files, "content": content})
    atomic_write(folder / RECORD, json.dumps({"crc32": zlib.crc32(text.encode()), "sealed": text}))


def unseal(folder: Path, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """Checks the files and returns the `content` that was given to `seal`.

    `shares` processes can share the work. The files are sorted by size, and process number `share` checks the files
    `share`, `share` + `shares` and so on. Raises `Damaged` for the first file that has changed. Raises `OSError` if a
    file cannot be read for another reason.
    """
    try:
        with _damage(RECORD):
            outer = json.loads((folder / RECORD).read_bytes())
        text = outer["sealed"]
        record = json.loads(text)
        files, content = record["files"], record["content"]
        if outer["crc32"] != zlib.crc32(text.encode()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{RECORD} has changed since it was written") from None
    for name in sorted(files, key=lambda name: (-files[name][0], name))[share::shares]:
        with _damage(name):
            size, crc = _size_and_crc(folder / name)
        if size != files[name][0]:
            raise Damaged(f"{name} has {size} bytes instead of {files[name][0]}")
        if crc != files[name][1]:
            raise Damaged(f"{name} has changed since it was written")
    return content


def _size_and_crc(path: Path) -> list[int]:
    size, crc = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return [size, crc]


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """If the block raises an `OSError` that means lost data, raises `Damaged` instead."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LOST:
            raise
        raise Damaged(f"{name} is missing" if error.errno == errno.ENOENT else f"{name}: {error.strerror}") from error
