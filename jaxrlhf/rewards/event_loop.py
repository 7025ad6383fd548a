"""One event loop for all async rewards. The loop runs in a daemon thread until the process ends.

An async function may keep a client or a semaphore between calls. These objects are bound to the loop, so the loop must
stay open. A caller that runs in its own event loop, such as a notebook, can wait for a result.
"""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

PATIENCE = 0.2  # seconds; a loop that does not reply within this time counts as blocked

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process id, because a forked process has no copy of the thread


def run_async(awaitable: Awaitable, timeout: float | None = None) -> Any:
    """Returns the result of `awaitable`, or raises the error of `awaitable`.

    Raises TimeoutError after `timeout` seconds, even if the function blocks and never awaits.
    """
    future = asyncio.run_coroutine_threadsafe(_awaited(awaitable), _loop())
    try:
        done, _ = concurrent.futures.wait([future], timeout)
    except BaseException:  # Ctrl-C while waiting
        future.cancel()
        raise
    if not done:
        future.cancel()
        _forget_if_blocked()
        raise TimeoutError(f"the call took longer than {timeout:g} s")
    return future.result()


async def _awaited(awaitable: Awaitable) -> Any:
    return await awaitable


class _DaemonThreads(concurrent.futures.ThreadPoolExecutor):
    """Runs `asyncio.to_thread` and host name look-ups in daemon threads.

    At exit, Python waits for worker threads of the standard library. A call that never returns would then block the
    exit. Python does not wait for daemon threads.
    """

    def __init__(self):
        super().__init__()
        self._slots = threading.BoundedSemaphore(self._max_workers)

    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()

        def work() -> None:
            with self._slots:
                if not future.set_running_or_notify_cancel():
                    return
                try:
                    future.set_result(function(*args, **kwargs))
                except BaseException as error:
                    future.set_exception(error)

        threading.Thread(target=work, name="jaxrlhf-rewards-call", daemon=True).start()
        return future


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        if os.getpid() not in _loops:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            loop.set_default_executor(_DaemonThreads())
            threading.Thread(target=_run_forever, args=(loop,), name="jaxrlhf-rewards", daemon=True).start()
        return _loops[os.getpid()]


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            # A coroutine raised this error, and the loop stopped. The loop must run again, so that run_async can raise
            # the error.
            continue


def _forget_if_blocked() -> None:
    """Forgets the loop if code without `await` blocks it. The next call then starts a new loop."""
    alive = threading.Event()
    _loop().call_soon_threadsafe(alive.set)
    if not alive.wait(PATIENCE):
        with _lock:
            _loops.pop(os.getpid(), None)
