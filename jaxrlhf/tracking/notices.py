"""One-line notices for the user about input that the program may not interpret as the user expects."""

import sys

from jaxrlhf.distributed import processes
from jaxrlhf.errors import printable

_printed: set[str] = set()


def notice(text: str) -> None:
    """Prints a line on stderr. The same line is printed only once.

    If there are several processes, only process 0 prints.
    """
    if text not in _printed and processes.is_first():
        print(printable(f"note: {text}"), file=sys.stderr, flush=True)
    _printed.add(text)
