"""Stops a run after SIGTERM, Ctrl-C or SIGHUP. The current step first ends and is saved, within a time limit.

A thread receives the signals, because Python cannot run a signal handler while the main thread compiles. If there is
nothing to save, the thread ends the process. This is safe, because no file is damaged if a process is killed while it
writes.

A terminal sends SIGINT after Ctrl-C, and SIGHUP when it closes. Child processes, such as the workers of a reward
function, receive these signals too, but the current step needs these children. So every thread that may start a child
blocks both signals, and children inherit the block. If the process exits in the middle of a step, it ends its children.

All processes of a run stop before the same step. If one process gets a SIGTERM, jax's preemption service tells all
processes and chooses the step (`multihost_utils.reached_preemption_sync_point`).
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
    """Raised when the run ended after a signal. The steps of the run are saved."""

    then = "the same command continues"  # end of the message: what the user can do next

    def __init__(self, number: int, what: str):
        super().__init__(f"stopped by {signal.Signals(number).name}: {what}")
        self.status = STATUS[number]


class StopSignals:
    """Receives the signals of `STATUS` inside the `with` block. A block outside the main thread receives no signals.

    A loop that can save its steps sets `at_work` and calls `due` before each step. `at_work` returns a text that says
    what an exit would lose at this moment. After a signal, the loop has `grace` seconds to stop. Then the process exits
    in the middle of a step. After a second SIGINT the process exits immediately. Child processes have the handlers from
    before the block and do not receive SIGINT and SIGHUP.

    A command may set `afterwards`, a text that says what the user can do next. If an exit loses nothing, its message
    ends with this text.
    """

    def __init__(self, grace: float = 60.0):
        self.grace, self.afterwards = grace, ""
        self.at_work: Callable[[], str] | None = None
        self.say: Callable[[str], None] | None = None  # prints above a live display; must not wait for a lock
        self._signal: signal.Signals | None = None
        self._before: dict[int, object] = {}
        self._shared = False  # jax handles SIGTERM
        self._steps = 0

    def due(self) -> int:
        """Returns the signal for which the run must stop before the next step, or 0.

        All processes of a run call `due` before each step, and all of them stop before the same step.
        """
        if self._before:  # before Python 3.13, the start of multiprocessing's resource tracker unblocks SIGINT
            signal.pthread_sigmask(signal.SIG_BLOCK, _FROM_TERMINAL)
        if not self._shared:
            return self._signal or 0
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        self._steps += 1
        return (self._signal or signal.SIGTERM) if reached_preemption_sync_point(self._steps) else 0

    def share(self) -> None:
        """Makes `due` stop all processes before the same step. Must be called after `jax.distributed.initialize`.

        jax has replaced the SIGTERM handler of this object. So Python's fault handler is registered for SIGTERM. It
        writes to the socket of this object and then calls jax's handler.
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
                continue  # nohup started the process
            # Python writes to the wake-up descriptor only for signals that have a Python handler.
            self._before[number] = signal.signal(number, lambda number, frame: None)
        _active = self
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FROM_TERMINAL)  # the thread below unblocks these signals
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
                # The fault handler writes text. The first byte of this text is larger than every signal number.
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
            _leave_terminal()  # the main thread, which may print, must not see the signal before this call
        self._signal = received
        if self.at_work is None:
            self._exit("interrupted" if received == signal.SIGINT else f"stopped by {received.name}")
        (self.say or _say)(f"{received.name}: the current step ends and is saved, within {self.grace:g} s")
        threading.Thread(target=self._limit, name="grace", daemon=True).start()
        if self._shared and received != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)  # jax tells the other processes only about SIGTERM

    def _limit(self) -> None:
        time.sleep(self.grace)
        if self._before:
            self._exit(f"stopped by {self._signal.name}: the step did not end within {self.grace:g} s")

    def _exit(self, text: str) -> None:
        work = self.at_work
        line = f"{text}{self.afterwards}" if work is None else f"{text}; {work()}; the same command continues"
        _say(line if self.say is None else f"\n{line}")  # a live display leaves the cursor at the end of its last line
        _end_children()
        os._exit(STATUS[self._signal])


_active: StopSignals | None = None


def _restore_in_child() -> None:
    """Restores the signal handlers in a forked child, such as a worker of a reward function."""
    if _active is not None:
        _active._restore()
        interrupt.restore_in_child()


os.register_at_fork(after_in_child=_restore_in_child)


def _end_children() -> None:
    """Sends SIGTERM to the child processes on Linux, because children do not receive signals of the terminal."""
    for children in glob.glob(f"/proc/{os.getpid()}/task/*/children"):
        with contextlib.suppress(OSError), open(children) as file:
            for child in map(int, file.read().split()):
                with contextlib.suppress(OSError):
                    os.kill(child, signal.SIGTERM)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())  # sys.stderr is not used, because the main thread may hold its lock


def _leave_terminal() -> None:
    """Redirects stdout and stderr to /dev/null if the terminal has closed, so that prints raise no errors."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
