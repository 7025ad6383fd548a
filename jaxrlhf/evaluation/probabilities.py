"""Perplexity of held-out text, and calibration, which measures how good the probabilities of a model are."""

import numpy as np

from jaxrlhf.evaluation.bootstrap import Metrics, ratio


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = 10, lowest: float = 0.5) -> Metrics:
    """Returns the expected calibration error and the Brier score of N predictions.

    Rows are sorted by confidence into bins of equal width from `lowest` to 1. The error is the mean over rows of
    |accuracy - confidence| of the row's bin (Guo et al. 2017). For a preference pair with score difference d, the
    confidence is sigmoid(|d|). Its prediction is right (1) if d > 0, wrong (0) if d < 0, and 0.5 if d = 0.
    """
    of_row = np.stack([confidence, right, np.ones(len(right))], axis=1)
    in_bin = np.eye(bins)[_bins(confidence, bins, lowest)]
    of_bins = (in_bin[:, :, None] * of_row[:, None]).reshape(-1, 3 * bins)
    rows = np.concatenate([of_bins, (confidence - right)[:, None] ** 2], axis=1)

    def value(sums: np.ndarray) -> np.ndarray:
        of_bins = sums[..., :-1].reshape(*sums.shape[:-1], bins, 3)
        count = of_bins[..., 2].sum(axis=-1)
        error = np.abs(of_bins[..., 0] - of_bins[..., 1]).sum(axis=-1)
        return np.stack([ratio(error, count, np.nan), ratio(sums[..., -1], count, np.nan)], axis=-1)

    return Metrics(("calibration_error", "brier"), rows, value)


def calibration_table(
    confidence: np.ndarray, right: np.ndarray, bins: int = 10, lowest: float = 0.5
) -> list[dict[str, float]]:
    """Returns mean confidence, accuracy and number of pairs of each bin that has pairs, for a reliability diagram."""
    number = _bins(confidence, bins, lowest)
    return [
        {"confidence": float(confidence[own].mean()), "accuracy": float(right[own].mean()), "pairs": int(own.sum())}
        for own in (number == b for b in range(bins))
        if own.any()
    ]


def _bins(confidence: np.ndarray, bins: int, lowest: float) -> np.ndarray:
    return np.clip(((confidence - lowest) / (1 - lowest) * bins).astype(np.int64), 0, bins - 1)


def perplexity(losses: np.ndarray, tokens: np.ndarray) -> Metrics:
    """Returns the loss in nats per token and the perplexity exp(loss), from each row's loss and number of tokens."""
    rows = np.stack([np.asarray(losses, np.float64), np.asarray(tokens, np.float64)], axis=1)

    def value(sums: np.ndarray) -> np.ndarray:
        loss = ratio(sums[..., 0], sums[..., 1], np.nan)
        with np.errstate(over="ignore"):
            return np.stack([loss, np.exp(loss)], axis=-1)

    return Metrics(("loss", "perplexity"), rows, value)
