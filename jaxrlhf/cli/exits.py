"""What all commands share: faults as one line, and the exit status that says whose they are."""

import sys
import traceback
from collections.abc import Callable

from jaxrlhf.distributed.stopping import Stopped
from jaxrlhf.errors import Fault, UserError


def main_of(command: Callable[[], None], afterwards: str = "") -> int:
    """Runs a command; its exit status:

    0  done
    1  a fault in the middle of a run, of the program or of the machine
    2  input that cannot be used
    129, 130, 143  ended by SIGHUP, Ctrl-C or SIGTERM

    `afterwards` says what a person can do after a fault or an interruption.
    """
    try:
        command()
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
        return 1
    except Exception as error:
        if hasattr(error, "elsewhere"):
            print(_line(error), file=sys.stderr)
            return 1
        traceback.print_exc()
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"error: {what}{afterwards}", file=sys.stderr)
        return 1
    return 0


def _line(error: Exception) -> str:
    """What this process says of an error that another process may tell."""
    return f"stopped: {error.elsewhere}" if hasattr(error, "elsewhere") else f"error: {error}"
