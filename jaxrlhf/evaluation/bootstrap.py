"""Metrics as functions of sums over rows, and bootstrap confidence intervals of these metrics.

Shapes: N rows, K sums, M metrics, R resamples. A resample draws N rows with replacement. Metrics depend only on sums
over the rows, such as counts of a confusion matrix, n-gram counts or summed losses. One matrix product of the draw
counts [R,N] with the rows [N,K] therefore gives the sums of all resamples, and no text is read again. Metrics of the
same rows use the same draws, so the interval of a difference is paired.
"""

import dataclasses
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

BLOCK = 2**22  # largest number of draws in memory
NORMAL = NormalDist()


@dataclasses.dataclass(frozen=True)
class Metrics:
    """M metrics of N rows. A row whose sums are all 0 does not affect any metric."""

    names: tuple[str, ...]  # M
    rows: np.ndarray  # f64[N,K]
    value: Callable[[np.ndarray], np.ndarray]  # sums f64[...,K] -> metrics f64[...,M]; NaN if undefined

    def estimates(self) -> dict[str, float]:
        """Returns the value of each metric over all rows."""
        return dict(zip(self.names, self.value(self.rows.sum(axis=0)).tolist()))

    def named(self, prefix: str) -> "Metrics":
        """Returns the same metrics with names PREFIX/NAME."""
        return dataclasses.replace(self, names=tuple(f"{prefix}/{name}" for name in self.names))

    def of_some(self, numbers: np.ndarray, count: int) -> "Metrics":
        """Returns the same metrics with `count` rows.

        The N rows of these metrics become the rows `numbers` i64[N]. In all other rows the sums are 0.
        """
        rows = np.zeros((count, self.rows.shape[1]))
        rows[numbers] = self.rows
        return dataclasses.replace(self, rows=rows)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A metric with the bounds of its confidence interval. Undefined numbers are NaN."""

    value: float
    low: float
    high: float


def mean(name: str, values: np.ndarray, counted: np.ndarray | None = None) -> Metrics:
    """Returns a metric: the mean of values [N] over the rows that `counted` bool[N] selects. NaN if there are none."""
    counted = np.ones(len(values)) if counted is None else np.asarray(counted, np.float64)
    rows = np.stack([np.where(counted, np.asarray(values, np.float64), 0.0), counted], axis=1)
    return Metrics((name,), rows, lambda sums: ratio(sums[..., :1], sums[..., 1:], np.nan))


def ratio(a: np.ndarray, b: np.ndarray, undefined: float = 0.0) -> np.ndarray:
    """Returns a / b. If b is 0, the result is `undefined`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b == 0, undefined, a / b)


def difference(second: Metrics, first: Metrics) -> Metrics:
    """Returns second - first, for the metrics that both have. Both must be measured on the same rows."""
    names = tuple(name for name in second.names if name in first.names)
    places = [[one.names.index(name) for name in names] for one in (second, first)]
    K = second.rows.shape[1]

    def value(sums: np.ndarray) -> np.ndarray:
        return second.value(sums[..., :K])[..., places[0]] - first.value(sums[..., K:])[..., places[1]]

    return Metrics(names, np.concatenate([second.rows, first.rows], axis=1), value)


def intervals(
    metrics: Sequence[Metrics],
    resamples: int = 2000,
    confidence: float = 0.95,
    method: str = "bca",
    seed: int = 0,
) -> list[dict[str, Interval]]:
    """Returns a confidence interval of each metric, by name. All metrics must be measured on the same N rows.

    The method percentile takes the quantiles of the resampled metric. The method bca is bias-corrected and accelerated
    (Efron 1987, "Better Bootstrap Confidence Intervals"), with the jackknife's acceleration. The error of the coverage
    is of order 1/sqrt(N) for percentile and 1/N for bca. With fewer than two rows the bounds are NaN.
    """
    rows = np.concatenate([one.rows for one in metrics], axis=1)
    sums = _resampled_sums(rows, resamples, seed)
    found, start = [], 0
    for one in metrics:
        end = start + one.rows.shape[1]
        total = one.rows.sum(axis=0)
        values, resampled = one.value(total), one.value(sums[:, start:end])
        levels = np.full((len(one.names), 2), [(1 - confidence) / 2, (1 + confidence) / 2])
        if method == "bca" and len(rows) > 1:
            levels = _bca_levels(levels[0], values, resampled, one.value(total - one.rows))
        bounds = [_quantiles(resampled[:, m], levels[m]) if len(rows) > 1 else [np.nan] * 2 for m in range(len(levels))]
        found.append({n: Interval(float(v), *map(float, b)) for n, v, b in zip(one.names, values, bounds)})
        start = end
    return found


def _resampled_sums(rows: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Returns the sums f64[R,K] of R resamples of the rows f64[N,K]."""
    N, random = len(rows), np.random.default_rng(seed)
    blocks = []
    for start in range(0, resamples, size := max(1, BLOCK // max(N, 1))):
        count = min(size, resamples - start)
        drawn = random.integers(N, size=(count, N)) + np.arange(count)[:, None] * N
        blocks.append(np.bincount(drawn.ravel(), minlength=count * N).reshape(count, N).astype(np.float64) @ rows)
    return np.concatenate(blocks)


def _bca_levels(levels: np.ndarray, values: np.ndarray, resampled: np.ndarray, jackknife: np.ndarray) -> np.ndarray:
    """Returns the quantile levels f64[M,2] of BCa intervals, from the levels f64[2] of percentile intervals.

    `values` f64[M] are the metrics of all rows, `resampled` f64[R,M] the metrics of the resamples, and `jackknife`
    f64[N,M] the metrics of all rows but one.
    """
    below = np.mean((resampled < values) + 0.5 * (resampled == values), axis=0)
    below = np.clip(below, 0.5 / len(resampled), 1 - 0.5 / len(resampled))
    average = ratio(np.nansum(jackknife, axis=0), (~np.isnan(jackknife)).sum(axis=0))
    deviation = np.nan_to_num(average - jackknife)
    acceleration = ratio((deviation**3).sum(axis=0), 6 * (deviation**2).sum(axis=0) ** 1.5)

    def adjusted(share: float, a: float, level: float) -> float:
        bias = NORMAL.inv_cdf(share)
        z = bias + NORMAL.inv_cdf(level)
        return NORMAL.cdf(bias + z / (1 - a * z)) if a * z < 1 else float(level > 0.5)

    shares = zip(below.tolist(), acceleration.tolist())
    return np.array([[adjusted(share, a, level) for level in levels] for share, a in shares])


def _quantiles(resampled: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Returns quantiles [2] of a resampled metric [R], over the resamples in which the metric is defined."""
    defined = resampled[~np.isnan(resampled)]
    return np.quantile(defined, levels) if len(defined) else np.array([np.nan, np.nan])
