"""KL estimators, the coefficient's controller, rewards per token."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrlhf.algorithms import kl

close = np.testing.assert_allclose

# Compiled once per shape: faster than operation by operation.
kl_estimate = jax.jit(kl.kl_estimate, static_argnames="estimator")
shape_rewards = jax.jit(kl.shape_rewards, static_argnames="estimator")


def in_python(estimator, r, bound=10.0):
    """An estimate and its derivative by the policy's logprob: past the knee a straight line."""
    knee = {"k1": np.inf, "k2": bound, "k3": np.log1p(bound)}[estimator]
    near = min(r, knee) if estimator == "k3" else float(np.clip(r, -knee, knee))
    if estimator == "k3":
        value, slope = np.exp(near) - 1 - near, 1 - np.exp(near)
    else:
        value, slope = (-near, 1.0) if estimator == "k1" else (near**2 / 2, -near)
    return value - slope * (r - near), slope


def test_estimators_by_hand():
    policy, reference = jnp.log(jnp.array([0.5, 0.25])), jnp.log(jnp.array([0.25, 0.5]))
    two = np.log(2)
    close(kl_estimate(policy, reference, "k1"), [two, -two], rtol=1e-6)
    close(kl_estimate(policy, reference, "k2"), [two**2 / 2, two**2 / 2], rtol=1e-6)
    close(kl_estimate(policy, reference, "k3"), [0.5 - 1 + two, 2 - 1 - two], rtol=1e-5)
    with pytest.raises(KeyError):
        kl_estimate(policy, reference, "k4")


def test_k1_and_k3_have_the_exact_kl_as_expectation():
    logits = np.random.default_rng(0).normal(size=(2, 8))
    policy, reference = (row - np.log(np.exp(row).sum()) for row in logits)
    exact = (np.exp(policy) * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        expectation = (np.exp(policy) * np.array(kl_estimate(policy, reference, estimator))).sum()
        close(expectation, exact, rtol=1e-5)


def test_k3_is_exact_for_small_ratios():
    """exp(r) - 1 - r cancels in float32 below about 1e-3; r^2/2 + r^3/6 does not."""
    r = np.array([1e-3, -1e-3, 3e-3], np.float32)
    close(kl_estimate(np.zeros(3, np.float32), r, "k3"), r**2 / 2 + r**3 / 6, rtol=1e-3)


@pytest.mark.parametrize("bound", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_past_the_bound_an_estimate_goes_on_as_a_straight_line(estimator, bound):
    """Value and slope meet at the knee; no token's slope is above the bound, however far it is."""
    r = np.array([-1e6, -200, -bound - 0.1, -bound, -3, -1e-3, 0, 1e-3, 0.5, np.log1p(bound), bound + 0.1, 89, 1e6])

    def total(logprobs):
        found = kl.kl_estimate(logprobs, jnp.zeros(len(r)), estimator, bound)
        return found.sum(), found

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(-r, jnp.float32))
    expected = np.array([in_python(estimator, x, bound) for x in r])
    close(found, expected[:, 0], rtol=1e-4, atol=1e-6)
    close(gradient, expected[:, 1], rtol=1e-4, atol=1e-6)
    assert np.abs(gradient).max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_within_the_bound_nothing_changes_and_without_one_there_is_none(estimator):
    logprobs, ref_logprobs = np.random.default_rng(3).uniform(-2, 0, (2, 50)).astype(np.float32)
    free = kl.kl_estimate(logprobs, ref_logprobs, estimator, None)
    np.testing.assert_array_equal(kl.kl_estimate(logprobs, ref_logprobs, estimator), free)
    far = float(kl.kl_estimate(jnp.float32(-100), jnp.float32(0), estimator, None))
    assert far == {"k1": -100, "k2": 5000, "k3": np.inf}[estimator]


def test_equal_models_have_no_kl():
    logprobs = jnp.array([[-0.3, -12.0, 0.0]])
    for estimator in kl.ESTIMATORS:
        assert (kl_estimate(logprobs, logprobs, estimator) == 0).all()


# ---------------------------------------------------------------- in the loss


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("lengths", [(3, 1, 0), (0, 0, 0), (3, 3, 3)])
def test_loss_and_its_gradient_by_token(estimator, lengths):
    generator = np.random.default_rng(sum(lengths))
    policy, reference = generator.normal(-2, 1, size=(2, 3, 3)).astype(np.float32)
    mask = np.arange(3) < np.array(lengths)[:, None]

    @jax.jit
    def value_and_gradients(policy, reference):
        def total(policy, reference):
            loss = kl.kl_loss(policy, reference, mask, estimator)
            return loss.sum(), loss

        return jax.grad(total, argnums=(0, 1), has_aux=True)(policy, reference)

    (gradient, constant), loss = value_and_gradients(policy, reference)
    assert (constant == 0).all()
    for i in range(3):
        for t in range(3):
            r = float(reference[i, t]) - float(policy[i, t])
            value, slope = in_python(estimator, r)
            close(loss[i, t], value * mask[i, t], rtol=1e-5, atol=1e-5)
            close(gradient[i, t], slope * mask[i, t], rtol=1e-5, atol=1e-5)
    for garbage in (np.nan, np.inf, -np.inf, 1e4):
        dirty = value_and_gradients(np.where(mask, policy, -garbage), np.where(mask, reference, garbage))
        jax.tree.map(np.testing.assert_array_equal, dirty, ((gradient, constant), loss))


def test_in_expectation_k1_teaches_nothing_k2_the_kl_and_k3_the_other_direction():
    """Sums over a whole vocabulary: E_policy[grad kl_loss] against the gradients of both exact divergences."""
    logits, reference = jnp.array(np.random.default_rng(2).normal(size=(2, 6)), jnp.float32)
    reference = jax.nn.log_softmax(reference)

    def expected_gradient(estimator):
        sampled = jax.nn.softmax(logits)  # where the tokens come from: no gradient

        def loss(logits):
            logprobs = jax.nn.log_softmax(logits)
            return (sampled * kl.kl_loss(logprobs[None], reference[None], jnp.ones((1, 6), bool), estimator)[0]).sum()

        return jax.grad(loss)(logits)

    def reverse(logits):
        logprobs = jax.nn.log_softmax(logits)
        return (jnp.exp(logprobs) * (logprobs - reference)).sum()

    def forward(logits):
        return (jnp.exp(reference) * (reference - jax.nn.log_softmax(logits))).sum()

    close(expected_gradient("k1"), np.zeros(6), atol=1e-6)
    close(expected_gradient("k2"), jax.grad(reverse)(logits), rtol=1e-4, atol=1e-6)
    close(expected_gradient("k3"), jax.grad(forward)(logits), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- controller


@pytest.mark.parametrize(
    "measured, factor",
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 64 / 10000),
        (5.4, 1 - 0.1 * 64 / 10000),
        (60.0, 1 + 0.2 * 64 / 10000),
        (0.0, 1 - 0.2 * 64 / 10000),
        (-3.0, 1 - 0.2 * 64 / 10000),
    ],
)
def test_controller_by_hand(measured, factor):
    found = jax.jit(kl.adapt_kl_coef)(0.15, measured, 6.0, 64, 10000.0)
    assert found.dtype == jnp.float32
    close(found, 0.15 * factor, rtol=1e-6)


def test_controller_finds_the_coefficient_that_holds_the_target():
    """In a world where the KL is 1.2 / coefficient, the coefficient for a KL of 6 is 0.2."""
    coefficient = 0.05
    adapt = jax.jit(kl.adapt_kl_coef)
    for _ in range(200):
        coefficient = adapt(coefficient, 1.2 / coefficient, 6.0, 50, 200.0)
    close(coefficient, 0.2, rtol=1e-3)


# ---------------------------------------------------------------- rewards


def test_rewards_by_hand():
    """A full answer, one of two tokens, one of one, an empty one. Scores are fractions and stay so."""
    scores = jnp.array([0.6, -0.25, 0.5, 100.0])
    mask = jnp.arange(3) < jnp.array([3, 2, 1, 0])[:, None]
    policy = jnp.full((4, 3), -1.0)
    reference = jnp.full((4, 3), -1.5)
    found = shape_rewards(scores, policy, reference, mask, 0.1)
    close(found, [[-0.05, -0.05, 0.55], [-0.05, -0.30, 0], [0.45, 0, 0], [0, 0, 0]], rtol=1e-6)
    assert found.dtype == jnp.float32
    k2 = shape_rewards(scores, policy, reference, mask, 0.1, "k2")
    close(k2[0], [-0.0125, -0.0125, 0.5875], rtol=1e-6)


@hypothesis.settings(deadline=None, max_examples=25, derandomize=True)
@hypothesis.given(st.data())
def test_rewards_equal_a_loop_and_nothing_past_the_end_matters(data):
    rows, length = data.draw(st.sampled_from([(1, 1), (3, 5), (4, 2)]))
    lengths = data.draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    estimator = data.draw(st.sampled_from(sorted(kl.ESTIMATORS)))
    garbage = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e38]))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scores = generator.normal(size=rows).astype(np.float32)
    policy, reference = generator.normal(-2, 1, size=(2, rows, length)).astype(np.float32)
    mask = np.arange(length) < np.array(lengths)[:, None]

    expected = np.zeros((rows, length))
    for i in range(rows):
        for t in range(lengths[i]):
            r = float(reference[i, t]) - float(policy[i, t])
            expected[i, t] = -0.3 * in_python(estimator, r)[0]
            if t == lengths[i] - 1:
                expected[i, t] += scores[i]

    found = shape_rewards(scores, policy, reference, mask, 0.3, estimator)
    close(found, expected, rtol=1e-5, atol=1e-5)
    assert (np.array(found)[~mask] == 0).all()
    dirty = shape_rewards(
        np.where(mask.any(axis=1), scores, np.nan),
        np.where(mask, policy, garbage),
        np.where(mask, reference, -garbage),
        mask,
        0.3,
        estimator,
    )
    np.testing.assert_array_equal(dirty, found)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_no_gradient_past_the_end(estimator):
    mask = jnp.array([[True, False, False]])
    policy, reference = jnp.array([[-1.0, -1e4, -jnp.inf]]), jnp.array([[-1.5, 1e4, jnp.inf]])

    def total(policy):
        return shape_rewards(jnp.ones(1), policy, reference, mask, 0.1, estimator).sum()

    gradient = jax.grad(total)(policy)
    assert np.isfinite(gradient).all()
    assert gradient[0, 0] != 0 and (gradient[0, 1:] == 0).all()


def test_rewards_sum_to_score_minus_the_penalty():
    generator = np.random.default_rng(4)
    policy, reference = generator.normal(-2, 1, size=(2, 5, 6)).astype(np.float32)
    mask = np.arange(6) < np.array([1, 2, 3, 6, 6])[:, None]
    scores = generator.normal(size=5).astype(np.float32)
    rewards = jax.jit(kl.shape_rewards)(scores, policy, reference, mask, jnp.float32(0.2))
    close(rewards.sum(axis=1), scores - 0.2 * np.where(mask, policy - reference, 0).sum(axis=1), rtol=1e-5)
