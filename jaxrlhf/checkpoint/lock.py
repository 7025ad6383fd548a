"""A lock that keeps a second run out of a run directory. The file `lock` names the process that holds the lock.

The lock is a `filelock.FileLock`. When this process ends, the lock ends too, even if child processes continue. On NFS
the lock works between hosts if the lock service of the server works. On a file system without locks, the run prints a
warning and continues.
"""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import filelock

from jaxrlhf.checkpoint.files import reason
from jaxrlhf.distributed.processes import largest
from jaxrlhf.errors import UserError

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """The lock of a run directory. Every process of a run calls `take`, but only the one with `takes=True` locks."""

    def __init__(self, folder: str | Path, takes: bool = True, say: Callable[[str], None] = print):
        self._folder, self._takes, self._say = Path(folder).absolute(), takes, say
        self._path = self._folder / "lock"
        self._lock = filelock.FileLock(self._path, blocking=False, thread_local=False, on_acquired=_write_holder)
        self.held = False

    def take(self) -> None:
        """Locks the folder. Every process raises `UserError` if another run holds the lock. The folder must exist."""
        if self.held:
            return
        refusal = self._acquire() if self._takes else ""
        if largest(int(bool(refusal))):
            raise UserError(refusal or f"{self._folder}: another run uses this folder; process 0 reports which run")
        self.held = True

    def _acquire(self) -> str:
        """Returns an error message, or "" on success."""
        try:
            self._lock.acquire()
        except filelock.Timeout:
            holder = "another process"
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(self._path.read_bytes())
                holder = f"process {entry['pid']} on {entry['host']}, since {entry['since']},"
            return (
                f"run_dir {self._folder}: {holder} is running there; wait until it ends, stop it, or give another "
                "run_dir"
            )
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                return (
                    f"{self._path}: the lock file cannot be written: {reason(error)}; give another run_dir, or make "
                    "the file writable"
                )
            self._say(
                f"{self._folder}: this file system has no locks ({reason(error)}); do not start a second run in this "
                "folder"
            )
        return ""

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        """Releases the lock. The lock file is not removed, because another process may have opened it."""
        self.held = False
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                os.truncate(self._path, 0)
            self._lock.release()


def _write_holder(descriptor: int) -> None:
    """Writes process, host and time into the lock file. If the disk is full, the lock works without this text."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
