"""Exceptions with a message for the user. Commands print the message without a traceback.

A `UserError` is an error in the input. Its message says in one line what is wrong, where it is (file and line, key path
or tensor name) and what would be right. A `UserError` is raised before anything is compiled or written. The exit status
is 2. A `Fault` is a problem outside the program that stopped a run, for example a full disk. Its message is one line.
The exit status is 1. Any other exception is a bug. The command then prints a traceback, and the exit status is 1.
"""

import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """The input is invalid. The message says in one line what is wrong, where it is, and what would be right."""


class SharedFault(UserError):
    """An error in something that all rows share, for example the chat template. No single row is named or dropped."""


class Fault(Exception):
    """A problem outside the program stopped a run. The message says in one line what failed and where."""


class Diverged(Fault):
    """The weights of a run are useless. The message does not recommend the same command, which would fail again."""


def reported_elsewhere(error: Exception, line: str) -> Exception:
    """Marks an error that another process reports, and returns the error. This process prints `line` instead."""
    error.elsewhere = line
    return error


def printable(text: str) -> str:
    """Returns the text with \\uXXXX (as in JSON) in place of characters that could control a terminal.

    These characters are control characters except newline and tab, marks that change the direction of text, line ends
    of Unicode, and single surrogates. Texts from data, models and servers may contain them.
    """
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def short(value: object) -> str:
    """Returns the `repr` of the value for a message. The result has at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's message.

    Returns the error's type instead if the message is empty or cannot be printed.
    """
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # `__str__` of a user's exception class may raise
        lines = []
    return lines[0] if lines else type(error).__name__
