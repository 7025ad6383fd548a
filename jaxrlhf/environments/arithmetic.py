"""Arithmetic with a calculator: the environment of the rows of `builtin:calculator`. The best success is 1.

All numbers are digits that are separated by blanks, for a word-level tokenizer. See `jaxrlhf/toy/tasks/calculator.py`.
"""

from typing import Any

import numpy as np

from jaxrlhf.environments import calculator as arithmetic
from jaxrlhf.environments.tools import ToolEnvironment
from jaxrlhf.toy.tasks import calculator as task


def calculator(expression: str) -> str:
    """
    Computes an arithmetic expression.

    Args:
        expression: The expression. Its digits, and those of the result, are separated by blanks.
    """
    return task.spell(arithmetic.calculator(expression.replace(" ", "")))


class Arithmetic(ToolEnvironment):
    """An environment: answer a sum, a difference or a product. The reward is 1 for the right answer, else 0.

    The question is a row of `builtin:calculator`, or is drawn from the seed if reset gets no row. With `tool: false`
    there is no calculator, and a call is a wrong answer. `max_calls` is the number of calls in an episode.
    """

    def __init__(self, tool: bool = True, max_calls: int = 1) -> None:
        super().__init__(
            [calculator] if tool else [], "plain", "jaxrlhf.rewards.library:exact_match", max_calls=max_calls
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if not options:
            options = task.draw(np.random.default_rng(seed))
        messages, _ = super().reset(seed=seed, options=options)
        return messages, {}  # the vocabulary has no words for a schema

    def _answer(self, call: Any) -> dict[str, str]:
        message = super()._answer(call)
        # Words of the vocabulary, so that the model can read that a call has failed.
        return message | {"content": "error"} if message["content"].startswith("error") else message
