"""Intervals against scipy's and against the formulas of a mean; differences are paired; rows without sums count 0."""

import time

import numpy as np
import pytest
from scipy.stats import bootstrap

from jaxrlhf.evaluation.bootstrap import Metrics, difference, intervals, mean
from jaxrlhf.evaluation.preference import win_rate, wins_by_judge, wins_by_score
from jaxrlhf.evaluation.probabilities import calibration, calibration_table, perplexity

RNG = np.random.default_rng(0)
SKEWED = RNG.exponential(size=200) ** 2


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_a_mean_has_scipys_interval(method):
    wanted = bootstrap((SKEWED,), np.mean, n_resamples=20_000, method=method, rng=1).confidence_interval
    found = intervals([mean("x", SKEWED)], 20_000, method=method)[0]["x"]
    width = wanted.high - wanted.low
    assert found.value == pytest.approx(SKEWED.mean())
    assert found.low == pytest.approx(wanted.low, abs=0.03 * width)
    assert found.high == pytest.approx(wanted.high, abs=0.03 * width)


def test_a_ratio_has_scipys_interval():
    losses, tokens = RNG.gamma(3.0, size=150), RNG.integers(1, 30, size=150)

    def value(a, b, axis):
        return np.exp(a.sum(axis) / b.sum(axis))

    options = {"n_resamples": 20_000, "paired": True, "rng": 1}
    wanted = bootstrap((losses, tokens), value, **options).confidence_interval
    found = intervals([perplexity(losses, tokens)], 20_000)[0]["perplexity"]
    assert found.low == pytest.approx(wanted.low, abs=0.02 * (wanted.high - wanted.low))
    assert found.high == pytest.approx(wanted.high, abs=0.02 * (wanted.high - wanted.low))


def test_a_difference_is_paired():
    noise = RNG.normal(size=400)
    first, second = mean("x", noise * 10), mean("x", noise * 10 + 1 + 0.1 * RNG.normal(size=400))
    own, of_difference = intervals([first, difference(second, first)])
    assert own["x"].high - own["x"].low > 1.5
    paired = of_difference["x"]
    assert 0.98 < paired.low < paired.value < paired.high < 1.02


def test_rows_that_do_not_count_change_no_estimate():
    values = RNG.normal(size=50)
    counted = np.arange(50) % 2 == 0
    assert mean("x", np.where(counted, values, np.nan), counted).estimates()["x"] == pytest.approx(
        values[counted].mean()
    )
    some = mean("x", values[counted]).of_some(np.flatnonzero(counted), 50)
    assert some.rows.shape[0] == 50 and some.estimates() == mean("x", values[counted]).estimates()
    assert np.isnan(mean("x", values, np.zeros(50, bool)).estimates()["x"])


def test_edges_have_an_interval_or_none():
    same = intervals([mean("x", np.ones(9))])[0]["x"]
    assert (same.value, same.low, same.high) == (1, 1, 1)
    one = intervals([mean("x", np.ones(1))])[0]["x"]
    assert one.value == 1 and np.isnan([one.low, one.high]).all()
    rare = intervals([mean("x", np.arange(9), np.arange(9) == 4)])[0]["x"]
    assert (rare.low, rare.high) == (4, 4)
    assert np.isnan(intervals([mean("x", np.ones(9), np.zeros(9, bool))])[0]["x"].low)


def test_the_same_seed_gives_the_same_interval_in_any_block(monkeypatch):
    metrics = [mean("x", SKEWED), mean("y", SKEWED**2)]
    whole = intervals(metrics, 500, seed=3)
    assert whole == intervals(metrics, 500, seed=3) != intervals(metrics, 500, seed=4)
    assert whole[1] == intervals(metrics[1:], 500, seed=3)[0], "draws do not depend on the other metrics"


def test_thousands_of_resamples_take_seconds():
    rows = RNG.poisson(1.0, size=(1000, 300)).astype(float)
    many = Metrics(tuple(map(str, range(300))), rows, lambda sums: sums / sums.sum(axis=-1, keepdims=True))
    began = time.perf_counter()
    intervals([many], 2000)
    assert time.perf_counter() - began < 10  # about 1 s on a free core


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_contain_the_true_value_in_95_of_100_samples(method):
    """A small version of benchmarks/interval_coverage.py; 600 samples have a standard error of 0.9%."""
    draws = np.random.default_rng(5)
    tokens = draws.geometric(0.05, size=2000)
    metrics = [
        mean("share", draws.random(2000) < 0.2),
        mean("skewed", draws.exponential(size=2000)),
        perplexity(draws.gamma(2.0, size=2000) * tokens, tokens),
    ]
    truth = {name: value for one in metrics for name, value in one.estimates().items()}
    hits = dict.fromkeys(truth, 0)
    for trial in range(600):
        numbers = draws.integers(2000, size=300)
        samples = [Metrics(one.names, one.rows[numbers], one.value) for one in metrics]
        for found in intervals(samples, 300, method=method, seed=trial):
            for name, bounds in found.items():
                hits[name] += bounds.low <= truth[name] <= bounds.high
    assert {name: 0.92 < count / 600 < 0.975 for name, count in hits.items()} == dict.fromkeys(truth, True), hits


def test_win_rates():
    wins = wins_by_score(np.array([1.0, 2.0, 3.0, 0.0]), np.array([1.0, 1.0, 4.0, -1.0]))
    assert wins.tolist() == [0.5, 1.0, 0.0, 1.0]
    found = win_rate(wins, [5, 9, 9, 3], [5, 2, 1, 4]).estimates()
    assert found == {"win_rate": 0.625, "ties": 0.25, "longer_wins": pytest.approx(1 / 3)}


def test_a_judge_with_a_favourite_place_decides_nothing():
    first = np.zeros(6)
    wins, agreed = wins_by_judge(first, first)
    assert (wins == 0.5).all() and not agreed.any()
    wins, agreed = wins_by_judge(np.array([0, 1, 0, -1]), np.array([1, 0, np.nan, -1]))
    assert wins.tolist() == [1.0, 0.0, 0.75, 0.5] and agreed.tolist() == [True, True, False, True]
    assert win_rate(wins, [1] * 4, [1] * 4, agreed).estimates()["order_agreement"] == 0.75


def test_calibration_of_known_bins():
    confidence = np.array([0.55, 0.55, 0.95, 0.95, 0.95, 0.95])
    right = np.array([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    found = calibration(confidence, right).estimates()
    assert found["calibration_error"] == pytest.approx(2 / 6 * 0.05 + 4 / 6 * 0.2)
    assert found["brier"] == pytest.approx(np.mean((confidence - right) ** 2))
    assert calibration_table(confidence, right) == [
        {"confidence": pytest.approx(0.55), "accuracy": 0.5, "pairs": 2},
        {"confidence": pytest.approx(0.95), "accuracy": 0.75, "pairs": 4},
    ]
