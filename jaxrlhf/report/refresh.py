"""Keeps report.html of a run up to date while the run trains."""

import sys
import time
from pathlib import Path

from jaxrlhf.errors import printable
from jaxrlhf.report.page import write_report

FILE = "report.html"
SECONDS = 60.0  # least time between two reports
SHARE = 0.005  # most of a run's time that reports take while it trains


class ReportFile:
    """The report of a run. A failure is printed once and never ends the run. `folder` None writes nothing."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._next = time.monotonic() + SECONDS
        self._failed = False

    def refresh(self) -> None:
        """Writes the report if the last one is old enough for its cost."""
        if time.monotonic() >= self._next and not self._failed:
            self.write()

    def write(self) -> None:
        """Writes the report now, if the run has logged a step."""
        if self._folder is None:
            return
        start = time.monotonic()
        try:
            if (log := self._folder / "metrics.jsonl").is_file() and log.stat().st_size:
                write_report([self._folder], self._folder / FILE)
        except Exception as error:  # a report must not end a run, whatever is wrong with it
            if not self._failed:
                text = f"{FILE} was not written: {' '.join(str(error).split())[:200]}; the run itself is not affected"
                print(printable(text), file=sys.stderr, flush=True)
            self._failed = True
        end = time.monotonic()
        self._next = end + max(SECONDS, (end - start) / SHARE)
