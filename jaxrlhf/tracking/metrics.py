"""What a run tells while it goes: one JSON line per step in a file, one progress line on a terminal."""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxrlhf.checkpoint.files import atomic_write, reason
from jaxrlhf.errors import Fault, UserError


class MetricsLog:
    """Appends JSON lines, each with the stage and step that it belongs to; a kill after `write` loses none.

    Serves `metrics.jsonl` (`seconds` and slash-named floats) and `samples.jsonl` (text, several lines per step).
    Lines are in the order of the run: within a stage steps never go back, and stages follow one another.
    On several hosts one process writes; `path` None writes nothing. A disk that takes no more is a `Fault`; the file
    keeps its whole lines.
    """

    def __init__(self, path: str | Path | None):
        self._path = None if path is None else Path(path)
        self._file = None
        self._lines = 0  # of the open file

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """One line. Values may be scalar arrays; floats that are not finite are written as null."""
        if self._path is None:
            return
        record = {"stage": stage, "step": int(step), **{key: _plain(value) for key, value in values.items()}}
        line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        with self._faults():
            self._append(line.encode("utf-8", errors="replace"))

    def _append(self, line: bytes) -> None:
        file = self._opened()
        whole = os.fstat(file.fileno()).st_size
        try:
            left = memoryview(line)
            while left:  # a disk that is nearly full may take a part
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), whole)
            raise
        self._lines += 1

    def lines(self) -> int:
        """How many lines there are."""
        if self._path is None or not (self._file or self._path.exists()):
            return 0
        with self._faults():
            self._opened()
        return self._lines

    def sync(self) -> None:
        """Forces all lines to disk, so that they outlast a failure of power too."""
        if self._file is not None:
            with self._faults():
                os.fsync(self._file.fileno())

    def truncate(self, stage: str, step: int, lines: int | None = None) -> int:
        """Forgets what came after `step` of `stage`, of this stage and of later ones; for a resumed run.

        Where the stage has no line up to `step`, its lines and all that follow go. What is beyond the first `lines`
        goes as well: a line of that very step that was written later. A last line that a kill cut in half goes too.
        The file is replaced at once or not at all. Raises `UserError` where a line is not JSON. Returns how many of the
        first `lines` are gone.
        """
        self.close()
        if self._path is None:
            return 0
        if not self._path.exists():
            return lines or 0
        with self._faults():
            data = self._path.read_bytes()
            *found, _ = data.split(b"\n")  # what follows the last newline is no whole line
            keep = _lines_to_keep([self._parse(line, i) for i, line in enumerate(found, start=1)], stage, step)
            kept = b"".join(line + b"\n" for line in found[: keep if lines is None else min(keep, lines)])
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
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self._path}:{number}: not a line of this log (JSON with stage and step); remove the line"
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
            raise Fault(f"{self._path}: cannot be written: {reason(error)}; it keeps the lines before") from error

    def close(self) -> None:
        """Closes the file; the next `write` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lines_to_keep(places: list[tuple[str, int]], stage: str, step: int) -> int:
    """How many leading lines of (stage, step) stay."""
    of_stage = [i for i, (name, _) in enumerate(places) if name == stage]
    up_to = [i for i in of_stage if places[i][1] <= step]
    if up_to:
        return up_to[-1] + 1
    return of_stage[0] if of_stage else len(places)


def _drop_half_line(path: Path) -> int:
    """Cuts off what follows the last newline: a line that a kill interrupted. How many lines there are."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            file.truncate(whole)
    return data.count(b"\n")


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """One line on a terminal that says how far a stage is; silent where stderr is no terminal."""

    def __init__(self, stage: str, total: int, done: int = 0):
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._last = time.perf_counter()
        # dynamic_ncols follows a resized window; the file is given so that a redirected stderr is honoured.
        self._bar = (
            tqdm(total=total, initial=done, desc=stage, unit="step", file=sys.stderr, dynamic_ncols=True)
            if self._shown
            else None
        )

    def update(self, values: Mapping[str, float], tokens: int | None = None) -> None:
        """One step further. `tokens` is how many this step worked on; the line shows them per second."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        if self._bar is None:
            return
        shown = {name: f"{float(value):.3g}" for name, value in values.items()}
        if tokens is not None:
            shown["tok/s"] = f"{tokens / max(elapsed, 1e-9):.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Ends the line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
