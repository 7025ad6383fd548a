"""Reads rows from files (JSON, JSON Lines, CSV, Parquet), from the datasets library and from the builtin data sets.

`read_rows` returns each row with its place, so that later errors name file and line. A file that cannot be parsed
always stops the run. A row that cannot be used may be dropped.
"""

import csv
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jaxrlhf.config import Overflow, SourceConfig
from jaxrlhf.config.paths import BUILTIN as BUILTIN_PREFIX
from jaxrlhf.config.paths import HUB_ID
from jaxrlhf.data import hub
from jaxrlhf.errors import SharedFault, UserError

Message = dict[str, Any]
"""One turn of a chat: `role`, `content`, and other keys that the chat template reads."""

ENDINGS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
BUILTIN_LIMIT = 1_000_000
REASONS = 6  # number of reasons that a report lists; the rarest are counted together as "other reasons"
T = TypeVar("T")
Skip = Callable[[UserError], None]  # receives the error of a line that holds no row


@dataclass(frozen=True)
class Row:
    """One row and its place `where`, such as `pairs.jsonl:12` or `pairs.parquet row 12`. Rows are counted from 1."""

    values: dict[str, Any]
    where: str
    fault: str | None = None  # why the row cannot be used, if this is known before its fields are read


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
        whole = cls(" + ".join(report.path for report in reports), sum(report.rows for report in reports))
        for report in reports:
            whole.cut += report.cut
            whole.past_stop += report.past_stop
            whole.unread = sorted({*whole.unread, *report.unread})
            whole.beside_text |= report.beside_text
            for reason, count in report.dropped.items():
                whole.dropped[reason] = whole.dropped.get(reason, 0) + count
            whole.first = report.first | whole.first
        whole.in_pass = list(in_pass)
        return whole

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


def check_source(source: SourceConfig) -> tuple[str, str]:
    """Returns (path, format) of a source without reading the source. Raises UserError if the source does not exist."""
    path = os.path.expanduser(source.path)
    form = _form(source, path)
    if form not in ("builtin", "datasets") and not os.path.isfile(path):
        is_folder = os.path.isdir(path)
        problem = "this is a folder; set format: datasets to read a folder" if is_folder else "no such file"
        raise UserError(f"{source.path}: {problem}")
    return path, form


def read_rows(source: SourceConfig) -> list[Row]:
    """Returns all rows of a source, or the first `limit` rows.

    Raises UserError if the source is missing, broken or empty.
    """
    rows = list(stream_rows(source))
    if not rows:
        raise UserError(f"{source.path}: the source has no rows; it must have at least one")
    return rows


def stream_rows(source: SourceConfig, skip: Skip | None = None) -> Iterator[Row]:
    """Yields the rows of a source. Only JSON (not JSON Lines) and sets of the datasets library are read as a whole.

    Raises UserError if the source is missing or broken. `skip` receives the error of a line or entry that holds no row,
    and the rows after it are read. Without `skip` this error is raised.
    """
    path, form = check_source(source)
    if form == "builtin":
        yield from _builtin(source)
    elif form == "datasets":
        yield from _datasets(source, path)
    else:
        reader = {"json": _json, "jsonl": _json_lines, "csv": _csv, "parquet": _parquet}[form]
        try:
            yield from itertools.islice(reader(path, source, skip or _stop), source.limit)
        except (OSError, EOFError, zlib.error) as error:  # no permission, or a broken .gz
            raise UserError(f"{source.path}: the file cannot be read: {one_line(error)}") from error


def _stop(error: UserError) -> None:
    raise error


def _form(source: SourceConfig, path: str) -> str:
    """Returns the format that the config sets. If it is `auto`, the path decides."""
    if source.format != "auto":
        return source.format
    if path.startswith(BUILTIN_PREFIX):
        return "builtin"
    ending = os.path.splitext(path.removesuffix(".gz"))[1].lower()
    if os.path.isdir(path) or (not os.path.exists(path) and ending not in ENDINGS and HUB_ID.fullmatch(path)):
        return "datasets"
    if ending in ENDINGS:
        return ENDINGS[ending]
    if not os.path.exists(path):
        raise UserError(f"{source.path}: no such file or folder")
    raise UserError(
        f"{source.path}: the ending of the file name is no known format; "
        f"the ending must be one of {', '.join(ENDINGS)}; for another ending, set format: json, jsonl, csv or parquet"
    )


# ---------------------------------------------------------------- files


def open_bytes(path: str):
    """Opens a file for reading bytes. A file with the ending .gz is decompressed."""
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _parse(data: bytes, source: SourceConfig, first_line: int, hint: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))  # files from Windows may begin with a byte order mark
    except UnicodeDecodeError as error:
        raise _not_utf8(data, error, source, first_line) from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{source.path}:{line}: not JSON ({error.msg}, column {error.colno}); {hint}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or very deep nesting
        raise UserError(f"{source.path}:{first_line}: not usable JSON ({one_line(error)})") from error


def _not_utf8(data: bytes, error: UnicodeDecodeError, source: SourceConfig, first_line: int) -> UserError:
    line = first_line + data[: error.start].count(b"\n")
    return UserError(f"{source.path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8")


def _no_row(values: Any, where: str) -> UserError:
    return UserError(f"{where}: a row must be a JSON object with named fields, not {describe(values)}")


def _json(path: str, source: SourceConfig, skip: Skip) -> Iterator[Row]:
    with open_bytes(path) as file:
        data = file.read()
    value = _parse(data, source, 1, "the file must be a list of rows; for JSON Lines, set format: jsonl")
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise UserError(f'{source.path}: the file must be a list of rows or {{"data": [...]}}, not {describe(value)}')
    for number, values in enumerate(value, 1):
        if isinstance(values, dict):
            yield Row(values, f"{source.path} row {number}")
        else:
            skip(_no_row(values, f"{source.path} row {number}"))


def _json_lines(path: str, source: SourceConfig, skip: Skip) -> Iterator[Row]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = _parse(line.rstrip(b"\r\n"), source, number, "each line must be one JSON object")
            except UserError as error:
                skip(error)
                continue
            if isinstance(values, dict):
                yield Row(values, f"{source.path}:{number}")
            else:
                skip(_no_row(values, f"{source.path}:{number}"))


def _csv(path: str, source: SourceConfig, skip: Skip) -> Iterator[Row]:
    """Yields the rows of a table with a header. An empty cell is null. Cells of .tsv files are separated by tabs."""
    csv.field_size_limit(2**31 - 1)
    separator = "\t" if path.removesuffix(".gz").lower().endswith(".tsv") else ","
    with open_bytes(path) as file:
        reader = csv.reader(_text_lines(file, source, skip), delimiter=separator, strict=True)
        line, names = 1, None
        try:
            for cells in reader:
                where, line = f"{source.path}:{line}", reader.line_num + 1
                if not cells:
                    continue
                if names is None:
                    names = _header(cells, where)
                elif len(cells) == len(names):
                    yield Row({name: cell or None for name, cell in zip(names, cells)}, where)
                else:
                    skip(UserError(f"{where}: the row has {len(cells)} cells, but the header has {len(names)}"))
        except csv.Error as error:
            raise UserError(f"{source.path}:{line}: not CSV ({one_line(error)}); mend its quotes") from error


def _header(cells: list[str], where: str) -> list[str]:
    if "" in cells or len(set(cells)) < len(cells):
        raise UserError(f"{where}: the header must give each column a name of its own, not {', '.join(cells)[:60]!r}")
    return cells


def _text_lines(file: Any, source: SourceConfig, skip: Skip) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            skip(_not_utf8(line, error, source, number))
            yield line.decode(errors="replace")


def _parquet(path: str, source: SourceConfig, skip: Skip) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{source.path} row {number}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{source.path}: the file cannot be read as Parquet: {one_line(error)}") from error


# ---------------------------------------------------------------- datasets and builtin sets


def _datasets(source: SourceConfig, path: str) -> list[Row]:
    """Loads a folder that `save_to_disk` wrote, a folder of data files, or a data set of the hub.

    Version 4 and later of the datasets library run no remote code.
    """
    import datasets

    if os.path.exists(os.path.join(path, "dataset_dict.json")) or os.path.exists(os.path.join(path, "state.json")):
        table = _saved(source, path)
    else:
        local = os.path.isdir(path)
        if not local and (os.path.exists(path) or not HUB_ID.fullmatch(path)):
            raise UserError(
                f"{source.path}: for format: datasets, the path must be a folder or a hub id such as owner/name"
            )
        try:
            load = datasets.load_dataset if local else hub.load_dataset
            table = load(path, source.subset, split=source.split)
        except ConnectionError as error:  # also raised in offline mode, but not for an unknown hub id
            raise UserError(
                f"{source.path}: there is no such local folder, and the hub cannot be reached: {one_line(error)}"
            ) from error
        except Exception as error:  # an error of datasets, pyarrow, fsspec or httpx
            cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
            raise UserError(
                f"{source.path}: the data set {'cannot be loaded' if local else 'cannot be loaded from the hub'} "
                f"(split {source.split}, subset {source.subset}): {one_line(cause or error)}"
            ) from error
    if source.limit:
        table = table.select(range(min(source.limit, len(table))))
    return [Row(values, f"{source.path} {source.split} row {n}") for n, values in enumerate(table.to_list(), 1)]


def _saved(source: SourceConfig, path: str) -> Any:
    import datasets

    try:
        table = datasets.load_from_disk(path)
    except Exception as error:  # a broken file may raise anything
        raise UserError(f"{source.path}: the saved data set cannot be read: {one_line(error)}") from error
    if isinstance(table, datasets.DatasetDict):
        if source.split not in table:
            raise UserError(f"{source.path}: no split {source.split!r}; the splits are {', '.join(table)}")
        return table[source.split]
    # A data set that was saved without splits often has no split name. `train` is the default of the setting `split`.
    if source.split not in ("train", str(table.split)):
        raise UserError(f"{source.path}: this data set has no splits; split must be train, not {source.split}")
    return table


def _builtin(source: SourceConfig) -> list[Row]:
    from jaxrlhf.toy import builtin

    name = source.path.removeprefix(BUILTIN_PREFIX)
    splits = builtin.splits(name)
    if source.split not in splits:
        raise UserError(f"{source.path}: no split {source.split!r}; the splits are {', '.join(splits)}")
    if (source.limit or 0) > BUILTIN_LIMIT:
        raise UserError(
            f"{source.path}: limit must be at most {BUILTIN_LIMIT:,} for a builtin set, not {source.limit}"
        )
    rows = builtin.load(name, source.split, source.limit)
    return [Row(values, f"{source.path} {source.split} row {n}") for n, values in enumerate(rows, 1)]


def describe(value: Any) -> str:
    """Returns the type and the first characters of a value, for error messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value!r:.40}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value))[:60] or 'no fields'}"
    return f"a {type(value).__name__}"


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's message.

    Returns the error's type instead if the message is empty or cannot be printed.
    """
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # `__str__` of a user's exception class may raise
        lines = []
    return lines[0] if lines else type(error).__name__
