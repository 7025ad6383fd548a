"""Win rates of one model against another, by scores or by a judge."""

from collections.abc import Sequence

import numpy as np

from jaxrlhf.evaluation.bootstrap import Metrics, ratio


def wins_by_score(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Wins f64[N] of scores [N] against the other model's: 1, 0, and 0.5 for a tie."""
    return np.where(scores == others, 0.5, (scores > others).astype(np.float64))


def wins_by_judge(forward: np.ndarray, backward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(wins f64[N] of the model, whether both orders agree bool[N]) of a judge's choices in both orders.

    `forward` [N] has the choice among (model, other), `backward` [N] that among (other, model): 0 is the first, 1 the
    second, and any other value is a tie. A win is the mean of both orders, so a judge that always prefers one place
    gives 0.5.
    """
    first = np.select([forward == 0, forward == 1], [1.0, 0.0], 0.5)
    second = np.select([backward == 1, backward == 0], [1.0, 0.0], 0.5)
    return (first + second) / 2, first == second


def win_rate(
    wins: np.ndarray, lengths: Sequence[int], others: Sequence[int], agreed: np.ndarray | None = None
) -> Metrics:
    """Win rate (ties count half), share of ties, and how often the longer answer won.

    Args:
      wins: f64[N]; 1, 0, 0.5 for a tie, or 0.75 and 0.25 where a judge was undecided in one order.
      lengths, others: tokens of the model's and of the other's answers, N each.
      agreed: bool[N]; whether a judge chose the same answer in both orders; gives the metric `order_agreement`.

    `longer_wins` is a share of the rows that have a winner and answers of different lengths: far from 0.5, the judge or
    reward may prefer length itself.
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
