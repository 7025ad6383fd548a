"""Writes JSON Lines files, whole or not at all."""

import contextlib
import datetime
import decimal
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxrlhf.checkpoint.files import reason, sync
from jaxrlhf.data.sources import ENDINGS, Row, describe
from jaxrlhf.errors import Fault, UserError


def check_output(path: str, overwrite: bool = False) -> None:
    """Raises UserError if the file exists and `overwrite` is not set, if its folder does not exist, or if its ending is
    that of another format.
    """
    ending = os.path.splitext(path)[1].lower()
    if ENDINGS.get(ending, "jsonl") != "jsonl" or ending == ".gz":
        raise UserError(f"{path}: the rows are written as JSON Lines; give a name that ends with .jsonl")
    if os.path.isdir(path):
        raise UserError(f"{path}: this is a folder; give a file")
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{path}: the file exists; give another path, or --overwrite to replace it")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UserError(f"{path}: there is no folder {folder}; make it first")


@contextlib.contextmanager
def jsonl_writer(path: str, overwrite: bool = False) -> Iterator[Callable[[Row], None]]:
    """Yields a function that writes a row. If the block raises no exception, the file then appears.

    The input file may be the output file if `overwrite` is set: it is replaced after it was read.
    """
    check_output(path, overwrite)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield lambda row: file.write(json_line(row))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync(target.parent)
    except PermissionError:
        raise
    except OSError as error:
        raise Fault(f"{path}: the file cannot be written: {reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def json_line(row: Row) -> str:
    """Returns a row as a line of JSON. Dates become text. Raises UserError if a value has no form in JSON."""

    def other(value: Any) -> Any:
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        if isinstance(value, decimal.Decimal):
            return float(value)
        raise UserError(f"{row.where}: {describe(value)} cannot be written as JSON; remove this column")

    text = json.dumps(row.values, ensure_ascii=False, default=other)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        text = json.dumps(row.values, default=other)
    return text + "\n"
