"""Counts of the rows of a source that are read, cut and dropped, and the rule that decides about unusable rows."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jaxrlhf.config import Overflow, SourceConfig
from jaxrlhf.data.sources import Row
from jaxrlhf.errors import SharedFault, UserError

REASONS = 6  # number of reasons that a report lists; the rarest are counted together as "other reasons"
T = TypeVar("T")


@dataclass
class LoadReport:
    """Counts how many rows of a source were read, cut to length and dropped, and for which reasons."""

    path: str
    rows: int
    cut: int = 0
    past_stop: int = 0  # text responses that were cut after a stop token inside them
    dropped: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)  # reason -> place of the first row that was dropped, if known
    unread: list[str] = field(default_factory=list)  # tools and template arguments that the chat template ignores
    beside_text: set[str] = field(default_factory=set)  # columns of tools and arguments that text prompts do not use
    in_pass: list[int] = field(default_factory=list)  # of a mixture: the rows of each source in a pass over the data

    @classmethod
    def joined(cls, reports: Sequence["LoadReport"], in_pass: Sequence[int]) -> "LoadReport":
        """Returns the report on a mixture of sources. `in_pass` holds the rows of each source in a pass."""
        if len(reports) == 1 and in_pass[0] == reports[0].kept:
            return reports[0]
        whole = cls(" + ".join(report.path for report in reports), 0)
        for report in reports:
            whole.add(report)
        whole.in_pass = list(in_pass)
        return whole

    def add(self, other: "LoadReport") -> None:
        """Adds the counts of another report to this one."""
        self.rows += other.rows
        self.cut += other.cut
        self.past_stop += other.past_stop
        self.unread = sorted({*self.unread, *other.unread})
        self.beside_text |= other.beside_text
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        self.first = other.first | self.first

    def notes(self) -> dict[str, Any]:
        """Returns the report as JSON values, from which `of_notes` rebuilds the report."""
        return dataclasses.asdict(self) | {"beside_text": sorted(self.beside_text)}

    @classmethod
    def of_notes(cls, notes: dict[str, Any]) -> "LoadReport":
        return cls(**copy.deepcopy(notes) | {"beside_text": set(notes["beside_text"])})

    def drop(self, reason: str, where: str | None = None) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if where is not None:
            self.first.setdefault(reason, where)

    def usable(self, rows: Sequence[Row], read: Callable[[Row], T], drop: bool) -> Iterator[tuple[Row, T]]:
        """Yields (row, `read(row)`) for each row. If `read` raises UserError and `drop` is set, the row is dropped."""
        for row in rows:
            try:
                if row.fault is not None:
                    raise UserError(row.fault)
                result = read(row)
            except UserError as error:
                if not drop or isinstance(error, SharedFault):
                    raise
                self.refuse(row, str(error))
            else:
                yield row, result

    def refuses(self, row: Row, fault: str | None, drop: bool) -> bool:
        """Returns whether the row has a fault.

        If `drop` is set, a row with a fault is dropped. Otherwise UserError is raised.
        """
        if fault is None:
            return False
        if not drop:
            raise UserError(f"{row.where}: {fault}")
        self.refuse(row, fault)
        return True

    def refuse(self, row: Row, message: str) -> None:
        """Drops a row. The reason is the error message without the place and without the advice after "; "."""
        self.drop(message.removeprefix(f"{row.where}: ").split("; ")[0], row.where)

    @property
    def kept(self) -> int:
        return self.rows - sum(self.dropped.values())

    def check(self) -> None:
        """Raises UserError if no row is left."""
        if not self.kept:
            reasons = "; ".join(self._reasons("{} {}"))
            raise UserError(f"{self.path}: none of the {self.rows} rows can be used: {reasons}")

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.kept} of {self.rows} rows"]
        parts += [f"a pass has {' + '.join(map(str, self.in_pass))} rows"] if self.in_pass else []
        parts += [f"{self.cut} cut to length"] if self.cut else []
        parts += [f"{self.past_stop} responses cut after a stop token in their text"] if self.past_stop else []
        parts += self._reasons("{} dropped ({})")
        parts += [f"the chat template ignores {' and '.join(self.unread)}"] if self.unread else []
        parts += [f"text prompts ignore {' and '.join(sorted(self.beside_text))}"] if self.beside_text else []
        return ", ".join(parts)

    def _reasons(self, form: str) -> list[str]:
        """Returns a text for each reason with the number of dropped rows. The most frequent reason is first."""
        ordered = sorted(self.dropped.items(), key=lambda item: -item[1])
        first = {reason: f"; first {place}" for reason, place in self.first.items()}
        texts = [form.format(count, reason + first.get(reason, "")) for reason, count in ordered]
        if len(texts) > REASONS:
            rest = ordered[REASONS - 1 :]
            texts[REASONS - 1 :] = [form.format(sum(n for _, n in rest), f"{len(rest)} other reasons")]
        return texts


def drops_unusable(source: SourceConfig, overflow: Overflow) -> bool:
    """Whether rows that cannot be used are dropped. The setting `unusable` decides.

    Without this setting, unusable rows are dropped if `overflow` drops long rows.
    """
    return (source.unusable or ("drop" if overflow == "drop" else "stop")) == "drop"
