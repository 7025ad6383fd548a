"""What a reward is given, and the one protocol that all rewards follow."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import jax
import numpy as np

from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.records import Rollout


@dataclasses.dataclass(frozen=True)
class Answers:
    """A rollout, and its text for those who want text."""

    rollout: Rollout
    prompts: Sequence[str]  # B texts, as the data gave them
    rows: Sequence[dict[str, Any]]  # B rows: the data's other columns
    tokenizer: Tokenizer

    @cached_property
    def completions(self) -> list[str]:
        """The B answers as text, without special tokens, as they follow their prompts; decoded once, on first use."""
        tokens, mask, real = jax.device_get((self.rollout.tokens, self.rollout.mask, self.rollout.response_mask))
        P = tokens.shape[1] - real.shape[1]
        return [
            self.tokenizer.decode_after(row[:P][whole[:P]].tolist(), row[P:][answer].tolist())
            for row, whole, answer in zip(tokens, mask, real)
        ]


class Reward(Protocol):
    """Scores f32[B] of B answers; higher is better."""

    name: str

    def __call__(self, answers: Answers) -> np.ndarray | jax.Array: ...
