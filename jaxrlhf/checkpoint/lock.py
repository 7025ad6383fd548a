"""One run at a time in a directory: filelock's lock on the file `lock`, which says who holds it.

It ends with its process, however that ends, and no child of the process keeps it. On NFS it holds between hosts where
the server's lock service works. Where a file system has no locks, the run says so and goes on.
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
    """The lock of a run's directory. On several hosts one process takes it for all, and all of them ask for it."""

    def __init__(self, folder: str | Path, takes: bool = True, say: Callable[[str], None] = print):
        self._folder, self._takes, self._say = Path(folder).absolute(), takes, say
        self._lock = filelock.FileLock(self._folder / "lock", blocking=False, thread_local=False, on_acquired=_sign)
        self.held = False

    def take(self) -> None:
        """Takes the lock of a folder that exists; `UserError` on every process where another run has it."""
        if self.held:
            return
        refusal = self._try() if self._takes else ""
        if largest(int(bool(refusal))):
            raise UserError(refusal or f"{self._folder}: another run is at work there, as process 0 says")
        self.held = True

    def _try(self) -> str:
        """Why it cannot be had; "" where it is."""
        path = self._folder / "lock"
        try:
            self._lock.acquire()
        except filelock.Timeout:
            who = _holder(path)
            return f"run_dir {self._folder}: {who} is running there; wait for it, stop it, or give another run_dir"
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                return f"{path}: cannot be written: {reason(error)}; give another run_dir, or make it writable"
            self._say(f"{self._folder}: no locks here ({reason(error)}): see to it that no second run uses it")
        return ""

    def release(self) -> None:
        """Lets go. The file stays: another process may have it open already."""
        self.held = False
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                os.truncate(self._lock.lock_file, 0)
            self._lock.release()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _sign(descriptor: int) -> None:
    """Writes process, host and time into the lock file. A full disk is no error: the lock holds without them."""
    told = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(told) + "\n").encode(), 0)


def _holder(path: Path) -> str:
    """Who has the lock, as far as the file tells."""
    try:
        found = json.loads(path.read_bytes())
        return f"process {found['pid']} on {found['host']}, since {found['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
