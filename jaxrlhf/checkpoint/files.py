"""Files that appear complete or not at all (written beside their place, synced, renamed), and what disks refuse."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxrlhf.errors import Fault, UserError

_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


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
