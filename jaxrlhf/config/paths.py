"""Paths in settings and on command lines. A path is expanded once, made absolute and checked when it is read.

A relative path is relative to the current directory. It becomes absolute when it is read, because a reward function may
change the directory later. Also, `config.yaml` of a run may be read from another directory.
"""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

LONGEST_NAME, LONGEST_PATH = 255, 3500  # bytes; Linux allows 255 and 4096, and a run makes files below a path
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
BUILTIN, AUTO = "builtin:", "auto"
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def absolute_path(text: str) -> str:
    """Returns the absolute path that `text` names. `~` and $VARIABLES are expanded once.

    If `text` is the absolute path of an existing file or folder, nothing is expanded. Raises ValueError if the text is
    empty or too long, has control characters or half surrogate pairs, or names an unknown user or variable. The error
    says what would be right.
    """
    if not text.strip():
        raise ValueError("the path is empty; give a path")
    check_characters(text)
    if os.path.isabs(text) and os.path.lexists(text):
        return _checked(text)
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        raise ValueError(
            f"{text.split('/')[0]} is not a known home folder; for a folder that has this name, write ./{text}"
        )
    try:
        return _checked(str(Path(_VARIABLE.sub(_value, path)).absolute()))
    except FileNotFoundError:
        raise ValueError("the current directory was removed; change to another directory") from None


def check_characters(text: str) -> None:
    """Raises ValueError if the text has control characters, such as NUL, or bytes that are not UTF-8."""
    if bad := next((c for c in text if ord(c) < 32 or 127 <= ord(c) < 160), None):
        raise ValueError(f"the text has the control character {bad!r}; remove this character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(not_utf8(text)) from None


def not_utf8(text: str) -> str:
    """Returns why a text cannot be written as UTF-8: its bytes are invalid, or were decoded with another encoding."""
    try:
        os.fsencode(text).decode()
    except UnicodeError:
        return "the text is not UTF-8"
    return f"the text was read as {sys.getfilesystemencoding()}, the encoding of this locale: set PYTHONUTF8=1"


def _value(match: re.Match) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
        raise ValueError(f"the variable {match[0]} is not set; set this variable, or write the full path")
    return os.environ[name]


def _checked(path: str) -> str:
    check_characters(path)  # also checks the values of variables
    longest = max(len(name.encode()) for name in path.split("/"))
    if longest > LONGEST_NAME:
        raise ValueError(f"the path has a name of {longest} bytes; a name may have at most {LONGEST_NAME}")
    if len(path.encode()) > LONGEST_PATH:
        raise ValueError(f"the path has {len(path.encode())} bytes; it may have at most {LONGEST_PATH}")
    return path


def source_path(text: str) -> str:
    """Returns the absolute path that `text` names, see `absolute_path`.

    Names of builtin sets and URLs are returned unchanged. So are hub ids, unless there is a local file or folder with
    the same name.
    """
    if text.startswith(BUILTIN) or re.match(r"[A-Za-z][\w+.-]*://", text):
        check_characters(text)
        return text
    path = absolute_path(text)
    return text if HUB_ID.fullmatch(text) and not os.path.lexists(path) else path


def function_path(text: str) -> str:
    """Returns `path.py:function` with an absolute path. `module:function` is returned unchanged.

    Raises ValueError for a text that names no function.
    """
    if not text.strip():
        raise ValueError("the name of the function is empty; give module:function or path.py:function")
    check_characters(text)
    where, _, name = text.rpartition(":")
    if not where or not name.isidentifier():
        raise ValueError(f"{text!r} names no function; give module:function or path.py:function")
    return f"{absolute_path(where)}:{name}" if where.endswith(".py") else text


def _for_text(check: Any, *words: str) -> BeforeValidator:
    """Returns a validator that applies `check` to text. Other types and the texts `words` are not checked here."""
    return BeforeValidator(lambda value: check(value) if isinstance(value, str) and value not in words else value)


FolderPath = Annotated[str, _for_text(absolute_path)]
SourcePath = Annotated[str, _for_text(source_path)]
CachePath = Annotated[str, _for_text(absolute_path, AUTO)]
FunctionPath = Annotated[str, _for_text(function_path)]
