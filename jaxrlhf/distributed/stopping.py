"""Stopping on request: SIGTERM, Ctrl-C or SIGHUP lets the step under way end and be saved, within a bound.

Signals are heard by a thread, so that it answers at once, also while the main thread compiles and no Python handler
can run. Where there is nothing to save, it ends the process itself: whatever is written by then is written so that a
kill does it no harm.

Several processes stop before the same step: jax's preemption service tells all of a SIGTERM to one of them, and names
the step (`multihost_utils.reached_preemption_sync_point`).
"""

import contextlib
import faulthandler
import os
import signal
import socket
import threading
from collections.abc import Callable

# 128 and the signal's number, as shells have it
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


class Stopped(Exception):
    """The run ended because a signal asked for it, and what it has done is saved."""

    def __init__(self, number: int, what: str):
        super().__init__(f"stopped by {signal.Signals(number).name}: {what}")
        self.status = STATUS[number]


class StopSignals:
    """Hears the signals of `STATUS` while it is entered, which is for the main thread; on another it hears nothing.

    `at_work` is set by whoever can stop in good order: it says what would be lost now. It then calls `due` before each
    of its steps, and has `grace` seconds from the signal on; then the process ends in the middle. A second SIGINT ends
    it at once. Children inherit nothing of it: signals do to them what they did before.
    """

    def __init__(self, grace: float = 60.0):
        self.grace = grace
        self.at_work: Callable[[], str] | None = None
        self._signal: signal.Signals | None = None
        self._before: dict[int, object] = {}
        self._shared = False  # jax has SIGTERM
        self._steps = 0

    def due(self) -> int:
        """The signal for which to stop before the next step; 0: go on.

        All processes of a run call it alike, before each step, and get an answer other than 0 before the same one.
        """
        if not self._shared:
            return self._signal or 0
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        self._steps += 1
        return (self._signal or signal.SIGTERM) if reached_preemption_sync_point(self._steps) else 0

    def share(self) -> None:
        """After `jax.distributed.initialize` on several processes: from now on `due` agrees with the others.

        jax has put its own handler for SIGTERM in the place of ours. The fault handler rings our bell before it.
        """
        self._shared = True
        if self._before:
            faulthandler.register(signal.SIGTERM, file=self._ear, all_threads=False, chain=True)

    def __enter__(self) -> "StopSignals":
        global _listening
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's
        self._heard, self._ear = socket.socketpair()
        self._ear.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._ear.fileno(), warn_on_full_buffer=False)
        for number in STATUS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            # Without a handler of Python's own, the wake-up descriptor would hear nothing.
            self._before[number] = signal.signal(number, lambda number, frame: None)
        _listening = self
        threading.Thread(target=self._listen, name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before:
            self._restore(self._wakeup)
            self._ear.close()  # which ends the thread

    def _restore(self, wakeup: int = -1) -> None:
        """The handlers that were there before."""
        global _listening
        _listening = None
        if self._shared:
            faulthandler.unregister(signal.SIGTERM)
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        self._before.clear()

    def _listen(self) -> None:
        interrupts = 0
        with self._heard:
            while heard := self._heard.recv(1):
                # The bell is text, whose first letter is beyond the number of any signal.
                number = signal.SIGTERM if heard[0] > signal.NSIG else heard[0]
                if number not in list(STATUS):
                    continue
                interrupts += number == signal.SIGINT
                if self._signal is None:  # the first one counts
                    self._note(signal.Signals(number))
                if interrupts > 1:
                    self._end(f"interrupted twice{self._lost()}")

    def _note(self, received: signal.Signals) -> None:
        if received == signal.SIGHUP:
            _leave_terminal()  # before the main thread hears of it, and prints
        self._signal = received
        if self.at_work is None:
            self._end(f"stopped by {received.name}")
        _say(f"{received.name}: the step under way ends and is saved, within {self.grace:g} s")
        threading.Thread(target=self._wait, name="grace", daemon=True).start()
        if self._shared and received != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)  # the one that jax tells the other processes of

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


_listening: StopSignals | None = None


def _forget() -> None:
    """In a forked child, such as a reward function's worker: else its signals would stop the run."""
    if _listening is not None:
        _listening._restore()


os.register_at_fork(after_in_child=_forget)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())  # sys.stderr has a lock that the main thread may hold


def _leave_terminal() -> None:
    """Output to a terminal that is gone goes nowhere, and raises nothing."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
