"""Reads rows from JSON, JSON Lines, Parquet, the datasets library and the builtin sets.

`read_rows` returns each row with its place, so that later errors name file and line. A file that cannot be parsed
always stops the run; a row that cannot be used may be dropped.
"""

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

ENDINGS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
BUILTIN_SPLITS, BUILTIN_LIMIT = ("train", "test"), 1_000_000
REASONS = 6  # reasons that a report lists; rarer ones count as "other reasons"
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One row and its place, such as `pairs.jsonl:12` or `pairs.parquet row 12` (counted from 1)."""

    values: dict[str, Any]
    where: str


@dataclass
class LoadReport:
    """Counts of the rows of a source that were read, cut to length and dropped, with reasons."""

    path: str
    rows: int
    cut: int = 0
    past_stop: int = 0  # text responses that were cut after a stop token inside them
    dropped: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)  # reason -> place of the first row dropped for it, if known
    unread: list[str] = field(default_factory=list)  # tools and template arguments that the chat template ignores
    beside_text: set[str] = field(default_factory=set)  # columns of tools and arguments beside prompts of text

    def drop(self, reason: str, where: str | None = None) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if where is not None:
            self.first.setdefault(reason, where)

    def usable(self, rows: Sequence[Row], read: Callable[[Row], T], drop: bool) -> Iterator[tuple[Row, T]]:
        """Yields each row with `read(row)`; a UserError drops the row if `drop` is set, and is raised otherwise."""
        for row in rows:
            try:
                result = read(row)
            except UserError as error:
                if not drop or isinstance(error, SharedFault):
                    raise
                self.refuse(row, str(error))
            else:
                yield row, result

    def refuses(self, row: Row, fault: str | None, drop: bool) -> bool:
        """Drops a row that has a fault and returns whether it did. Without `drop`, a fault raises UserError."""
        if fault is None:
            return False
        if not drop:
            raise UserError(f"{row.where}: {fault}")
        self.refuse(row, fault)
        return True

    def refuse(self, row: Row, message: str) -> None:
        """Drops a row; the reason is the error message without the place and without the advice after "; "."""
        self.drop(message.removeprefix(f"{row.where}: ").split("; ")[0], row.where)

    @property
    def kept(self) -> int:
        return self.rows - sum(self.dropped.values())

    def check(self) -> None:
        """Raises UserError if no row is left."""
        if not self.kept:
            reasons = "; ".join(self._reasons("{} {}"))
            raise UserError(f"{self.path}: none of its {self.rows} rows can be used: {reasons}")

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.kept} of {self.rows} rows"]
        parts += [f"{self.cut} cut to length"] if self.cut else []
        parts += [f"{self.past_stop} responses cut after a stop token in their text"] if self.past_stop else []
        parts += self._reasons("{} dropped ({})")
        parts += [f"the chat template ignores {' and '.join(self.unread)}"] if self.unread else []
        parts += [f"prompts of text ignore {' and '.join(sorted(self.beside_text))}"] if self.beside_text else []
        return ", ".join(parts)

    def _reasons(self, form: str) -> list[str]:
        """The number of dropped rows for each reason, the most frequent first."""
        ordered = sorted(self.dropped.items(), key=lambda item: -item[1])
        first = {reason: f"; first {place}" for reason, place in self.first.items()}
        texts = [form.format(count, reason + first.get(reason, "")) for reason, count in ordered]
        if len(texts) > REASONS:
            rest = ordered[REASONS - 1 :]
            texts[REASONS - 1 :] = [form.format(sum(n for _, n in rest), f"{len(rest)} other reasons")]
        return texts


def drops_unusable(source: SourceConfig, overflow: Overflow) -> bool:
    """Whether rows that cannot be used are dropped: the setting `unusable`, or by default if long rows are dropped."""
    return (source.unusable or ("drop" if overflow == "drop" else "stop")) == "drop"


def check_source(source: SourceConfig) -> tuple[str, str]:
    """(path, format) of a source, which is not read yet. UserError if it does not exist."""
    path = os.path.expanduser(source.path)
    form = _form(source, path)
    if form not in ("builtin", "datasets") and not os.path.isfile(path):
        problem = "is a folder; format: datasets reads one" if os.path.isdir(path) else "no such file"
        raise UserError(f"{source.path}: {problem}")
    return path, form


def read_rows(source: SourceConfig) -> list[Row]:
    """All rows of a source, or the first `limit`. UserError if it is missing, broken or empty."""
    path, form = check_source(source)
    if form == "builtin":
        rows = _builtin(source)
    elif form == "datasets":
        rows = _datasets(source, path)
    else:
        reader = {"json": _json, "jsonl": _json_lines, "parquet": _parquet}[form]
        try:
            rows = list(itertools.islice(reader(path, source), source.limit))
        except (OSError, EOFError, zlib.error) as error:  # no permission, or a broken .gz
            raise UserError(f"{source.path}: cannot be read: {one_line(error)}") from error
    if not rows:
        raise UserError(f"{source.path}: has no rows; want at least one")
    return rows


def _form(source: SourceConfig, path: str) -> str:
    """The format of the config; `auto` follows from the path."""
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
        f"{source.path}: its ending is not a known format; "
        f"want {', '.join(ENDINGS)}, or set format: json, jsonl or parquet"
    )


# ---------------------------------------------------------------- files


def _open(path: str):
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _parse(data: bytes, source: SourceConfig, first_line: int, hint: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))  # files from Windows may begin with a byte order mark
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise UserError(
            f"{source.path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{source.path}:{line}: not JSON ({error.msg}, column {error.colno}); {hint}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
        raise UserError(f"{source.path}:{first_line}: not usable JSON ({one_line(error)})") from error


def _row(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise UserError(f"{where}: a row must be a JSON object of named fields, not {describe(values)}")
    return Row(values, where)


def _json(path: str, source: SourceConfig) -> Iterator[Row]:
    with _open(path) as file:
        data = file.read()
    value = _parse(data, source, 1, "want a list of objects (JSON Lines: set format: jsonl)")
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise UserError(f'{source.path}: want a list of objects, or {{"data": [...]}}, not {describe(value)}')
    for number, values in enumerate(value, 1):
        yield _row(values, f"{source.path} row {number}")


def _json_lines(path: str, source: SourceConfig) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                values = _parse(line.rstrip(b"\r\n"), source, number, "want one JSON object a line")
                yield _row(values, f"{source.path}:{number}")


def _parquet(path: str, source: SourceConfig) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield _row(values, f"{source.path} row {number}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{source.path}: not a readable Parquet file: {one_line(error)}") from error


# ---------------------------------------------------------------- datasets and builtin sets


def _datasets(source: SourceConfig, path: str) -> list[Row]:
    """Loads a folder from `save_to_disk`, a folder of data files, or a hub id. datasets >= 4 runs no remote code."""
    import datasets

    if os.path.exists(os.path.join(path, "dataset_dict.json")) or os.path.exists(os.path.join(path, "state.json")):
        table = _saved(source, path)
    else:
        local = os.path.isdir(path)
        if not local and (os.path.exists(path) or not HUB_ID.fullmatch(path)):
            raise UserError(f"{source.path}: format: datasets wants a folder or a hub id such as owner/name")
        try:
            load = datasets.load_dataset if local else hub.load_dataset
            table = load(path, source.subset, split=source.split)
        except ConnectionError as error:  # also raised in offline mode, but not for an unknown hub id
            raise UserError(
                f"{source.path}: no such folder here, and the hub cannot be reached: {one_line(error)}"
            ) from error
        except Exception as error:  # the library raises its own, pyarrow's, fsspec's and httpx's errors
            cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
            raise UserError(
                f"{source.path}: {'cannot be loaded' if local else 'cannot be loaded from the hub'} "
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
        raise UserError(f"{source.path}: a saved set that cannot be read: {one_line(error)}") from error
    if isinstance(table, datasets.DatasetDict):
        if source.split not in table:
            raise UserError(f"{source.path}: no split {source.split!r}; it has {', '.join(table)}")
        return table[source.split]
    # A single saved set often has no split name, and `train` is only the setting's default.
    if source.split not in ("train", str(table.split)):
        raise UserError(f"{source.path}: a single set without splits; split: {source.split} does not exist; want train")
    return table


def _builtin(source: SourceConfig) -> list[Row]:
    from jaxrlhf.toy.world import BUILTIN

    name = source.path.removeprefix(BUILTIN_PREFIX)
    if name not in BUILTIN:
        raise UserError(
            f"{source.path}: no such builtin set; there are {', '.join(BUILTIN_PREFIX + n for n in BUILTIN)}"
        )
    if source.split not in BUILTIN_SPLITS:
        raise UserError(f"{source.path}: no split {source.split!r}; it has {', '.join(BUILTIN_SPLITS)}")
    if (source.limit or 0) > BUILTIN_LIMIT:
        raise UserError(f"{source.path}: limit {source.limit}: a builtin set has at most {BUILTIN_LIMIT:,} rows")
    rows = BUILTIN[name](source.split, source.limit)
    return [Row(values, f"{source.path} {source.split} row {n}") for n, values in enumerate(rows, 1)]


def describe(value: Any) -> str:
    """Describes a value by its type and its start, for messages."""
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
    """The first line of an error's message; the error's type if it has no message or cannot be printed."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a user's own exception class may raise in __str__
        lines = []
    return lines[0] if lines else type(error).__name__
