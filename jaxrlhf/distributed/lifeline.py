"""Who of a run's processes is there, who failed, and words from the first to all: a star of TCP connections.

Process 0 listens, the others hold one connection to it each. A process that is killed loses its connections at once,
because its kernel closes them; a host that is lost is noticed by TCP's own probes. Neither needs a thread of Python to
be answered, so a process that is busy is never taken for a dead one.

Not here: arrays that programs exchange (XLA's collectives), and jax's coordination service, whose heartbeats notice a
process that is there and frozen.
"""

import contextlib
import ctypes
import dataclasses
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from jaxrlhf.distributed.connection import Connection
from jaxrlhf.errors import UserError

HELLO = "jaxrlhf processes 1"  # the first word of a process that joins (`distributed.roll_call`)
GRACE = 1.0  # seconds from the first report of a fault to the verdict: others may know better
SUSPECT_GRACE = 4.0  # the same where the first report may be an echo of a death that is not known yet
PARTING = 5.0  # seconds that process 0 waits for the others to leave before it does
SAYING = 2.0  # seconds for the last word, which a full pipe or a stopped terminal may hold up
STUCK = 15.0  # seconds that a process may take to end itself after its fault


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a run ends: which process failed, and of what."""

    process: int
    processes: int
    host: str
    pid: int
    text: str
    status: int = 1
    died: bool = False
    suspect: bool = False  # may be an echo of another process's death, such as a collective that broke off

    @property
    def who(self) -> str:
        return f"process {self.process} of {self.processes} (host {self.host}, pid {self.pid})"

    def line(self, reader: int) -> str:
        """What process `reader` prints when it ends for this fault: process 0 says all that is known of it."""
        if self.process == reader:
            return f"error: {self.text}"
        if self.died:
            return f"stopped: {self.who} died: it was killed, ran out of memory, or its host was lost"
        if self.status in (130, 143):
            return f"stopped: {self.who} was asked to stop"
        return f"stopped: {self.who} failed: {self.text if reader == 0 else 'its own output says why'}"


class Lifeline:
    """One process's end of the star; `Hub` and `Member` are process 0's and the others'.

    When another process fails or dies, this process is ended here, by a thread: one line on stderr and the status of
    the fault. A process that reported a fault of its own ends itself, and is ended after `STUCK` seconds.
    """

    def __init__(self, process: int, processes: int):
        self.process, self.processes, self.host = process, processes, socket.gethostname()
        self.verdict: Failure | None = None
        self._decided, self._lock, self._speaking = threading.Event(), threading.Lock(), threading.Lock()
        self._failing = self._leaving = self._spoken = False

    def failure(self, text: str, status: int, suspect: bool) -> Failure:
        """What `report` wants of this process."""
        return Failure(self.process, self.processes, self.host, os.getpid(), text, status, False, suspect)

    def report(self, failure: Failure) -> Failure:
        """Tells the others that this process has failed; the fault that ends the run, which may be another one.

        Returns within a bounded time. After it the process must end.
        """
        with self._lock:
            self._failing = True
            known = self.verdict
        if known is None:
            with contextlib.suppress(OSError):
                self._tell(failure)
            self._decided.wait(SUSPECT_GRACE + GRACE)
        return self.verdict or failure

    def exit(self, verdict: Failure) -> NoReturn:
        """Ends this process for the fault, after what there is to be said of it."""
        self._await_others(verdict)
        flush()
        # Two threads may end here at once: neither may end the process before the word is out, or has got stuck.
        speaking = threading.Thread(target=self._say_once, args=(verdict,), daemon=True)
        speaking.start()
        speaking.join(SAYING)
        os._exit(verdict.status)

    def _say_once(self, verdict: Failure) -> None:
        with self._speaking:
            if not self._spoken:
                say(verdict.line(self.process))
            self._spoken = True

    def _settle(self, verdict: Failure) -> bool:
        """Notes what ends the run; whether that was still open."""
        with self._lock:
            if self._leaving or self.verdict is not None:
                return False
            self.verdict = verdict
            return True

    def _end(self) -> None:
        """Ends this process by the verdict, unless it is ending by itself; called in a thread."""
        self._decided.set()
        if self._failing:
            time.sleep(STUCK)
        if not self._leaving:
            self.exit(self.verdict)

    def _tell(self, failure: Failure) -> None:
        raise NotImplementedError

    def _await_others(self, verdict: Failure) -> None:
        raise NotImplementedError


def say(line: str) -> None:
    """A line on stderr at once, whatever Python's own buffers hold and whoever has locked them."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="replace"))


class Hub(Lifeline):
    """Process 0's end."""

    def __init__(self, listener: socket.socket, processes: int, software: dict[str, str]):
        super().__init__(0, processes)
        self._listener, self._software = listener, software
        self._members: dict[int, Connection] = {}
        self._names: dict[int, tuple[str, int]] = {0: (self.host, os.getpid())}  # host and process id
        self._parted: set[int] = set()
        self._refused: str | None = None
        self._changed = threading.Condition(self._lock)
        self._arrived = 0
        self._failures: list[Failure] = []
        threading.Thread(target=self._accept, daemon=True, name="lifeline").start()

    def gather(self, timeout: float, welcome: Callable[[], dict]) -> None:
        """Waits until all are there, then sends `welcome`; `UserError` that names those who are missing."""
        expected = set(range(1, self.processes))
        with self._changed:
            self._changed.wait_for(lambda: self._refused or set(self._members) == expected, timeout)
            missing, refused = sorted(expected - set(self._members)), self._refused
            here = ", ".join(f"{i} ({host})" for i, (host, _) in sorted(self._names.items()))
            members = list(self._members.values())
        if missing or refused:
            text = refused or (
                f"process{'es' if len(missing) > 1 else ''} {_ranges(missing)} of {self.processes} did not come within "
                f"{timeout:g} s; here: {here}; start all of them, or give the number that there is"
            )
            for member in members:
                with contextlib.suppress(OSError):
                    member.send("refused", text=text)
            self._listener.close()
            raise UserError(text)
        told = welcome()
        for member in members:
            with contextlib.suppress(OSError):  # its reader notices
                member.send("welcome", **told)

    def share(self, payload: bytes) -> bytes:
        """Gives the bytes to all."""
        for member in list(self._members.values()):
            with contextlib.suppress(OSError):
                member.send("share", payload)
        return payload

    def barrier(self) -> None:
        """Returns when all have called it."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived >= self.processes - 1)
            self._arrived -= self.processes - 1
        for member in list(self._members.values()):
            with contextlib.suppress(OSError):
                member.send("release")

    def leave(self, patience: float = PARTING) -> None:
        """Parts from the others, and waits until they have left: losing process 0 would end them the hard way."""
        with self._changed:
            self._leaving = True
            self._changed.wait_for(lambda: len(self._parted) == len(self._members), patience)
        self._listener.close()

    def _await_others(self, verdict: Failure) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._parted) == len(self._members), PARTING)

    def _tell(self, failure: Failure) -> None:
        self._note(failure)

    # ------------------------------------------------------------ threads

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(Connection(sock),), daemon=True, name="lifeline").start()

    def _serve(self, connection: Connection) -> None:
        """One connection, from its first word to its end."""
        try:
            hello, _ = connection.receive(timeout=10)
            if hello["kind"] != HELLO:
                raise ConnectionError("a stranger")
            process = self._admit(hello, connection)
        except (OSError, KeyError, TypeError):
            connection.close()
            return
        if process is None:
            return
        try:
            while True:
                header, _ = connection.receive()
                if header["kind"] == "bye":
                    break
                self._take(process, header)
        except (OSError, KeyError, TypeError):
            host, pid = self._names[process]
            self._part(process)
            self._note(Failure(process, self.processes, host, pid, "lost", died=True))
            return
        self._part(process)

    def _part(self, process: int) -> None:
        with self._changed:
            self._parted.add(process)
            self._changed.notify_all()

    def _admit(self, hello: dict, connection: Connection) -> int | None:
        """The number of a process that has come, or None where it is refused."""
        process, host = int(hello["process"]), str(hello["host"])
        where = f"process {process} on host {host}"
        refused = None
        if hello["processes"] != self.processes:
            refused = f"{where} was started as one of {hello['processes']}, process 0 as one of {self.processes}"
        elif not 0 < process < self.processes:
            refused = f"{where}: the numbers are 1 to {self.processes - 1} beside process 0"
        for name, version in self._software.items():
            if refused is None and hello["software"].get(name) != version:
                refused = f"{where} runs {name} {hello['software'].get(name)}, process 0 runs {name} {version}"
        if refused is not None:  # whoever else is missing, nobody needs to wait
            refused = f"{refused}; start all processes alike"
            connection.send("refused", text=refused)
            with self._changed:
                self._refused = refused
                self._changed.notify_all()
            return None
        with self._changed:
            taken = self._names.get(process)
            if taken is None:
                self._members[process], self._names[process] = connection, (host, int(hello["pid"]))
                self._changed.notify_all()
        if taken is not None:
            where += f": this number is taken by pid {taken[1]} on host {taken[0]}; give each its own"
            connection.send("refused", text=where)
            return None
        return process

    def _take(self, process: int, header: dict) -> None:
        if header["kind"] == "arrive":
            with self._changed:
                self._arrived += 1
                self._changed.notify_all()
        elif header["kind"] == "failure":
            host, pid = self._names[process]
            given = (str(header["text"]), int(header["status"]), False, bool(header["suspect"]))
            self._note(Failure(process, self.processes, host, pid, *given))

    def _note(self, fault: Failure) -> None:
        """Weighs a fault: the first that is no echo ends the run."""
        with self._lock:
            if self._leaving or self.verdict is not None:
                return
            self._failures.append(fault)
            first = len(self._failures) == 1
            sure = first and (fault.died or (fault.process == 0 and not fault.suspect))
        if sure:
            self._decide()
        elif first:
            timer = threading.Timer(SUSPECT_GRACE if fault.suspect else GRACE, self._decide)
            timer.daemon = True
            timer.start()
        elif fault.died:  # what came before may have been its echo
            self._decide()

    def _decide(self) -> None:
        with self._lock:
            faults = list(self._failures)
        reported = {fault.process for fault in faults if not fault.died}
        known = [fault for fault in faults if not (fault.died and fault.process in reported)]
        verdict = next((fault for fault in known if not fault.suspect), known[0])
        # What all processes find wrong, such as a setting, is process 0's to say.
        verdict = next((f for f in known if f.process == 0 and f.text == verdict.text), verdict)
        if self._settle(verdict):
            for member in list(self._members.values()):
                with contextlib.suppress(OSError):
                    member.send("verdict", failure=dataclasses.asdict(verdict))
            threading.Thread(target=self._end, daemon=True, name="lifeline").start()


class Member(Lifeline):
    """The end of a process that is not process 0."""

    def __init__(self, connection: Connection, process: int, processes: int, first: tuple[str, int]):
        super().__init__(process, processes)
        self._connection, self._first = connection, first
        self._shared: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._released: queue.SimpleQueue[None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True, name="lifeline").start()

    def share(self, payload: bytes | None = None) -> bytes:
        """The bytes that process 0 gives."""
        return self._shared.get()

    def barrier(self) -> None:
        """Returns when all have called it."""
        self._send("arrive")
        self._released.get()

    def leave(self, patience: float = PARTING) -> None:
        """Parts from the others."""
        with self._lock:
            self._leaving = True
        self._send("bye")

    def _tell(self, failure: Failure) -> None:
        self._connection.send("failure", text=failure.text, status=failure.status, suspect=failure.suspect)

    def _send(self, kind: str) -> None:
        with contextlib.suppress(OSError):  # the listening thread notices
            self._connection.send(kind)

    def _await_others(self, verdict: Failure) -> None:
        if verdict.process not in (0, self.process):
            time.sleep(0.3)  # whoever watches the processes sees the one that failed end first

    def _listen(self) -> None:
        while True:
            try:
                header, payload = self._connection.receive()
                if header["kind"] == "share":
                    self._shared.put(payload)
                elif header["kind"] == "release":
                    self._released.put(None)
                elif header["kind"] == "verdict":
                    verdict = Failure(**header["failure"])
                    break
            except (OSError, KeyError, TypeError):
                verdict = Failure(0, self.processes, *self._first, "lost", died=True)
                break
        if self._settle(verdict):
            self._end()


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as a person writes them: 1, 3-6, 9."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def hold_up_aborts() -> None:
    """An abort of native code waits for some seconds, in its own thread, before it ends this process.

    Gloo aborts a process whose peer was killed at a bad moment, and what it says then is wrong ("collective mismatch").
    The lifeline knows better and needs a moment to say so.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    # A handler that needs no interpreter: sleep(3), whose seconds are then the signal's number, 6.
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def flush() -> None:
    """What Python still holds of the output goes out, unless whoever holds it is stuck."""

    def both() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    flushing = threading.Thread(target=both, daemon=True)
    flushing.start()
    flushing.join(2.0)
