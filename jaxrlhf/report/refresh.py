"""Keeps report.html of a run up to date while the run trains."""

import sys
import time
from pathlib import Path

from jaxrlhf.errors import printable
from jaxrlhf.report.page import write_report

FILE = "report.html"
SECONDS = 60.0  # least number of seconds between two reports
SHARE = 0.005  # largest share of a run's time that its reports may take while it trains


class ReportFile:
    """The report of a run. An error is printed once, and never ends the run.

    If `folder` is None, nothing is written.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._next = time.monotonic() + SECONDS
        self._failed = False

    def refresh(self) -> None:
        """Writes the report if enough time has passed since the last one (`SECONDS`, `SHARE`)."""
        if time.monotonic() >= self._next and not self._failed:
            self.write()

    def write(self) -> None:
        """Writes the report now, if the run has logged a step and the report is older than the logs."""
        if self._folder is None:
            return
        start = time.monotonic()
        try:
            if _has_news(self._folder):
                write_report([self._folder], self._folder / FILE)
        except Exception as error:  # no error of a report may end the run
            if not self._failed:
                text = f"{FILE} was not written: {' '.join(str(error).split())[:200]}; the run continues"
                print(printable(text), file=sys.stderr, flush=True)
            self._failed = True
        end = time.monotonic()
        self._next = end + max(SECONDS, (end - start) / SHARE)


def _has_news(folder: Path) -> bool:
    """Whether the run has logged a step, and its logs or results have changed since its report was written."""
    read = [folder / name for name in ("metrics.jsonl", "samples.jsonl", "roles/finished.json")]
    if not read[0].is_file() or not read[0].stat().st_size:
        return False
    report = folder / FILE
    changed = max(path.stat().st_mtime_ns for path in read if path.is_file())
    return not report.is_file() or report.stat().st_mtime_ns < changed
