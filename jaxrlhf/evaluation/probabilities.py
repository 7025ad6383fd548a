"""Perplexity of held-out text, and calibration, which measures how good the probabilities of a model are."""

import numpy as np

from jaxrlhf.evaluation.bootstrap import Metrics, mean, ratio

TEMPERATURES = 1e-2, 1e2  # range of the fitted temperature


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


def label_probabilities(logprobs: np.ndarray, labels: np.ndarray) -> list[Metrics]:
    """Returns log loss, Brier score and calibration error of N predictions of one of C labels.

    The Brier score is the sum over labels of (probability - 1 if it is the right label, else 0)^2, from 0 to 2 (Brier
    1950). The calibration error is that of the most probable label, in ten bins from 0 to 1 (Guo et al. 2017).

    Args:
      logprobs: f64[N,C]; the probabilities need not add up to 1, because they are renormalised.
      labels: i64[N]; the right label.
    """
    probabilities = softmax(logprobs)
    loss = _log_sum(logprobs) - logprobs[np.arange(len(labels)), labels]
    wanted = np.eye(logprobs.shape[1])[labels]
    right = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    error = calibration(probabilities.max(axis=1), right, lowest=0.0)
    only_error = Metrics(error.names[:1], error.rows, lambda sums: error.value(sums)[..., :1])
    return [mean("log_loss", loss), mean("brier", ((probabilities - wanted) ** 2).sum(axis=1)), only_error]


def fit_temperature(logprobs: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature T with the least log loss of softmax(logprobs / T).

    This is temperature scaling (Guo et al. 2017). The log loss is convex in 1 / T, so its slope has one zero, which
    bisection finds. T is limited to the range `TEMPERATURES`.

    Args:
      logprobs: f64[N,C].
      labels: i64[N]; the right label.
    """
    right = logprobs[np.arange(len(labels)), labels]
    low, high = (np.log(1 / bound) for bound in reversed(TEMPERATURES))
    for _ in range(60):
        middle = (low + high) / 2
        rises = np.mean((softmax(logprobs * np.exp(middle)) * logprobs).sum(axis=1) - right) > 0
        low, high = (low, middle) if rises else (middle, high)
    return float(np.exp(-(low + high) / 2))


def at_limit(temperature: float) -> bool:
    """Whether a fitted temperature is at a limit of `TEMPERATURES`, so that the data do not decide it."""
    return not TEMPERATURES[0] * 1.01 < temperature < TEMPERATURES[1] / 1.01


def softmax(logprobs: np.ndarray) -> np.ndarray:
    """Returns probabilities f64[...,C] that add up to 1."""
    return np.exp(logprobs - _log_sum(logprobs)[..., None])


def _log_sum(logprobs: np.ndarray) -> np.ndarray:
    peak = logprobs.max(axis=-1)
    return peak + np.log(np.exp(logprobs - peak[..., None]).sum(axis=-1))


def perplexity(losses: np.ndarray, tokens: np.ndarray) -> Metrics:
    """Returns the loss in nats per token and the perplexity exp(loss), from each row's loss and number of tokens."""
    rows = np.stack([np.asarray(losses, np.float64), np.asarray(tokens, np.float64)], axis=1)

    def value(sums: np.ndarray) -> np.ndarray:
        loss = ratio(sums[..., 0], sums[..., 1], np.nan)
        with np.errstate(over="ignore"):
            return np.stack([loss, np.exp(loss)], axis=-1)

    return Metrics(("loss", "perplexity"), rows, value)
