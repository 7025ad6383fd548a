"""What all commands share: faults as one line, and the exit status that says whose they are."""

import sys
import traceback
from collections.abc import Callable

from jaxrlhf.errors import UserError


def main_of(command: Callable[[], None], afterwards: str = "") -> int:
    """Runs a command; 0, or 2 for input that cannot be used, or 1 for a fault in the middle of a run.

    `afterwards` says what a person can do after a fault or an interruption.
    """
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted{afterwards}", file=sys.stderr)
        return 130
    except Exception as error:
        traceback.print_exc()
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"error: {what}{afterwards}", file=sys.stderr)
        return 1
    return 0
