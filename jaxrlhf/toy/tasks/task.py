"""The form of the builtin tasks: generated rows in three splits that share no prompt.

A task is a function that draws one row. Each row has a `prompt` (or `messages`), a `response` for supervised
fine-tuning, and the columns that the task's reward compares completions with. All texts are lower case words that are
separated by single spaces, for the word-level tokenizer of `model.new`.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

Random = np.random.Generator
Row = dict[str, Any]
Item = TypeVar("Item")

SPLITS = ("train", "validation", "test")
SEED = 20_261_127
HELD_OUT = 0.1  # share of the keys in each of validation and test
# A split ends early if this number of draws in a row gave no new row of the split.
MAX_DRAWS = 20_000


def _prompt(row: Row) -> str:
    return row["prompt"]


@dataclass(frozen=True)
class Task:
    """A generated data set with a known best score."""

    draw: Callable[[Random], Row]  # one random row
    words: tuple[str, ...]  # every word of its texts: the vocabulary of `model.new`
    rows: dict[str, int] = field(default_factory=lambda: {"train": 2000, "validation": 200, "test": 500})
    # Rows with equal keys are in the same split. Validation and test have each key once.
    key: Callable[[Row], str] = _prompt
    chat_template: str | None = None  # of the tokenizer, for tasks whose rows have `messages`
    # Where the hashes of the held-out keys begin. Another value makes test rows that no result is known for.
    held_out_from: float = 0.0

    def load(self, split: str = "train", limit: int | None = None) -> list[Row]:
        """Returns the first `limit` rows of a split (null: `rows[split]`). Every call returns the same rows."""
        rng = np.random.default_rng([SEED, SPLITS.index(split)])
        count = self.rows[split] if limit is None else limit
        return [row for row, _ in zip(self._draws(rng, split), range(count))]

    def _draws(self, rng: Random, split: str) -> Iterator[Row]:
        seen: set[str] = set()
        fruitless = 0
        while fruitless < MAX_DRAWS:
            row = self.draw(rng)
            key = self.key(row)
            if split_of(key, self.held_out_from) != split or (split != "train" and key in seen):
                fruitless += 1
                continue
            fruitless = 0
            seen.add(key)
            yield row


def split_of(key: str, held_out_from: float = 0.0) -> str:
    """Returns the split of a key. It depends on the key's text alone, so no key is in two splits.

    Of the hashes in [0, 1), those from `held_out_from` on are in test, the next ones in validation, the rest in train.
    """
    place = (zlib.crc32(key.encode()) / 2**32 - held_out_from) % 1.0
    return "test" if place < HELD_OUT else "validation" if place < 2 * HELD_OUT else "train"


def pick(rng: Random, items: Sequence[Item]) -> Item:
    """Returns a uniformly random item."""
    return items[int(rng.integers(len(items)))]


def sample(rng: Random, items: Sequence[Item], count: int) -> list[Item]:
    """Returns `count` different items in random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


def words_of(*texts: str) -> tuple[str, ...]:
    """Returns the distinct words of texts, sorted."""
    return tuple(sorted({word for text in texts for word in text.split()}))
