"""Stopping on a signal: after SIGTERM, Ctrl-C or SIGHUP, the current step ends and is saved, within a time limit.

A thread receives the signals, because Python cannot run a signal handler while the main thread compiles. If there is
nothing to save, the thread exits the process itself. This is safe, because every file is written so that a kill does no
harm.

A terminal sends SIGINT (Ctrl-C) and SIGHUP (when it closes) also to child processes, such as the workers of a reward
function. The current step needs these children, so both signals are blocked in every thread that may start a child, and
children inherit the block. If the process exits in the middle of a step, it ends its children.

Several processes stop before the same step: if one process gets a SIGTERM, jax's preemption service tells all processes
and chooses the step (`multihost_utils.reached_preemption_sync_point`).
"""

import contextlib
import faulthandler
import glob
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from jaxrlhf.distributed import interrupt

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}  # exit status: 128 + the signal's number
_FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """The run ended after a signal, and its steps are saved."""

    def __init__(self, number: int, what: str):
        super().__init__(f"stopped by {signal.Signals(number).name}: {what}")
        self.status = STATUS[number]


class StopSignals:
    """Receives the signals of `STATUS` inside its `with` block; a block outside the main thread receives no signals.

    A loop that can save its steps sets `at_work`, a function that describes what an exit would lose now. The loop calls
    `due` before each step. After a signal it has `grace` seconds to stop; then the process exits in the middle of a
    step. A second SIGINT exits at once. Child processes keep the handlers from before the block, and do not receive
    SIGINT and SIGHUP.

    `afterwards` says what the user can do next; it is appended to the message of an exit that loses nothing.
    """

    def __init__(self, grace: float = 60.0, afterwards: str = ""):
        self.grace, self._afterwards = grace, afterwards
        self.at_work: Callable[[], str] | None = None
        self._signal: signal.Signals | None = None
        self._before: dict[int, object] = {}
        self._shared = False  # jax handles SIGTERM
        self._steps = 0

    def due(self) -> int:
        """Returns the signal for which the run must stop before the next step, or 0.

        All processes of a run call `due` before each step, and all of them stop before the same step.
        """
        if self._before:  # before Python 3.13, multiprocessing's resource tracker unblocks SIGINT when it starts
            signal.pthread_sigmask(signal.SIG_BLOCK, _FROM_TERMINAL)
        if not self._shared:
            return self._signal or 0
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        self._steps += 1
        return (self._signal or signal.SIGTERM) if reached_preemption_sync_point(self._steps) else 0

    def share(self) -> None:
        """Makes `due` agree between processes; must be called after `jax.distributed.initialize`.

        jax has replaced the SIGTERM handler of this object by its own. So Python's fault handler is set for SIGTERM: it
        writes to the socket of this object, then calls jax's handler.
        """
        self._shared = True
        if self._before:
            faulthandler.register(signal.SIGTERM, file=self._sender, all_threads=False, chain=True)

    def __enter__(self) -> "StopSignals":
        global _active
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may set handlers
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for number in STATUS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # the process was started with nohup
            # Python writes to the wake-up descriptor only for signals that have a Python handler.
            self._before[number] = signal.signal(number, lambda number, frame: None)
        _active = self
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FROM_TERMINAL)  # the thread below unblocks them
        threading.Thread(target=self._listen, name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before:
            self._restore(self._wakeup)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            self._sender.close()  # ends the thread

    def _restore(self, wakeup: int = -1) -> None:
        global _active
        _active = None
        if self._shared:
            faulthandler.unregister(signal.SIGTERM)
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        self._before.clear()

    def _listen(self) -> None:
        interrupts = 0
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FROM_TERMINAL)
        with self._receiver:
            while data := self._receiver.recv(1):
                # The fault handler writes text, whose first byte is above the number of any signal.
                number = signal.SIGTERM if data[0] > signal.NSIG else data[0]
                if number not in list(STATUS):
                    continue
                interrupts += number == signal.SIGINT
                if self._signal is None:  # only the first signal starts the stop
                    self._begin_stop(signal.Signals(number))
                if interrupts > 1:
                    self._exit("interrupted twice")

    def _begin_stop(self, received: signal.Signals) -> None:
        if received == signal.SIGHUP:
            _leave_terminal()  # before the main thread learns of the signal and prints
        self._signal = received
        if self.at_work is None:
            self._exit("interrupted" if received == signal.SIGINT else f"stopped by {received.name}")
        _say(f"{received.name}: the current step ends and is saved, within {self.grace:g} s")
        threading.Thread(target=self._limit, name="grace", daemon=True).start()
        if self._shared and received != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)  # jax tells the other processes only of a SIGTERM

    def _limit(self) -> None:
        time.sleep(self.grace)
        if self._before:
            self._exit(f"stopped by {self._signal.name}: {self.grace:g} s were not enough")

    def _exit(self, text: str) -> None:
        work = self.at_work
        _say(f"{text}{self._afterwards}" if work is None else f"{text}; {work()}; the same command continues")
        _end_children()
        os._exit(STATUS[self._signal])


_active: StopSignals | None = None


def _restore_in_child() -> None:
    """Restores the handlers in a forked child, such as a reward function's worker."""
    if _active is not None:
        _active._restore()
        interrupt.restore_in_child()


os.register_at_fork(after_in_child=_restore_in_child)


def _end_children() -> None:
    """Sends SIGTERM to the child processes (on Linux), which signals of the terminal do not reach."""
    for children in glob.glob(f"/proc/{os.getpid()}/task/*/children"):
        with contextlib.suppress(OSError), open(children) as file:
            for child in map(int, file.read().split()):
                with contextlib.suppress(OSError):
                    os.kill(child, signal.SIGTERM)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())  # sys.stderr has a lock that the main thread may hold


def _leave_terminal() -> None:
    """Sends stdout and stderr to /dev/null if the terminal has closed, so that printing raises no error."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
