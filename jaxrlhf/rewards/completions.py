"""The input of a reward, and the protocol that every reward follows."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import jax
import numpy as np

from jaxrlhf.data.chats import Chat
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.distributed.mesh import fetch
from jaxrlhf.records import Rollout


@dataclasses.dataclass(frozen=True)
class Completions:
    """A rollout of B completions and their prompts. The texts are decoded when they are first used."""

    rollout: Rollout
    prompts: Sequence[str]  # B texts, as in the data
    rows: Sequence[dict[str, Any]]  # B rows: the other columns of the data
    tokenizer: Tokenizer
    chats: Sequence[Chat | None] = ()  # B chat prompts, None for a text prompt; empty if all prompts are text

    def gather(self) -> None:
        """Fetches the tokens to this host. All processes must call it. Then a single process can decode the tokens."""
        _ = self._ids, self.ended, self.response_mask

    @cached_property
    def texts(self) -> list[str]:
        """The texts of the B completions without special tokens. A blank after the prompt is part of the completion."""
        return [self.tokenizer.decode_after(prompt, response) for prompt, response in self._ids]

    def token_texts(self, rows: int) -> list[list[str]]:
        """Returns the text of each token of the first `rows` completions. The texts of a row form its completion."""
        return [self.tokenizer.token_texts(*ids, text) for ids, text in zip(self._ids[:rows], self.texts)]

    def token_ends(self, row: int) -> np.ndarray:
        """Returns the number of characters of completion `row` up to the end of each of its tokens, i64[T]."""
        return np.cumsum([len(text) for text in self.tokenizer.token_texts(*self._ids[row], self.texts[row])])

    def details(self, row: int) -> dict[str, Any]:
        """Returns further entries of the record of completion `row` in samples.jsonl."""
        return {}

    @cached_property
    def response_mask(self) -> np.ndarray:
        """The tokens of each completion, bool[B,R]."""
        return fetch(self.rollout.response_mask)

    @cached_property
    def ended(self) -> list[bool]:
        """For each of the B completions, whether it ended with a stop token."""
        return fetch(self.rollout.ended).tolist()

    @cached_property
    def _ids(self) -> list[tuple[list[int], list[int]]]:
        """The real tokens of each prompt and the real tokens of its completion."""
        (tokens, mask), response_mask = fetch((self.rollout.tokens, self.rollout.mask)), self.response_mask
        P = tokens.shape[1] - response_mask.shape[1]
        rows = zip(tokens, mask[:, :P], response_mask)
        return [(row[:P][real].tolist(), row[P:][own].tolist()) for row, real, own in rows]


class Reward(Protocol):
    """Returns scores f32[B] of B completions. Higher scores are better.

    A reward that may leave completions without a score has the attribute `may_abstain` and returns a masked array, see
    `with_abstained`. A reward that scores inside completions has the attribute `by_step` and always returns a masked
    array f32[B,R], see `rewards.steps`.
    """

    name: str

    def __call__(self, completions: Completions) -> np.ndarray | jax.Array: ...


def may_abstain(reward: Reward) -> bool:
    """Whether the reward may leave completions without a score."""
    return getattr(reward, "may_abstain", False)


def by_step(reward: Reward) -> bool:
    """Whether the reward scores inside completions."""
    return getattr(reward, "by_step", False)


def with_abstained(scores: np.ndarray, abstained: np.ndarray) -> np.ndarray:
    """Returns the scores f32[B] as a masked array. An entry is 0 and masked if `abstained` bool[B] is True for its row.

    If the reward scored every row, the scores are returned as an ordinary array.
    """
    if not abstained.any():
        return scores
    return np.ma.MaskedArray(np.where(abstained, np.float32(0), scores), abstained)


def abstained_rows(scores: np.ndarray) -> np.ndarray:
    """Returns bool[B]. An entry is True if the reward gave its row no score. `scores` is f32[B] or f32[B,R]."""
    masked = np.ma.getmaskarray(scores)
    return masked if masked.ndim == 1 else masked.all(axis=1)


def summed(scores: np.ndarray) -> np.ndarray:
    """Returns the scores f32[B] of completions: the sums of the rewards if `scores` is f32[B,R]."""
    if np.ndim(scores) == 1:
        return scores
    return with_abstained(np.ma.filled(scores, 0).sum(axis=1, dtype=np.float32), abstained_rows(scores))
