"""Stopping on request: SIGTERM or Ctrl-C lets the step under way end and be saved, within a bound.

Signals are heard by a thread, so that it answers at once, also while the main thread compiles and no Python handler
can run. Where there is nothing to save, it ends the process itself: whatever is written by then is written so that a
kill does it no harm.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}  # 128 and the signal's number, as shells have it


class Stopped(Exception):
    """The run ended because a signal asked for it, and what it has done is saved."""

    def __init__(self, number: int, what: str):
        super().__init__(f"stopped by {signal.Signals(number).name}: {what}")
        self.status = STATUS[number]


class StopSignals:
    """Hears SIGTERM and SIGINT while it is entered, which is for the main thread; on another it hears nothing.

    `at_work` is set by whoever can stop in good order: it says what would be lost now. It then looks at `requested`
    between its steps, and has `grace` seconds from the signal on; then the process ends in the middle. A second
    SIGINT ends it at once.
    """

    def __init__(self, grace: float = 60.0):
        self.grace = grace
        self.at_work: Callable[[], str] | None = None
        self._signal: signal.Signals | None = None
        self._before: dict[int, object] = {}
        self._lock = threading.RLock()  # a handler may interrupt a handler

    @property
    def requested(self) -> int:
        """The signal that asked to stop, of this process; 0: none did."""
        return self._signal or 0

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's
        self._heard, self._ear = socket.socketpair()
        self._ear.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._ear.fileno(), warn_on_full_buffer=False)
        for number in STATUS:
            # Without a handler of Python's own, the wake-up descriptor would hear nothing.
            self._before[number] = signal.signal(number, lambda number, frame: self._note(signal.Signals(number)))
        threading.Thread(target=self._listen, name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._ear.close()  # which ends the thread
        self._before.clear()

    def _listen(self) -> None:
        interrupts = 0
        with self._heard:
            while heard := self._heard.recv(1):
                if heard[0] not in list(STATUS):
                    continue
                received = signal.Signals(heard[0])
                interrupts += received == signal.SIGINT
                self._note(received)
                if interrupts > 1:
                    self._end(f"interrupted twice{self._lost()}")

    def _note(self, received: signal.Signals) -> None:
        """The first signal counts; heard by the thread, and once more by the handler."""
        with self._lock:
            if self._signal is not None:
                return
            self._signal = received
        if self.at_work is None:
            self._end(f"stopped by {received.name}")
        _say(f"{received.name}: the step under way ends and is saved, within {self.grace:g} s")
        threading.Thread(target=self._wait, name="grace", daemon=True).start()

    def _wait(self) -> None:
        threading.Event().wait(self.grace)
        if self._before:
            self._end(f"stopped by {self._signal.name}: {self.grace:g} s were not enough{self._lost()}")

    def _lost(self) -> str:
        work = self.at_work
        return f"; {work()}" if work is not None else ""

    def _end(self, text: str) -> None:
        _say(f"{text}; the same command continues")
        os._exit(STATUS[self._signal])


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # sys.stderr has a lock that the main thread may hold
