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
        """The B answers as text, without special tokens; decoded once, on first use."""
        tokens, mask = jax.device_get((self.rollout.tokens, self.rollout.response_mask))
        responses = tokens[:, -mask.shape[1] :]
        return [self.tokenizer.decode(row[real].tolist()) for row, real in zip(responses, mask)]


class Reward(Protocol):
    """Scores f32[B] of B answers; higher is better."""

    name: str

    def __call__(self, answers: Answers) -> np.ndarray | jax.Array: ...
