"""What a run tells while it goes: one JSON line per step in a file, one progress line on a terminal."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxrlhf.errors import UserError
from jaxrlhf.runtime.run_dir import atomic_write


class MetricsLog:
    """Appends JSON lines, each with the stage and step that it belongs to; each is on disk when `write` returns.

    Serves `metrics.jsonl` (`seconds` and slash-named floats) and `samples.jsonl` (text, several lines per step).
    Lines are in the order of the run: within a stage steps never go back, and stages follow one another.
    On several hosts one process writes; `path` None writes nothing.
    """

    def __init__(self, path: str | Path | None):
        self._path = None if path is None else Path(path)
        self._file = None

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """One line. Values may be scalar arrays; floats that are not finite are written as null."""
        if self._path is None:
            return
        if self._file is None:
            _drop_half_line(self._path)
            self._file = open(self._path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115  (stays open until close)
        record = {"stage": stage, "step": int(step), **{key: _plain(value) for key, value in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def truncate(self, stage: str, step: int) -> None:
        """Forgets what came after `step` of `stage`, of this stage and of later ones; for a resumed run.

        Where the stage has no line up to `step`, its lines and all that follow go. A last line that a kill cut in
        half goes too. The file is replaced at once or not at all. Raises `UserError` where a line is not JSON.
        """
        self.close()
        if self._path is None or not self._path.exists():
            return
        data = self._path.read_bytes()
        *lines, _ = data.split(b"\n")  # what follows the last newline is no whole line
        keep = _lines_to_keep([self._parse(line, number) for number, line in enumerate(lines, start=1)], stage, step)
        kept = b"".join(line + b"\n" for line in lines[:keep])
        if kept != data:
            atomic_write(self._path, kept.decode("utf-8"))

    def _parse(self, line: bytes, number: int) -> tuple[str, int]:
        try:
            record = json.loads(line)
            return record["stage"], record["step"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self._path}:{number}: not a line of this log (JSON with stage and step); remove the line"
            ) from None

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


def _drop_half_line(path: Path) -> None:
    """Cuts off what follows the last newline: a line that a kill interrupted."""
    if path.exists():
        with open(path, "rb+") as file:
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)


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
