"""The parser of commands, and the types of their options: text, paths and bounded numbers."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from jaxrlhf.config.base import LARGEST
from jaxrlhf.config.paths import absolute_path, not_utf8, source_path
from jaxrlhf.errors import UserError

MOST_PROCESSES = 65536  # and devices


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; {self.prog} --help lists the options")


def text(value: str) -> str:
    """Text in UTF-8; the shell may pass any bytes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{not_utf8(value)}: {value[:40]!r}") from None
    return value


def path(value: str) -> str:
    """The absolute path, as in settings."""
    return _expanded(absolute_path, value)


def model_path(value: str) -> str:
    """The absolute path of a folder, or a hub id."""
    return _expanded(source_path, value)


def output_file(value: str) -> str:
    """The absolute path, or - for standard output."""
    return value if value == "-" else path(value)


def whole(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""

    def read(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {value[:40]!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value[:40]}")
        if number > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {value[:40]}")
        return number

    return read


def finite(value: str) -> float:
    """A finite number."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {value[:40]!r}")
    return number


def _expanded(expand: Callable[[str], str], value: str) -> str:
    try:
        return expand(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; given {value[:40]!r}") from None
