"""Handles Ctrl-C from the start of a command. After Ctrl-C, the command prints one line and exits with status 130.

This file imports little, so that it loads fast.
"""

import atexit
import os
import signal


def exit_on_interrupt() -> None:
    """Makes Ctrl-C print one line and end the process. A command calls this function before slow imports.

    Ctrl-C has no effect once the command has ended and Python removes the handlers.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # the first registered is the last to run


def _exit(number: int, frame: object) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(130)


def restore_in_child() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again in a forked child."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


os.register_at_fork(after_in_child=restore_in_child)
