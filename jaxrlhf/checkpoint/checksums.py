"""A folder under seal: one record of every file's size and CRC-32, so that damage is found before it is read.

Files are hashed, not the arrays in them: descriptions and indices are covered to the last byte too, the devices and
processes that read may be others than those that wrote, and several processes can share the reading. CRC-32 is
zlib's: it finds every flipped bit and every burst of up to 32, and misses one in 4e9 of other accidents, at several
times the speed of cryptographic hashes, which guard against people and not against disks.
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
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = _measured(path)
        sync(path)
    text = json.dumps({"files": files, "content": content})
    atomic_write(folder / RECORD, json.dumps({"crc32": zlib.crc32(text.encode()), "sealed": text}))


def unseal(folder: Path, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """What was given to `seal` as `content`, after a look at the files; raises `Damaged` at the first that has changed.

    Only every `shares`-th file is read, by size, so that several processes can share the work. Raises `OSError` where
    a file cannot be read for a reason that is no damage.
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
        raise Damaged(f"{RECORD} is not as it was written") from None
    for name in sorted(files, key=lambda name: (-files[name][0], name))[share::shares]:
        with _damage(name):
            size, crc = _measured(folder / name)
        if size != files[name][0]:
            raise Damaged(f"{name} has {size} bytes instead of {files[name][0]}")
        if crc != files[name][1]:
            raise Damaged(f"{name} is not as it was written")
    return content


def _measured(path: Path) -> list[int]:
    """[size, CRC-32] of a file."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return [size, crc]


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """What the block cannot read counts as damage where reading again will not help."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LOST:
            raise
        raise Damaged(f"{name} is missing" if error.errno == errno.ENOENT else f"{name}: {error.strerror}") from error
