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


def add_origin(parser: argparse.ArgumentParser, roles: str) -> None:
    """Adds --run or --model, --step and --roles, of which `roles` is the help text."""
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--run", type=path, metavar="DIR", help="run directory")
    origin.add_argument("--model", type=model_path, metavar="DIR", help="Hugging Face folder or hub id")
    step = "roles of a checkpoint of the stage under way: latest, best (by the run's checkpoints.best) or a step number"
    parser.add_argument("--step", metavar="latest|best|N", help=f"{step} (default: those of finished stages)")
    parser.add_argument("--roles", metavar="NAMES", help=roles)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options of sampling."""
    parser.add_argument("--max-new-tokens", type=whole(1), help="default: the run's, else 64")
    parser.add_argument("--temperature", type=finite, help="0: greedy (default: the run's, else 1.0)")
    parser.add_argument("--top-k", type=whole(0), help="sample from the k likeliest (default: the run's, else off)")
    top_p = "sample from the likeliest tokens with total probability p (default: the run's, else off)"
    parser.add_argument("--top-p", type=finite, help=top_p)
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="default: 0")
