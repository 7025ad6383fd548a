"""Masked reductions against numpy, by hand, and as relations."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrlhf.algorithms import masked

close = np.testing.assert_allclose

# Compiled once per shape: faster than operation by operation.
explained_variance = jax.jit(masked.explained_variance)
masked_sum = jax.jit(masked.masked_sum, static_argnames="axis")
masked_mean = jax.jit(masked.masked_mean, static_argnames="axis")
masked_variance = jax.jit(masked.masked_variance, static_argnames="unbiased")
whiten = jax.jit(masked.whiten, static_argnames="shift_mean")
aggregate = jax.jit(masked.aggregate, static_argnames="how")


@st.composite
def masked_arrays(draw, arrays=1):
    """[B,R] arrays and a mask of answers, of which some are empty and some fill their row."""
    rows, length = draw(st.sampled_from([(1, 1), (3, 5), (4, 2)]))
    lengths = draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    mask = np.arange(length) < np.array(lengths)[:, None]
    return (*(generator.normal(2.0, 3.0, (rows, length)).astype(np.float32) for _ in range(arrays)), mask)


quick = hypothesis.settings(deadline=None, max_examples=25, derandomize=True)


@quick
@hypothesis.given(masked_arrays())
def test_sum_mean_and_variance_equal_numpy(case):
    x, mask = case
    real = x[mask].astype(np.float64)
    close(masked_sum(x, mask), real.sum(), rtol=1e-5, atol=1e-5)
    close(masked_mean(x, mask), real.mean() if real.size else 0, rtol=1e-5, atol=1e-5)
    close(masked_variance(x, mask, unbiased=False), real.var() if real.size else 0, rtol=1e-4, atol=1e-5)
    unbiased = real.var(ddof=1) if real.size > 1 else 0
    close(masked_variance(x, mask), unbiased, rtol=1e-4, atol=1e-5)
    by_row = [row[m].mean() if m.any() else 0 for row, m in zip(x, mask, strict=True)]
    close(masked_mean(x, mask, axis=-1), by_row, rtol=1e-5, atol=1e-5)


@quick
@hypothesis.given(masked_arrays())
def test_whitened_has_mean_0_and_deviation_1(case):
    x, mask = case
    white = np.array(whiten(x, mask))
    assert (white[~mask] == 0).all()
    if mask.sum() > 1:
        close(white[mask].mean(), 0, atol=1e-5)
        close(white[mask].std(ddof=1), 1, rtol=1e-4)
    kept = np.array(whiten(x, mask, shift_mean=False))
    assert (kept[~mask] == 0).all()
    mean = x[mask].mean() if mask.any() else 0
    close(kept[mask], white[mask] + mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("constant", [7.3, 37.7, 1000.1, -0.1, 1e-30, 1e30, 0.0])
@pytest.mark.parametrize("rounding", [False, True])
def test_equal_values_whiten_to_exactly_0(constant, rounding):
    """A sum of 57,000 equal numbers rounds: their float32 mean lies beside them. Numbers that differ by the last digit
    or two, as sums in another order do, count as equal: divided by their deviation they would be noise of size 1."""
    generator = np.random.default_rng(0)
    mask = generator.random((256, 320)) < 0.7
    x = np.full(mask.shape, constant, np.float32)
    if rounding:
        x = x * (1 + generator.integers(-2, 3, mask.shape) * np.finfo(np.float32).eps).astype(np.float32)
    x = jnp.asarray(np.where(mask, x, 1e9))
    assert (whiten(x, mask) == 0).all()
    assert masked_variance(x, mask) == 0
    close(np.asarray(whiten(x, mask, shift_mean=False))[mask], constant, rtol=1e-6)
    assert explained_variance(jnp.zeros(mask.shape), x, mask) == 0


@pytest.mark.parametrize("offset", [0.0, 7.3, 1000.1, -30000.0])
@pytest.mark.parametrize("deviation", [0.05, 1.0, 30.0])
def test_whiten_beside_a_large_mean_equals_float64(offset, deviation):
    generator = np.random.default_rng(1)
    mask = generator.random((256, 320)) < 0.7
    x = generator.normal(offset, deviation, mask.shape).astype(np.float32)
    real = x[mask].astype(np.float64)
    expected = np.where(mask, (x.astype(np.float64) - real.mean()) / real.std(ddof=1), 0)
    close(whiten(x, mask), expected, rtol=1e-4, atol=1e-4)
    close(masked_variance(x, mask), real.var(ddof=1), rtol=1e-4)


def test_whiten_by_hand():
    x, mask = jnp.array([[1.0, 3.0, 99.0]]), jnp.array([[True, True, False]])
    root = np.sqrt(2.0)  # the unbiased variance of 1 and 3 is 2
    close(whiten(x, mask), [[-1 / root, 1 / root, 0]], rtol=1e-6)
    close(whiten(x, mask, shift_mean=False), [[2 - 1 / root, 2 + 1 / root, 0]], rtol=1e-6)
    close(whiten(x, mask, epsilon=2.0), [[-0.5, 0.5, 0]], rtol=1e-6)


def test_garbage_past_the_mask_reaches_no_value_and_no_gradient():
    mask = jnp.array([[True, True, False], [True, False, False], [False, False, False]])
    clean = jnp.where(mask, jnp.array([[1.0, 2.5, 0], [-3.0, 0, 0], [0, 0, 0]]), 0)
    functions = {
        "sum": lambda x: masked.masked_sum(x, mask),
        "mean": lambda x: masked.masked_mean(x, mask),
        "row means": lambda x: masked.masked_mean(x, mask, axis=-1).sum(),
        "variance": lambda x: masked.masked_variance(x, mask),
        "whiten": lambda x: (masked.whiten(x, mask) * jnp.arange(9.0).reshape(3, 3)).sum(),
        "values": lambda x: masked.explained_variance(x, 2 * clean, mask),
        "returns": lambda x: masked.explained_variance(clean, x, mask),
        **{how: lambda x, how=how: masked.aggregate(x, mask, how, 3, 3) for how in masked.AGGREGATIONS},
    }
    for name, function in functions.items():
        # Not jitted: XLA rewrites x * mask as a selection, which would hide a product of NaN and 0.
        with_gradient = jax.value_and_grad(function)
        expected, expected_gradient = with_gradient(clean)
        for garbage in (np.nan, np.inf, -np.inf, 1e38):
            value, gradient = with_gradient(jnp.where(mask, clean, garbage))
            np.testing.assert_array_equal(value, expected, err_msg=name)
            np.testing.assert_array_equal(gradient, expected_gradient, err_msg=name)
            assert np.isfinite(gradient).all() and (np.array(gradient)[~mask] == 0).all(), name


def test_everything_is_0_for_an_empty_mask():
    x, mask = jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)
    assert masked_mean(x, mask) == masked_variance(x, mask) == 0
    assert explained_variance(x, x, mask) == 0
    assert (whiten(x, mask) == 0).all()
    for how in masked.AGGREGATIONS:
        assert aggregate(x, mask, how, 0, 0) == 0


def test_half_precision_is_reduced_in_float32():
    x, mask = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((1, 4096), bool)
    for found in (masked_sum(x, mask), aggregate(x, mask, "token", 1, 1)):
        assert found.dtype == jnp.float32
        assert found == 4096


def test_a_mask_of_another_shape_or_type_is_refused():
    with pytest.raises(AssertionError):
        masked_mean(jnp.ones(3), jnp.ones((3, 3), bool))
    with pytest.raises(AssertionError):
        masked_mean(jnp.ones(3), jnp.ones(3))


# ---------------------------------------------------------------- explained variance


def test_explained_variance_by_hand():
    returns = jnp.array([[1.0, 2.0, 3.0, 50.0]])
    mask = jnp.array([[True, True, True, False]])
    ev = masked.explained_variance
    close(ev(returns, returns, mask), 1)
    close(ev(returns + 7, returns, mask), 1, rtol=1e-6)  # a bias is not variance
    close(ev(jnp.zeros((1, 4)), returns, mask), 0, atol=1e-6)
    close(ev(-returns, returns, mask), -3, rtol=1e-6)  # Var(2 r) = 4 Var(r)
    close(ev(returns / 2, returns, mask), 0.75, rtol=1e-6)


def test_explained_variance_of_constant_returns_is_0():
    """0.1 summed 33 times in float32 is not 3.3: the variance of a constant is not exactly 0."""
    values = jnp.linspace(0, 1, 33)[None]
    for constant in (0.0, 0.1, 1e7, 1e-30):
        assert explained_variance(values, jnp.full((1, 33), constant), jnp.ones((1, 33), bool)) == 0


@quick
@hypothesis.given(masked_arrays(arrays=2))
def test_explained_variance_equals_numpy(case):
    values, returns, mask = case
    if mask.sum() < 2:
        assert explained_variance(values, returns, mask) == 0
    else:
        expected = 1 - np.var((returns - values)[mask]) / np.var(returns[mask])
        close(explained_variance(values, returns, mask), expected, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- aggregation


def test_aggregate_by_hand():
    loss = jnp.array([[1.0, 2.0, 6.0, 99.0], [5.0, 99.0, 99.0, 99.0], [99.0, 99.0, 99.0, 99.0]])
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    close(aggregate(loss, mask, "token", 4, 3), 14 / 4)
    close(aggregate(loss, mask, "sequence", 4, 3), (3 + 5) / 3, rtol=1e-6)
    close(aggregate(loss, mask, "constant", 4, 3), 14 / (3 * 4), rtol=1e-6)
    with pytest.raises(KeyError):
        aggregate(loss, mask, "mean", 4, 3)


@functools.partial(jax.jit, static_argnames=("how", "cut"))
def in_two_microbatches(x, mask, how, cut):
    """Value and gradient of a minibatch's loss, from its rows before and after `cut`."""

    def loss(x):
        parts = [part for part in (slice(0, cut), slice(cut, None)) if len(x[part])]
        totals = (mask.sum(), len(mask))
        return sum(masked.aggregate(jnp.square(x[part]), mask[part], how, *totals) for part in parts)

    return jax.value_and_grad(loss)(x)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@quick
@hypothesis.given(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.integers(1, 4))
def test_microbatches_sum_to_the_whole_in_value_and_gradient(how, lengths, cut):
    x = np.random.default_rng(sum(lengths)).normal(2.0, 3.0, (4, 3)).astype(np.float32)
    mask = np.arange(3) < np.array(lengths)[:, None]
    expected, expected_gradient = in_two_microbatches(x, mask, how, 0)
    found, gradient = in_two_microbatches(x, mask, how, cut)
    close(found, expected, rtol=1e-6, atol=1e-6)
    close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)
    real = np.square(x.astype(np.float64)) * mask
    reference = {
        "token": real.sum() / max(sum(lengths), 1),
        "sequence": (real.sum(axis=1) / np.maximum(lengths, 1)).sum() / 4,
        "constant": real.sum() / 12,
    }
    close(found, reference[how], rtol=1e-5, atol=1e-5)


def test_the_three_aggregations_differ_where_lengths_do():
    loss, mask = jnp.array([[1.0, 1.0, 1.0], [4.0, 9.0, 9.0]]), jnp.array([[1, 1, 1], [1, 0, 0]], bool)
    found = [float(aggregate(loss, mask, how, 4, 2)) for how in ("token", "sequence", "constant")]
    close(found, [7 / 4, 5 / 2, 7 / 6], rtol=1e-6)


def test_totals_may_be_traced():
    loss, mask = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    for how in masked.AGGREGATIONS:
        jitted = jax.jit(masked.aggregate, static_argnames="how")
        close(jitted(loss, mask, how=how, total_tokens=6, total_rows=2), 1, rtol=1e-6)
