"""Exit statuses and one-line error messages, shared by all commands."""

import sys
import traceback
from collections.abc import Callable

from jaxrlhf.distributed.stopping import Stopped
from jaxrlhf.errors import Fault, UserError


def main_of(command: Callable[[], None], afterwards: str = "") -> int:
    """Runs a command and returns its exit status:

    0  success
    1  a run failed: a bug, or an error from outside the program
    2  invalid input
    129, 130, 143  stopped by SIGHUP, Ctrl-C or SIGTERM

    `afterwards` is appended to the message of a failure or an interruption: what the user can do next.
    """
    try:
        command()
        return 0
    except UserError as error:
        print(_line(error), file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"{stopped}; the same command continues", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print(f"interrupted{afterwards}", file=sys.stderr)
        return 130
    except Fault as fault:
        print(f"error: {fault}{afterwards}", file=sys.stderr)
    except Exception as error:
        if hasattr(error, "elsewhere"):
            print(_line(error), file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"error: {type(error).__name__}: {' '.join(str(error).split())}{afterwards}", file=sys.stderr)
    return 1


def _line(error: Exception) -> str:
    """The message for this process; another process may report the error itself."""
    return f"stopped: {error.elsewhere}" if hasattr(error, "elsewhere") else f"error: {error}"
