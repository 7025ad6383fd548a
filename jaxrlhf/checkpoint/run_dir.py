"""The run directory. A run creates this directory, and only a run with the same settings can continue in it.

On several hosts, only one process writes.
"""

import datetime
import os
from collections.abc import Callable
from pathlib import Path

from jaxrlhf.checkpoint.files import atomic_write
from jaxrlhf.config.differences import Change, describe_change, differences
from jaxrlhf.config.reading import parse_yaml
from jaxrlhf.errors import UserError

LOGS = ("metrics.jsonl", "samples.jsonl")
START = "begun.txt"  # holds the time at which the run started; chat templates write the date of this time


def open_run(
    run_dir: str | Path, config_text: str, writes: bool = True, may_change: Callable[[Change], bool] = lambda _: False
) -> Path:
    """Creates the directory with its `config.yaml`, or opens a directory with the same settings. Returns the path.

    `config_text` is YAML. On several hosts, all processes compare the settings, and only the process with `writes=True`
    writes them. If a setting differs and `may_change` is true for it, the file gets the new value. If any other setting
    differs, raises `UserError` with the name of the first one. Also raises `UserError` if the directory cannot be
    written.
    """
    folder = Path(run_dir)
    file = folder / "config.yaml"
    make_folder(folder)
    if (not file.exists() or _changes(folder, config_text, may_change)) and writes:
        _write(folder, file, config_text)
    return folder


def started_at(run_dir: str | Path) -> datetime.datetime | None:
    """Returns the start time that `record_start` wrote, or None if the run has not started."""
    path = Path(run_dir) / START
    try:
        return datetime.datetime.fromisoformat(path.read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the file must hold the start time of the run ({error}); restore the file, or give another run_dir"
        ) from None


def record_start(run_dir: str | Path, time: datetime.datetime) -> None:
    """Writes the start time of the run. If the file exists already, it is not changed."""
    path = Path(run_dir) / START
    if not path.exists():
        _write(path.parent, path, time.isoformat() + "\n")


def make_folder(folder: Path) -> list[Path]:
    """Creates the run directory and returns the folders that were created, the innermost first.

    Raises `UserError` if the directory cannot be created.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error.strerror) from None
    return missing


def _write(folder: Path, file: Path, text: str) -> None:
    try:
        atomic_write(file, text)
    except OSError as error:
        raise _unwritable(folder, error.strerror) from None


def _unwritable(folder: Path, why: str) -> UserError:
    return UserError(
        f"run_dir {folder}: the folder cannot be written: {why}; give another run_dir, or make this folder writable"
    )


def check_run(
    run_dir: str | Path, config_text: str, may_change: Callable[[Change], bool] = lambda _: False
) -> list[Change]:
    """Returns the settings that differ from those of the run in `run_dir`. For a new run, the list is empty.

    Nothing is written. Raises `UserError` if `run_dir` is a file or cannot be written. Also raises `UserError` if a
    setting differs and `may_change` is false for it.
    """
    folder = Path(run_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir {folder}: this is a file; give a folder")
    for name in LOGS:
        if (folder / name).exists() and not (folder / name).is_file():
            raise UserError(f"{folder / name}: the log of a run must be a file; give another run_dir")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"{parent} is not writable")
    if (folder / "config.yaml").is_file():
        return _changes(folder, config_text, may_change)
    for name in ("checkpoints", "roles", *LOGS):
        if (folder / name).exists():
            raise UserError(
                f"run_dir {folder}: the folder has {name} of a run, but no config.yaml; restore config.yaml, or give "
                "another run_dir"
            )
    return []


def _changes(folder: Path, new_text: str, may_change: Callable[[Change], bool]) -> list[Change]:
    try:
        old = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    except OSError as error:
        raise UserError(
            f"{folder / 'config.yaml'}: the file cannot be read: {error.strerror}; make it readable, or give another "
            "run_dir"
        ) from None
    except (UserError, UnicodeDecodeError):
        old = None
    if not isinstance(old, dict):
        raise UserError(
            f"{folder / 'config.yaml'}: the file must hold the settings of a run; give another run_dir, or remove this "
            "folder"
        )
    changed = differences(old, parse_yaml(new_text, "settings"))
    refused = [change for change in changed if not may_change(change)]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise UserError(
            f"run_dir {folder} holds a run with other settings: {describe_change(refused[0])}{more}; give another "
            "run_dir, or give the same settings to continue that run"
        )
    return changed
