"""The logs of a run: JSON lines in files."""

import collections
import contextlib
import datetime
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.checkpoint.files import atomic_write, reason
from jaxrlhf.errors import Fault, UserError


class MetricsLog:
    """Appends JSON lines with stage and step to a file. If the process is killed after `write`, no line is lost.

    The logs are `metrics.jsonl` (`seconds` and floats with names such as `kl/k1`) and `samples.jsonl` (text). The key
    `time` is the time at which the line was written, in UTC as ISO 8601 with milliseconds. Lines are in the order of
    the run: all lines of one stage come before the next stage, and steps within a stage never decrease. If `path` is
    None, nothing is written. All processes except the first have None. A full disk raises `Fault`, and the complete
    lines stay in the file.
    """

    def __init__(self, path: str | Path | None):
        self._path = None if path is None else Path(path)
        self._file = None
        self._lines = 0  # number of lines of the open file

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line. Values may be arrays. Floats that are not finite become null."""
        if self._path is None:
            return
        place = {"stage": stage, "step": int(step), "time": _now()}
        record = place | {key: _plain(value) for key, value in values.items()}
        line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        with self._faults():
            self._append(line.encode("utf-8", errors="replace"))

    def _append(self, line: bytes) -> None:
        file = self._opened()
        whole = os.fstat(file.fileno()).st_size
        try:
            left = memoryview(line)
            while left:  # a nearly full disk may accept only a part of the line
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), whole)
            raise
        self._lines += 1

    def lines(self) -> int:
        """Returns the number of lines."""
        if self._path is None or not (self._file or self._path.exists()):
            return 0
        with self._faults():
            self._opened()
        return self._lines

    def stages(self) -> collections.Counter[str]:
        """Returns the number of lines of each stage that has lines. Raises `UserError` for a line that is not JSON."""
        if self._path is None or not self._path.exists():
            return collections.Counter()
        with self._faults():
            *complete, _ = self._path.read_bytes().split(b"\n")
        return collections.Counter(self._parse(line, i)[0] for i, line in enumerate(complete, start=1))

    def sync(self) -> None:
        """Flushes all lines to disk, so that they survive a power failure."""
        if self._file is not None:
            with self._faults():
                os.fsync(self._file.fileno())

    def truncate(self, stage: str, step: int, lines: int | None = None) -> int:
        """Removes the lines after `step` of `stage`, and those of later stages, before a run resumes.

        Also removes an incomplete last line. `lines` is the number of lines at the time when the checkpoint of `step`
        was saved; later lines are removed too. The file is replaced atomically. Raises `UserError` for a line that is
        not JSON. Returns how many of the first `lines` lines are missing.
        """
        self.close()
        if self._path is None:
            return 0
        if not self._path.exists():
            return lines or 0
        with self._faults():
            data = self._path.read_bytes()
            *complete, _ = data.split(b"\n")  # the text after the last newline is an incomplete line
            keep = _lines_to_keep([self._parse(line, i) for i, line in enumerate(complete, start=1)], stage, step)
            kept = b"".join(line + b"\n" for line in complete[: keep if lines is None else min(keep, lines)])
            if kept != data:
                atomic_write(self._path, kept.decode("utf-8"))
        return 0 if lines is None else max(lines - keep, 0)

    def _parse(self, line: bytes, number: int) -> tuple[str, int]:
        try:
            record = json.loads(line)
            stage, step = record["stage"], record["step"]
            if not isinstance(stage, str) or not isinstance(step, int):
                raise TypeError
            return stage, step
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{self._path}:{number}: is not a line of this log (JSON with stage and step); remove the line"
            ) from None

    def _opened(self) -> io.FileIO:
        if self._file is None:
            self._lines = _drop_half_line(self._path)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  (stays open until close)
        return self._file

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Fault(f"{self._path}: cannot be written: {reason(error)}; earlier lines are kept") from error

    def close(self) -> None:
        """Closes the file. The next `write` opens the file again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lines_to_keep(places: list[tuple[str, int]], stage: str, step: int) -> int:
    """Returns the number of lines up to and including `step` of `stage`. `places` holds (stage, step) of each line.

    If all lines of the stage are after `step`, returns the number of lines before the stage. If the stage has no line,
    returns the number of all lines.
    """
    of_stage = [i for i, (name, _) in enumerate(places) if name == stage]
    up_to = [i for i in of_stage if places[i][1] <= step]
    if up_to:
        return up_to[-1] + 1
    return of_stage[0] if of_stage else len(places)


def _drop_half_line(path: Path) -> int:
    """Removes an incomplete last line, which a killed process may leave. Returns the number of complete lines."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
    return data.count(b"\n")


def _now() -> str:
    """Returns the time now in UTC, such as 2026-11-27T08:30:00.123Z."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: Any) -> Any:
    """Returns a value for JSON: arrays become lists, and floats that are not finite become None, at every depth."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
