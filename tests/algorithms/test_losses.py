"""Losses by hand, against numpy, torch-free; and no gradient through what is masked."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrlhf.algorithms import losses, policy_losses

close = np.testing.assert_allclose

# Compiled once per shape: faster than operation by operation.
policy_loss = jax.jit(policy_losses.policy_loss)
value_loss = jax.jit(losses.value_loss)
token_logprobs = jax.jit(losses.token_logprobs)
cross_entropy = jax.jit(losses.cross_entropy)
entropy_from_logits = jax.jit(losses.entropy_from_logits)
pairwise_loss = jax.jit(losses.pairwise_loss)
quick = hypothesis.settings(deadline=None, max_examples=25, derandomize=True)


@st.composite
def masked_arrays(draw, arrays):
    """[B,R] arrays and a mask of answers, of which some are empty and some fill their row."""
    rows, length = draw(st.sampled_from([(1, 1), (3, 5), (4, 2)]))
    lengths = draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    mask = np.arange(length) < np.array(lengths)[:, None]
    return (*generator.normal(0, 1, (arrays, rows, length)).astype(np.float32), mask)


# ---------------------------------------------------------------- policy


def test_policy_loss_by_hand():
    """Ratios 2, 1/2, 2, 1/2, 1.1 with bounds 0.8 and 1.3; the last token is masked."""
    ratio = jnp.array([[2.0, 0.5, 2.0, 0.5, 1.1, 3.0]])
    advantages = jnp.array([[1.0, 1.0, -1.0, -1.0, 2.0, 5.0]])
    mask = jnp.array([[True] * 5 + [False]])
    old = jnp.full((1, 6), -1.0)

    def total(logprobs):
        loss, diagnostics = policy_loss(logprobs, old, advantages, mask, 0.2, 0.3)
        return loss.sum(), (loss, diagnostics)

    gradient, (loss, diagnostics) = jax.grad(total, has_aux=True)(old + jnp.log(ratio))
    close(loss, [[-1.3, -0.5, 2.0, 0.8, -2.2, 0]], rtol=1e-5)
    close(gradient, [[0, -0.5, 2.0, 0, -2.2, 0]], rtol=1e-5)
    close(diagnostics["ratio"], [[2, 0.5, 2, 0.5, 1.1, 1]], rtol=1e-5)
    assert diagnostics["clipped_high"].tolist() == [[True, False, False, False, False, False]]
    assert diagnostics["clipped_low"].tolist() == [[False, False, False, True, False, False]]
    approx_kl = np.where(mask, ratio - 1 - np.log(ratio), 0)
    close(diagnostics["approx_kl"], approx_kl, rtol=1e-4)


@quick
@hypothesis.given(masked_arrays(3))
def test_policy_loss_equals_numpy(case):
    new, old, advantages, mask = case
    loss, diagnostics = policy_loss(new, old, advantages, mask, 0.1, 0.3)
    ratio = np.exp(new.astype(np.float64) - old)
    unclipped, clipped = -advantages * ratio, -advantages * np.clip(ratio, 0.9, 1.3)
    close(loss, np.where(mask, np.maximum(unclipped, clipped), 0), rtol=1e-4, atol=1e-6)
    both = diagnostics["clipped_low"] | diagnostics["clipped_high"]
    np.testing.assert_array_equal(both, (clipped > unclipped) & mask)
    assert not (diagnostics["clipped_low"] & diagnostics["clipped_high"]).any()
    assert (diagnostics["approx_kl"] >= 0).all()


def test_at_ratio_1_the_gradient_is_that_of_the_policy_gradient():
    logprobs = jnp.array([[-0.5, -3.0]])
    advantages, mask = jnp.array([[1.5, -0.5]]), jnp.ones((1, 2), bool)

    def total(new, old):
        loss, diagnostics = policy_loss(new, old, advantages, mask, 0.2, 0.2)
        return loss.sum(), diagnostics

    gradients, diagnostics = jax.grad(total, argnums=(0, 1), has_aux=True)(logprobs, logprobs)
    close(gradients[0], -advantages)
    assert (gradients[1] == 0).all()  # the old ones are constants, even where they are the new ones
    assert (diagnostics["ratio"] == 1).all() and (diagnostics["approx_kl"] == 0).all()


def test_only_what_is_trained_has_a_gradient():
    arrays = [jnp.array([[x]]) for x in (-1.0, -1.1, 0.7)]
    mask = jnp.ones((1, 1), bool)
    cases = [
        (lambda *a: policy_loss(*a, mask, 0.2, 0.2), True),
        (lambda *a: value_loss(*a, mask, 0.2), True),
        (lambda *a: value_loss(*a, mask, 0.05), False),  # clipped: the old value's own turn to have none
    ]
    for loss, learns in cases:
        trained, *constants = jax.grad(lambda *a, loss=loss: loss(*a)[0].sum(), argnums=(0, 1, 2))(*arrays)
        assert (trained != 0) == learns
        assert constants == [0, 0]


# ---------------------------------------------------------------- value


def test_value_loss_by_hand():
    """Old value 0, clip 0.2. A step towards the return beyond the clip pays no more and has no gradient."""
    values = jnp.array([[0.1, 1.0, -1.0, 5.0]])
    returns = jnp.array([[1.0, 1.0, 1.0, 9.0]])
    mask = jnp.array([[True, True, True, False]])

    def total(values):
        loss, clipped = value_loss(values, jnp.zeros((1, 4)), returns, mask, 0.2)
        return loss.sum(), (loss, clipped)

    gradient, (loss, clipped) = jax.grad(total, has_aux=True)(values)
    close(loss, [[0.405, 0.32, 2.0, 0]], rtol=1e-6)
    close(gradient, [[-0.9, 0, -2.0, 0]], rtol=1e-6)
    assert clipped.tolist() == [[False, True, False, False]]


@quick
@hypothesis.given(masked_arrays(3))
def test_value_loss_equals_numpy(case):
    values, old, returns, mask = case
    loss, clipped = value_loss(values, old, returns, mask, 0.5)
    error = np.square(values - returns)
    clipped_error = np.square(np.clip(values, old - np.float32(0.5), old + np.float32(0.5)) - returns)
    close(loss, np.where(mask, np.maximum(error, clipped_error) / 2, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(clipped, (clipped_error > error) & mask)
    plain, never = value_loss(values, old, returns, mask, np.inf)
    close(plain, np.where(mask, error / 2, 0), rtol=1e-6)
    assert not never.any()


# ---------------------------------------------------------------- what is masked


def test_garbage_past_the_end_reaches_no_value_and_no_gradient():
    mask = jnp.array([[True, True, False, False], [False] * 4])
    a, b, c = jnp.array(np.random.default_rng(0).normal(size=(3, 2, 4)), jnp.float32)

    def policy(new, old, advantages):
        loss, diagnostics = policy_losses.policy_loss(new, old, advantages, mask, 0.2, 0.2)
        return loss.sum() + diagnostics["approx_kl"].sum(), (loss, diagnostics)

    def value(values, old, returns):
        loss, clipped = losses.value_loss(values, old, returns, mask, 0.2)
        return loss.sum(), (loss, clipped)

    for function in (policy, value):
        with_gradient = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2), has_aux=True))
        clean = with_gradient(a, b, c)
        for garbage in (np.nan, np.inf, -np.inf, 1e4, -1e38):
            dirty = with_gradient(
                *(jnp.where(mask, x, sign * garbage) for x, sign in ((a, 1), (b, -1), (c, 1)))
            )
            jax.tree.map(np.testing.assert_array_equal, clean, dirty)
            gradient = np.array(dirty[1][0])
            assert (
                np.isfinite(gradient).all() and (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()
            )


def test_cross_entropy_ignores_masked_logits_and_targets():
    targets, mask = jnp.array([[2, -100]]), jnp.array([[True, False]])

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_loss(logits):
        loss = losses.cross_entropy(logits, targets, mask)
        return loss.sum(), loss

    for garbage in (np.nan, np.inf, -np.inf):
        gradient, loss = gradient_and_loss(jnp.array([[[1.0, 2.0, 3.0], [garbage] * 3]]))
        close(loss, [[np.log(1 + np.exp(-1) + np.exp(-2)), 0]], rtol=1e-6)
        p = np.exp([1, 2, 3]) / np.exp([1, 2, 3]).sum()
        close(gradient, [[p - [0, 0, 1], [0, 0, 0]]], rtol=1e-5)


# ---------------------------------------------------------------- logits


def log_softmax(logits):
    logits = logits.astype(np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))


@quick
@hypothesis.given(st.integers(0, 1000), st.sampled_from([1.0, 30.0, 1000.0]), st.sampled_from([1, 2, 11]))
def test_logprobs_entropy_and_cross_entropy_equal_numpy(seed, scale, vocabulary):
    generator = np.random.default_rng(seed)
    logits = generator.normal(5, scale, (2, 3, vocabulary)).astype(np.float32)
    tokens = generator.integers(0, vocabulary, (2, 3))
    temperature = np.array([0.7, 2.0], np.float32)
    expected = log_softmax(logits / temperature[:, None, None].astype(np.float64))
    logprobs, entropy = token_logprobs(logits, tokens, temperature)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    close(logprobs, np.take_along_axis(expected, tokens[..., None], -1)[..., 0], rtol=1e-6, atol=1e-6)
    close(entropy, -(np.exp(expected) * expected).sum(-1), rtol=1e-5, atol=1e-6)
    plain = log_softmax(logits)
    close(entropy_from_logits(logits), -(np.exp(plain) * plain).sum(-1), rtol=1e-5, atol=1e-6)
    mask = np.array([[True, True, False], [True, False, False]])
    nll = -np.take_along_axis(plain, tokens[..., None], -1)[..., 0]
    close(cross_entropy(logits, tokens, mask), np.where(mask, nll, 0), rtol=1e-6, atol=1e-6)


def test_a_near_certain_token_keeps_its_small_logprob_beside_large_logits():
    """log(1 + 2 exp(-9)) is 2.5e-4; at a logit of 4000 float32 counts in steps of 2.4e-4."""
    logits = jnp.array([[[4000.0, 3991.0, 3991.0]]])
    rest = 2 * np.exp(-9)
    logprobs, entropy = token_logprobs(logits, jnp.array([[0]]), 1.0)
    close(logprobs, [[-np.log1p(rest)]], rtol=1e-3)
    close(cross_entropy(logits, jnp.array([[0]]), jnp.ones((1, 1), bool)), -logprobs, rtol=1e-6)
    close(entropy, [[(np.log1p(rest) + rest * (9 + np.log1p(rest))) / (1 + rest)]], rtol=1e-3)


def test_one_temperature_for_all_rows_or_one_per_row():
    logits = np.random.default_rng(1).normal(size=(3, 2, 5)).astype(np.float32)
    tokens = np.zeros((3, 2), int)
    single = token_logprobs(logits, tokens, 0.5)
    close(single, token_logprobs(logits, tokens, np.full(3, 0.5, np.float32)), rtol=1e-6)
    close(single, token_logprobs(logits / 0.5, tokens, 1.0), rtol=1e-6)
    mixed = token_logprobs(logits, tokens, np.array([1.0, 0.5, 2.0], np.float32))
    assert not np.allclose(mixed[0][0], single[0][0])
    for i, temperature in enumerate([1.0, 0.5, 2.0]):
        alone = token_logprobs(logits, tokens, temperature)
        for a, b in zip(mixed, alone, strict=True):
            close(a[i], b[i], rtol=1e-6)


def test_half_precision_logits_are_normalised_in_float32():
    logits = np.random.default_rng(2).normal(size=(1, 4, 300)).astype(np.float32)
    half = jnp.array(logits, jnp.bfloat16)
    tokens = jnp.array([[3, 5, 7, 299]])
    wide = half.astype(jnp.float32)
    np.testing.assert_array_equal(token_logprobs(half, tokens, 0.7), token_logprobs(wide, tokens, 0.7))
    np.testing.assert_array_equal(
        cross_entropy(half, tokens, tokens > 0), cross_entropy(wide, tokens, tokens > 0)
    )
    assert entropy_from_logits(half).dtype == jnp.float32


def test_gradients_equal_those_of_jax_softmax():
    logits = jnp.array(np.random.default_rng(3).normal(0, 3, size=(2, 3, 7)), jnp.float32)
    tokens = jnp.array([[0, 1, 6], [2, 2, 5]])

    def ours(logits):
        logprobs, entropy = token_logprobs(logits, tokens, jnp.array([0.7, 1.3]))
        return (logprobs + 0.3 * entropy).sum()

    def theirs(logits):
        log_p = jax.nn.log_softmax(logits / jnp.array([0.7, 1.3])[:, None, None])
        logprobs = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
        return (logprobs - 0.3 * (jnp.exp(log_p) * log_p).sum(-1)).sum()

    close(jax.grad(ours)(logits), jax.grad(theirs)(logits), rtol=1e-5, atol=1e-6)


def test_an_unlikely_token_beside_a_certain_one_pulls_it_down():
    """exp(-200) is 0 in float32; the gradient is one-hot minus probabilities all the same."""
    logits = jnp.array([[[200.0, 0.0, 0.0]]])
    gradient = jax.grad(lambda x: token_logprobs(x, jnp.array([[1]]), 1.0)[0].sum())(logits)
    close(gradient, [[[-1, 1, 0]]])
    gradient = jax.grad(lambda x: cross_entropy(x, jnp.array([[1]]), jnp.ones((1, 1), bool)).sum())(logits)
    close(gradient, [[[1, -1, 0]]])


@pytest.mark.parametrize("impossible", [-np.inf, float(np.finfo(np.float32).min), -1e9])
def test_impossible_tokens_count_for_nothing(impossible):
    """A vocabulary with two tokens ruled out is the vocabulary without them, in value and gradient."""
    small = jnp.array([[[0.5, -1.0, 2.0]]])
    large = jnp.array([[[0.5, impossible, -1.0, 2.0, impossible]]])

    def total(logits, token):
        logprobs, entropy = token_logprobs(logits, token, 0.7)
        return (2 * logprobs + entropy).sum()

    close(total(large, jnp.array([[3]])), total(small, jnp.array([[2]])), rtol=1e-6)
    gradient = jax.grad(total)(large, jnp.array([[3]]))
    close(gradient[..., [0, 2, 3]], jax.grad(total)(small, jnp.array([[2]])), rtol=1e-5)
    assert (gradient[..., [1, 4]] == 0).all()


def test_a_row_where_nothing_is_possible_gives_no_nan():
    logits = jnp.full((1, 2, 3), -jnp.inf).at[0, 0].set(jnp.array([1.0, 2.0, 3.0]))
    mask = jnp.array([[True, False]])

    def total(logits):
        logprobs, entropy = token_logprobs(logits, jnp.zeros((1, 2), int), 1.0)
        loss, _ = policy_loss(logprobs, logprobs, mask * 1.0, mask, 0.2, 0.2)
        return loss.sum() + jnp.where(mask, entropy, 0).sum()

    value, gradient = jax.value_and_grad(total)(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert (gradient[0, 1] == 0).all() and (gradient[0, 0] != 0).any()


def test_entropy_is_the_logarithm_of_equal_choices():
    close(entropy_from_logits(jnp.zeros((2, 50))), np.log([50, 50]), rtol=1e-6)
    close(entropy_from_logits(jnp.array([1e4, 0.0, 0.0])), 0, atol=1e-6)
    gradient = jax.grad(lambda x: entropy_from_logits(x))(jnp.zeros(5))
    close(gradient, np.zeros(5), atol=1e-6)


# ---------------------------------------------------------------- pairs


def test_pairwise_loss_by_hand():
    chosen, rejected = jnp.array([2.0, -1.0, 0.0]), jnp.array([1.0, 1.0, 0.0])
    zeros, ones = jnp.zeros(3), jnp.ones(3)
    loss, accuracy = pairwise_loss(chosen, rejected, zeros, 0.0, ones)
    terms = [np.log1p(np.exp(-1)), np.log1p(np.exp(2)), np.log(2)]
    close(loss, np.mean(terms), rtol=1e-6)
    close(accuracy, 1 / 3, rtol=1e-6)  # a tie is no success
    centred, _ = pairwise_loss(chosen, rejected, zeros, 0.01, ones)
    close(centred - loss, 0.01 * (9 + 0 + 0) / 3, rtol=1e-4)
    with_margin, _ = pairwise_loss(chosen, rejected, jnp.array([1.0, 0, 0]), 0.0, ones)
    close(with_margin, np.mean([np.log(2), *terms[1:]]), rtol=1e-6)
    weighted, accuracy = pairwise_loss(chosen, rejected, zeros, 0.0, jnp.array([3.0, 1.0, 0.0]))
    close(weighted, (3 * terms[0] + terms[1]) / 4, rtol=1e-6)
    close(accuracy, 3 / 4)


def test_pairs_of_weight_0_count_for_nothing():
    weight = jnp.array([1.0, 0.0])

    def loss(chosen, rejected, margin):
        return pairwise_loss(chosen, rejected, margin, 0.01, weight)[0]

    clean = jax.value_and_grad(loss, argnums=(0, 1))(*(jnp.array([x, 0.0]) for x in (1.0, 0.5, 0.1)))
    dirty = jax.value_and_grad(loss, argnums=(0, 1))(*(jnp.array([x, jnp.nan]) for x in (1.0, 0.5, 0.1)))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    nothing = pairwise_loss(*(jnp.full(2, jnp.nan),) * 3, 0.01, jnp.zeros(2))
    assert nothing == (0, 0)


def test_pairwise_loss_is_stable_for_large_scores():
    scores = jnp.array([1e4, -1e4])
    (loss, _), gradient = jax.value_and_grad(losses.pairwise_loss, has_aux=True)(
        scores, -scores, jnp.zeros(2), 0.0, jnp.ones(2)
    )
    close(loss, 1e4)
    close(gradient, [0, -0.5])


def test_changing_a_setting_compiles_nothing_and_settings_batch():
    new, old, returns = np.random.default_rng(5).normal(size=(3, 2, 4)).astype(np.float32)
    mask = np.arange(4) < np.array([4, 1])[:, None]
    traces = []

    @jax.jit
    def both(clip):
        traces.append(clip)
        policy, _ = policy_losses.policy_loss(new, old, returns, mask, clip, clip)
        value, _ = losses.value_loss(new, old, returns, mask, clip)
        return policy, value

    separate = [both(clip) for clip in (0.1, 0.4)]
    assert len(traces) == 1
    population = jax.vmap(both)(jnp.array([0.1, 0.4]))
    for i in range(2):
        for a, b in zip(population, separate[i], strict=True):
            close(a[i], b, rtol=1e-5, atol=1e-6)
    assert not np.allclose(separate[0][0], separate[1][0]) and not np.allclose(separate[0][1], separate[1][1])
