"""Writes files and folders atomically, and explains disk errors.

A file or folder is written under a temporary name, then synced to disk and renamed.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxrlhf.errors import Fault, UserError

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Writes a file that appears complete or not at all. Raises `OSError` if the disk refuses a write.

    Text is written as UTF-8. If `path` is a symbolic link, the function replaces the file to which the link points. If
    `path` is a device or a pipe, the function writes into it directly.
    """
    path, data = Path(os.path.realpath(path)), content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)  # a rename would replace the device
        return
    temporary = path.with_name(f".{path.name}.tmp")  # overwrites the temporary file of a killed process
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # frees space on a full disk
        raise


@contextlib.contextmanager
def atomic_directory(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder for the block to write into. If the block raises no exception, the folder becomes `path`.

    If `replace` is true, the old contents of `path` stay until the new folder is complete. Leftovers of a killed
    process are removed. Raises `UserError` if the folder cannot be created, or if `path` is not empty and `replace` is
    false. Raises `Fault` if the disk refuses a write in the block.
    """
    path = Path(os.path.abspath(path))
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():  # a process was killed between the two renames below
            os.replace(old, path)
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        if path.exists() and not replace and any(path.iterdir()):
            raise UserError(f"{path}: this folder is not empty; give another folder, or remove this folder")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: this is a file; give a folder")
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be written: {error.strerror}; give another folder") from error
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                sync(Path(folder, name))
            sync(Path(folder))
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        sync(path.parent)
    except Exception as error:
        if _error_number(error) not in _DISK_ERRORS:
            raise
        raise Fault(f"{path}: the folder cannot be written: {reason(error)}; the old contents are unchanged") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until the contents of a file or folder are on disk. Callers call this function before they rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _error_number(error: BaseException) -> int | None:
    """Returns the errno of an exception, or of the first of its causes that has an errno."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        # For libraries in C++ and Rust (tensorstore, safetensors), only the text has the errno.
        if match := re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error)):
            return int(match[1] or match[2])
        error = error.__cause__
    return None


def reason(error: BaseException) -> str:
    """Returns the operating system's message for an exception, if the exception has an errno.

    Otherwise the text of the exception's root cause is returned, at most 200 characters.
    """
    number = _error_number(error)
    if number is not None:
        return os.strerror(number)
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join((str(error) or type(error).__name__).split())
    return text if len(text) <= 200 else text[:197] + "..."
