"""Paths in settings and on command lines: expanded once, made absolute at once, checked before anything uses them.

A relative path is relative to the current directory. It becomes absolute when it is read, because a reward function may
change the directory, and because `config.yaml` of a run is read from other directories later.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

LONGEST_NAME, LONGEST_PATH = 255, 3500  # bytes; the limits of Linux are 255 and 4096, and runs make files below
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
BUILTIN, AUTO = "builtin:", "auto"
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def absolute_path(text: str) -> str:
    """The absolute path that `text` names, with `~` and $VARIABLES expanded once.

    An absolute path that exists as written is not expanded. Raises ValueError, with what would be right, for text that
    is empty, has control characters or half surrogate pairs, names an unknown user or variable, or is too long.
    """
    if not text.strip():
        raise ValueError("is empty; give a path")
    check_characters(text)
    if os.path.isabs(text) and os.path.lexists(text):
        return _checked(text)
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        raise ValueError(f"{text.split('/')[0]} is no known home folder; ./{text} names a folder of that name")
    try:
        return _checked(str(Path(_VARIABLE.sub(_value, path)).absolute()))
    except FileNotFoundError:
        raise ValueError("the current directory was removed; change to another") from None


def check_characters(text: str) -> None:
    """Raises ValueError for control characters, NUL included, and for bytes that are not UTF-8."""
    if bad := next((c for c in text if ord(c) < 32 or 127 <= ord(c) < 160), None):
        raise ValueError(f"has the control character {bad!r}; give a name without it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8 text (half a surrogate pair); give a name in UTF-8") from None


def _value(match: re.Match) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
        raise ValueError(f"the variable {match[0]} is not set; set it, or write the path in full")
    return os.environ[name]


def _checked(path: str) -> str:
    check_characters(path)  # a variable's value, too
    longest = max(len(name.encode()) for name in path.split("/"))
    if longest > LONGEST_NAME:
        raise ValueError(f"has a name of {longest} bytes; file systems take at most {LONGEST_NAME}")
    if len(path.encode()) > LONGEST_PATH:
        raise ValueError(f"has {len(path.encode())} bytes; give a path of at most {LONGEST_PATH}")
    return path


def source_path(text: str) -> str:
    """As `absolute_path`, but hub ids that name nothing here, names of builtin sets and URLs stay as they are."""
    if text.startswith(BUILTIN) or re.match(r"[A-Za-z][\w+.-]*://", text):
        check_characters(text)
        return text
    path = absolute_path(text)
    return text if HUB_ID.fullmatch(text) and not os.path.lexists(path) else path


def function_path(text: str) -> str:
    """`path.py:function` with an absolute path; `module:function` stays as it is."""
    if not text.strip():
        raise ValueError("is empty; give module:function or path.py:function")
    where, _, name = text.rpartition(":")
    if not where.endswith(".py"):
        check_characters(text)
        return text
    return f"{absolute_path(where)}:{name}"


def _for_text(check: Any, *words: str) -> BeforeValidator:
    """Applies a check to text; other types, and these words, are left to pydantic."""
    return BeforeValidator(lambda value: check(value) if isinstance(value, str) and value not in words else value)


FolderPath = Annotated[str, _for_text(absolute_path)]
SourcePath = Annotated[str, _for_text(source_path)]
CachePath = Annotated[str, _for_text(absolute_path, AUTO)]
FunctionPath = Annotated[str, _for_text(function_path)]
