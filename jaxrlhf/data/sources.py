"""Reads rows from files (JSON, JSON Lines, CSV, Parquet), from the datasets library and from the builtin data sets.

`read_rows` returns each row with its place, so that later errors name file and line. A file that cannot be parsed
always stops the run. A row that cannot be used may be dropped. `rows_from` can begin at any row of a source.
"""

import csv
import glob
import gzip
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxrlhf.config import SourceConfig
from jaxrlhf.config.paths import BUILTIN as BUILTIN_PREFIX
from jaxrlhf.config.paths import HUB_ID
from jaxrlhf.data import hub
from jaxrlhf.errors import UserError, one_line

Message = dict[str, Any]
"""One turn of a chat: `role`, `content`, and other keys that the chat template reads."""

ENDINGS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
BUILTIN_LIMIT = 1_000_000
Skip = Callable[[UserError], None]  # receives the error of a line that holds no row
Position = Any
"""Where the next row begins, as JSON values: [file, [bytes, lines]], [file, rows], or the state of a data set."""


@dataclass(frozen=True)
class Row:
    """One row and its place `where`, such as `pairs.jsonl:12` or `pairs.parquet row 12`. Rows are counted from 1."""

    values: dict[str, Any]
    where: str
    fault: str | None = None  # why the row cannot be used, if this is known before its fields are read


def check_source(source: SourceConfig) -> tuple[str, str]:
    """Returns (path, format) of a source without reading the source. Raises UserError if the source does not exist."""
    path = os.path.expanduser(source.path)
    form = _form(source, path)
    if form not in ("builtin", "datasets") and not all(map(os.path.isfile, files_of(path) or [path])):
        is_folder = os.path.isdir(path)
        problem = "this is a folder; set format: datasets to read a folder" if is_folder else "no such file"
        raise UserError(f"{source.path}: {problem}")
    return path, form


def files_of(path: str) -> list[str]:
    """Returns the files that a path names, in the order of their names. A pattern such as `part-*.jsonl` names several.

    A path that exists, or that contains none of `*`, `?` and `[`, is not a pattern and names only itself.
    """
    return [path] if os.path.exists(path) or not glob.has_magic(path) else sorted(glob.glob(path))


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

    Raises UserError if the source is missing or broken. If a line holds no row, `skip` is called with the error, and
    reading continues after this line. Without `skip` the error is raised.
    """
    path, form = check_source(source)
    if form == "builtin":
        yield from _builtin(source)
    elif form == "datasets":
        yield from _datasets(source, path)
    else:
        yield from itertools.islice((row for row, _ in _from_files(path, form, None, skip or _stop)), source.limit)


def rows_from(source: SourceConfig, position: Position = None) -> Iterator[tuple[Row, Position]]:
    """Yields each row that follows `position`, and the position after this row. None is the start of the source.

    What comes before the position is skipped; in a .gz file it must still be decompressed. Raises UserError if the
    source can only be read as a whole (a JSON file or a builtin set).
    """
    path, form = check_source(source)
    if form == "datasets":
        yield from _from_data_set(source, path, position)
    elif form in ("jsonl", "csv", "parquet"):
        yield from _from_files(path, form, position, _stop)
    else:
        kind = "a builtin set is made in memory" if form == "builtin" else "a JSON file is read as a whole"
        raise UserError(
            f"{source.path}: {kind}, so it cannot be streamed; leave streaming out, or give JSON Lines, CSV, Parquet "
            "or a data set of the datasets library"
        )


def _stop(error: UserError) -> None:
    raise error


def _from_files(path: str, form: str, position: Position, skip: Skip) -> Iterator[tuple[Row, Position]]:
    reader = {"json": _json, "jsonl": _json_lines, "csv": _csv, "parquet": _parquet}[form]
    files, (first, start) = files_of(path), position or (0, None)
    for number, name in enumerate(files[first:], first):
        try:
            for row, after in reader(name, start, skip):
                yield row, [number, after]
        except (OSError, EOFError, zlib.error) as error:  # no permission, or a broken .gz
            raise UserError(f"{name}: the file cannot be read: {one_line(error)}") from error
        start = None


def _form(source: SourceConfig, path: str) -> str:
    """Returns the format that the config sets. If it is `auto`, the path decides."""
    if source.format != "auto":
        return source.format
    if path.startswith(BUILTIN_PREFIX):
        return "builtin"
    if not files_of(path):
        raise UserError(f"{source.path}: no file matches this pattern")
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


def _parse(data: bytes, name: str, first_line: int, hint: str) -> Any:
    try:
        text = data.decode("utf-8-sig")  # files from Windows may begin with a byte order mark
        return json.loads(text, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise _not_utf8(data, error, name, first_line) from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{name}:{line}: not JSON ({error.msg}, column {error.colno}); {hint}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or very deep nesting
        raise UserError(f"{name}:{first_line}: not usable JSON ({one_line(error)})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object. Raises ValueError if a key is given twice: readers differ in which value they take."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is given twice in an object")
    return values


def _not_utf8(data: bytes, error: UnicodeDecodeError, name: str, first_line: int) -> UserError:
    line = first_line + data[: error.start].count(b"\n")
    return UserError(f"{name}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8")


def _no_row(values: Any, where: str) -> UserError:
    return UserError(f"{where}: a row must be a JSON object with named fields, not {describe(values)}")


def _json(name: str, start: None, skip: Skip) -> Iterator[tuple[Row, None]]:
    with open_bytes(name) as file:
        data = file.read()
    value = _parse(data, name, 1, "the file must be a list of rows; for JSON Lines, set format: jsonl")
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise UserError(f'{name}: the file must be a list of rows or {{"data": [...]}}, not {describe(value)}')
    for number, values in enumerate(value, 1):
        if isinstance(values, dict):
            yield Row(values, f"{name} row {number}"), None
        else:
            skip(_no_row(values, f"{name} row {number}"))


class _Lines:
    """The lines of a file after the position `start` [bytes, lines], and the position reached so far."""

    def __init__(self, file: Any, start: list[int] | None = None):
        self.file, (self.bytes, self.lines) = file, start or (0, 0)
        file.seek(self.bytes)

    def __iter__(self) -> Iterator[bytes]:
        for line in self.file:
            self.bytes, self.lines = self.bytes + len(line), self.lines + 1
            yield line

    @property
    def position(self) -> list[int]:
        return [self.bytes, self.lines]


def _json_lines(name: str, start: list[int] | None, skip: Skip) -> Iterator[tuple[Row, list[int]]]:
    with open_bytes(name) as file:
        lines = _Lines(file, start)
        for line in lines:
            if not line.strip():
                continue
            where = f"{name}:{lines.lines}"
            try:
                values = _parse(line.rstrip(b"\r\n"), name, lines.lines, "each line must be one JSON object")
            except UserError as error:
                skip(error)
                continue
            if isinstance(values, dict):
                yield Row(values, where), lines.position
            else:
                skip(_no_row(values, where))


def _csv(name: str, start: list[int] | None, skip: Skip) -> Iterator[tuple[Row, list[int]]]:
    """Yields the rows of a table with a header. An empty cell is null. Cells of .tsv files are separated by tabs."""
    csv.field_size_limit(2**31 - 1)
    separator = "\t" if name.removesuffix(".gz").lower().endswith(".tsv") else ","
    with open_bytes(name) as file:
        lines, line, names = _Lines(file), 1, None
        records = csv.reader(_texts(lines, name, skip), delimiter=separator, strict=True)
        try:
            if start is not None:
                names = next(filter(None, records))  # the header was checked when the first row was read
                lines = _Lines(file, start)
                records = csv.reader(_texts(lines, name, skip), delimiter=separator, strict=True)
                line = lines.lines + 1
            for cells in records:
                where, line = f"{name}:{line}", lines.lines + 1
                if not cells:
                    continue
                if names is None:
                    names = _header(cells, where)
                elif len(cells) == len(names):
                    yield Row({name: cell or None for name, cell in zip(names, cells)}, where), lines.position
                else:
                    skip(UserError(f"{where}: the row has {len(cells)} cells, but the header has {len(names)}"))
        except csv.Error as error:
            raise UserError(f"{name}:{line}: not CSV ({one_line(error)}); correct the quotes") from error


def _header(cells: list[str], where: str) -> list[str]:
    if "" in cells or len(set(cells)) < len(cells):
        names = ", ".join(cells)[:60]
        raise UserError(f"{where}: the header must give each column a different name; its names are {names!r}")
    return cells


def _texts(lines: _Lines, name: str, skip: Skip) -> Iterator[str]:
    for line in lines:
        try:
            yield line.decode("utf-8-sig" if lines.lines == 1 else "utf-8")
        except UnicodeDecodeError as error:
            skip(_not_utf8(line, error, name, lines.lines))
            yield line.decode(errors="replace")


def _parquet(name: str, start: int | None, skip: Skip) -> Iterator[tuple[Row, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            number = passed = start or 0  # rows before the next one: of the file, and of the row groups that are read
            groups = list(range(file.num_row_groups))
            while groups and passed >= (size := file.metadata.row_group(groups[0]).num_rows):
                passed -= size
                del groups[0]
            for batch in file.iter_batches(batch_size=1024, row_groups=groups):
                for values in batch.slice(min(passed, len(batch))).to_pylist():
                    number += 1
                    yield Row(values, f"{name} row {number}"), number
                passed = max(0, passed - len(batch))
    except pyarrow.ArrowException as error:
        raise UserError(f"{name}: the file cannot be read as Parquet: {one_line(error)}") from error


# ---------------------------------------------------------------- datasets and builtin sets


def _datasets(source: SourceConfig, path: str) -> list[Row]:
    table = _data_set(source, path)
    if source.limit:
        table = table.select(range(min(source.limit, len(table))))
    return [Row(values, f"{source.path} {source.split} row {n}") for n, values in enumerate(table.to_list(), 1)]


def _from_data_set(source: SourceConfig, path: str, position: Position) -> Iterator[tuple[Row, Position]]:
    """Yields the rows of a data set after a position: [number of rows before it, state of the `datasets` iterator]."""
    number, state = position or (0, None)
    table = _data_set(source, path, streaming=True)
    if state is not None:
        table.load_state_dict(state)
    rows = iter(table)
    while True:
        try:
            values = next(rows, None)
        except Exception as error:  # an error of datasets, pyarrow, fsspec or httpx
            raise UserError(f"{source.path}: the row after row {number} cannot be read: {one_line(error)}") from error
        if values is None:
            return
        number += 1
        yield Row(values, f"{source.path} {source.split} row {number}"), [number, table.state_dict()]


def _data_set(source: SourceConfig, path: str, streaming: bool = False) -> Any:
    """Loads a folder that `save_to_disk` wrote, a folder of data files, or a data set of the hub.

    With `streaming`, rows are read when they are needed. Version 4 and later of the datasets library run no remote
    code.
    """
    import datasets

    if os.path.exists(os.path.join(path, "dataset_dict.json")) or os.path.exists(os.path.join(path, "state.json")):
        table = _saved(source, path)
        return table.to_iterable_dataset() if streaming else table
    local = os.path.isdir(path)
    if not local and (os.path.exists(path) or not HUB_ID.fullmatch(path)):
        raise UserError(f"{source.path}: for format: datasets, the path must be a folder or a hub id (owner/name)")
    try:
        load = datasets.load_dataset if local else hub.load_dataset
        return load(path, source.subset, split=source.split, streaming=streaming)
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
