"""One-line notices for the user about input that is interpreted in a way its author may not expect."""

import sys

from jaxrlhf.distributed import processes
from jaxrlhf.errors import printable

_printed: set[str] = set()


def notice(text: str) -> None:
    """Prints a line on stderr, once per process. Of several processes, process 0 prints."""
    if text not in _printed and processes.is_first():
        print(printable(f"note: {text}"), file=sys.stderr, flush=True)
    _printed.add(text)
