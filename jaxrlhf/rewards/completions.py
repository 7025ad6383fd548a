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
    """A rollout of B completions with their prompts; the text is decoded on first use."""

    rollout: Rollout
    prompts: Sequence[str]  # B texts, as in the data
    rows: Sequence[dict[str, Any]]  # B rows: the other columns of the data
    tokenizer: Tokenizer
    chats: Sequence[Chat | None] = ()  # B chat prompts, None for a text prompt; empty: all prompts are text

    def gather(self) -> None:
        """Fetches the tokens to this host. All processes must call it; afterwards one process can decode alone."""
        _ = self._ids, self.ended

    @cached_property
    def texts(self) -> list[str]:
        """The B completions as text without special tokens. A blank between prompt and completion is included."""
        return [self.tokenizer.decode_after(prompt, response) for prompt, response in self._ids]

    @cached_property
    def ended(self) -> list[bool]:
        """Whether each of the B completions ended with a stop token."""
        return fetch(self.rollout.ended).tolist()

    @cached_property
    def _ids(self) -> list[tuple[list[int], list[int]]]:
        """The real tokens of each prompt and of its completion."""
        tokens, mask, response_mask = fetch((self.rollout.tokens, self.rollout.mask, self.rollout.response_mask))
        P = tokens.shape[1] - response_mask.shape[1]
        rows = zip(tokens, mask[:, :P], response_mask)
        return [(row[:P][real].tolist(), row[P:][own].tolist()) for row, real, own in rows]


class Reward(Protocol):
    """Scores f32[B] of B completions; higher is better.

    A reward that may abstain has the attribute `may_abstain` and returns a masked array, see `with_abstained`.
    """

    name: str

    def __call__(self, completions: Completions) -> np.ndarray | jax.Array: ...


def may_abstain(reward: Reward) -> bool:
    """Whether the reward may leave completions without a score."""
    return getattr(reward, "may_abstain", False)


def with_abstained(scores: np.ndarray, abstained: np.ndarray) -> np.ndarray:
    """The scores f32[B] as a masked array: 0 and masked where `abstained` bool[B] is True.

    If the reward scored every row, the array is not a masked one.
    """
    if not abstained.any():
        return scores
    return np.ma.MaskedArray(np.where(abstained, np.float32(0), scores), abstained)


def abstained_rows(scores: np.ndarray) -> np.ndarray:
    """The rows on which a reward abstained, bool[B]."""
    return np.ma.getmaskarray(scores)
