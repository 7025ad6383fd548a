"""Signals, streams, exit statuses and one-line error messages, shared by all commands."""

import itertools
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from jaxrlhf.cli.streams import OutputLost, discard_output, open_streams
from jaxrlhf.distributed.stopping import Stopped, StopSignals
from jaxrlhf.errors import Diverged, Fault, UserError, printable


def main_of(command: Callable[[StopSignals], None]) -> int:
    """Runs a command and returns its exit status.

    0  success
    1  failure: a bug, or an error from outside the program, such as a full disk
    2  invalid input
    3  stopped by an alarm
    129, 130, 143  stopped by SIGHUP, Ctrl-C or SIGTERM
    141  the program that reads the output has ended, as in `| head`; no message is printed

    The command may set `afterwards` of its `StopSignals` to a text that says what the user can do next. This text is
    appended to the message of a failure or an interruption.
    """
    open_streams()
    # jax warns at each fork that a child process may deadlock. Child processes of reward functions, such as those of a
    # process pool, are safe: they do not call jax, and they restore the signals of a run.
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    with StopSignals() as stop:
        try:
            try:
                status = _status(command, stop)
            except SystemExit:  # argparse exits after a help text
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except OutputLost as lost:
            discard_output()
            if lost.broken_pipe and not lost.kept:
                return 141
            _say(f"error: {lost}{lost.kept}")
            return 1
        return status


def _status(command: Callable[[StopSignals], None], stop: StopSignals) -> int:
    try:
        command(stop)
        return 0
    except UserError as error:
        _print_user_frames(error)
        _say(_line(error))
        return 2
    except Stopped as stopped:
        _say(f"{stopped}; {stopped.then}")
        return stopped.status
    except KeyboardInterrupt:
        _say(f"interrupted{stop.afterwards}")
        return 130
    except OutputLost:
        raise
    except Fault as fault:
        if hasattr(fault, "elsewhere"):  # another process prints the fault
            _say(_line(fault))
        else:
            _print_user_frames(fault)
            _say(f"error: {fault}{'' if isinstance(fault, Diverged) else stop.afterwards}")
    except PermissionError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
        _say(f"error: {what}; change its permissions, or give another path")
        return 2
    except Exception as error:
        if hasattr(error, "elsewhere"):
            _say(_line(error))
        else:
            _say(traceback.format_exc().rstrip("\n"))
            _say(f"error: {type(error).__name__}: {' '.join(str(error).split())}{stop.afterwards}")
    return 1


def _print_user_frames(error: BaseException | None) -> None:
    """Prints the stack frames of the user's reward function if the function raised the error.

    These frames name the faulty line.
    """
    while error is not None and getattr(error, "user_error", None) is None:
        error = error.__cause__
    if error is not None:
        package = str(Path(__file__).parents[1])
        frames = traceback.extract_tb(error.user_error.__traceback__)
        own = itertools.dropwhile(lambda frame: frame.filename.startswith(package), frames)
        _say("".join(traceback.format_list(list(own))).rstrip())


def _line(error: Exception) -> str:
    """Returns the message that this process prints.

    If another process reports the error, the message names that process.
    """
    return f"stopped: {error.elsewhere}" if hasattr(error, "elsewhere") else f"error: {error}"


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
