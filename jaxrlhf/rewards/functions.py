"""Rewards from Python functions: `module:function` or `path.py:function`.

A function is called once per batch with the keywords `prompts` and `completions` (lists of str) and one list per other
column of the data, as in TRL. It returns one finite number per completion, or None to abstain. An abstention counts 0.
A function without `**kwargs` receives only the keywords that it names. It may be `async def`. `options` are keywords
that every call receives, such as a target length.

Two rules hold only for the package's own functions (`jaxrlhf.rewards.library`). Options fill keyword-only parameters;
columns of the same name do not. Options are checked when the reward is built.
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
from jaxrlhf.errors import Fault, UserError
from jaxrlhf.rewards.completions import Completions, with_abstained
from jaxrlhf.rewards.event_loop import run_async


class RewardFault(Fault):
    """A reward raised an error or did not return scores. The message is one line that names the reward.

    `user_error` is the error that a user's function raised, or None.
    """

    def __init__(self, message: str, user_error: BaseException | None = None):
        super().__init__(message)
        self.user_error = user_error


class FunctionReward:
    """A reward (see `completions.Reward`) that calls a Python function on text.

    `options` are keywords of every call and take precedence over columns of the same name. `columns` maps a keyword of
    the function to the column of the data that fills it. `timeout`, in seconds, ends an async function; other functions
    cannot be ended. `key_path` is the setting that names the function, for messages. Raises UserError if the function
    does not exist or does not take an option.
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
        except ValueError:  # some builtins have no signature
            raise UserError(f"{key_path}: {spec} has no signature; want (prompts, completions, **columns)") from None
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
        for kind, names in (("option", self.options), ("column", self.columns)):
            for name in names:
                if name in ("prompts", "completions") or not (takes_all or name in known):
                    others = ", ".join(sorted(known - {"prompts", "completions"})) or "none"
                    raise UserError(f"{key_path}: {self.name} takes no {kind} {name!r}; it takes {others}")

    def _try_options(self, fields: set[str], key_path: str) -> None:
        """Calls a library function on an empty batch, so that the function checks its options and optional packages."""
        try:
            self.function(**{name: [] for name in fields} | self.options)
        except UserError as error:
            raise UserError(f"{key_path}: {self.name}: {one_line(error)}") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{key_path}: {self.name}: options: {one_line(error)}") from error

    def check_columns(self, columns: set[str], key_path: str) -> None:
        """Raises `UserError` if the function requires a keyword for which the data has no column."""
        if absent := sorted(set(self.columns.values()) - columns):
            present = ", ".join(sorted(columns)) or "none"
            raise UserError(f"{key_path}: the data has no column {', '.join(absent)}; it has {present}")
        keywords = columns | {"prompts", "completions"} | set(self.columns)
        if missing := sorted(self.required - keywords):
            names = ", ".join(sorted(keywords))
            raise UserError(f"{key_path}: {self.name} requires {', '.join(missing)}; the data has {names}")

    def __call__(self, completions: Completions) -> np.ndarray:
        # Copied, because a function may sort or pop its lists; the data and the inputs of other rewards must not
        # change.
        keywords = copy.deepcopy(columns_of(completions.rows))
        keywords |= {keyword: keywords[name] for keyword, name in self.columns.items() if name in keywords}
        keywords |= {"prompts": list(completions.prompts), "completions": list(completions.texts)}
        if self.accepted is not None:
            keywords = {name: value for name, value in keywords.items() if name in self.accepted}
        try:
            scores = self.function(**keywords | self.options)
            if inspect.isawaitable(scores):
                scores = run_async(scores, self.timeout)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit, or a panic in Rust, would end the run as if it had succeeded
            what = f"{type(error).__name__}: {one_line(error)}"
            raise RewardFault(f"reward function {self.name} raised {what}", user_error=error) from error
        return checked_scores(scores, len(completions.prompts), f"reward function {self.name}")


def checked_scores(scores: Any, count: int, source: str) -> np.ndarray:
    """Converts the return value of `source` to scores f32[count]. An entry of None becomes 0 and is masked.

    Raises RewardFault unless the value is a list of `count` entries, each a finite number or None.
    """
    try:
        scores, abstained = _numbers(scores)
    except Exception as error:  # torch raises RuntimeError for a tensor that requires grad
        raise RewardFault(f"{source} returned no list of numbers: {one_line(error)}") from error
    if scores.shape != (count,):
        raise RewardFault(f"{source} returned shape {scores.shape} for {count} completions; want one number each")
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        hint = "; None abstains" if np.isnan(scores[bad[0]]) else ""
        raise RewardFault(f"{source} returned {scores[bad[0]]} for completion {bad[0]} of {count}{hint}")
    return with_abstained(scores, abstained)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """One list per column, with None for rows that lack the column."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def load_function(spec: str, key_path: str) -> Callable:
    """Imports the function named as `module:function` or `path.py:function`; UserError if that fails.

    `key_path` is the setting that names the function, for the message.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name.isidentifier():
        raise UserError(f"{key_path}: {spec!r} is neither module:function nor path.py:function")
    try:
        module = _load_file(where, key_path) if where.endswith(".py") else importlib.import_module(where)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{key_path}: cannot import {where}: {what}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [(n, v) for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        known = [n for n, _ in own if not n.startswith("_")]
        raise UserError(f"{key_path}: {where} has no function {name}; it has {', '.join(known) or 'none'}")
    return function


def _load_file(path: str, key_path: str) -> ModuleType:
    if not Path(path).is_file():
        raise UserError(f"{key_path}: there is no file {path} (from {os.getcwd()})")
    # So that the files beside it can be imported, now and when a function imports them later; last, so that they hide
    # no installed module.
    if (folder := str(Path(path).parent.absolute())) not in sys.path:
        sys.path.append(folder)
    # The prefix keeps a file called json.py from hiding a module. Dataclasses look their module up by its name.
    name = f"jaxrlhf_file_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _numbers(scores: Any) -> tuple[np.ndarray, np.ndarray]:
    """(scores f32, a bool array that is True where they were None). Refuses text, which numpy would read as numbers."""
    if scores is None:
        raise TypeError("it is None; want a list, with None for each completion that is not scored")
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
