"""A lock that keeps a second run out of a run directory. The file `lock` says which process holds the lock.

The lock is a `filelock.FileLock`. It ends with its process; child processes do not keep it. On NFS the lock works
between hosts if the server's lock service does. On a file system without locks the run prints a warning and continues.
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
    """The lock of a run directory. Every process of a run calls `take`; the process with `takes` locks for all."""

    def __init__(self, folder: str | Path, takes: bool = True, say: Callable[[str], None] = print):
        self._folder, self._takes, self._say = Path(folder).absolute(), takes, say
        self._path = self._folder / "lock"
        self._lock = filelock.FileLock(self._path, blocking=False, thread_local=False, on_acquired=_write_holder)
        self.held = False

    def take(self) -> None:
        """Locks the folder, which must exist; every process raises `UserError` if another run holds the lock."""
        if self.held:
            return
        refusal = self._acquire() if self._takes else ""
        if largest(int(bool(refusal))):
            raise UserError(refusal or f"{self._folder}: in use by another run; process 0 says which")
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
            return f"run_dir {self._folder}: {holder} is running there; wait for it, stop it, or give another run_dir"
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                return f"{self._path}: cannot be written: {reason(error)}; give another run_dir, or make it writable"
            self._say(
                f"{self._folder}: no locks on this file system ({reason(error)}); do not start a second run there"
            )
        return ""

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        """Releases the lock. The file stays: another process may have opened it."""
        self.held = False
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                os.truncate(self._path, 0)
            self._lock.release()


def _write_holder(descriptor: int) -> None:
    """Writes process, host and time into the lock file. If that fails, as on a full disk, the lock still holds."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
