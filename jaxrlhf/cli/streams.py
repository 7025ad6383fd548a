"""Standard output and standard error of a command, which may be closed or full, or unable to show a character.

Characters that the encoding of the stream does not have are replaced. Output that cannot be written raises
`OutputLost`. Messages on standard error that cannot be written are dropped: they must not stop a run.
"""

import contextlib
import errno
import io
import os
import sys
from typing import Any

from jaxrlhf.errors import Fault


class OutputLost(Fault):
    """Raised if standard output cannot be written."""

    kept = ""  # text for the message that says where the results are

    def __init__(self, error: OSError):
        reason = "it is closed" if error.errno == errno.EBADF else os.strerror(error.errno)
        super().__init__(f"standard output cannot be written: {reason}")
        self.broken_pipe = error.errno == errno.EPIPE  # the program that reads the output, such as `head`, has ended


class _Output(io.FileIO):
    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputLost(error) from None


class _Messages(io.FileIO):
    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def open_streams() -> None:
    """Replaces Python's own streams by streams that behave as the module describes.

    Streams that a caller has set are kept.
    """
    # No file that is opened later may get the number of a closed stream. Writing to a closed output must still fail.
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, mode)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(sys.stdout, _Output(1, "w", closefd=False), "replace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(sys.stderr, _Messages(2, "w", closefd=False), "backslashreplace", line_buffering=True)


def _text(before: Any, raw: io.FileIO, errors: str, line_buffering: bool = False) -> io.TextIOWrapper:
    with contextlib.suppress(OSError, AttributeError):
        before.flush()
    encoding = getattr(before, "encoding", None) or "utf-8"
    line_buffering |= raw.isatty() or getattr(before, "line_buffering", False)
    through = getattr(before, "write_through", False)  # python -u
    writer = io.BufferedWriter(raw)
    return io.TextIOWrapper(writer, encoding, errors, line_buffering=line_buffering, write_through=through)


def discard_output() -> None:
    """Discards the text that is still buffered for standard output. Otherwise Python would write this text at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def ascii_only() -> bool:
    """Whether the encoding of standard output cannot write all of Unicode, so that JSON must be ASCII."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") not in ("utf8", "utf16", "utf32")
