"""Where an environment runs: in the caller's thread, in a thread, or in a process of its own.

A worker holds one environment. `wait` waits until the environment has been made, `send` starts a call, and `receive`
returns the result of the call, so that many environments work at the same time. If a call is not over at its deadline
(a time of `time.monotonic`; None means no deadline), `receive` raises `TimeoutError`. The worker is then unusable.
"""

import contextlib
import ctypes
import multiprocessing
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxrlhf.environments.protocol import adapt
from jaxrlhf.errors import UserError, one_line

Factory = Callable[[], Any]
OUTPUT_LIMIT = 64 * 1024  # characters that an environment in a process may print
START_LIMIT = 60.0  # seconds to start a thread or process and to make the environment, before the first call


class Failed(Exception):
    """An environment failed. If it raised an exception, the message has the type and text of the exception."""


def _perform(env: Any, method: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if method == "get":
        return tuple(getattr(env, name, None) for name in arguments)
    return getattr(env, method)(*arguments, **options)


def _line(error: BaseException) -> str:
    name, text = type(error).__name__, one_line(error)
    return name if text == name else f"{name}: {text[:300]}"


class Inline:
    """Runs calls at once, in the caller's thread. There is no time limit."""

    def __init__(self, factory: Factory, name: str) -> None:
        self.env = adapt(factory())

    def wait(self) -> None:
        """Does nothing, because the environment has already been made."""

    def send(self, method: str, *arguments: Any, **options: Any) -> None:
        self._call = (method, arguments, options)

    def receive(self, deadline: float | None) -> Any:
        try:
            return _perform(self.env, *self._call)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # such as SystemExit or asyncio's CancelledError
            raise Failed(_line(error)) from error

    def stop(self) -> None:
        """Closes the environment."""
        close = getattr(self.env, "close", None)
        if callable(close):
            close()


class Thread:
    """Runs calls in a thread of its own. A thread that hangs is left behind and ends at its next bytecode."""

    def __init__(self, factory: Factory, name: str) -> None:
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self._replies: queue.SimpleQueue = queue.SimpleQueue()
        self._started = False
        self._thread = threading.Thread(target=self._run, args=(factory,), daemon=True, name=name)
        self._thread.start()

    def _run(self, factory: Factory) -> None:
        try:
            worker: Any = Inline(factory, "")
        except BaseException as error:  # such as SystemExit
            worker = error
        self._replies.put((True, None))
        while (call := self._requests.get()) is not None:
            try:
                if isinstance(worker, BaseException):
                    raise Failed(_line(worker))
                worker.send(call[0], *call[1], **call[2])
                self._replies.put((True, worker.receive(None)))
            except Failed as error:
                self._replies.put((False, str(error)))
        if isinstance(worker, Inline):
            worker.stop()

    def wait(self) -> None:
        if not self._started:
            self._next(START_LIMIT)
            self._started = True

    def send(self, method: str, *arguments: Any, **options: Any) -> None:
        self._requests.put((method, arguments, options))

    def receive(self, deadline: float | None) -> Any:
        return self._next(None if deadline is None else max(deadline - time.monotonic(), 0))

    def _next(self, seconds: float | None) -> Any:
        try:
            done, result = self._replies.get(timeout=seconds)
        except queue.Empty:
            identity = ctypes.c_ulong(self._thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(SystemExit))
            raise TimeoutError from None
        if not done:
            raise Failed(result)
        return result

    def stop(self) -> None:
        self._requests.put(None)


class Process:
    """Runs calls in a process of its own, for environments that compute much or that must not share memory.

    The factory is pickled and sent to the process, so a function must be defined at the top level of a module. Output
    of the environment after the first `OUTPUT_LIMIT` characters is dropped.
    """

    def __init__(self, factory: Factory, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, factory), daemon=True, name=name)
        try:
            self._process.start()
        except Exception as error:  # pickle's errors have several types
            raise UserError(
                f"{name}: the function that makes the environment cannot be sent to a process ({_line(error)}); "
                'use a function that is defined at the top level of a module, or mode="threads"'
            ) from None
        other.close()
        self._started = False

    def wait(self) -> None:
        if not self._started:
            self._next(START_LIMIT)
            self._started = True

    def send(self, method: str, *arguments: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):  # the process has ended: `receive` says so
            self._connection.send((method, arguments, options))

    def receive(self, deadline: float | None) -> Any:
        return self._next(None if deadline is None else max(deadline - time.monotonic(), 0))

    def _next(self, seconds: float | None) -> Any:
        try:
            if not self._connection.poll(seconds):
                raise TimeoutError
            done, result = self._connection.recv()
        except TimeoutError:
            self._process.kill()
            raise
        except (EOFError, OSError):
            self._process.join(1.0)
            raise Failed(f"its process ended with status {self._process.exitcode}") from None
        except Exception as error:  # an object that cannot be unpickled here
            raise Failed(f"its result cannot be read: {_line(error)}") from None
        if not done:
            raise Failed(result)
        return result

    def stop(self) -> None:
        self._connection.close()
        self._process.join(1.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class _Limited:
    """A text stream that drops what is written after `OUTPUT_LIMIT` characters."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._left = stream, OUTPUT_LIMIT

    def write(self, text: str) -> int:
        if self._left > 0:
            self._stream.write(text[: self._left])
            if len(text) >= self._left:
                self._stream.write("\n[the environment printed more, which is dropped]\n")
        self._left -= len(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _serve(connection: Any, factory: Factory) -> None:
    """The main function of a process: answers calls until the other end of the pipe is closed."""
    for number in (signal.SIGINT, signal.SIGHUP):  # of the terminal; the run decides when its environments end
        signal.signal(number, signal.SIG_IGN)
    sys.stdout, sys.stderr = _Limited(sys.stdout), _Limited(sys.stderr)
    try:
        worker: Any = Inline(factory, "")
    except Exception as error:
        worker = error
    try:
        connection.send((True, None))
        while True:
            method, arguments, options = connection.recv()
            try:
                if isinstance(worker, Exception):
                    raise Failed(_line(worker))
                worker.send(method, *arguments, **options)
                reply = (True, worker.receive(None))
            except Failed as error:
                reply = (False, str(error))
            try:
                connection.send(reply)
            except Exception as error:
                connection.send((False, f"its result cannot be sent: {_line(error)}"))
    except (EOFError, OSError, KeyboardInterrupt):
        if isinstance(worker, Inline):
            worker.stop()


MODES = {"sequential": Inline, "threads": Thread, "processes": Process}
