"""Exceptions with a message for the user. Commands print the message without a traceback.

A `UserError` says in one line what is wrong, where (file and line, key path, tensor name) and what would be right. It
is raised before anything is compiled or written, and the exit status is 2. A `Fault` says in one line what outside the
program stopped a run, such as a full disk; the exit status is 1. Any other exception is a bug: the command prints a
traceback, and the exit status is 1.
"""

import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """Invalid input: one line with what is wrong, where, and what would be right."""


class SharedFault(UserError):
    """An error in something that all rows share, such as the chat template. No single row is named or dropped."""


class Fault(Exception):
    """An error from outside the program during a run: one line with what failed and where."""


class Diverged(Fault):
    """A run whose weights are of no use. The same command would end the same way, so it is not recommended."""


def reported_elsewhere(error: Exception, line: str) -> Exception:
    """Marks an error that another process reports, and returns it. This process prints `line` instead."""
    error.elsewhere = line
    return error


def printable(text: str) -> str:
    """The text without what would control a terminal: such characters are written as \\uXXXX, as in JSON.

    These are control characters except newline and tab, marks that reverse the direction of text, Unicode's own line
    ends, and half surrogate pairs. Texts of data, models and servers may contain them.
    """
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def short(value: object) -> str:
    """Returns the value's repr for a message, cut at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
