"""Reads the logs of a run while the run writes them. Returns them as lines for a tracker."""

import datetime
import io
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrlhf.tracking.trackers.protocol import Line


class LogReader:
    """Reads each complete line of a JSON Lines file once, while another process appends to it.

    When a run resumes, its log is replaced by a log that ends at the checkpoint. The run then writes the later lines
    again. They are recognised by their numbers, and are not read twice.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: io.BufferedReader | None = None
        self._passed = 0  # number of lines of the open file that were read
        self.number = 0  # number of the last line that was returned, counted from 1

    def new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (number, record) of each line that was written since the last call."""
        if not self._open():
            return
        for line in self._file:
            if not line.endswith(b"\n"):  # the line is not complete yet
                self._file.seek(-len(line), os.SEEK_CUR)
                return
            self._passed += 1
            if self._passed > self.number:
                self.number = self._passed
                yield self._passed, json.loads(line)

    def _open(self) -> bool:
        """Opens the file if it is not open or was replaced. Returns whether the file exists."""
        try:
            now = os.stat(self._path)
        except FileNotFoundError:
            return False
        if self._file is not None and os.fstat(self._file.fileno()).st_ino == now.st_ino:
            return True
        self.close()
        self._file, self._passed = open(self._path, "rb"), 0  # noqa: SIM115  (stays open until close)
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Feed:
    """The lines of a run for one tracker. The tracker already has the first `last` lines.

    `samples` is the number of lines of samples.jsonl that the tracker has. A tracker stores a line together with the
    samples that were written before it, so it has all samples of the lines before `last`. Of the samples of line `last`
    some may be missing, because a stage may write samples after its last line: `samples` tells which.
    """

    def __init__(self, folder: Path, last: int, samples: int):
        self._metrics, self._samples = LogReader(folder / "metrics.jsonl"), LogReader(folder / "samples.jsonl")
        self._last, self.samples = last, samples
        self._waiting: deque[tuple[int, dict[str, Any]]] = deque()  # samples whose line has not been read yet
        self._seen: set[str] = set()  # stages of the lines read so far
        self._place = (0, "", 0, 0.0)  # number, stage, step and time of the last line

    def new(self) -> Iterator[Line]:
        """Yields the lines that were written since the last call and that the tracker does not have."""
        metrics = list(self._metrics.new())
        self._waiting += self._samples.new()  # read after the metrics, because samples are written before their line
        for number, record in metrics:
            yield from self._late()
            stage, step, seconds = record["stage"], record["step"], _seconds(record.get("time"))
            self._seen.add(stage)
            self._place = (number, stage, step, seconds)
            if number > self._last:
                yield Line(number, seconds, metrics_of(record), self._tables(lambda _: True))
                self._last = number
            else:
                done = self.samples if number == self._last else math.inf
                if tables := self._tables(lambda place, done=done: place > done):
                    yield Line(number, seconds, {}, tables)
        yield from self._late()

    def _late(self) -> Iterator[Line]:
        """Yields the samples that were written after their line was read."""
        number, *_, seconds = self._place
        if number and (tables := self._tables(lambda place: number >= self._last and place > self.samples)):
            yield Line(number, seconds, {}, tables)

    def _tables(self, wanted: Any) -> dict[str, list[dict[str, Any]]]:
        """Removes the samples up to the current line from the waiting samples.

        Returns the tables of those removed samples for which `wanted` is true.
        """
        tables: dict[str, list[dict[str, Any]]] = {}
        _, stage, step, _ = self._place
        while self._waiting:
            place, record = self._waiting[0]
            other = record["stage"]
            if (other == stage and record["step"] > step) or (other != stage and other not in self._seen):
                break
            self._waiting.popleft()
            if wanted(place):
                tables |= tables_of(record)
                self.samples = max(self.samples, place)
        return tables

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()


def metrics_of(record: dict[str, Any]) -> dict[str, float]:
    """Returns the step and the numbers of a line of metrics.jsonl. Their names contain the stage. Null becomes NaN."""
    stage = record["stage"]
    numbers = {
        with_stage(name, stage): math.nan if value is None else float(value)
        for name, value in record.items()
        if name not in ("stage", "step") and (value is None or isinstance(value, int | float))
    }
    return {f"{stage}/step": float(record["step"]), **numbers}


def with_stage(name: str, stage: str) -> str:
    """Returns the name of a metric, such as `ppo/reward/score`.

    The stage is added unless the name contains it (`sft/loss`).
    """
    return name if stage in name.split("/") else f"{stage}/{name}"


def tables_of(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the lists of records in a line of samples.jsonl, by name. Only texts and numbers of a record are kept."""
    tables: dict[str, list[dict[str, Any]]] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}/{key}", inner)
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            rows = [{k: v for k, v in row.items() if isinstance(v, str | int | float | None)} for row in value]
            columns = list(dict.fromkeys(key for row in rows for key in row))
            tables[name] = [{column: row.get(column) for column in columns} for row in rows]

    for key, value in record.items():
        if key not in ("stage", "step", "time"):
            add(with_stage(key, record["stage"]), value)
    return tables


def _seconds(text: str | None) -> float:
    """Returns the Unix time of an ISO 8601 timestamp, or the time now if there is no timestamp."""
    return time.time() if text is None else datetime.datetime.fromisoformat(text).timestamp()
