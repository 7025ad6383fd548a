"""Checksums of a folder: `record.json` holds every file's size and CRC-32, so that damage is found before loading.

Files are hashed rather than arrays: this covers metadata and indices too, the reading devices and processes may differ
from the writing ones, and several processes share the work. CRC-32 (zlib's) finds every burst of up to 32 flipped bits
and misses one in 4e9 of other accidents, at several times the speed of a cryptographic hash.
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
# Errors that mean lost data. Others, such as a missing permission, are not damage.
_LOST = (errno.ENOENT, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class Damaged(Exception):
    """A sealed folder has changed; the text says which file, and how."""


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Syncs every file and folder to disk and writes `record.json` with their checksums and `content`.

    Every file in the folder is covered. Raises `OSError` where the disk refuses.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = _size_and_crc(path)
        sync(path)
    text = json.dumps({"files": files, "content": content})
    atomic_write(folder / RECORD, json.dumps({"crc32": zlib.crc32(text.encode()), "sealed": text}))


def unseal(folder: Path, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """Checks the files and returns the `content` of `seal`; raises `Damaged` at the first file that has changed.

    Several processes share the work: each reads every `shares`-th file, by size, from number `share` on. Raises
    `OSError` where a file cannot be read for another reason than damage.
    """
    try:
        with _damage(RECORD):
            outer = json.loads((folder / RECORD).read_bytes())
        text = outer["sealed"]
        record = json.loads(text)
        files, content = record["files"], record["content"]
        if outer["crc32"] != zlib.crc32(text.encode()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
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
    """Raises `Damaged` for an `OSError` that means lost data."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LOST:
            raise
        raise Damaged(f"{name} is missing" if error.errno == errno.ENOENT else f"{name}: {error.strerror}") from error
