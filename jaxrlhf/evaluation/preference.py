"""Win rates of one model against another. Scores or a judge decide which answer wins."""

from collections.abc import Sequence

import numpy as np

from jaxrlhf.evaluation.bootstrap import Metrics, ratio


def wins_by_score(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns wins f64[N] of a model's scores [N] over the other model's scores: 1 for a win, 0.5 for a tie, else 0."""
    return np.where(scores == others, 0.5, (scores > others).astype(np.float64))


def wins_by_judge(forward: np.ndarray, backward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (wins f64[N] of the model, whether both orders agree bool[N]), from a judge's choices in both orders.

    `forward` [N] is the choice from (model, other), and `backward` [N] is the choice from (other, model). A choice is 0
    for the first, 1 for the second, and any other value for a tie. A win is the mean over both orders, so a judge that
    always prefers the first gives 0.5.
    """
    first = np.select([forward == 0, forward == 1], [1.0, 0.0], 0.5)
    second = np.select([backward == 1, backward == 0], [1.0, 0.0], 0.5)
    return (first + second) / 2, first == second


def win_rate(
    wins: np.ndarray, lengths: Sequence[int], others: Sequence[int], agreed: np.ndarray | None = None
) -> Metrics:
    """Returns the win rate (ties count half), the share of ties, and how often the longer answer won.

    Args:
      wins: f64[N]; 1, 0, 0.5 for a tie, or 0.75 and 0.25 if a judge was undecided in one order.
      lengths, others: [N]; numbers of tokens of the model's answers, and of the other model's answers.
      agreed: bool[N]; whether a judge chose the same answer in both orders, for the metric `order_agreement`.

    `longer_wins` is a share of the rows with a winner and answers of different lengths. If this share is far from 0.5,
    the judge or reward may prefer length itself.
    """
    longer = np.sign(np.asarray(lengths) - np.asarray(others))
    decided = (wins != 0.5) & (longer != 0)
    columns = [wins, wins == 0.5, decided & ((wins > 0.5) == (longer > 0))]
    columns += [np.ones(len(wins)) if agreed is None else agreed, decided, np.ones(len(wins))]
    rows = np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
    names = ("win_rate", "ties", "longer_wins", *(() if agreed is None else ("order_agreement",)))

    def value(sums: np.ndarray) -> np.ndarray:
        counts = sums[..., [5, 5, 4, 5]]
        return ratio(sums[..., :4], counts, np.nan)[..., : len(names)]

    return Metrics(names, rows, value)
