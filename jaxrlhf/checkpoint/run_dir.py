"""The run directory: a run creates it, and only a run with the same settings can continue in it.

On several hosts one process writes.
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
START = "begun.txt"  # when the run started; chat templates that write the date use it


def open_run(
    run_dir: str | Path, config_text: str, writes: bool = True, may_change: Callable[[Change], bool] = lambda _: False
) -> Path:
    """Creates the directory with its `config.yaml`, or opens one with the same settings, and returns its path.

    `config_text` is YAML. On several hosts all processes compare the settings, and the process with `writes` writes
    them. Differing settings for which `may_change` is true are updated in the file. Raises `UserError` if other
    settings differ (the error names the first), or if the directory cannot be written.
    """
    folder = Path(run_dir)
    file = folder / "config.yaml"
    make_folder(folder)
    if (not file.exists() or _changes(folder, config_text, may_change)) and writes:
        _write(folder, file, config_text)
    return folder


def started_at(run_dir: str | Path) -> datetime.datetime | None:
    """Returns when the run started, as `record_start` wrote it; None if the run has not started."""
    path = Path(run_dir) / START
    try:
        return datetime.datetime.fromisoformat(path.read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a start time of a run ({error}); restore it, or give another run_dir") from None


def record_start(run_dir: str | Path, time: datetime.datetime) -> None:
    """Writes when the run started, unless the file exists already."""
    path = Path(run_dir) / START
    if not path.exists():
        _write(path.parent, path, time.isoformat() + "\n")


def make_folder(folder: Path) -> list[Path]:
    """Creates the run directory, and returns the folders that it created, inner ones first; `UserError` on failure."""
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
    return UserError(f"run_dir {folder}: cannot be written: {why}; give another run_dir, or make this one writable")


def check_run(
    run_dir: str | Path, config_text: str, may_change: Callable[[Change], bool] = lambda _: False
) -> list[Change]:
    """Returns the settings that differ from those of the run in `run_dir`; none for a new run. Writes nothing.

    Raises `UserError` if `run_dir` is a file, cannot be written, or holds a run with different settings that may not
    change.
    """
    folder = Path(run_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir {folder}: is a file; give a folder")
    for name in LOGS:
        if (folder / name).exists() and not (folder / name).is_file():
            raise UserError(f"{folder / name}: must be a file, for the run's log; give another run_dir")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"{parent} is not writable")
    if (folder / "config.yaml").is_file():
        return _changes(folder, config_text, may_change)
    for name in ("checkpoints", "roles", *LOGS):
        if (folder / name).exists():
            raise UserError(
                f"run_dir {folder}: has {name} of a run, but no config.yaml; restore it, or give another run_dir"
            )
    return []


def _changes(folder: Path, new_text: str, may_change: Callable[[Change], bool]) -> list[Change]:
    try:
        old = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    except OSError as error:
        raise UserError(
            f"{folder / 'config.yaml'}: cannot be read: {error.strerror}; make it readable, or give another run_dir"
        ) from None
    except (UserError, UnicodeDecodeError):
        old = None
    if not isinstance(old, dict):
        raise UserError(f"{folder / 'config.yaml'}: not a run's settings; give another run_dir, or remove this one")
    changed = differences(old, parse_yaml(new_text, "settings"))
    refused = [change for change in changed if not may_change(change)]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise UserError(
            f"run_dir {folder} holds a run with other settings: {describe_change(refused[0])}{more}; give another "
            "run_dir, or the same settings to continue that run"
        )
    return changed
