"""One line for the person at the keyboard about input that is read in another way than its words suggest."""

import sys

from jaxrlhf.distributed import processes

_given: set[str] = set()


def notice(text: str) -> None:
    """Prints a line on stderr, once in a process; on several hosts one of them prints it."""
    if text not in _given and processes.is_first():
        print(f"note: {text}", file=sys.stderr, flush=True)
    _given.add(text)
