"""What becomes of a score before it is a reward: one number per answer, B answers, R tokens.

Scores here are all real: there is no mask. Penalties are 0 or less, and are added.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jax import Array

from jaxrlhf.algorithms import masked


def fit_gain_bias(scores: Array) -> tuple[Array, Array]:
    """gain and bias such that gain * score + bias has mean 0 and deviation 1 over these scores (1909.08593).

    Fitted once, on answers of the policy before it learns, and kept. The deviation is that of the scores as the
    whole population, as in lm-human-preferences.

    Args:
      scores: f32[N].

    Returns:
      gain f32[] and bias f32[]. Scores that are all equal have no scale: gain 1, and the bias brings them to 0.
    """
    chex.assert_rank(scores, 1)
    scores = jnp.asarray(scores, jnp.float32)
    # Counted from the first score: equal ones are then exactly 0, and their variance is no rounding error.
    origin = scores[0]
    everything = jnp.ones(scores.shape, bool)
    mean = masked.masked_mean(scores - origin, everything)
    variance = masked.masked_variance(scores - origin, everything, unbiased=False)
    gain = jnp.where(variance > 0, 1.0 / jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 1.0)
    return gain, -gain * (origin + mean)


def clip_scores(scores: Array, limit: Array | float) -> Array:
    """Scores held within [-limit, limit]: f32[B] -> f32[B]; infinity switches it off."""
    return jnp.clip(jnp.asarray(scores, jnp.float32), -limit, limit)


def whiten_scores(scores: Array, shift_mean: bool = True, epsilon: float = 1e-8) -> Array:
    """`masked.whiten` over the scores of one global batch: f32[B] -> f32[B]; equal scores become 0 or their mean."""
    chex.assert_rank(scores, 1)
    return masked.whiten(scores, jnp.ones(scores.shape, bool), shift_mean, epsilon)


MISSING_EOS: dict[str, Callable[[Array, Array | float], Array]] = {
    "subtract": lambda scores, penalty: scores - penalty,
    "replace": lambda scores, penalty: jnp.zeros_like(scores) - penalty,
}


def missing_eos(scores: Array, ended: Array, penalty: Array | float, how: str = "subtract") -> Array:
    """The rule for answers that did not end with a stop token.

      subtract  score - penalty (TRL)
      replace   -penalty, whatever the answer said so far (2403.17031, with a penalty of 1)

    Args:
      scores: f32[B].
      ended: bool[B].
      penalty: f32[] >= 0.
      how: a name from `MISSING_EOS`; another is a KeyError.

    Returns:
      f32[B]; scores of answers that ended are as they were.
    """
    chex.assert_rank([scores, ended], 1)
    chex.assert_equal_shape([scores, ended])
    chex.assert_type(ended, bool)
    scores = jnp.asarray(scores, jnp.float32)
    return jnp.where(ended, scores, MISSING_EOS[how](scores, penalty))


def length_penalty(lengths: Array, free: Array | float, per_token: Array | float) -> Array:
    """-per_token * max(0, length - free): i32[B] -> f32[B], to be added to the scores."""
    return -per_token * jnp.maximum(jnp.asarray(lengths, jnp.float32) - free, 0.0)


def overlong_penalty(lengths: Array, limit: Array | float, buffer: Array | float) -> Array:
    """DAPO's soft over-long punishment (2503.14476, equation 13), to be scaled and added to the scores.

      0                                 length <= limit - buffer
      (limit - buffer - length) / buffer   within the buffer before the limit
      -1                                beyond the limit

    Args:
      lengths: i32[B]; tokens of each answer.
      limit: f32[]; the longest answer that is not punished in full, in tokens.
      buffer: f32[] >= 0; tokens before the limit. 0 is a hard limit.

    Returns:
      f32[B] in [-1, 0].
    """
    limit, buffer = jnp.asarray(limit, jnp.float32), jnp.asarray(buffer, jnp.float32)
    beyond = jnp.asarray(lengths, jnp.float32) - (limit - buffer)
    # Lengths are whole: a buffer of less than one token holds none, and beyond is 1 or more or not at all.
    return -jnp.clip(beyond / jnp.maximum(buffer, 1e-6), 0.0, 1.0)


def informative_groups(scores: Array, group: int) -> Array:
    """Which prompts have answers of different scores: those that teach group baselines something (2503.14476).

    Args:
      scores: f32[B]; rows i*group to (i+1)*group - 1 answer the same prompt.
      group: answers per prompt, static; divides B. A group of one is never informative.

    Returns:
      bool[B/group].
    """
    chex.assert_rank(scores, 1)
    chex.assert_is_divisible(scores.shape[0], group)
    by_group = jnp.asarray(scores, jnp.float32).reshape(-1, group)
    return jnp.max(by_group, axis=1) > jnp.min(by_group, axis=1)
