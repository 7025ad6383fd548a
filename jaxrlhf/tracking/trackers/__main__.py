"""python -m jaxrlhf.tracking.trackers RUN_DIR PID DESCRIPTOR [NAME ...]: sends the logs of a run to trackers.

The run, which is process PID, starts this process; see `process`. DESCRIPTOR is a listening socket for Prometheus, or
-1. This process ends soon after it reads a line from standard input, or soon after the run is killed. What clients
print goes to standard error, which is the file RUN_DIR/trackers.log. Lines for the user go to standard output.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from jaxrlhf.checkpoint.files import atomic_write
from jaxrlhf.config.reading import parse_yaml
from jaxrlhf.tracking.trackers.feed import Feed
from jaxrlhf.tracking.trackers.process import CLOSING, LOCK, STATE
from jaxrlhf.tracking.trackers.prometheus import serve
from jaxrlhf.tracking.trackers.protocol import RunInfo, Tracker

INTERVAL = 1.0  # seconds between two readings of the logs
HANGS = 120.0  # a tracker that does not answer for this number of seconds is dropped
CLASSES = {"tensorboard": "TensorBoard", "wandb": "WeightsAndBiases", "mlflow": "MLflow", "trackio": "Trackio"}
LATER = "the same command sends the rest when the run resumes"


class State:
    """The file trackers.json.

    It holds, for each tracker, the ids of the run in the service, and how many lines of samples.jsonl the tracker has.
    """

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        self._entries: dict[str, dict[str, Any]] = json.loads(path.read_bytes()) if path.exists() else {}

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._entries.get(name, {"ids": {}, "samples": 0})

    def put(self, name: str, ids: dict[str, Any], samples: int) -> None:
        with self._lock:
            entry = {"ids": ids, "samples": samples}
            if entry != self[name] or name not in self._entries:
                self._entries[name] = entry
                atomic_write(self._path, json.dumps(self._entries, indent=1) + "\n")


class Follower:
    """Sends the logs to one tracker, in its own thread. If one tracker hangs or fails, the others are not affected."""

    def __init__(self, name: str, tracker: Tracker, run: RunInfo, state: State, say: Callable[[str], None]):
        self.name, self._tracker, self._run, self._state, self._say = name, tracker, run, state, say
        self._closing, self._finished = threading.Event(), False
        self._called: float | None = None  # time of the call that is running; None if no call is running
        self._dropped = False
        self.thread = threading.Thread(target=self._follow, name=name, daemon=True)
        self.thread.start()

    def close(self, finished: bool) -> None:
        """Tells the thread to send the rest of the logs and then to end."""
        self._finished = finished
        self._closing.set()

    def drop_if_hanging(self, limit: float = HANGS) -> None:
        """Drops the tracker if it has not answered a call for `limit` seconds."""
        called = self._called
        if called is not None and time.monotonic() - called > limit:
            self.drop(f"has not answered for {limit:g} s")

    def drop(self, reason: str) -> None:
        """Stops sending to the tracker. Prints the reason, once."""
        if not self._dropped:
            self._dropped = True
            self._say(f"{self.name}: {reason}; the run continues without it; {LATER}")

    def _follow(self) -> None:
        try:
            self._send()
        except BaseException as error:  # some clients raise SystemExit
            text = " ".join(str(error).split())
            if isinstance(error, OSError) and error.strerror:
                self.drop(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
            else:
                self.drop(f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__)

    def _send(self) -> None:
        before = self._state[self.name]
        last = self._call(self._tracker.open, self._run, before["ids"])
        self._state.put(self.name, self._tracker.ids, before["samples"])
        self._say(f"{self.name}: {self._tracker.where}")
        feed = Feed(self._run.folder, last, before["samples"])
        while not self._dropped:
            closing = self._closing.is_set()
            for line in feed.new():
                self._call(self._tracker.log, line)
                if self._dropped:
                    return
                if line.tables:
                    self._state.put(self.name, self._tracker.ids, feed.samples)
            if closing:
                self._call(self._tracker.close, self._finished)
                return
            self._closing.wait(INTERVAL)

    def _call(self, function: Callable, *arguments: Any) -> Any:
        self._called = time.monotonic()
        try:
            return function(*arguments)
        finally:
            self._called = None


def main(folder: Path, parent: int, descriptor: int, names: list[str]) -> None:
    say = _take_output()
    # The run tells this process when to end. Child processes get the default handlers.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: None)
    with contextlib.suppress(OSError):
        os.nice(10)  # the run gets the processor first
    if descriptor >= 0:
        threading.Thread(target=serve, args=(socket.socket(fileno=descriptor), folder), daemon=True).start()
    followers = _start(folder, names, parent, say)
    finished = _wait_for_end(followers, parent)
    deadline = time.monotonic() + CLOSING[finished]
    for follower in followers:
        follower.close(finished)
    for follower in followers:
        follower.thread.join(max(deadline - time.monotonic(), 0))
        if follower.thread.is_alive():
            follower.drop(f"was still busy {CLOSING[finished]:g} s after the end of the run")


def _take_output() -> Callable[[str], None]:
    """Sends what clients print to the log. Returns a function that writes a line to the real standard output."""
    output = os.dup(1)
    os.set_inheritable(output, False)
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(text: str) -> None:
        with lock, contextlib.suppress(OSError):  # the run may have been killed
            os.write(output, f"{' '.join(text.split())}\n".encode("utf-8", "replace"))

    return say


def _start(folder: Path, names: list[str], parent: int, say: Callable[[str], None]) -> list[Follower]:
    """Starts the followers.

    First waits for the tracker process of an earlier start of the run, which may still run if that start was killed.
    """
    if not names:
        return []
    lock = filelock.FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=CLOSING[False] + 20)
    except filelock.Timeout:
        say(
            "trackers: the tracker process of an earlier start of this run is still running; the run continues "
            f"without trackers; {LATER}"
        )
        return []
    except OSError:
        pass  # the file system has no locks
    global _held
    _held = lock  # the lock is held until the process ends
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    run = RunInfo(folder, parse_yaml(text, "config.yaml"), text, parent)
    state = State(folder / STATE)
    return [Follower(name, _tracker(name), run, state, say) for name in names]


def _tracker(name: str) -> Tracker:
    return getattr(importlib.import_module(f"jaxrlhf.tracking.trackers.{name}"), CLASSES[name])()


def _wait_for_end(followers: list[Follower], run: int) -> bool:
    """Waits for a line on standard input, or until the process `run` ends. Returns whether the run has finished.

    If the run is killed, standard input may stay open, because a process that a reward function has forked may hold it.
    So the function also checks whether the process of the run still exists.
    """
    while os.getppid() == run:
        if select.select([0], [], [], INTERVAL)[0]:
            return os.read(0, 100).startswith(b"finished")
        for follower in followers:
            follower.drop_if_hanging()
    return False


if __name__ == "__main__":
    status = 1
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # skips what clients do at exit
