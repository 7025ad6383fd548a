"""The parser of commands, and the types of their options: text, paths and bounded numbers."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from jaxrlhf.config.base import LARGEST
from jaxrlhf.config.paths import absolute_path, not_utf8, source_path
from jaxrlhf.errors import UserError

MOST_PROCESSES = 65536  # largest number of processes or devices


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, as commands report all errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; {self.prog} --help lists the options")


def text(value: str) -> str:
    """Returns the text of an option. Raises an error if it is not UTF-8, because the shell may pass any bytes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{not_utf8(value)}: {value[:40]!r}") from None
    return value


def path(value: str) -> str:
    """Returns the absolute path, by the same rules as in settings."""
    return _expanded(absolute_path, value)


def model_path(value: str) -> str:
    """Returns the absolute path of a folder, or a hub id unchanged."""
    return _expanded(source_path, value)


def output_file(value: str) -> str:
    """Returns the absolute path of a file, or - for standard output."""
    return value if value == "-" else path(value)


def whole(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """Returns a function that reads a whole number from `least` to `most`."""

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
    """Returns a finite number."""
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
    """Adds the options --run, --model, --step and --roles. `roles` is the help text of --roles."""
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--run", type=path, metavar="DIR", help="run directory")
    origin.add_argument("--model", type=model_path, metavar="DIR", help="Hugging Face folder or hub id")
    step = "use this checkpoint of the unfinished stage: latest, best (by checkpoints.best) or a step number"
    parser.add_argument("--step", metavar="latest|best|N", help=f"{step} (default: only roles of finished stages)")
    parser.add_argument("--roles", metavar="NAMES", help=roles)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options of sampling."""
    parser.add_argument(
        "--max-new-tokens", type=whole(1), help="largest number of new tokens (default: the run's, else 64)"
    )
    parser.add_argument(
        "--temperature", type=finite, help="sampling temperature; 0 is greedy decoding (default: the run's, else 1.0)"
    )
    parser.add_argument(
        "--top-k", type=whole(0), help="sample from the k most likely tokens (default: the run's, else off)"
    )
    top_p = "sample from the most likely tokens, whose total probability is p (default: the run's, else off)"
    parser.add_argument("--top-p", type=finite, help=top_p)
    choices = "allow only one of these texts: A,B,C or a YAML list; '' allows every text (default: the run's, else off)"
    parser.add_argument("--choices", type=text, metavar="A,B,...", help=choices)
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="seed of sampling (default: 0)")
