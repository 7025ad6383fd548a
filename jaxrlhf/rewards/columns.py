"""Checks columns and options for the library of rewards. A failed check raises a one-line ValueError."""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from jaxrlhf.errors import UserError


def abstains_without(column: str) -> Callable[[Callable[..., list[float]]], Callable[..., list[float | None]]]:
    """Returns a decorator for a reward function. The decorated function returns None for rows whose `column` is None.

    In mixed data, only some rows have a value in the column.
    """

    def wrap(function: Callable[..., list[float]]) -> Callable[..., list[float | None]]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def score(*args: Any, **kwargs: Any) -> list[float | None]:
            bound = signature.bind(*args, **kwargs)
            values = list(bound.arguments[column])
            present = [value for value in values if value is not None]
            if len(present) < len(values):
                # Error messages have row numbers, so no row is removed. A row without a value gets the value of another
                # row for the call, and the score of the row is then ignored.
                filled = [present[0] if value is None else value for value in values] if present else []
                bound.arguments[column] = filled
                bound.arguments["completions"] = list(bound.arguments["completions"]) if present else []
            scores = function(*bound.args, **bound.kwargs)  # also called if there are no rows, to check the options
            return [None if value is None else scores[i] for i, value in enumerate(values)]

        return score

    return wrap


def references(column: str, values: Sequence[Any], several: bool = True) -> list[list[str]]:
    """Returns the list of acceptable texts of each row.

    A row's value is a text, a number, or a list of texts and numbers. Errors count rows from 0.
    """
    return [_texts(value, f"column {column}, row {i}", several) for i, value in enumerate(values)]


def reference(column: str, values: Sequence[Any]) -> list[str]:
    """Returns the text of each row. A row's value is a text or a number."""
    return [texts[0] for texts in references(column, values, several=False)]


def _texts(value: Any, where: str, several: bool) -> list[str]:
    listed = list(value) if several and isinstance(value, (list, tuple)) else [value]
    if not listed or not all(isinstance(text, (str, int, float)) for text in listed):
        odd = next((x for x in listed if not isinstance(x, (str, int, float))), value)
        what = "None" if odd is None else "an empty list" if odd == [] else f"a {type(odd).__name__}"
        raise ValueError(f"{where} must hold text{' or a list of texts' if several else ''}, not {what}")
    return [str(text) for text in listed]


def check_choice(option: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises ValueError unless the option's value is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{option} must be {' or '.join(allowed)}, not {value!r}")


def check_number(option: str, value: Any, low: float, whole: bool = False) -> None:
    """Raises ValueError unless the option's value is a number of at least `low`."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value < float("inf"):
        raise ValueError(f"{option} must be a {'whole ' if whole else ''}number of at least {low:g}, not {value!r}")


def check_texts(option: str, value: Any) -> None:
    """Raises ValueError unless the option's value is a list of texts."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{option} must be a list of texts, not {value!r}")


def optional_package(module: str) -> ModuleType:
    """Imports a module of the optional extra `rewards`. Raises UserError if the module is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the module {module} is not installed; run pip install 'jaxrlhf[rewards]'") from error
