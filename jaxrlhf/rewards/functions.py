"""Rewards from Python functions: `module:function` or `path.py:function`.

A function is called once per batch with keywords `prompts` and `completions` (lists of str) and one list
per other column of the data, and returns one finite number per answer, as TRL's reward functions do, or None
for an answer that it does not score: it abstains there, and counts 0. A function without `**kwargs` gets only
the keywords that it names. It may be `async def`; `options` are keywords that every call gets, such as a target
length.

In the package's own functions (`jaxrlhf.rewards.library`) only options fill the keyword-only parameters, never
columns of the same name, and options that they cannot use are found when the reward is made.
"""

import copy
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxrlhf.data.sources import one_line
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.completions import Completions, with_abstained
from jaxrlhf.rewards.event_loop import run_async


class RewardFault(RuntimeError):
    """A reward raised, or returned what is no score: one line that names the culprit."""


class FunctionReward:
    """A reward (see `completions.Reward`) that calls a Python function on text.

    `options` are keywords of every call and go before columns of the same name. `columns` renames: keyword of the
    function -> column of the data. `timeout` in seconds ends an async function; one that is not async cannot be
    ended. `key_path` is the setting that names the function, for messages. Raises UserError where there is no
    such function or it takes no such option.
    """

    may_abstain = True

    def __init__(
        self,
        spec: str,
        key_path: str,
        options: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ):
        self.name, self.options, self.columns, self.timeout = spec, dict(options or {}), dict(columns or {}), timeout
        self.function = load_function(spec, key_path)
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except ValueError:  # some builtins have none
            raise UserError(f"{key_path}: {spec} tells no parameters; want prompts, completions, **columns") from None
        if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
            raise UserError(f"{key_path}: {spec} takes positional arguments; it is called with keywords")
        of_library = (getattr(self.function, "__module__", None) or "").startswith("jaxrlhf.rewards.")
        fields = [p for p in parameters if not (of_library and p.kind is p.KEYWORD_ONLY)]
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.accepted = None if takes_all else {p.name for p in fields}
        optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self.required = {p.name for p in fields if p.default is p.empty and p.kind not in optional} - set(self.options)
        self._check_keywords({p.name for p in parameters if p.kind not in optional}, takes_all, key_path)
        if of_library:
            self._try_options({p.name for p in fields if p.kind not in optional}, key_path)

    def _check_keywords(self, known: set[str], takes_all: bool, key_path: str) -> None:
        for kind, given in (("option", self.options), ("column", self.columns)):
            for name in given:
                if name in ("prompts", "completions") or not (takes_all or name in known):
                    names = ", ".join(sorted(known - {"prompts", "completions"})) or "none"
                    raise UserError(f"{key_path}: {self.name} takes no {kind} {name!r}; it takes {names}")

    def _try_options(self, fields: set[str], key_path: str) -> None:
        """The library's functions check options and packages on no answers as well: before anything compiles."""
        try:
            self.function(**{name: [] for name in fields} | self.options)
        except UserError as error:
            raise UserError(f"{key_path}: {self.name}: {one_line(error)}") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{key_path}: {self.name}: options: {one_line(error)}") from error

    def check_columns(self, columns: set[str], key_path: str) -> None:
        """`UserError` where the function requires a keyword that the data does not give."""
        if absent := sorted(set(self.columns.values()) - columns):
            given = ", ".join(sorted(columns)) or "none"
            raise UserError(f"{key_path}: the data has no column {', '.join(absent)}; it has {given}")
        given = columns | {"prompts", "completions"} | set(self.columns)
        if missing := sorted(self.required - given):
            raise UserError(
                f"{key_path}: {self.name} requires {', '.join(missing)}; the data gives {', '.join(sorted(given))}"
            )

    def __call__(self, completions: Completions) -> np.ndarray:
        # Copies: a function that sorts or pops what it is given must change neither the data, which a run that goes
        # on later reads anew, nor what the other parts of a sum see.
        columns = copy.deepcopy(columns_of(completions.rows))
        columns |= {keyword: columns.get(name) for keyword, name in self.columns.items() if name in columns}
        given = columns | {"prompts": list(completions.prompts), "completions": list(completions.texts)}
        if self.accepted is not None:
            given = {name: value for name, value in given.items() if name in self.accepted}
        try:
            scores = self.function(**given | self.options)
            if inspect.isawaitable(scores):
                scores = run_async(scores, self.timeout)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit would end the run as if it had succeeded; so may a panic of Rust
            what = f"{type(error).__name__}: {one_line(error)}"
            raise RewardFault(f"reward function {self.name} raised {what}") from error
        return checked_scores(scores, len(completions.prompts), f"reward function {self.name}")


def checked_scores(scores: Any, count: int, source: str) -> np.ndarray:
    """Scores f32[count] of what `source` returned, masked and 0 where that is None (see `completions.with_abstained`).

    RewardFault where it is no list of `count` finite numbers and None.
    """
    try:
        scores, abstained = _numbers(scores)
    except Exception as error:  # torch says with a RuntimeError that a tensor still requires grad
        raise RewardFault(f"{source} returned no list of numbers: {one_line(error)}") from error
    if scores.shape != (count,):
        raise RewardFault(f"{source} returned shape {scores.shape} for {count} answers; want one number each")
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        hint = "; None abstains" if np.isnan(scores[bad[0]]) else ""
        raise RewardFault(f"{source} returned {scores[bad[0]]} for answer {bad[0]} of {count}{hint}")
    return with_abstained(scores, abstained)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """One list per column; None where a row has no such column."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


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


def _numbers(scores: Any) -> tuple[np.ndarray, np.ndarray]:
    """(float32 of what are numbers already, where there was None): numpy would also take texts that spell a number."""
    if scores is None:
        raise TypeError("it is None; want a list, with None for each answer that is not scored")
    abstained = np.ma.getmaskarray(scores) if isinstance(scores, np.ma.MaskedArray) else False
    scores = np.asarray(scores)
    abstained = np.broadcast_to(abstained, scores.shape)
    if scores.dtype.kind == "O":
        none = np.reshape([value is None for value in scores.ravel()], scores.shape).astype(bool)
        scores, abstained = np.where(none, 0.0, scores), abstained | none
        if odd := [value for value in scores.ravel().tolist() if isinstance(value, (str, bytes))]:
            raise TypeError(f"it holds values of type {type(odd[0]).__name__}")
    elif scores.dtype.kind in "USmMc":
        raise TypeError(f"it holds values of type {scores.dtype.name}")
    return scores.astype(np.float32), abstained
