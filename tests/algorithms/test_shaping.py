"""Scores before they are rewards, against plain Python and by hand."""

import math

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrlhf.algorithms import shaping

close = np.testing.assert_allclose
quick = hypothesis.settings(deadline=None, max_examples=25, derandomize=True)
# Few sizes: each is compiled once.
scores_lists = st.sampled_from([1, 4, 6]).flatmap(
    lambda n: st.lists(st.floats(-100, 100, width=32), min_size=n, max_size=n)
)


def test_clipped_scores():
    close(shaping.clip_scores(jnp.array([-7.0, -1.0, 0.5, 9.0]), 2.0), [-2, -1, 0.5, 2])
    close(shaping.clip_scores(jnp.array([-7, 9]), math.inf), [-7, 9])


# ---------------------------------------------------------------- rules and penalties


@pytest.mark.parametrize("how, expected", [("subtract", [2.0, -0.5, -1.5]), ("replace", [2.0, -1.0, -1.0])])
def test_missing_eos(how, expected):
    ended = jnp.array([True, False, False])
    found = shaping.missing_eos(jnp.array([2.0, 0.5, -0.5]), ended, 1.0, how)
    close(found, expected)
    assert found.dtype == jnp.float32
    with pytest.raises(KeyError):
        shaping.missing_eos(jnp.zeros(3), ended, 1.0, "ignore")


def test_missing_eos_of_whole_numbers_stays_fractional():
    close(shaping.missing_eos(jnp.array([1, 1]), jnp.array([True, False]), 0.25), [1, 0.75])
    replaced = shaping.missing_eos(jnp.array([1.0, jnp.nan]), jnp.array([True, False]), 2.0, "replace")
    close(replaced, [1, -2])


@quick
@hypothesis.given(st.lists(st.integers(0, 50), min_size=5, max_size=5), st.integers(0, 40), st.integers(0, 20))
def test_length_penalties_equal_plain_python(lengths, limit, buffer):
    plain = shaping.length_penalty(jnp.array(lengths), limit, 0.5)
    close(plain, [-0.5 * (n - limit) if n > limit else 0.0 for n in lengths])
    expected = []
    for n in lengths:
        if n <= limit - buffer:
            expected.append(0.0)
        elif n <= limit:
            expected.append((limit - buffer - n) / buffer)
        else:
            expected.append(-1.0)
    close(shaping.overlong_penalty(jnp.array(lengths), limit, buffer), expected, rtol=1e-6)


def test_overlong_penalty_by_hand():
    """The paper's numbers: 16,384 tokens are free, another 4,096 cost more and more."""
    lengths = jnp.array([0, 16384, 16385, 18432, 20480, 20481, 99999])
    close(shaping.overlong_penalty(lengths, 20480, 4096), [0, 0, -1 / 4096, -0.5, -1, -1, -1])


# ---------------------------------------------------------------- groups


@quick
@hypothesis.given(
    st.sampled_from([(6, 1), (6, 2), (6, 3), (6, 6)]),
    st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=6, max_size=6),
)
def test_informative_groups_equal_plain_python(sizes, scores):
    rows, group = sizes
    expected = [len(set(scores[i : i + group])) > 1 for i in range(0, rows, group)]
    found = shaping.informative_groups(jnp.array(scores), group)
    assert found.dtype == bool and found.tolist() == expected


def test_groups_must_divide_the_scores():
    with pytest.raises(AssertionError):
        shaping.informative_groups(jnp.zeros(5), 2)
