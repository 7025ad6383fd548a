"""A time limit for code that is not ours, such as a chat template that loops."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Returns `call()`, run in a thread of its own; raises TimeoutError where it takes longer, and ends the thread."""
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
        # Raised at the thread's next bytecode; the thread runs nothing but `call`.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]
