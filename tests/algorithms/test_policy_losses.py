"""Policy losses against plain Python in value and gradient, their reductions to each other, importance weights."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms import policy_losses as module

close = np.testing.assert_allclose
NAMES = sorted(module.POLICY_LOSSES)
quick = hypothesis.settings(deadline=None, max_examples=25, derandomize=True)
importance_weights = jax.jit(module.importance_weights, static_argnames="level")


@functools.partial(jax.jit, static_argnames="name")
def with_gradient(name, new, old, advantages, mask, low=0.2, high=0.2, dual_clip=None):
    """Loss per token, diagnostics, and the gradients of the summed loss by new, old and advantages."""

    def total(new, old, advantages):
        loss, noted = module.policy_loss(new, old, advantages, mask, low, high, dual_clip, loss=name)
        return loss.sum(), (loss, noted)

    gradients, (loss, noted) = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(new, old, advantages)
    return loss, noted, gradients


@st.composite
def cases(draw, arrays=3):
    """[B,R] arrays and a mask of answers, of which some are empty and some fill their row."""
    rows, length = draw(st.sampled_from([(1, 1), (3, 5), (4, 2)]))
    lengths = draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    return (*generator.normal(0, 1, (arrays, rows, length)).astype(np.float32), lengths)


def mask_of(lengths, like):
    return np.arange(like.shape[1]) < np.array(lengths)[:, None]


def surrogate(ratio, advantage, low, high, dual_clip):
    """Loss and its derivative by log ratio, of one token, as a case distinction."""
    if advantage > 0:
        clipped = ratio > 1 + high
        return -advantage * (1 + high if clipped else ratio), 0.0 if clipped else -advantage * ratio
    if ratio < 1 - low:
        return -advantage * (1 - low), 0.0
    if ratio > dual_clip:
        return -advantage * dual_clip, 0.0
    return -advantage * ratio, -advantage * ratio


def reference(name, new, old, advantages, lengths, low, high, dual_clip):
    """Loss, gradient, ratio and approximate KL of every real token, in plain Python; 0 (ratio 1) elsewhere."""
    found = [np.zeros(new.shape), np.zeros(new.shape), np.ones(new.shape), np.zeros(new.shape)]
    for i, length in enumerate(lengths):
        log_ratios = [float(new[i, t]) - float(old[i, t]) for t in range(length)]
        for t, log_ratio in enumerate(log_ratios):
            advantage, logprob = float(advantages[i, t]), float(new[i, t])
            ratio = math.exp(sum(log_ratios) / length if name == "gspo" else log_ratio)
            if name in ("clip", "gspo"):
                loss, slope = surrogate(ratio, advantage, low, high, dual_clip)
            else:
                weight = min(max(ratio, 1 - low), 1 + high) if name == "cispo" else 1.0
                loss, slope = -weight * advantage * logprob, -weight * advantage
            for array, x in zip(found, (loss, slope, ratio, math.exp(log_ratio) - 1 - log_ratio)):
                array[i, t] = x
    return found


@pytest.mark.parametrize("name", NAMES)
@quick
@hypothesis.given(cases(), st.sampled_from([(0.1, 0.3, math.inf), (0.2, 0.2, 1.5), (1.0, 4.0, 3.0)]))
def test_every_loss_equals_plain_python_in_value_and_gradient(name, case, settings):
    new, old, advantages, lengths = case
    mask = mask_of(lengths, new)
    loss, noted, gradients = with_gradient(name, new, old, advantages, mask, *settings)
    expected, slope, ratio, approx_kl = reference(name, new, old, advantages, lengths, *settings)
    close(loss, expected, rtol=1e-4, atol=1e-5)
    close(gradients[0], slope, rtol=1e-4, atol=1e-5)
    assert (gradients[1] == 0).all() and (gradients[2] == 0).all()
    close(noted["ratio"], ratio, rtol=1e-4)
    close(noted["approx_kl"], approx_kl, rtol=1e-3, atol=1e-5)
    low, high, dual_clip = settings
    flags = {
        "clipped_low": (ratio < 1 - low) & ((advantages < 0) | (name == "cispo")),
        "clipped_high": (ratio > 1 + high) & ((advantages > 0) | (name == "cispo")),
        "clipped_dual": (ratio > dual_clip) & (advantages < 0) & (name != "cispo"),
    }
    for key, expected in flags.items():
        np.testing.assert_array_equal(noted[key], expected & mask & (name != "pg"), err_msg=key)
    if name in ("clip", "gspo"):
        clipped = noted["clipped_low"] | noted["clipped_high"] | noted["clipped_dual"]
        np.testing.assert_array_equal(np.array(gradients[0])[mask] == 0, np.array(clipped)[mask])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_garbage_past_the_end_reaches_no_value_and_no_gradient(name, dual_clip):
    mask = mask_of([2, 0, 4], np.zeros((3, 4)))
    arrays = np.random.default_rng(0).normal(size=(3, 3, 4)).astype(np.float32)
    clean = with_gradient(name, *arrays, mask, dual_clip=dual_clip)
    assert (np.array(clean[2][0])[mask] != 0).any()
    for garbage in (np.nan, np.inf, -np.inf, 1e4, -1e38):
        dirty = [np.where(mask, x, sign * garbage) for x, sign in zip(arrays, (1, -1, 1))]
        found = with_gradient(name, *dirty, mask, dual_clip=dual_clip)
        jax.tree.map(np.testing.assert_array_equal, found, clean)
        assert (np.array(found[0])[~mask] == 0).all() and (np.array(found[2][0])[~mask] == 0).all()


# ---------------------------------------------------------------- reductions


@pytest.mark.parametrize("name", NAMES)
@quick
@hypothesis.given(cases(arrays=2))
def test_at_ratio_1_all_have_the_gradient_of_reinforce(name, case):
    logprobs, advantages, lengths = case
    mask = mask_of(lengths, logprobs)
    _, noted, gradients = with_gradient(name, logprobs, logprobs, advantages, mask, 0.2, 0.2, 3.0)
    close(gradients[0], np.where(mask, -advantages, 0), rtol=1e-6)
    assert (noted["ratio"] == 1).all() and (noted["approx_kl"] == 0).all()


@quick
@hypothesis.given(cases(), st.sampled_from([math.inf, 1.3]))
def test_gspo_on_one_token_answers_is_ppo(case, dual_clip):
    new, old, advantages, lengths = case
    mask = mask_of([min(length, 1) for length in lengths], new)
    ours = with_gradient("gspo", new, old, advantages, mask, 0.1, 0.3, dual_clip)
    jax.tree.map(
        lambda a, b: close(a, b, rtol=1e-5),
        ours,
        with_gradient("clip", new, old, advantages, mask, 0.1, 0.3, dual_clip),
    )


@pytest.mark.parametrize("name", ["clip", "gspo"])
@quick
@hypothesis.given(cases())
def test_dual_clip_off_is_ppo(name, case):
    new, old, advantages, lengths = case
    arguments = (new, old, advantages, mask_of(lengths, new), 0.1, 0.3)
    without = with_gradient(name, *arguments, None)
    for off in (math.inf, 1e30):
        jax.tree.map(np.testing.assert_array_equal, with_gradient(name, *arguments, off), without)


def test_gspo_has_the_gradient_of_the_sequence_objective():
    """-(1/B) sum_i s_i A_i, differentiated as the paper's equation 5 is written, equals the mean of token means."""
    new, old = np.random.default_rng(1).normal(0, 0.1, (2, 3, 4)).astype(np.float32)
    lengths, advantage = np.array([4, 1, 2]), np.array([1.0, -2.0, 0.5], np.float32)
    mask = mask_of(lengths, new)

    def sequence(new):
        s = jnp.exp(jnp.where(mask, new - old, 0).sum(axis=1) / lengths)
        return -(s * advantage).mean()

    def ours(new):
        loss, _ = module.policy_loss(new, old, advantage[:, None] * mask, mask, 0.9, 9.0, loss="gspo")
        return masked.aggregate(loss, mask, "sequence", mask.sum(), 3)

    for a, b in zip(jax.value_and_grad(ours)(new), jax.value_and_grad(sequence)(new)):
        close(a, b, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- by hand


def test_dual_clip_by_hand():
    """Ratios 1/2, 1 and 10 with advantages 1, -1 and -4: the last one pays 3 * 4 at most, not 40."""
    old = jnp.array([[-1.0, -1.0, -3.0]])
    new = old + jnp.log(jnp.array([[0.5, 1.0, 10.0]]))
    advantages, mask = jnp.array([[1.0, -1.0, -4.0]]), jnp.ones((1, 3), bool)
    loss, noted, gradients = with_gradient("clip", new, old, advantages, mask, 0.2, 0.2, 3.0)
    close(loss, [[-0.5, 1, 12]], rtol=1e-5)
    close(gradients[0], [[-0.5, 1, 0]], rtol=1e-5)
    assert noted["clipped_dual"].tolist() == [[False, False, True]]
    loss, noted, gradients = with_gradient("clip", new, old, advantages, mask, 0.2, 0.2)
    close(loss, [[-0.5, 1, 40]], rtol=1e-5)
    assert not noted["clipped_dual"].any()


def test_cispo_clips_the_weight_and_never_the_token():
    old = jnp.full((1, 4), -2.0)
    new = old + jnp.log(jnp.array([[3.0, 3.0, 0.25, 1.5]]))
    advantages, mask = jnp.array([[1.0, -1.0, 1.0, 2.0]]), jnp.ones((1, 4), bool)
    loss, _, gradients = with_gradient("cispo", new, old, advantages, mask, 0.5, 1.0)
    close(gradients[0], [[-2, 2, -0.5, -3]], rtol=1e-5)
    close(loss, gradients[0] * new, rtol=1e-5)
    _, noted, gradients = with_gradient("cispo", new, old, advantages, mask, 1.0, 1.0)
    close(gradients[0], [[-2, 2, -0.25, -3]], rtol=1e-5)  # 1 and more: no lower bound
    assert noted["clipped_high"].tolist() == [[True, True, False, False]] and not noted["clipped_low"].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distance", [100.0, -100.0, 1e30])
def test_a_far_away_token_gives_no_nan(name, distance):
    """exp(100) is infinite in float32; clipped or not, values and gradients stay finite."""
    new, old = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.0 - distance] * 2])
    for dual_clip in (None, 3.0):
        found = with_gradient(
            name, new, old, jnp.array([[1.0, -1.0]]), jnp.ones((1, 2), bool), dual_clip=dual_clip
        )
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("name", NAMES)
def test_log_ratios_end_at_their_bound_and_have_no_gradient_beyond(name):
    """At 2 the ratio is exp(2) of a token 3 nats off; None leaves exp(100) infinite."""
    new, advantages, mask = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.0, -1.0]]), jnp.ones((1, 2), bool)

    def found(distance, bound):
        def total(new):
            loss, noted = module.policy_loss(new, old, advantages, mask, 0.9, 1e9, None, bound, name)
            return loss.sum(), noted

        old = jnp.full((1, 2), -1.0 - distance)
        return jax.grad(total, has_aux=True)(new)

    gradient, noted = found(3.0, 2.0)
    close(noted["ratio"], math.exp(2), rtol=1e-6)
    close(noted["approx_kl"], math.exp(2) - 3, rtol=1e-6)
    close(gradient, {"cispo": math.exp(2), "pg": 1}.get(name, 0), rtol=1e-6)
    assert np.isinf(found(100.0, None)[1]["ratio"]).all()
    assert np.isinf(found(100.0, None)[1]["approx_kl"]).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_end_at_the_bound(level):
    train, sample, mask = jnp.array([[-1.0, -1.0]]), jnp.array([[-51.0, -51.0]]), jnp.ones((1, 2), bool)
    close(importance_weights(train, sample, mask, math.inf, level), math.exp(20), rtol=1e-5)
    close(importance_weights(train, sample, mask, math.inf, level, 3.0), math.exp(3), rtol=1e-5)
    assert (importance_weights(train, sample, mask, math.inf, "sequence", None) == math.inf).all()


# ---------------------------------------------------------------- accumulation


@functools.partial(jax.jit, static_argnames=("name", "how", "parts"))
def accumulated(name, how, parts, new, old, advantages, mask):
    """Value and gradient of the minibatch's loss, as the sum over microbatches of so many rows each."""

    def share(new, old, advantages, rows):
        loss, _ = module.policy_loss(new, old, advantages, rows, 0.2, 0.3, 3.0, loss=name)
        return masked.aggregate(loss, rows, how, mask.sum(), len(mask))

    value, gradient, start = 0.0, [], 0
    for size in parts:
        rows = slice(start, start + size)
        x, g = jax.value_and_grad(share)(new[rows], old[rows], advantages[rows], mask[rows])
        value, start = value + x, start + size
        gradient.append(g)
    return value, jnp.concatenate(gradient)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", sorted(masked.AGGREGATIONS))
def test_microbatches_sum_to_the_whole(name, how):
    generator = np.random.default_rng(3)
    for lengths in ((5, 1, 0, 3), (1, 5, 4, 2), (0, 0, 0, 0), (5, 5, 5, 5)):
        arrays = generator.normal(size=(3, 4, 5)).astype(np.float32)
        mask = mask_of(lengths, arrays[0])
        whole = accumulated(name, how, (4,), *arrays, mask)
        for parts in ((1, 1, 1, 1), (1, 3)):
            for a, b in zip(accumulated(name, how, parts, *arrays, mask), whole):
                close(a, b, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- importance weights


@pytest.mark.parametrize("level", ["token", "sequence"])
@quick
@hypothesis.given(cases(arrays=2), st.sampled_from([1.0, 2.0, math.inf]))
def test_importance_weights_equal_plain_python(level, case, cap):
    train, sample, lengths = case
    mask = mask_of(lengths, train)
    expected = np.zeros(train.shape)
    for i, length in enumerate(lengths):
        gaps = [float(train[i, t]) - float(sample[i, t]) for t in range(length)]
        for t in range(length):
            expected[i, t] = min(math.exp(gaps[t] if level == "token" else sum(gaps)), cap)
    found = importance_weights(train, sample, mask, cap, level)
    close(found, expected, rtol=1e-5, atol=1e-7)
    for garbage in (np.nan, np.inf, 1e38):
        dirty = importance_weights(np.where(mask, train, garbage), np.where(mask, sample, -garbage), mask, cap, level)
        np.testing.assert_array_equal(dirty, found)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_are_constants_and_1_where_the_engines_agree(level):
    logprobs, mask = jnp.array([[-0.5, -3.0, -9.0]]), jnp.array([[True, True, False]])
    close(importance_weights(logprobs, logprobs, mask, 2.0, level), [[1, 1, 0]])
    gradients = jax.grad(
        lambda a, b: module.importance_weights(a, b, mask, 2.0, level).sum(), argnums=(0, 1)
    )(logprobs, logprobs - 0.1)
    assert all((g == 0).all() for g in gradients)
    with pytest.raises(KeyError):
        importance_weights(logprobs, logprobs, mask, 2.0, "batch")
