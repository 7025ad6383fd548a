"""The one exception that is written for the person at the keyboard.

A `UserError` says in one line what is wrong, where (file and line, key path, tensor name) and what would
be right. The commands print it without a traceback and exit with status 2; nothing has been compiled or
written by then. Everything else that goes wrong is a fault of the program or of the machine: status 1.
"""


class UserError(Exception):
    """Input that cannot be used: one line with what, where and what would be right."""
