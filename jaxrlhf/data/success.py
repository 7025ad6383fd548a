"""A curriculum by the policy's own success: prompts that the policy solves sometimes are drawn most often.

A prompt that the policy always solves, or never solves, gives equal scores, and so no gradient. The probability of a
draw is in proportion to the learnability p (1 - p), where p is the probability that a completion solves the prompt
(2304.12877; 2408.15099; for language models 2502.12272). This is the variance of a score that is 0 or 1.
"""

from typing import Any

import numpy as np

from jaxrlhf.data.order import epoch_order

_STREAM = 90  # stream of the random numbers of a draw, see `epoch_order`


class Success:
    """Discounted counts of the completions of each prompt, and the draws that depend on them.

    p is estimated as (solved + 1/2) / (tried + 1), the mean of a Beta distribution with Jeffreys' prior. A prompt that
    was never drawn has p = 1/2, and so the largest weight. No prompt has weight 0, so each is tried again.
    """

    def __init__(self, count: int, solved_at: float, decay: float):
        """`count` is the number of prompts. A completion solves its prompt if its score is at least `solved_at`.

        At each draw of a prompt, `decay` multiplies its earlier counts, because the policy changes.
        """
        self.solved_at, self.decay = solved_at, decay
        self.solved, self.tried = np.zeros(count), np.zeros(count)  # f64[N]

    def estimates(self) -> np.ndarray:
        """Returns the estimated probability of success of each prompt, f64[N]."""
        return (self.solved + 0.5) / (self.tried + 1)

    def choose(self, seed: int, draw: int, batch_size: int) -> np.ndarray:
        """Returns the prompt numbers, i64[batch_size], of a draw. They are distinct if there are enough prompts.

        The draw is weighted and without replacement: it takes the prompts with the smallest E / weight, where each E
        is drawn from an exponential distribution (Efraimidis and Spirakis 2006). It depends only on `seed`, `draw` and
        the counts.
        """
        success, count = self.estimates(), len(self.tried)
        uniform = (1 + np.argsort(epoch_order(seed, draw, count, stream=_STREAM))) / (count + 1)
        order = np.argsort(-np.log(uniform) / (success * (1 - success)), kind="stable")
        return np.resize(order, batch_size)

    def observe(self, rows: np.ndarray, scores: np.ndarray) -> None:
        """Counts the completions of a draw: prompt numbers i64[B], scores f32[B * k] with k adjacent per prompt."""
        solved = (scores.reshape(len(rows), -1) >= self.solved_at).astype(np.float64)
        drawn = np.unique(rows)
        for counts, new in ((self.solved, solved.sum(1)), (self.tried, np.full(len(rows), solved.shape[1], float))):
            counts[drawn] *= self.decay
            np.add.at(counts, rows, new)

    def metrics(self) -> dict[str, float]:
        """Returns the share of prompts that were drawn, and of those the mean success and the share partly solved."""
        seen, success = self.tried > 0, self.estimates()
        partly = (success > 0.1) & (success < 0.9)
        return {
            "curriculum/seen": float(seen.mean()),
            "curriculum/success": float(success[seen].mean()) if seen.any() else 0.0,
            "curriculum/partly_solved": float(partly[seen].mean()) if seen.any() else 0.0,
        }

    def notes(self, draw: int) -> dict[str, Any]:
        """Returns the counts of the prompts that were drawn, for a checkpoint, as JSON values."""
        seen = np.flatnonzero(self.tried)
        return {"rows": seen.tolist(), "solved": self.solved[seen].tolist(), "tried": self.tried[seen].tolist()}

    def resume(self, notes: dict[str, Any]) -> None:
        """Continues with the counts of a checkpoint."""
        rows = np.array(notes["rows"], np.int64)
        self.solved[:], self.tried[:] = 0, 0
        self.solved[rows], self.tried[rows] = notes["solved"], notes["tried"]
