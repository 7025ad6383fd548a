"""A time limit for code from outside the package, such as a chat template with an endless loop."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any


class TookTooLong(TimeoutError):
    """A call took longer than its time limit. A TimeoutError of the call itself is of another class."""


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Runs `call` in a new thread and returns its result.

    If the call takes longer than `seconds`, TookTooLong is raised, and the thread ends at its next bytecode.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="time limit")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        # The next bytecode of the thread raises SystemExit. The thread runs only `call`.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        raise TookTooLong
    if errors:
        raise errors[0]
    return results[0]
