"""GAE against a plain loop, by hand, and as a learner of known values."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrlhf.algorithms import advantages as module

close = np.testing.assert_allclose
gae, truncated_gae = jax.jit(module.gae), jax.jit(module.truncated_gae)  # compiled once per shape: faster


def loop(rewards, values, lengths, gamma, lam):
    """The recurrence as the paper writes it, answer by answer, in plain Python."""
    advantages = [[0.0] * len(row) for row in rewards]
    for i, length in enumerate(lengths):
        following_advantage = following_value = 0.0
        for t in reversed(range(length)):
            delta = float(rewards[i][t]) + gamma * following_value - float(values[i][t])
            following_advantage = delta + gamma * lam * following_advantage
            following_value = float(values[i][t])
            advantages[i][t] = following_advantage
    return np.array(advantages)


@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
@hypothesis.given(st.data())
def test_gae_equals_the_loop_and_nothing_past_the_end_matters(data):
    rows, length = data.draw(st.sampled_from([(1, 1), (3, 6), (2, 3)]))
    lengths = np.array(data.draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows)))
    gamma, lam = data.draw(st.sampled_from([(1.0, 0.95), (0.9, 1.0), (0.98, 0.0), (0.0, 0.5)]))
    garbage = data.draw(st.sampled_from([np.nan, np.inf, -7.0, 1e38]))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    rewards, values = generator.normal(size=(2, rows, length)).astype(np.float32)
    mask = np.arange(length) < lengths[:, None]
    expected = loop(rewards, values, lengths, gamma, lam)

    advantages, returns = gae(rewards, values, mask, gamma, lam)
    close(advantages, expected, rtol=1e-5, atol=1e-5)
    close(returns, np.where(mask, expected + values, 0), rtol=1e-5, atol=1e-5)
    assert (np.array(advantages)[~mask] == 0).all() and (np.array(returns)[~mask] == 0).all()

    dirty = gae(np.where(mask, rewards, garbage), np.where(mask, values, garbage), mask, gamma, lam)
    np.testing.assert_array_equal(dirty, (advantages, returns))


def test_gae_by_hand():
    """gamma 1/2 and lambda 1/2: advantages decay by 1/4. The second answer ends after one token."""
    rewards, values = (
        jnp.array([[0.0, 0.0, 8.0], [1.0, 8.0, 8.0]]),
        jnp.array([[1.0, 2.0, 4.0], [3.0, 9.0, 9.0]]),
    )
    mask = jnp.array([[True, True, True], [True, False, False]])
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    # deltas of the first: 0 + 1 - 1 = 0; 0 + 2 - 2 = 0; 8 - 4 = 4
    close(advantages, [[0.25, 1, 4], [-2, 0, 0]])
    close(returns, [[1.25, 3, 8], [1, 0, 0]])


def test_lambda_1_gives_rewards_to_go_whatever_the_values():
    generator = np.random.default_rng(0)
    rewards, values = generator.normal(size=(2, 2, 5)).astype(np.float32)
    _, returns = gae(rewards, values, np.ones((2, 5), bool), 1.0, 1.0)
    close(returns, np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1], rtol=1e-5, atol=1e-5)


def test_fractional_rewards_stay_fractional():
    """A score of 0.6 reaches the first token whole, even where values come as integers or in half precision."""
    mask = jnp.ones((1, 3), bool)
    rewards = jnp.array([[0.0, 0.0, 0.6]])
    for values in (jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3), jnp.bfloat16)):
        advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
        assert advantages.dtype == returns.dtype == jnp.float32
        close(advantages, [[0.6, 0.6, 0.6]], rtol=1e-6)


def test_a_row_alone_and_among_others_is_the_same():
    generator = np.random.default_rng(1)
    rewards, values = generator.normal(size=(2, 4, 6)).astype(np.float32)
    mask = np.arange(6) < np.array([6, 0, 2, 5])[:, None]
    together = gae(rewards, values, mask, 0.99, 0.9)
    for i in range(4):
        alone = gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], 0.99, 0.9)
        for a, b in zip(together, alone, strict=True):
            close(a[i], b[0], rtol=1e-6, atol=1e-6)


def test_a_gap_in_the_mask_ends_one_answer_and_starts_another():
    rewards, values = np.random.default_rng(2).normal(size=(2, 1, 7)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 1, 1, 0]], bool)
    advantages, _ = gae(rewards, values, mask, 0.9, 0.8)
    for piece in (slice(0, 3), slice(4, 6)):
        alone, _ = gae(rewards[:, piece], values[:, piece], mask[:, piece], 0.9, 0.8)
        close(advantages[:, piece], alone, rtol=1e-6)


def test_gamma_and_lambda_may_be_traced_and_batched():
    rewards, values = np.random.default_rng(3).normal(size=(2, 2, 4)).astype(np.float32)
    mask = np.arange(4) < np.array([4, 2])[:, None]
    gammas, lams = jnp.array([1.0, 0.9]), jnp.array([0.95, 0.5])
    population = jax.jit(jax.vmap(gae, in_axes=(None, None, None, 0, 0)))(rewards, values, mask, gammas, lams)
    for i in range(2):
        single = gae(rewards, values, mask, float(gammas[i]), float(lams[i]))
        for a, b in zip(population, single, strict=True):
            close(a[i], b, rtol=1e-6, atol=1e-6)


def test_no_gradient_past_the_end():
    mask = jnp.array([[True, True, False]])
    rewards, values = jnp.array([[1.0, 2.0, jnp.nan]]), jnp.array([[0.5, 0.5, jnp.inf]])

    def total(rewards, values):
        advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
        return (advantages + returns).sum()

    for gradient in jax.grad(total, argnums=(0, 1))(rewards, values):
        assert np.isfinite(gradient).all()
        assert gradient[0, 2] == 0 and (gradient[0, :2] != 0).all()


def test_bootstrap_value_enters_through_the_last_discount():
    close(truncated_gae(jnp.array([1.0]), jnp.array([2.0, 10.0]), jnp.array([0.5]), 0.9), [4.0])
    close(truncated_gae(jnp.array([1.0]), jnp.array([2.0, 10.0]), jnp.array([0.0]), 0.9), [-1.0])


# ---------------------------------------------------------------- learning known values


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_the_values_of_a_deterministic_chain_are_powers_of_gamma(lam):
    """Five steps, a reward of 1 on the last: V_t = gamma^(4 - t). Answers of three steps end unrewarded."""
    rewards = jnp.array([[0, 0, 0, 0, 1.0], [0, 0, 0, 0, 0]])
    mask = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    values = jnp.zeros((2, 5))
    step = jax.jit(lambda values: gae(rewards, values, mask, 0.9, lam)[1])
    for _ in range(5):
        values = step(values)
    close(values, [0.9 ** np.arange(4, -1, -1), np.zeros(5)], rtol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_the_values_of_a_random_walk_converge_to_dynamic_programming(lam):
    """Sutton and Barto's walk, example 6.2, cut at 7 steps: from 3 to the left or right by coin; right of 5 pays 0.7.

    All 128 sequences of coins stand in the batch, so that averages are expectations. Walks that fall off
    an end earlier leave the rest of their row empty. A tabular value per (time, place) is fitted to the returns.
    """
    horizon, gamma = 7, 0.97
    coins = np.array(list(itertools.product([-1, 1], repeat=horizon)))
    place = 3 + np.concatenate([np.zeros((len(coins), 1), int), np.cumsum(coins, axis=1)], axis=1)
    alive = np.logical_and.accumulate((place >= 1) & (place <= 5), axis=1)
    mask, states = alive[:, :-1], place[:, :-1]
    rewards = np.where(mask & (place[:, 1:] == 6), 0.7, 0.0).astype(np.float32)
    assert (~mask).sum() > 0 and mask.all(axis=1).any()

    known = np.zeros((horizon + 1, 7))
    for t in reversed(range(horizon)):
        for s in range(1, 6):
            right = 0.7 if s == 5 else gamma * known[t + 1, s + 1]
            left = 0.0 if s == 1 else gamma * known[t + 1, s - 1]
            known[t, s] = (left + right) / 2

    index = np.where(mask, np.arange(horizon) * 7 + np.clip(states, 0, 6), horizon * 7)
    visits = np.bincount(index.ravel(), minlength=horizon * 7 + 1)

    @jax.jit
    def sweep(table):
        _, returns = gae(rewards, table[index], mask, gamma, lam)
        sums = jnp.zeros_like(table).at[index].add(returns)
        return sums / np.maximum(visits, 1)

    table = jnp.zeros(horizon * 7 + 1)
    for _ in range(horizon):
        table = sweep(table)
    visited = visits[:-1] > 0
    close(np.array(table)[:-1][visited], known[:horizon].ravel()[visited], rtol=1e-4, atol=1e-6)
    assert known[0, 3] > 0.05
