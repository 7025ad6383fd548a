"""Number guessing: find a number by guesses that are answered with higher or lower. The best success is 1.

Bisection finds a number of 1 to N in floor(log2 N) + 1 guesses at most. A quarter of the demonstrations bisect. The
others are stubborn: they repeat their first guess, so few of them succeed.
"""

from typing import Any

from jaxrlhf.toy.games.game import Game, demonstrations
from jaxrlhf.toy.tasks.task import Random

LARGEST = 100
BISECT = 0.25  # share of the demonstrations
SAID = ("higher", "lower", "right", "say a number")


class NumberGuessing(Game):
    """An environment: guess a number of 1 to `numbers` (at most 100) in `guesses` guesses. The reward of success is 1.

    An action is a number. Any other action is a lost guess.
    """

    def __init__(self, numbers: int = 30, guesses: int = 6) -> None:
        if not (1 <= numbers <= LARGEST and guesses >= 1):
            raise ValueError(f"numbers must be 1 to {LARGEST} and guesses at least 1, not {numbers} and {guesses}")
        self.numbers, self.guesses = numbers, guesses

    def start(self, options: dict[str, Any]) -> str:
        self.secret, self.left = 1 + int(self.random.integers(self.numbers)), self.guesses
        self.last: int | None = None
        self.low, self.high = 1, self.numbers  # what a player who listens knows
        return f"guess a number from 1 to {self.numbers}"

    def play(self, action: str) -> tuple[str, tuple[float, bool] | None]:
        self.left -= 1
        guess = int(action) if action.isascii() and action.isdigit() and len(action) <= 4 else None
        self.last = guess if guess is not None else self.last
        if guess == self.secret:
            return "right", (1.0, True)
        lost = None if self.left else (0.0, False)
        if guess is None:
            return "say a number", lost
        if guess < self.secret:
            self.low = max(self.low, guess + 1)
            return "higher", lost
        self.high = min(self.high, guess - 1)
        return "lower", lost


def best_action(env: NumberGuessing) -> str:
    """Returns the guess of bisection."""
    return str((env.low + env.high) // 2)


def stubborn_action(env: NumberGuessing, rng: Random) -> str:
    """Returns the first guess again, whatever was said; the first guess is random."""
    return str(1 + int(rng.integers(env.numbers)) if env.last is None else env.last)


TASK = demonstrations(
    NumberGuessing,
    {lambda env, rng: best_action(env): BISECT, stubborn_action: 1 - BISECT},
    ("guess a number from to", *SAID, *(str(n) for n in range(1, LARGEST + 1))),
    {"train": 2000, "validation": 200, "test": 500},
)
