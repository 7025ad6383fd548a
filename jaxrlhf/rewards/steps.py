"""Rewards inside completions (process rewards): steps of a text, and the tokens at which their rewards stand.

A reward that scores inside completions returns a masked array f32[B,R]. An entry is masked where no reward was given.
The last token of a scored completion always ends a step, with the reward 0 if none was given for it. A row whose
entries are all masked has no score.

The tokens of a completion are those that the policy sampled. `Tokenizer.token_texts` says which part of the
completion's text each token has. If several tokens form one character, the last of them has it. The reward of a step
stands at the last token that ends within the step and after all of its words:

  - Blanks and separators after the words may be the beginning of the next step's first token, such as " next". The
    reward then stands at the token before.
  - If a token has words of two steps, the reward of the first step stands at it. If several steps end inside one
    token, their rewards are added.
  - The end of the text is the last token of the completion. This is the stop token if the completion ended.

If a function returns the end itself, blanks after the end do not matter: the reward stands at the first token that
reaches the end.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxrlhf.config import RewardConfig
from jaxrlhf.errors import one_line
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.functions import RewardFault, numbers_of

Placed = tuple[np.ndarray, np.ndarray] | None
"""(places, rewards f32[n]) of one completion, or None without a score. Places are numbers of tokens i64[n], or ends in
the text i64[n,2], see `step_ends`."""


def split_steps(text: str, separator: str) -> list[str]:
    """Returns the steps of a text. Together they are the text. There is at least one step.

    A step ends after a separator. A piece that has only blanks is not a step. It belongs to the step before it, or at
    the start of the text to the step after it.
    """
    parts = text.split(separator)
    steps, blank = [""], True  # blank says whether the last step has only separators and blanks
    for i, part in enumerate(parts):
        piece = part + separator if i < len(parts) - 1 else part
        if blank or not part.strip():
            steps[-1] += piece
            blank = blank and not part.strip()
        else:
            steps.append(piece)
    return steps


def step_ends(steps: Sequence[str], separator: str) -> np.ndarray:
    """Returns i64[n,2]: the ends of each step without and with the blanks and separators after its words.

    Ends are numbers of characters from the start of the text.
    """
    lengths = np.array([(_words(step, separator), len(step)) for step in steps], np.int64)
    return lengths + (np.cumsum(lengths[:, 1:], axis=0) - lengths[:, 1:])


def _words(step: str, separator: str) -> int:
    """Returns the number of characters of a step without the blanks and separators at its end."""
    while step != (shorter := step.rstrip().removesuffix(separator)):
        step = shorter
    return len(step)


@dataclasses.dataclass(frozen=True)
class Granularity:
    """What a reward scores inside completions, and how its numbers are read.

      step    one number per step; `separator` ends a step
      token   one number per token, special tokens and the stop token included
      offset  (end, reward) pairs; `end` is a number of characters of the completion's text
    """

    kind: Literal["step", "token", "offset"]
    separator: str = "\n"

    @property
    def keywords(self) -> set[str]:
        """The names of the texts that `texts` returns."""
        return {"step": {"steps"}, "token": {"tokens"}, "offset": set()}[self.kind]

    def texts(self, completions: Completions) -> dict[str, list[list[str]]]:
        """Returns {"steps": texts of the steps} or {"tokens": texts of the tokens} of each completion, else {}."""
        if self.kind == "step":
            return {"steps": [split_steps(text, self.separator) for text in completions.texts]}
        if self.kind == "token":
            return {"tokens": completions.token_texts(len(completions.texts))}
        return {}

    def read(
        self, returned: Any, texts: Sequence[str], parts: Sequence[list[str]] | None = None, *, source: str
    ) -> list[Placed]:
        """Returns the rewards of each completion. `parts` holds its steps or tokens, see `Granularity.texts`.

        Raises `RewardFault` with one line unless `returned` has one list per completion, and each list fits its
        completion. An entry None instead of a number means that this step or token has no reward. A None instead of a
        list means that the completion has no score.
        """
        form = "(end, reward) pairs," if self.kind == "offset" else f"numbers, one per {self.kind},"
        if hasattr(returned, "tolist"):  # an array of numpy, torch or jax
            returned = returned.tolist()
        if not isinstance(returned, (list, tuple)):
            what = type(returned).__name__
            raise RewardFault(f"{source} returned a {what}; it must return one list of {form} for each completion")
        if len(returned) != len(texts):
            raise RewardFault(
                f"{source} returned {len(returned)} entries for {len(texts)} completions; it must return one list of "
                f"{form} for each completion"
            )
        placed: list[Placed] = []
        for i, (row, text) in enumerate(zip(returned, texts)):
            where = f"completion {i} of {len(texts)}"
            if row is None:
                placed.append(None)
            elif self.kind == "offset":
                placed.append(_pairs(row, text, source, where))
            else:
                placed.append(self._numbers(row, parts[i], source, where))
        return placed

    def _numbers(self, row: Any, parts: list[str], source: str, where: str) -> Placed:
        """Returns the rewards of the steps or tokens `parts` of one completion."""
        values, absent = _checked(row, f"numbers, one per {self.kind},", source, where)
        if values.shape != (len(parts),):
            found, needed = _count(len(values), "number"), _count(len(parts), self.kind)
            raise RewardFault(
                f"{source} returned {found} for {where}, which has {needed}; it must return one number per {self.kind}"
            )
        _check_finite(values, self.kind, source, where)
        if absent.all() and len(parts):
            return None
        places = np.arange(len(parts)) if self.kind == "token" else step_ends(parts, self.separator)
        return places[~absent], values[~absent]

    def at_tokens(self, placed: Sequence[Placed], completions: Completions) -> np.ma.MaskedArray:
        """Returns the rewards at their tokens, see the module docstring: f32[B,R], masked where there is none."""
        mask = completions.response_mask
        rewards, given = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, bool)
        for i, row in enumerate(placed):
            real = np.flatnonzero(mask[i])
            if row is None or not real.size:
                continue
            places, values = row
            if self.kind != "token":
                places = tokens_at(places, completions.token_ends(i))
            np.add.at(rewards[i], real[places], values)
            given[i, real[places]] = given[i, real[-1]] = True
        return np.ma.MaskedArray(rewards, ~given)

    def take(self, scores: np.ndarray, completions: Completions, step_reward: str) -> np.ma.MaskedArray:
        """Returns the rewards of steps from the scores f32[B,R] of all tokens: those at the last token of each step.

        `step_reward` is as in `step_values`.
        """
        (steps,) = self.texts(completions).values()
        placed: list[Placed] = []
        for i, of_row in enumerate(steps):
            ends, real = step_ends(of_row, self.separator), np.flatnonzero(completions.response_mask[i])
            if not real.size:
                placed.append(None)
                continue
            values = scores[i, real[tokens_at(ends, completions.token_ends(i))]]
            placed.append((ends, step_values(values, step_reward)))
        return self.at_tokens(placed, completions)


def granularity_of(config: RewardConfig) -> Granularity | None:
    """Returns what a reward scores inside completions, or None if it scores whole completions."""
    kind = getattr(config, "granularity", "completion")
    return None if kind == "completion" else Granularity(kind, config.step_separator)


def step_values(scores: np.ndarray, step_reward: str) -> np.ndarray:
    """Returns the rewards of steps from the scores at their ends.

    A reward is the score. With "difference", it is the increase since the step before (since 0 in the first step).
    """
    return np.diff(scores, prepend=np.float32(0)) if step_reward == "difference" else scores


def tokens_at(places: np.ndarray, token_ends: np.ndarray) -> np.ndarray:
    """Returns the number of the token at which each step ends, i64[n]; the module docstring has the rules.

    `places` i64[n,2] are those of `step_ends`. `token_ends` i64[T] are the ends of the tokens in the same text. Of
    tokens with equal ends, the first one counts, because the others have no text.
    """
    words, ends = places.T
    within = np.searchsorted(token_ends, ends, side="right")  # number of tokens that end within the step or before
    last = np.where(within > 0, token_ends[np.maximum(within - 1, 0)], -1)
    tokens = np.searchsorted(token_ends, np.where(last >= words, last, ends), side="left")
    return np.where(ends == token_ends[-1], len(token_ends) - 1, tokens)


def _pairs(row: Any, text: str, source: str, where: str) -> Placed:
    sequence = (list, tuple)
    if not isinstance(row, sequence) or not all(isinstance(pair, sequence) and len(pair) == 2 for pair in row):
        raise RewardFault(f"{source} must return a list of (end, reward) pairs for {where}, not {_shown(row)}")
    ends = [end for end, _ in row]
    for end in ends:
        if isinstance(end, bool) or not isinstance(end, (int, np.integer)) or not 0 <= end <= len(text):
            raise RewardFault(
                f"{source} returned the end {end!r} for {where}, whose text has {len(text)} characters; an end must be "
                "a whole number from 0 to the number of characters"
            )
    values, absent = _checked([value for _, value in row], "(end, reward) pairs", source, where)
    _check_finite(values, "pair", source, where)
    if absent.all() and row:
        return None
    places = np.array(ends, np.int64)[~absent]
    return np.stack([places, places], axis=1), values[~absent]


def _checked(row: Any, form: str, source: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        values, absent = numbers_of(row)
    except Exception as error:
        raise RewardFault(f"{source} must return a list of {form} for {where}: {one_line(error)}") from error
    if values.ndim != 1:
        raise RewardFault(f"{source} must return a list of {form} for {where}, not {_shown(row)}")
    return values, absent


def _shown(row: Any) -> str:
    return one_line(repr(row))[:40]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _check_finite(values: np.ndarray, kind: str, source: str, where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise RewardFault(f"{source} returned {values[bad[0]]} for {kind} {bad[0]} of {where}; a reward must be finite")


def at_end(scores: np.ndarray, abstained: np.ndarray, mask: np.ndarray) -> np.ma.MaskedArray:
    """Returns scores f32[B] as rewards f32[B,R] at the last token of each completion of `mask` bool[B,R]."""
    rewards, given = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, bool)
    rows = np.flatnonzero(mask.any(axis=1) & ~abstained)
    last = mask.shape[1] - 1 - mask[rows, ::-1].argmax(axis=1)
    rewards[rows, last], given[rows, last] = np.asarray(scores)[rows], True
    return np.ma.MaskedArray(rewards, ~given)


def step_texts(tokens: Sequence[str], given: np.ndarray) -> list[str]:
    """Returns the text up to each token that ends a step, from the end of the step before. `given` is bool[T]."""
    ends = np.flatnonzero(given) + 1
    return ["".join(tokens[a:b]) for a, b in itertools.pairwise([0, *ends.tolist()])]
