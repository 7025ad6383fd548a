"""Reads wandb's offline files. wandb's Python client has no reader for these files.

A file has a header of 7 bytes, and then blocks of 32 KiB, as in LevelDB's log format. A block holds chunks: checksum (4
bytes), length (2 bytes), type (1 byte), data. A record is one chunk of type 1, or a first chunk (type 2), any number of
middle chunks (type 3) and a last chunk (type 4). If the rest of a block is shorter than a chunk's header, the rest is
filled with zeros.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK = 7, 32 * 1024
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[bytes]:
    """Yields the complete records of a file.

    Ends before the first incomplete record, which a killed process may leave.
    """
    data = path.read_bytes()
    place, parts = _HEADER, []
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        chunk = data[place + _HEADER : place + _HEADER + length]
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or len(chunk) < length:
            return
        place += _HEADER + length
        parts = [chunk] if kind in (_WHOLE, _FIRST) else [*parts, chunk]
        if kind in (_WHOLE, _LAST):
            yield b"".join(parts)


def history(folder: str | Path, run_id: str) -> Iterator[dict[str, Any]]:
    """Yields the history rows of a run from the files under `folder`, in the order in which they were written.

    A table in a row is read as an empty mapping.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(Path(folder).glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")):
        for data in records(path):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {}
                for item in record.history.item:
                    name, *inner = item.nested_key or [item.key]
                    row[name] = json.loads(item.value_json) if not inner else {}
                yield row


def last_step(folder: str | Path, run_id: str) -> int:
    """Returns the last step in the offline files of a run, or 0 if there is none."""
    return max((int(row["_step"]) for row in history(folder, run_id)), default=0)
