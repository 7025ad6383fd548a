"""What a reward is given, and the one protocol that all rewards follow."""

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
    """A rollout, and its text for those who want text."""

    rollout: Rollout
    prompts: Sequence[str]  # B texts, as the data gave them
    rows: Sequence[dict[str, Any]]  # B rows: the data's other columns
    tokenizer: Tokenizer
    chats: Sequence[Chat | None] = ()  # B: the chat that a prompt is, None for text; empty: all are text

    def gather(self) -> None:
        """Brings what the text needs to this host; on several hosts all call it, and then one can read alone."""
        _ = self._ids, self.ended

    @cached_property
    def texts(self) -> list[str]:
        """The B answers as text, without special tokens, as they follow their prompts; decoded once, on first use."""
        return [self.tokenizer.decode_after(prompt, response) for prompt, response in self._ids]

    @cached_property
    def ended(self) -> list[bool]:
        """Whether each of the B answers ended by itself."""
        return fetch(self.rollout.ended).tolist()

    @cached_property
    def _ids(self) -> list[tuple[list[int], list[int]]]:
        """The real tokens of each prompt and its answer."""
        rollout = self.rollout
        tokens, mask, answered = fetch((rollout.tokens, rollout.mask, rollout.response_mask))
        at = tokens.shape[1] - answered.shape[1]
        rows = zip(tokens, mask[:, :at], answered)
        return [(row[:at][real].tolist(), row[at:][answer].tolist()) for row, real, answer in rows]


class Reward(Protocol):
    """Scores f32[B] of B answers; higher is better.

    A reward that may abstain has the attribute `may_abstain`. It returns a masked array where it does, of 0 there: see
    `with_abstained`.
    """

    name: str

    def __call__(self, completions: Completions) -> np.ndarray | jax.Array: ...


def may_abstain(reward: Reward) -> bool:
    """Whether there may be answers that the reward gives no score."""
    return getattr(reward, "may_abstain", False)


def with_abstained(scores: np.ndarray, abstained: np.ndarray) -> np.ndarray:
    """The scores f32[B], 0 and masked where `abstained` bool[B]; a plain array where no row is."""
    if not abstained.any():
        return scores
    return np.ma.MaskedArray(np.where(abstained, np.float32(0), scores), abstained)


def abstained_rows(scores: np.ndarray) -> np.ndarray:
    """Where a reward has abstained, bool[B]."""
    return np.ma.getmaskarray(scores)
