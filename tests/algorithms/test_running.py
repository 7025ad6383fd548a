"""Moments that run along equal those of all scores at once; averages of trees."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrlhf.algorithms import running

close = np.testing.assert_allclose
quick = hypothesis.settings(deadline=None, max_examples=25, derandomize=True)
update_moments = jax.jit(running.update_moments)
batches = st.lists(
    st.sampled_from([0, 1, 5]).flatmap(
        lambda n: st.lists(st.floats(-100, 100, width=32), min_size=n, max_size=n)
    ),
    max_size=5,
)


@quick
@hypothesis.given(batches)
def test_moments_equal_those_of_all_scores_at_once(batches):
    moments = running.init_moments()
    for batch in batches:
        moments = update_moments(moments, jnp.array(batch, jnp.float32))
    scores = [x for batch in batches for x in batch]
    mean = sum(scores) / max(len(scores), 1)
    squares = sum((x - mean) ** 2 for x in scores)
    assert moments.count == len(scores)
    close(moments.mean, mean, rtol=1e-4, atol=1e-4)
    close(moments.squares, squares, rtol=1e-4, atol=1e-2)
    if len(scores) > 1 and squares > 1:
        scale = math.sqrt(squares / (len(scores) - 1) + 1e-8)
        new = jnp.array([-3.0, 0.5])
        close(running.normalise(moments, new), [(x - mean) / scale for x in (-3.0, 0.5)], rtol=1e-3, atol=1e-3)


def test_moments_merge_in_any_order():
    parts = [np.random.default_rng(i).normal(i, 1 + i, 3 + i).astype(np.float32) for i in range(3)]
    a, b, c = (running.update_moments(running.init_moments(), jnp.array(x)) for x in parts)
    merge = running.merge_moments
    everything = running.update_moments(running.init_moments(), jnp.array(np.concatenate(parts)))
    for merged in (merge(merge(a, b), c), merge(c, merge(b, a)), merge(merge(a, running.init_moments()), merge(b, c))):
        jax.tree.map(lambda x, y: close(x, y, rtol=1e-5), merged, everything)


def test_the_spread_survives_a_large_mean():
    """In float32 the mean of squares minus the square of the mean would lose it all."""
    moments = running.init_moments()
    for _ in range(50):
        moments = update_moments(moments, jnp.array([9999.0, 10000.0, 10001.0, 10000.0]))
    close(moments.squares / 200, 0.5, rtol=1e-4)


def test_normalise_before_there_is_a_spread():
    scores = jnp.array([2.0, -1.0])
    nothing = running.init_moments()
    close(running.normalise(nothing, scores), scores)
    one = running.update_moments(nothing, jnp.array([1.5]))
    close(running.normalise(one, scores), [0.5, -2.5])
    for number in (0.1, 0.0, 12345.678):  # scores that were all equal have no scale: later ones are only shifted
        constant = running.update_moments(running.update_moments(nothing, jnp.full(9, number)), jnp.full(3, number))
        close(running.normalise(constant, jnp.array([number, number + 0.5])), [0, 0.5], atol=1e-3)


@quick
@hypothesis.given(st.sampled_from([4, 6]).flatmap(lambda n: st.lists(st.floats(-100, 100), min_size=n, max_size=n)))
def test_scores_by_their_own_moments_have_mean_0_and_deviation_1(scores):
    deviation = np.std(np.float32(scores), ddof=1)
    hypothesis.assume(deviation == 0 or deviation > 1e-2)
    found = running.normalise(running.update_moments(running.init_moments(), jnp.array(scores)), jnp.array(scores))
    close(np.mean(found), 0, atol=2e-3)
    close(np.std(found, ddof=1), 1 if deviation else 0, rtol=1e-3)


# ---------------------------------------------------------------- averages of weights


@quick
@hypothesis.given(st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.integers(0, 1000))
def test_ema_equals_plain_python_leaf_by_leaf(decay, seed):
    old, new = np.random.default_rng(seed).normal(size=(2, 2, 3)).astype(np.float32)
    found = running.ema({"a": {"b": old[0], "c": old[1]}}, {"a": {"b": new[0], "c": new[1]}}, decay)
    for i, leaf in enumerate("bc"):
        expected = [decay * float(x) + (1 - decay) * float(y) for x, y in zip(old[i], new[i])]
        close(found["a"][leaf], expected, rtol=1e-5, atol=1e-6)
    if decay == 1.0:
        np.testing.assert_array_equal(found["a"]["b"], old[0])


def test_ema_of_equal_trees_is_the_tree_and_types_stay():
    tree = {"x": jnp.array([0.1, 1e-20, 3e7]), "y": jnp.array([1.5], jnp.bfloat16)}
    found = jax.jit(running.ema)(tree, tree, 0.999)
    jax.tree.map(np.testing.assert_array_equal, found, tree)
    assert found["y"].dtype == jnp.bfloat16


def test_ema_of_a_constant_goes_there_geometrically():
    average = {"x": jnp.zeros(2)}
    step = jax.jit(running.ema)
    for _ in range(20):
        average = step(average, {"x": jnp.array([1.0, -4.0])}, 0.9)
    close(average["x"], (1 - 0.9**20) * np.array([1, -4]), rtol=1e-5)


def test_trees_of_another_structure_or_shape_are_refused():
    for other in ({"y": jnp.zeros(2)}, {"x": jnp.zeros(3)}, {"x": jnp.zeros(2), "y": jnp.zeros(2)}):
        with pytest.raises((AssertionError, ValueError)):
            running.ema({"x": jnp.zeros(2)}, other, 0.9)


@pytest.mark.parametrize("scores", [[3.0, -1.0, 2.5, 7.0], [2.0, 2.0], [4.0]])
def test_gain_and_bias_are_the_normalisation(scores):
    moments = running.update_moments(running.init_moments(), jnp.float32(scores))
    gain, bias = running.gain_and_bias(moments)
    others = jnp.float32([0.0, -5.0, 2.0, 10.0])
    close(gain * others + bias, running.normalise(moments, others), rtol=1e-5, atol=1e-6)
