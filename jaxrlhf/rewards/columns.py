"""Checks of columns and options for the library of rewards. A failed check raises a one-line ValueError."""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from jaxrlhf.errors import UserError


def abstains_without(column: str) -> Callable[[Callable[..., list[float]]], Callable[..., list[float | None]]]:
    """Decorates a reward function so that it returns None for rows whose `column` is None, as in mixed data."""

    def wrap(function: Callable[..., list[float]]) -> Callable[..., list[float | None]]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def score(*args: Any, **kwargs: Any) -> list[float | None]:
            bound = signature.bind(*args, **kwargs)
            values = list(bound.arguments[column])
            present = [value for value in values if value is not None]
            if len(present) < len(values):
                # Messages count rows, so every row stays. A row without a value gets another row's value for the call,
                # and the score of this row is then dropped.
                filled = [present[0] if value is None else value for value in values] if present else []
                bound.arguments[column] = filled
                bound.arguments["completions"] = list(bound.arguments["completions"]) if present else []
            scores = function(*bound.args, **bound.kwargs)  # called without rows as well, to check the options
            return [None if value is None else scores[i] for i, value in enumerate(values)]

        return score

    return wrap


def references(column: str, values: Sequence[Any], several: bool = True) -> list[list[str]]:
    """The acceptable texts of each row. A text or number counts as one, a list as several. Errors count rows from 0."""
    return [_texts(value, f"column {column}, row {i}", several) for i, value in enumerate(values)]


def reference(column: str, values: Sequence[Any]) -> list[str]:
    """The text of each row, whose value is a text or a number."""
    return [texts[0] for texts in references(column, values, several=False)]


def _texts(value: Any, where: str, several: bool) -> list[str]:
    listed = list(value) if several and isinstance(value, (list, tuple)) else [value]
    if not listed or not all(isinstance(text, (str, int, float)) for text in listed):
        odd = next((x for x in listed if not isinstance(x, (str, int, float))), value)
        what = "nothing (None)" if odd is None else "an empty list" if odd == [] else f"a {type(odd).__name__}"
        raise ValueError(f"{where} holds {what}; want text{' or a list of texts' if several else ''}")
    return [str(text) for text in listed]


def check_choice(option: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises ValueError unless the option's value is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{option} is {value!r}; want {' or '.join(allowed)}")


def check_number(option: str, value: Any, low: float, whole: bool = False) -> None:
    """Raises ValueError unless the option's value is a number of at least `low`."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value < float("inf"):
        raise ValueError(f"{option} is {value!r}; want a {'whole ' if whole else ''}number of at least {low:g}")


def check_texts(option: str, value: Any) -> None:
    """Raises ValueError unless the option's value is a list of texts."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{option} is {value!r}; want a list of texts")


def optional_package(module: str) -> ModuleType:
    """Imports a module of the optional extra `rewards`; UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"needs {module}, which is not installed: pip install 'jaxrlhf[rewards]'") from error
