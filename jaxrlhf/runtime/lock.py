"""One run at a time in a directory.

The lock is a POSIX record lock on the file `lock`, which says who holds it. It ends with its process, however that
ends, also on another host; a child that was forked and outlives the process does not keep it (as it would with
flock). On NFS it works where the server's lock service does. Where a file system has no locks, the run says so and
goes on. The process must not open the file again while it holds the lock: closing any descriptor ends it.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from jaxrlhf.distributed.agreement import largest
from jaxrlhf.errors import UserError
from jaxrlhf.runtime.run_dir import reason

_held: set[str] = set()  # by this process, which a record lock would let in twice
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """The lock of a run's directory. On several hosts one process takes it for all, and all of them ask for it."""

    def __init__(self, folder: str | Path, takes: bool = True, say: Callable[[str], None] = print):
        self._folder, self._takes, self._say = Path(folder), takes, say
        self._descriptor: int | None = None
        self._name = ""

    @property
    def held(self) -> bool:
        return bool(self._name)

    def take(self) -> None:
        """Takes the lock of a folder that exists; `UserError` on every process where another run has it."""
        if self.held:
            return
        refusal = self._try() if self._takes else ""
        if largest(int(bool(refusal))):
            raise UserError(refusal or f"{self._folder}: another run is at work there, as process 0 says")
        self._name = self._name or str(self._folder)

    def _try(self) -> str:
        """Why it cannot be had; "" where it is."""
        name = os.path.realpath(self._folder)
        if name in _held:
            return _refused(self._folder, f"this process, {os.getpid()},")
        path = self._folder / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            return f"{path}: cannot be written: {reason(error)}; give another run_dir, or make it writable"
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                return _refused(self._folder, holder)
            self._say(f"{self._folder}: no locks here ({reason(error)}): see to it that no second run uses it")
        else:
            self._descriptor = descriptor
            with contextlib.suppress(OSError):  # a full disk: nobody learns who holds it, but it is held
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, (json.dumps(_myself()) + "\n").encode(), 0)
        self._name = name
        _held.add(name)
        return ""

    def release(self) -> None:
        """Lets go. The file stays: another process may have it open already."""
        _held.discard(self._name)
        self._name = ""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _myself() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder(descriptor: int) -> str:
    """Who has the lock, as far as the file tells."""
    try:
        found = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {found['pid']} on {found['host']}, since {found['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _refused(folder: Path, holder: str) -> str:
    return f"run_dir {folder}: {holder} is running there; wait for it, stop it, or give another run_dir"
