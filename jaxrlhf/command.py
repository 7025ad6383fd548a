"""What all commands share: faults as one line, and the exit status that says whose they are."""

import sys
import traceback
from collections.abc import Callable

from jaxrlhf.errors import UserError


def main_of(command: Callable[[], None]) -> int:
    """Runs a command; 0, or 2 for input that cannot be used, or 1 for a fault in the middle of a run."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        traceback.print_exc()
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"error: {what} (the same command goes on from the last checkpoint)", file=sys.stderr)
        return 1
    return 0
