"""A run is its directory: opened once, continued by the same settings. On several hosts one process writes."""

import datetime
import os
from collections.abc import Callable
from pathlib import Path

from jaxrlhf.checkpoint.files import atomic_write
from jaxrlhf.config.differences import Change, described, differences
from jaxrlhf.config.reading import parse_yaml
from jaxrlhf.errors import UserError

LOGS = ("metrics.jsonl", "samples.jsonl")
BEGUN = "begun.txt"  # when the run began: chat templates that write the date write that one


def open_run(
    run_dir: str | Path, config_text: str, writes: bool = True, may_change: Callable[[Change], bool] = lambda _: False
) -> Path:
    """Creates the directory with its `config.yaml`, or finds it there with the same settings.

    `config_text` is YAML. On several hosts all compare, and one `writes`. Settings that `may_change` are written anew.
    Raises `UserError` where the directory belongs to a run with other settings (the first key that differs is
    named), or cannot be written.
    """
    folder = Path(run_dir)
    file = folder / "config.yaml"
    make_folder(folder)
    try:
        changed = not file.exists() or _changes(folder, config_text, may_change)
        if changed and writes:
            atomic_write(file, config_text)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder


def begun_at(run_dir: str | Path) -> datetime.datetime | None:
    """When the run began, as `record_begin` has written it; None where it has not."""
    path = Path(run_dir) / BEGUN
    try:
        return datetime.datetime.fromisoformat(path.read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no time when a run began ({error}); restore it, or give another run_dir") from None


def record_begin(run_dir: str | Path, time: datetime.datetime) -> None:
    """Writes when the run began, unless that is written already."""
    path = Path(run_dir) / BEGUN
    try:
        if not path.exists():
            atomic_write(path, time.isoformat() + "\n")
    except OSError as error:
        raise _unwritable(path.parent, error) from None


def make_folder(folder: Path) -> None:
    """Makes the run's folder; `UserError` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"run_dir {folder}: cannot be written: {error.strerror}; give another run_dir, or make this one writable"
    )


def check_run(
    run_dir: str | Path, config_text: str, may_change: Callable[[Change], bool] = lambda _: False
) -> list[Change]:
    """The settings that a run in `run_dir` is continued with and did not begin with; writes nothing.

    `UserError` where `run_dir` is a file, cannot be written, or holds a run with other settings that may not change.
    """
    folder = Path(run_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir {folder}: is a file; give a folder")
    for name in LOGS:
        if (folder / name).exists() and not (folder / name).is_file():
            raise UserError(f"{folder / name}: is no file, and the run's log goes there; give another run_dir")
    nearest = next(above for above in (folder, *folder.absolute().parents) if above.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"run_dir {folder}: {nearest} cannot be written; give another run_dir, or make it writable")
    if not (folder / "config.yaml").is_file():
        left = next((name for name in ("checkpoints", "roles", *LOGS) if (folder / name).exists()), None)
        if left is not None:
            raise UserError(
                f"run_dir {folder}: has {left} of a run, but no config.yaml that says which; restore that, or give "
                "another run_dir"
            )
        return []
    return _changes(folder, config_text, may_change)


def _changes(folder: Path, new_text: str, may_change: Callable[[Change], bool]) -> list[Change]:
    try:
        old = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    except (UserError, UnicodeDecodeError):
        old = None
    if not isinstance(old, dict):
        raise UserError(f"{folder / 'config.yaml'}: not a run's settings; give another run_dir, or remove this one")
    changed = differences(old, parse_yaml(new_text, "settings"))
    refused = [change for change in changed if not may_change(change)]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise UserError(
            f"run_dir {folder} holds a run with other settings: {described(refused[0])}{more}; give another run_dir, "
            "or the same settings to continue that run"
        )
    return changed
