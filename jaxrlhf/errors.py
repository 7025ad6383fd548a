"""The exceptions that are written for the person at the keyboard: the commands print them without a traceback.

A `UserError` says in one line what is wrong, where (file and line, key path, tensor name) and what would
be right; exit status 2. Nothing has been compiled or written by then. A `Fault` says in one line what outside the
program stopped it midway, such as a full disk; exit status 1. Everything else that goes wrong is a fault of the
program: a traceback, and status 1.
"""


class UserError(Exception):
    """Input that cannot be used: one line with what, where and what would be right."""


class SharedFault(UserError):
    """A fault of what all rows share, such as the chat template: no single row is named, or dropped, for it."""


class Fault(Exception):
    """Something outside the program stopped it midway: one line with what and where."""


def reported_elsewhere(error: Exception, line: str) -> Exception:
    """The same error, for a process that need not say it: another one does. `line` is what it says instead."""
    error.elsewhere = line
    return error


def short(value: object) -> str:
    """A value in a message, cut at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
