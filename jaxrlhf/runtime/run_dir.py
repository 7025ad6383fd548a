"""A run is its directory: opened once, continued by the same settings, written so that a kill leaves no half.

Whatever is written here appears complete or not at all: into a temporary sibling, synced, renamed. On several
hosts one process writes; the others wait for it.
"""

import contextlib
import datetime
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from jaxrlhf.config.differences import Change, differences
from jaxrlhf.errors import Fault, UserError

LOGS = ("metrics.jsonl", "samples.jsonl")
BEGUN = "begun.txt"  # when the run began: chat templates that write the date write that one
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


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
        old = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        old = None
    if not isinstance(old, dict):
        raise UserError(f"{folder / 'config.yaml'}: not a run's settings; give another run_dir, or remove this one")
    changed = differences(old, yaml.safe_load(new_text))
    refused = [change for change in changed if not may_change(change)]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise UserError(
            f"run_dir {folder} holds a run with other settings: {described(refused[0])}{more}; give another run_dir, "
            "or the same settings to continue that run"
        )
    return changed


def described(change: Change) -> str:
    """One change of settings in words."""
    key, before, after = change
    return f"{key} was {_short(before)}, is now {_short(after)}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def atomic_write(path: str | Path, text: str) -> None:
    """Writes a text file that appears complete or not at all. Raises `OSError` where it cannot."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # what a kill left behind there is overwritten
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # what a full disk has taken of it
        raise


@contextlib.contextmanager
def atomic_directory(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write into; it becomes `path` once the block has ended well.

    Where `path` holds something, `replace` says that it may go: it stays until the new folder is complete, and for
    good where the block raises. Leftovers of an earlier kill are removed. Raises `UserError` where a folder cannot
    be made there, or `path` is not empty and may not be replaced, and `Fault` where the disk refuses what the block
    writes.
    """
    path = Path(os.path.abspath(path))
    temporary, retired = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if retired.exists() and not path.exists():  # killed between the two renames below
            os.replace(retired, path)
        for leftover in (temporary, retired):
            if leftover.exists():
                shutil.rmtree(leftover)
        if path.exists() and not replace and any(path.iterdir()):
            raise UserError(f"{path}: holds something already; give another folder, or remove this one")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; give a folder")
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; give another folder") from None
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                sync(Path(folder, name))
            sync(Path(folder))
        if path.exists():
            os.replace(path, retired)
        os.replace(temporary, path)
        sync(path.parent)
    except Exception as error:
        if not disk_refuses(error):
            raise
        raise Fault(f"{path}: cannot be written: {reason(error)}; what was there before is untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(retired, ignore_errors=True)


def sync(path: Path) -> None:
    """Forces a file's or folder's contents to disk, so that a rename never overtakes what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_refuses(error: BaseException) -> bool:
    """Whether an exception, Python's or a library's, comes from a disk that is full, read-only, at fault or gone."""
    return _system_error(error) in _REFUSALS


def _system_error(error: BaseException) -> int | None:
    """The number of the system's error that lies under an exception; None where none does."""
    while True:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        # What is written in C++ or Rust gives only text: tensorstore, safetensors.
        if found := re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error)):
            return int(found[1] or found[2])
        if error.__cause__ is None:
            return None
        error = error.__cause__


def reason(error: BaseException) -> str:
    """Why something could not be written or read, as short as the system says it."""
    number = _system_error(error)
    if number is not None:
        return os.strerror(number)
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join((str(error) or type(error).__name__).split())
    return text if len(text) <= 200 else text[:197] + "..."
