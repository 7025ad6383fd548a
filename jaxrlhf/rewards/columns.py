"""What the library of rewards asks of a column and of an option; a misfit is a ValueError of one line."""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from jaxrlhf.errors import UserError


def abstains_without(column: str) -> Callable[[Callable[..., list[float]]], Callable[..., list[float | None]]]:
    """A reward function that gives None where a row's `column` is None, as in mixed data where some rows have none."""

    def wrap(function: Callable[..., list[float]]) -> Callable[..., list[float | None]]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def score(*args: Any, **kwargs: Any) -> list[float | None]:
            given = signature.bind(*args, **kwargs)
            values = list(given.arguments[column])
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                return function(*given.args, **given.kwargs)
            # Rows keep their numbers, for messages: one without a reference is scored by another's, and thrown away.
            given.arguments[column] = [known[0] if value is None else value for value in values] if known else []
            given.arguments["completions"] = list(given.arguments["completions"]) if known else []
            scores = function(*given.args, **given.kwargs)  # of no rows: options are checked all the same
            return [None if value is None else scores[i] for i, value in enumerate(values)]

        return score

    return wrap


def references(column: str, values: Sequence[Any], several: bool = True) -> list[list[str]]:
    """Per row the acceptable texts: of a text or a number one, of a list all. Row numbers count from 0 in a batch."""
    return [_texts(value, f"column {column}, row {i}", several) for i, value in enumerate(values)]


def reference(column: str, values: Sequence[Any]) -> list[str]:
    """Per row the one text that a text or a number stands for."""
    return [texts[0] for texts in references(column, values, several=False)]


def _texts(value: Any, where: str, several: bool) -> list[str]:
    listed = list(value) if several and isinstance(value, (list, tuple)) else [value]
    if not listed or not all(isinstance(text, (str, int, float)) for text in listed):
        odd = next((x for x in listed if not isinstance(x, (str, int, float))), value)
        what = "nothing (None)" if odd is None else "an empty list" if odd == [] else f"a {type(odd).__name__}"
        raise ValueError(f"{where} holds {what}; want text{' or a list of texts' if several else ''}")
    return [str(text) for text in listed]


def check_choice(option: str, value: Any, allowed: Sequence[str]) -> None:
    """ValueError where an option is none of its names."""
    if value not in allowed:
        raise ValueError(f"{option} is {value!r}; want {' or '.join(allowed)}")


def check_number(option: str, value: Any, low: float, whole: bool = False) -> None:
    """ValueError where an option is no number of at least `low`."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value < float("inf"):
        raise ValueError(f"{option} is {value!r}; want a {'whole ' if whole else ''}number of at least {low:g}")


def check_texts(option: str, value: Any) -> None:
    """ValueError where an option is no list of texts."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{option} is {value!r}; want a list of texts")


def optional_package(module: str) -> ModuleType:
    """A module of the optional extra `rewards`; UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"needs {module}, which is not installed: pip install 'jaxrlhf[rewards]'") from error
