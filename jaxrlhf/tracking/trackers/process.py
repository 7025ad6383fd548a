"""Starts the process of the trackers beside a run, and stops it when the run ends."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxrlhf.checkpoint.files import reason
from jaxrlhf.errors import UserError

CLOSING = {True: 60.0, False: 10.0}  # whether the run has finished -> seconds to send the rest of the logs
_KILL_AFTER = 5.0  # seconds after `CLOSING` until the process is killed
FILES = LOG, STATE, LOCK = "trackers.log", "trackers.json", "trackers.lock"  # in the run directory


def check_clients(names: Sequence[str]) -> None:
    """Raises `UserError` if the client of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"trackers: {name} is not installed; run pip install 'jaxrlhf[{name}]', or leave {name} out"
            )


def listen(port: int | None) -> socket.socket | None:
    """Opens the port on all addresses of this machine. Returns None for None.

    Raises `UserError` if the port is not free.
    """
    if port is None:
        return None
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("", port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(f"prometheus_port: {port} cannot be opened: {error.strerror}; give another port") from None
    return listener


class TrackerProcess:
    """The process that sends the run's logs to trackers and to Prometheus. It runs during a `with` block.

    This tracker process reads metrics.jsonl and samples.jsonl itself, so the run never waits for it. It ends when the
    block ends or the run's process ends. The run prints the lines that the tracker process writes to its standard
    output.
    """

    def __init__(self, folder: Path, names: Sequence[str], listener: socket.socket | None, say: Callable[[str], None]):
        self._folder, self._names, self._listener, self._say = folder, names, listener, say
        self._ending = False

    def __enter__(self) -> "TrackerProcess":
        try:
            self._process = self._start()
        except OSError as error:
            self._say(
                f"trackers: the tracker process cannot start: {reason(error)}; the run continues without trackers"
            )
            self._process = None
        if self._listener is not None:
            self._listener.close()
        if self._process is not None:
            self._reader = threading.Thread(target=self._read, name="trackers", daemon=True)
            self._reader.start()
        return self

    def _start(self) -> subprocess.Popen:
        port = -1 if self._listener is None else self._listener.fileno()
        arguments = map(str, (self._folder, os.getpid(), port, *self._names))
        source = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        with open(self._folder / LOG, "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "jaxrlhf.tracking.trackers", *arguments],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=() if port < 0 else (port,),
            )

    def _read(self) -> None:
        for line in self._process.stdout:
            self._say(line.decode("utf-8", "replace").rstrip("\n"))
        status = self._process.wait()
        if status and not self._ending:
            self._say(
                f"trackers: the tracker process ended with status {status} (see {self._folder / LOG}); the run "
                "continues without trackers; the same command sends the rest when the run resumes"
            )

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self._process is None:
            return
        finished = kind is None
        with contextlib.suppress(OSError):  # the process may already have ended
            self._process.stdin.write(b"finished\n" if finished else b"stopped\n")
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSING[finished] + _KILL_AFTER)
        except subprocess.TimeoutExpired:
            self._ending = True
            self._process.kill()
            self._say(
                "trackers: the tracker process did not end in time and was killed; the same command sends the rest"
            )
        self._reader.join(_KILL_AFTER)
