"""Rewards from Python functions. A config names a function as `module:function` or `path.py:function`.

A function is called once per batch, with keywords as in TRL. The keywords `prompts` and `completions` are lists of str.
Each other column of the data is a keyword with one list. A function without `**kwargs` receives only the keywords that
it names. `options` are further keywords that every call receives, such as a target length. The function may be
`async def`. It returns a list with one finite number per completion. The entry None means that the function gives this
completion no score, and then the score is 0. With a granularity other than completion, each entry is a list of numbers
for the places inside a completion, see `steps.Granularity`. The function then also has the keyword `steps` or `tokens`:
a list with the texts of the steps or tokens of each completion.

Two rules hold only for the functions of `jaxrlhf.rewards.library`. Keyword-only parameters receive options, but never
columns of the same name. Options are checked when the reward is built.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrlhf.config.functions import load_function
from jaxrlhf.errors import Fault, UserError, one_line
from jaxrlhf.rewards.completions import Completions, with_abstained
from jaxrlhf.rewards.event_loop import run_async

if TYPE_CHECKING:
    from jaxrlhf.rewards.steps import Granularity


class RewardFault(Fault):
    """Raised if a reward raises an error or returns no usable scores. The message is one line and names the reward.

    `user_error` is the error that a user's function raised, or None.
    """

    def __init__(self, message: str, user_error: BaseException | None = None):
        super().__init__(message)
        self.user_error = user_error


class FunctionReward:
    """A reward (see `completions.Reward`) that calls a Python function on text.

    `spec` is the name of the function, or the function. `options` are keywords of every call. An option replaces a
    column of the same name. `columns` maps a keyword of the function to the column of the data that this keyword
    receives. An async function is stopped after `timeout` seconds. Other functions cannot be stopped. If there is a
    `granularity`, the function scores inside completions. `key_path` is the setting that names the function. Error
    messages contain it.
    Raises UserError if the function does not exist or does not accept an option.
    """

    may_abstain = True

    def __init__(
        self,
        spec: Any,
        key_path: str,
        options: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
        timeout: float | None = None,
        granularity: "Granularity | None" = None,
    ):
        self.options, self.columns, self.timeout = dict(options or {}), dict(columns or {}), timeout
        self.name = spec if isinstance(spec, str) else getattr(spec, "__name__", type(spec).__name__)
        self.granularity, self.by_step = granularity, granularity is not None
        self.given = {"prompts", "completions"} | (granularity.keywords if granularity else set())
        self.function = load_function(spec, key_path) if isinstance(spec, str) else spec
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except ValueError:  # some builtins have no signature
            raise UserError(
                f"{key_path}: {self.name} has no signature; write a function (prompts, completions, **columns) that "
                "calls it"
            ) from None
        if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
            raise UserError(
                f"{key_path}: {self.name} has positional-only parameters; a reward function must accept keywords"
            )
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
                if name in self.given or not (takes_all or name in known):
                    others = ", ".join(sorted(known - self.given)) or "none"
                    raise UserError(
                        f"{key_path}: {self.name} accepts no {kind} {name!r}; it accepts: {others}"
                    )

    def _try_options(self, fields: set[str], key_path: str) -> None:
        """Calls a library function on an empty batch. The function then checks its options and optional packages."""
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
            raise UserError(f"{key_path}: the data has no column {', '.join(absent)}; the columns are: {present}")
        keywords = columns | self.given | set(self.columns)
        if missing := sorted(self.required - keywords):
            names = ", ".join(sorted(keywords))
            raise UserError(
                f"{key_path}: {self.name} requires the keywords {', '.join(missing)}; the given keywords are: {names}"
            )

    def __call__(self, completions: Completions) -> np.ndarray:
        # The columns are copied, because a function may sort or pop its lists. The data and the inputs of other rewards
        # must not change.
        keywords = copy.deepcopy(columns_of(completions.rows))
        keywords |= {keyword: keywords[name] for keyword, name in self.columns.items() if name in keywords}
        keywords |= {"prompts": list(completions.prompts), "completions": list(completions.texts)}
        parts = self.granularity.texts(completions) if self.granularity is not None else {}
        keywords |= copy.deepcopy(parts)
        if self.accepted is not None:
            keywords = {name: value for name, value in keywords.items() if name in self.accepted}
        try:
            scores = self.function(**keywords | self.options)
            if inspect.isawaitable(scores):
                scores = run_async(scores, self.timeout)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # otherwise sys.exit would end the run with status 0
            what = f"{type(error).__name__}: {one_line(error)}"
            raise RewardFault(f"reward function {self.name} raised {what}", user_error=error) from error
        source = f"reward function {self.name}"
        if self.granularity is None:
            return checked_scores(scores, len(completions.prompts), source)
        placed = self.granularity.read(scores, completions.texts, *parts.values(), source=source)
        return self.granularity.at_tokens(placed, completions)


def checked_scores(scores: Any, count: int, source: str) -> np.ndarray:
    """Converts the value that `source` returned to scores f32[count]. An entry None becomes 0 and is masked.

    Raises RewardFault unless the value is a list of `count` entries and each entry is a finite number or None.
    """
    try:
        scores, abstained = numbers_of(scores)
    except Exception as error:  # torch raises RuntimeError for a tensor that requires grad
        raise RewardFault(f"{source} returned no list of numbers: {one_line(error)}") from error
    if scores.shape != (count,):
        raise RewardFault(
            f"{source} returned shape {scores.shape} for {count} completions; it must return one number per completion"
        )
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        hint = "; return None to give no score" if np.isnan(scores[bad[0]]) else "; a score must be finite"
        raise RewardFault(f"{source} returned {scores[bad[0]]} for completion {bad[0]} of {count}{hint}")
    return with_abstained(scores, abstained)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Returns one list per column. The list holds None for each row without the column."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def numbers_of(scores: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns (scores f32, a bool array that is True for each score that was None).

    Raises TypeError for text, because numpy would read a text such as "1" as a number.
    """
    if scores is None:
        raise TypeError("the value is None; return a list that has None for each completion without a score")
    abstained = np.ma.getmaskarray(scores) if isinstance(scores, np.ma.MaskedArray) else False
    scores = np.asarray(scores)
    abstained = np.broadcast_to(abstained, scores.shape)
    if scores.dtype.kind == "O":
        none = np.reshape([value is None for value in scores.ravel()], scores.shape).astype(bool)
        scores, abstained = np.where(none, 0.0, scores), abstained | none
        if odd := [value for value in scores.ravel().tolist() if isinstance(value, (str, bytes))]:
            raise TypeError(f"an entry has the type {type(odd[0]).__name__}")
    elif scores.dtype.kind in "USmMc":
        raise TypeError(f"an entry has the type {scores.dtype.name}")
    with np.errstate(over="ignore"):  # a number too large for float32 becomes inf, which the caller refuses
        return scores.astype(np.float32), abstained
