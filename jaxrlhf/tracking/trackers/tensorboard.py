"""Writes a run as TensorBoard event files in the run directory, with tensorboard's own code and without TensorFlow."""

import shlex
from pathlib import Path
from typing import Any

from jaxrlhf.tracking.trackers.protocol import Line, RunInfo

FLUSH = 5  # seconds between two writes to the file
_QUEUE = 100  # largest number of events in memory


class TensorBoard:
    """Writes each line as one event, so that a killed process leaves a whole event or none.

    Each start writes a new file.
    """

    def open(self, run: RunInfo, ids: dict[str, Any]) -> int:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.folder / "tensorboard"
        self.ids, self.where = {}, f"to see it: tensorboard --logdir {shlex.quote(str(folder))}"
        last = last_step(folder)
        self._writer = EventFileWriter(str(folder), max_queue_size=_QUEUE, flush_secs=FLUSH)
        if not last:
            self._write(0, None, [_text("settings", f"```yaml\n{run.settings_text}```")])
        return last

    def log(self, line: Line) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in line.metrics.items()]
        values += [_text(name, _markdown(rows)) for name, rows in line.tables.items()]
        self._write(line.number, line.time, values)

    def _write(self, step: int, time: float | None, values: list) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._writer.add_event(Event(step=step, wall_time=time, summary=Summary(value=values)))

    def close(self, finished: bool) -> None:
        self._writer.close()


def last_step(folder: Path) -> int:
    """Returns the largest step in the event files of a folder, or 0 if there is none.

    An incomplete event does not count.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    steps = [0]
    for path in folder.glob("*tfevents*"):
        steps += [event.step for event in LegacyEventFileLoader(str(path)).Load()]
    return max(steps)


def _text(name: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    data = make_tensor_proto(text.encode("utf-8", "replace"))
    return Summary.Value(tag=name, metadata=create_summary_metadata(name, ""), tensor=data)


def _markdown(rows: list[dict[str, Any]]) -> str:
    """Returns rows with the same columns as a Markdown table.

    Characters that Markdown or HTML would interpret are escaped.
    """

    def cell(value: Any) -> str:
        text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        for character in "\\`*_{}[]<>()#+-!|~&":
            text = text.replace(character, f"&#{ord(character)};")
        return " ".join(text.split())

    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
