"""Streams: data sets that are larger than memory. Rows are read, checked and tokenized window by window.

A window has the next `shuffle_buffer` rows. It is a small data set in memory, so packing, length buckets and shuffles
work as without streaming. If one window holds the whole set, the batches are the same.

A place says where a window begins, as JSON values: the position in each source, and the counts of the pass so far.
Reading from a place gives the same window each time, so a checkpoint holds a place and no rows. Each source keeps a
running hash of the rows of the pass. It shows whether a window that is read again has the same rows, and whether each
later pass has the rows of the first pass.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from jaxrlhf.config import ChatSourceConfig
from jaxrlhf.data.mixture import Reader
from jaxrlhf.data.report import LoadReport
from jaxrlhf.data.sources import Position, Row, files_of, rows_from
from jaxrlhf.distributed import processes
from jaxrlhf.errors import Fault, UserError

T = TypeVar("T")
Made = TypeVar("Made")
Place = dict[str, Any]
Say = Callable[[str], None]


class StreamFault(Fault):
    """The next rows of a stream cannot be used. All processes raise it, before the step that needs the rows."""


@dataclass(frozen=True)
class Window(Generic[T]):
    """The items of consecutive rows."""

    number: int  # counted from 0 over all passes
    start: Place
    end: Place  # the place of the next window
    items: list[T]
    report: LoadReport  # on the rows of the pass up to the end of this window

    @property
    def ends_pass(self) -> bool:
        return self.end["pass"] > self.start["pass"]

    def metrics(self) -> dict[str, float]:
        """Returns the number of the pass, from 1, and how many of its rows were read and dropped up to this window."""
        rows = self.report.rows
        found = {"pass": self.start["pass"] + 1, "rows": rows, "dropped": rows - self.report.kept}
        return {f"stream/{name}": float(value) for name, value in found.items()}

    def notes(self, first: int) -> dict[str, Any]:
        """Returns what a checkpoint needs to read the window again. `first` is the number of its first batch or row."""
        return {"first": first, "start": self.start, "hashes": _hashes(self.end)}


_START: Place = {"pass": 0, "rows": 0, "position": None, "hash": "", "whole": None}  # whole: hash of the first pass


class _Source:
    """The rows of one source, pass after pass, from a place on."""

    def __init__(self, config: ChatSourceConfig):
        self.config = config
        self.place: Place | None = None  # None: not open
        self._rows: Iterator[tuple[Row, Position]] = iter(())
        self._ahead: tuple[Row, Position] | None = None

    def seek(self, place: Place) -> None:
        if place != self.place:
            limit = None if self.config.limit is None else self.config.limit - place["rows"]
            self._rows = itertools.islice(rows_from(self.config, place["position"]), limit)
            self._ahead, self.place = next(self._rows, None), place

    def take(self, count: int) -> list[Row]:
        """Returns the next rows of this pass, at most `count`."""
        rows, place, running = [], self.place, self.place["hash"]
        position = place["position"]
        while len(rows) < count and self._ahead is not None:
            row, position = self._ahead
            rows.append(row)
            running = hashlib.blake2b(f"{running}{row.values!r}".encode(), digest_size=16).hexdigest()
            self._ahead = next(self._rows, None)
        self.place = {**place, "rows": place["rows"] + len(rows), "position": position, "hash": running}
        return rows

    @property
    def ended(self) -> bool:
        """Whether the pass has no more rows."""
        return self._ahead is None

    def begin_pass(self) -> None:
        """Begins the next pass. Raises UserError if this pass had no rows, or other rows than the first pass."""
        place = self.place
        if not place["rows"]:
            raise UserError(f"{self.config.path}: the source has no rows; it must have at least one")
        if place["whole"] not in (None, place["hash"]):
            raise UserError(
                f"{self.config.path}: pass {place['pass'] + 1} has other rows than the first pass, because the data "
                "changed during the run; restore the earlier data, or start a new run in another run_dir"
            )
        self.seek({**_START, "pass": place["pass"] + 1, "whole": place["hash"]})


class Stream(Generic[T]):
    """Windows of one source, or of several that are mixed by weight.

    A window of a mixture has rows of each source in proportion to the weights. After its last row, a source starts
    again at its first row. A pass over the mixture ends with the window in which the slowest source ends, so a pass
    has every row at least once. If there is only one source, a window also ends where the pass ends.
    """

    def __init__(self, config: Any, reader_of: Callable[[ChatSourceConfig], Reader[T]], say: Say):
        """`say` receives the report on the first pass.

        Raises UserError if the first window has no row that can be used.
        """
        configs = [config, *config.mix_with]
        self.rows, self._say = config.shuffle_buffer, say
        total = sum(source.weight or 1.0 for source in configs)
        self._shares = [(source.weight or 1.0) / total for source in configs]
        self._sources = [_Source(source) for source in configs]
        self._readers = [reader_of(source) for source in configs]
        reports = [LoadReport(source.path, 0).notes() for source in configs]
        self._zero = reports
        start = {"window": 0, "pass": 0, "sources": [_START] * len(configs), "reports": reports}
        self.first = self.read(start)
        self.first.report.check()

    def read(self, start: Place) -> Window[T]:
        """Reads the window that begins at a place. A window has no items if none of its rows can be used."""
        reports, items = [LoadReport.of_notes(notes) for notes in start["reports"]], []
        try:
            for number, (source, reader) in enumerate(zip(self._sources, self._readers)):
                source.seek(start["sources"][number])
                missing = self._quota(number, start["window"])
                while missing:
                    first = source.place["rows"]
                    rows = source.take(missing)
                    missing -= len(rows)
                    if rows:
                        read, report = reader(rows, first)
                        items += read
                        reports[number].add(report)
                    if source.ended:
                        source.begin_pass()
                        if len(self._sources) == 1:
                            break
        except BaseException:
            for source in self._sources:  # a new attempt opens the files again
                source.place = None
            raise
        places = [source.place for source in self._sources]
        report = LoadReport.joined(reports, [report.kept for report in reports])
        passes = min(place["pass"] for place in places)
        if passes > start["pass"]:
            report.check()
            if not start["pass"]:  # the rows of later passes are the same
                self._say(f"{report}")
            reports = [LoadReport.of_notes(notes) for notes in self._zero]
        notes = [report.notes() for report in reports]
        end = {"window": start["window"] + 1, "pass": passes, "sources": places, "reports": notes}
        return Window(start["window"], start, end, items, report)

    def _quota(self, number: int, window: int) -> int:
        """Returns the number of rows of a source in a window. Rounding errors do not add up over the windows."""
        share = self._shares[number] * self.rows
        return round((window + 1) * share) - round(window * share)

    def following(
        self, place: Place, make: Callable[[list[T]], Made], passes: int | None = None
    ) -> tuple[Window[T], Made] | None:
        """Returns (the next window with items, `make(items)`), or None if the first `passes` passes have none left.

        All processes must call this method. Raises `StreamFault` on all of them if a row stops the run, and UserError
        if they have read different rows.
        """

        def read() -> tuple[Window[T], Made] | None:
            at = place
            try:
                while passes is None or at["pass"] < passes:
                    window = self.read(at)
                    if window.items:
                        return window, make(window.items)
                    at = window.end
            except UserError as error:
                raise StreamFault(f"{error}; correct it, and run the same command to continue") from error
            return None

        found = processes.agreed(read, StreamFault)
        if not processes.alone():
            rows = {"rows": None if found is None else _hashes(found[0].end)}
            processes.check_alike("streamed data", rows, "give all hosts the same files of data")
        return found

    def again(self, notes: dict[str, Any]) -> Window[T]:
        """Reads the window of a checkpoint. Raises UserError if the window has other rows than before."""

        def read() -> Window[T]:
            window = self.read(notes["start"])
            for number, (before, after) in enumerate(zip(notes["hashes"], _hashes(window.end))):
                if before != after:
                    path, row = self._sources[number].config.path, notes["start"]["sources"][number]["rows"] + 1
                    raise UserError(
                        f"{path}: rows from row {row} on changed since the run read them; restore the earlier data, "
                        "or give another run_dir"
                    )
            return window

        return processes.agreed(read)

    def forget_first(self) -> None:
        """Drops the items of the first window, which are kept for the checks before training."""
        self.first = replace(self.first, items=[])

    def checksum(self) -> str:
        """Returns a hash of the rows of the first window and of the names of all files."""
        files = [files_of(source.config.path) for source in self._sources]
        return hashlib.blake2b(repr((files, _hashes(self.first.end))).encode(), digest_size=8).hexdigest()


def _hashes(place: Place) -> list[list[str | None]]:
    """Returns [hash of the rows of this pass so far, hash of the first pass] of each source."""
    return [[source["hash"], source["whole"]] for source in place["sources"]]
