"""Ctrl-C from the first moment of a command: one line and status 130. Imports little, to be there early."""

import os
import signal


def exit_on_interrupt() -> None:
    """Makes Ctrl-C end the process with one line. A command calls it first, before it imports anything slow."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def _exit(number: int, frame: object) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(130)


def restore_in_child() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt in a forked child."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


os.register_at_fork(after_in_child=restore_in_child)
