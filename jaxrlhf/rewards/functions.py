"""Rewards from Python functions: `module:function` or `path.py:function`.

A function is called once per batch with keywords `prompts` and `completions` (lists of str) and one list
per other column of the data, and returns one finite number per answer, as TRL's reward functions do. A
function without `**kwargs` gets only the keywords that it names.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from jaxrlhf.data.sources import one_line
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.answers import Answers


class RewardFault(RuntimeError):
    """A reward function raised, or returned what is no score: one line that names the function."""


class FunctionReward:
    """A reward (see `answers.Reward`) that calls a Python function on text."""

    def __init__(self, spec: str, key_path: str):
        self.name = spec
        self.function = load_function(spec, key_path)
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except ValueError:  # some builtins have none
            raise UserError(f"{key_path}: {spec} tells no parameters; want prompts, completions, **columns") from None
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.accepted = None if takes_all else {p.name for p in parameters}
        optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self.required = {p.name for p in parameters if p.default is p.empty and p.kind not in optional}
        if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
            raise UserError(f"{key_path}: {spec} takes positional arguments; it is called with keywords")

    def check_columns(self, columns: set[str], key_path: str) -> None:
        """`UserError` where the function requires a keyword that the data does not give."""
        given = columns | {"prompts", "completions"}
        if missing := sorted(self.required - given):
            raise UserError(
                f"{key_path}: {self.name} requires {', '.join(missing)}; the data gives {', '.join(sorted(given))}"
            )

    def __call__(self, answers: Answers) -> np.ndarray:
        columns = {name: [row.get(name) for row in answers.rows] for name in _columns(answers.rows)}
        given = columns | {"prompts": list(answers.prompts), "completions": answers.completions}
        if self.accepted is not None:
            given = {name: value for name, value in given.items() if name in self.accepted}
        try:
            scores = self.function(**given)
        except (Exception, SystemExit) as error:  # sys.exit would end the run as if it had succeeded
            what = f"{type(error).__name__}: {one_line(error)}"
            raise RewardFault(f"reward function {self.name} raised {what}") from error
        return self._checked(scores, len(answers.prompts))

    def _checked(self, scores, count: int) -> np.ndarray:
        try:
            scores = _numbers(scores)
        except (TypeError, ValueError) as error:
            raise RewardFault(f"reward function {self.name} returned no list of numbers: {one_line(error)}") from error
        if scores.shape != (count,):
            raise RewardFault(
                f"reward function {self.name} returned shape {scores.shape} for {count} answers; want one number each"
            )
        bad = np.flatnonzero(~np.isfinite(scores))
        if bad.size:
            raise RewardFault(f"reward function {self.name} returned {scores[bad[0]]} for answer {bad[0]} of {count}")
        return scores


def load_function(spec: str, key_path: str) -> Callable:
    """The function that `module:function` or `path.py:function` names; UserError where there is none.

    `key_path` is the setting that names it, for the message.
    """
    where, separator, name = spec.rpartition(":")
    if not separator or not where or not name.isidentifier():
        raise UserError(f"{key_path}: {spec!r} is neither module:function nor path.py:function")
    try:
        module = _load_file(where, key_path) if where.endswith(".py") else importlib.import_module(where)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{key_path}: {where} does not import: {what}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [(n, v) for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        known = [n for n, _ in own if not n.startswith("_")]
        raise UserError(f"{key_path}: {where} has no function {name}; it has {', '.join(known) or 'none'}")
    return function


def _load_file(path: str, key_path: str) -> ModuleType:
    if not Path(path).is_file():
        raise UserError(f"{key_path}: there is no file {path} (from {os.getcwd()})")
    # A name of its own, so that a file called json.py hides no module; known by it, as dataclasses want.
    name = f"jaxrlhf_file_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _numbers(scores) -> np.ndarray:
    """float32 of what are numbers already: numpy would also take texts that spell one, and None for NaN."""
    scores = np.asarray(scores)
    if scores.dtype.kind in "USc" or (scores.dtype.kind == "O" and None in scores.ravel().tolist()):
        raise TypeError(f"it holds {'None' if scores.dtype.kind == 'O' else 'values of type ' + scores.dtype.name}")
    return scores.astype(np.float32)


def _columns(rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
