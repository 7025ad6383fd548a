"""GAE against a plain loop, by hand, and as a learner of known values; all estimators against plain loops."""

import functools
import itertools
import math

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


def test_a_gap_in_the_mask_is_passed_over():
    rewards, values = np.random.default_rng(2).normal(size=(2, 1, 7)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 1, 1, 0]], bool)
    found = gae(rewards, values, mask, 0.9, 0.8)
    alone = gae(rewards[mask][None], values[mask][None], np.ones((1, 5), bool), 0.9, 0.8)
    for one, other in zip(found, alone, strict=True):
        close(np.asarray(one)[mask], other[0], rtol=1e-6)
        assert not np.asarray(one)[~mask].any()


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


# ---------------------------------------------------------------- all of them, behind one signature

NAMES = sorted(module.ADVANTAGES)
GROUPED = [name for name in NAMES if module.ADVANTAGES[name].needs_group]


@functools.partial(jax.jit, static_argnames=("name", "group"))
def compute(name, rewards, mask, values, group, greedy, gamma=1.0, lam=1.0):
    return module.ADVANTAGES[name].compute(rewards, mask, values, group, greedy, gamma, lam)


def scores_as_rewards(scores, lengths, width):
    """One score on the last token of each answer, and the mask."""
    mask = np.arange(width) < np.array(lengths)[:, None]
    rewards = np.zeros(mask.shape, np.float32)
    for i, length in enumerate(lengths):
        if length:
            rewards[i, length - 1] = scores[i]
    return rewards, mask


def mean(numbers):
    return sum(numbers) / len(numbers) if numbers else 0.0


def deviation(numbers):
    return math.sqrt(sum((x - mean(numbers)) ** 2 for x in numbers) / max(len(numbers) - 1, 1))


def normalised(rows):
    """Rows of numbers: all tokens of the batch to mean 0 and deviation 1."""
    tokens = [x for row in rows for x in row]
    scale = math.sqrt(deviation(tokens) ** 2 + 1e-8)
    return [[(x - mean(tokens)) / scale for x in row] for row in rows]


def reference(name, rewards, lengths, values, group, greedy, gamma, lam):
    """Advantages and returns by the papers, answer by answer: two lists of lists of the real tokens."""
    answers = [[float(x) for x in row[:n]] for row, n in zip(rewards, lengths)]
    if name == "gae":
        padded = loop(rewards, values, lengths, gamma, lam)
        found = [[float(x) for x in row[:n]] for row, n in zip(padded, lengths)]
        return found, [[a + float(v) for a, v in zip(*both)] for both in zip(found, values)]
    to_go = [[sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))] for row in answers]
    total = [sum(row) for row in answers]
    if name == "reinforce":
        baseline = mean([row[0] for row in to_go if row])
        return [[x - baseline for x in row] for row in to_go], to_go
    if name == "reinforce_plus_plus":
        return normalised(to_go), to_go
    advantage = []
    for i in range(len(answers)):
        first = i - i % group
        mates = [j for j in range(first, first + group) if lengths[j] > 0]
        others = [total[j] for j in mates if j != i]
        everyone = [total[j] for j in mates]
        above = total[i] - mean(everyone)
        choices = {
            "rloo": total[i] - mean(others) if others else 0.0,
            "grpo": above / (deviation(everyone) + 1e-4),
            "dr_grpo": above,
            "reinforce_plus_plus_baseline": above,
            "remax": total[i] - float(greedy[i]),
        }
        advantage.append(choices[name])
    found = [[a] * n for a, n in zip(advantage, lengths)]
    returns = [[r] * n for r, n in zip(total, lengths)]
    return (normalised(found) if name == "reinforce_plus_plus_baseline" else found), returns


def padded(rows, width):
    return np.array([row + [0.0] * (width - len(row)) for row in rows])


@pytest.mark.parametrize("name", NAMES)
@hypothesis.settings(deadline=None, max_examples=25, derandomize=True)
@hypothesis.given(st.data())
def test_every_estimator_equals_plain_python_and_nothing_past_the_end_matters(name, data):
    rows, width, group = data.draw(st.sampled_from([(1, 1, 1), (4, 5, 2), (6, 3, 3), (6, 3, 6)]))
    lengths = data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
    gamma, lam = data.draw(st.sampled_from([(1.0, 0.95), (0.9, 1.0), (0.5, 0.0)]))
    garbage = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e38]))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    rewards, values = generator.normal(size=(2, rows, width)).astype(np.float32)
    if data.draw(st.booleans()):
        rewards = np.round(rewards)  # some groups agree
    greedy = generator.normal(size=rows).astype(np.float32)
    mask = np.arange(width) < np.array(lengths)[:, None]

    found = compute(name, rewards, mask, values, group, greedy, gamma, lam)
    expected = reference(name, rewards, lengths, values, group, greedy, gamma, lam)
    for ours, theirs in zip(found, expected):
        assert ours.dtype == jnp.float32
        close(ours, padded(theirs, width), rtol=2e-4, atol=2e-5)
        assert (np.array(ours)[~mask] == 0).all()
    dirty = (np.where(mask, x, garbage) for x in (rewards, values))
    dirty_greedy = np.where(mask.any(axis=1), greedy, garbage)
    dirty_rewards, dirty_values = dirty
    again = compute(name, dirty_rewards, mask, dirty_values, group, dirty_greedy, gamma, lam)
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("name", NAMES)
def test_estimators_have_finite_gradients_and_none_past_the_end(name):
    """Among others in a group that agrees, where the deviation is 0, and in one that is empty."""
    mask = np.arange(3) < np.array([2, 2, 3, 1, 0, 0])[:, None]
    clean = jnp.where(mask, jnp.array([1.0, 1, 1, 5, 0, 0])[:, None], 0.0).at[3, 0].set(-2.0)

    @jax.jit
    def gradient(rewards, values):
        def total(rewards, values):
            advantages, returns = module.ADVANTAGES[name].compute(rewards, mask, values, 2, jnp.ones(6), 0.9, 0.8)
            return (advantages * jnp.arange(18.0).reshape(6, 3) + returns).sum()

        return jax.value_and_grad(total, argnums=(0, 1))(rewards, values)

    expected = gradient(clean, clean)
    for garbage in (np.nan, np.inf, -1e38):
        found = gradient(*(jnp.where(mask, clean, garbage),) * 2)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        for array in found[1]:
            assert np.isfinite(array).all() and (np.array(array)[~mask] == 0).all()


@pytest.mark.parametrize("score", [0.0, 0.1, -1 / 3, 12345.678, 1e-20])
@pytest.mark.parametrize("name", [*GROUPED, "reinforce", "reinforce_plus_plus"])
def test_equal_scores_give_exactly_0(name, score):
    """0.1 three times in float32 is not 0.3: the remainder over a deviation of about 0 would be large."""
    rewards, mask = scores_as_rewards([score] * 6, [1, 3, 2, 3, 0, 3], 3)
    found, _ = compute(name, rewards, mask, np.zeros((6, 3)), 3, np.zeros(6))
    assert (found == 0).all()


@pytest.mark.parametrize("name", GROUPED)
def test_an_answer_alone_in_its_group_says_nothing(name):
    rewards, mask = scores_as_rewards([3.0, 9.0, 1.0, 2.0], [2, 0, 1, 0], 2)
    found, returns = compute(name, rewards, mask, np.zeros((4, 2)), 2, np.zeros(4))
    assert (found == 0).all()
    close(returns, [[3, 3], [0, 0], [1, 0], [0, 0]])


@pytest.mark.parametrize("name", GROUPED)
def test_groups_must_divide_the_batch(name):
    with pytest.raises(AssertionError):
        compute(name, np.zeros((4, 2)), np.ones((4, 2), bool), np.zeros((4, 2)), 3, np.zeros(4))


def test_by_hand_two_groups_of_three():
    rewards, mask = scores_as_rewards([0, 3, 6, 1, 1, 4], [1, 2, 3, 2, 2, 2], 3)
    answer = {
        "rloo": [-4.5, 0, 4.5, -1.5, -1.5, 3],
        "dr_grpo": [-3, 0, 3, -1, -1, 2],
        "grpo": [-3 / 3.0001, 0, 3 / 3.0001, *(x / (math.sqrt(3) + 1e-4) for x in (-1, -1, 2))],
        "remax": [-1, 2, 5, 0, 0, 3],
        "reinforce": [-2.5, 0.5, 3.5, -1.5, -1.5, 1.5],
    }
    for name, expected in answer.items():
        found, _ = compute(name, rewards, mask, np.zeros((6, 3)), 3, np.ones(6))
        close(found, np.where(mask, np.array(expected)[:, None], 0), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("group", [2, 3, 6])
def test_grpo_without_deviation_is_rloo_up_to_its_constant(group):
    generator = np.random.default_rng(group)
    rewards, mask = scores_as_rewards(generator.normal(size=6), [3, 1, 2, 3, 3, 2], 3)
    rest = (np.zeros((6, 3)), group, np.zeros(6))
    without, _ = compute("dr_grpo", rewards, mask, *rest)
    leave_one_out, _ = compute("rloo", rewards, mask, *rest)
    close(leave_one_out, np.array(without) * group / (group - 1), rtol=1e-5, atol=1e-6)
    grouped, _ = compute("grpo", rewards, mask, *rest)
    by_group = np.array([scores.std(ddof=1) for scores in rewards.sum(axis=1).reshape(-1, group)])
    close(np.array(grouped) * (np.repeat(by_group, group) + 1e-4)[:, None], without, rtol=1e-5, atol=1e-6)


def test_gae_at_gamma_and_lambda_1_is_return_minus_value():
    rewards, values = np.random.default_rng(7).normal(size=(2, 4, 5)).astype(np.float32)
    mask = np.arange(5) < np.array([5, 1, 0, 3])[:, None]
    found, returns = compute("gae", rewards, mask, values, 1, np.zeros(4))
    to_go = [[sum(row[t:n]) for t in range(n)] + [0] * (5 - n) for row, n in zip(rewards, [5, 1, 0, 3])]
    close(found, np.where(mask, to_go - values, 0), rtol=1e-5, atol=1e-5)
    close(returns, to_go, rtol=1e-5, atol=1e-5)


def test_reinforce_plus_plus_is_normalised_over_the_whole_batch():
    rewards = np.random.default_rng(8).normal(2, 3, size=(6, 3)).astype(np.float32)
    mask = np.arange(3) < np.array([3, 1, 2, 3, 0, 2])[:, None]
    for name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        found = np.array(compute(name, rewards, mask, np.zeros((6, 3)), 2, np.zeros(6))[0])[mask]
        close([found.mean(), found.std(ddof=1)], [0, 1], atol=1e-5)


def test_the_table_says_what_is_needed():
    """What an estimator does not ask for changes nothing; what it asks for does."""
    generator = np.random.default_rng(9)
    rewards, values, others = generator.normal(size=(3, 6, 3)).astype(np.float32)
    mask = np.ones((6, 3), bool)
    for name, entry in module.ADVANTAGES.items():
        base = compute(name, rewards, mask, values, 2, np.zeros(6), 0.9, 0.5)[0]
        changed = {
            "needs_value": compute(name, rewards, mask, others, 2, np.zeros(6), 0.9, 0.5)[0],
            "needs_group": compute(name, rewards, mask, values, 3, np.zeros(6), 0.9, 0.5)[0],
            "needs_greedy": compute(name, rewards, mask, values, 2, np.ones(6), 0.9, 0.5)[0],
        }
        for need, found in changed.items():
            assert getattr(entry, need) == (not np.array_equal(found, base)), (name, need)
