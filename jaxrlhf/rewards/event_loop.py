"""One event loop of the package's own, for what is async among the rewards.

It runs in a daemon thread as long as the process does. So what an async function keeps between calls (a client,
a semaphore) stays bound to a loop that is open, and a caller within a running loop, such as a notebook, can wait.
"""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

PATIENCE = 0.2  # seconds a loop may take to answer before it counts as blocked

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a thread does not survive a fork


def run_async(awaitable: Awaitable, timeout: float | None = None) -> Any:
    """What `awaitable` gives, or raises; TimeoutError after `timeout` seconds, even where it blocks the loop."""
    future = asyncio.run_coroutine_threadsafe(_awaited(awaitable), _loop())
    try:
        done, _ = concurrent.futures.wait([future], timeout)
    except BaseException:  # Ctrl-C while waiting
        future.cancel()
        raise
    if not done:
        future.cancel()
        _forget_if_blocked()
        raise TimeoutError(f"took longer than {timeout:g} s")
    return future.result()


async def _awaited(awaitable: Awaitable) -> Any:
    return await awaitable


class _DaemonThreads(concurrent.futures.ThreadPoolExecutor):
    """Threads for `asyncio.to_thread` and look-ups of host names; a process that ends does not wait for them.

    It would wait for the standard library's: a call that never returns would keep a run from ending that has given
    up on it and said so.
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
            # A coroutine raised it: asyncio lets it end the loop, but whoever waits for the coroutine gets it too,
            # once the loop runs on.
            continue


def _forget_if_blocked() -> None:
    """Leaves a loop behind that code without `await` holds: the next call gets a fresh one."""
    alive = threading.Event()
    _loop().call_soon_threadsafe(alive.set)
    if not alive.wait(PATIENCE):
        with _lock:
            _loops.pop(os.getpid(), None)
