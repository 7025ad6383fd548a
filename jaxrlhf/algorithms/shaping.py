"""Score shaping: clipping, the missing-EOS rule and length penalties. Each of B completions has one score.

Penalties are 0 or less and are added to the scores. Normalisation is in `running`.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jax import Array


def clip_scores(scores: Array, limit: Array | float) -> Array:
    """Scores clipped to [-limit, limit]: f32[B] -> f32[B]. A limit of infinity disables clipping."""
    return jnp.clip(jnp.asarray(scores, jnp.float32), -limit, limit)


MISSING_EOS: dict[str, Callable[[Array, Array | float], Array]] = {
    "subtract": lambda scores, penalty: scores - penalty,
    "replace": lambda scores, penalty: jnp.zeros_like(scores) - penalty,
}


def missing_eos(scores: Array, ended: Array, penalty: Array | float, how: str = "subtract") -> Array:
    """Penalises completions that did not end with a stop token.

      subtract  score - penalty (TRL)
      replace   -penalty, whatever the score (2403.17031, with a penalty of 1)

    Args:
      scores: f32[B].
      ended: bool[B].
      penalty: f32[] >= 0.
      how: a name from `MISSING_EOS`; another is a KeyError.

    Returns:
      f32[B]; scores of completions that ended are unchanged.
    """
    chex.assert_rank([scores, ended], 1)
    chex.assert_equal_shape([scores, ended])
    chex.assert_type(ended, bool)
    scores = jnp.asarray(scores, jnp.float32)
    return jnp.where(ended, scores, MISSING_EOS[how](scores, penalty))


def length_penalty(lengths: Array, free: Array | float, per_token: Array | float) -> Array:
    """-per_token * max(0, length - free): i32[B] -> f32[B]. The caller adds it to the scores."""
    return -per_token * jnp.maximum(jnp.asarray(lengths, jnp.float32) - free, 0.0)


def overlong_penalty(lengths: Array, limit: Array | float, buffer: Array | float) -> Array:
    """DAPO's soft overlong penalty (2503.14476, equation 13). The caller scales it and adds it to the scores.

      0                                    length <= limit - buffer
      (limit - buffer - length) / buffer   within the buffer before the limit
      -1                                   beyond the limit

    Args:
      lengths: i32[B]; tokens of each completion.
      limit: f32[]; tokens; longer completions get the full penalty.
      buffer: f32[] >= 0; tokens before the limit over which the penalty grows. 0 is a hard limit.

    Returns:
      f32[B] in [-1, 0].
    """
    limit, buffer = jnp.asarray(limit, jnp.float32), jnp.asarray(buffer, jnp.float32)
    beyond = jnp.asarray(lengths, jnp.float32) - (limit - buffer)
    # Lengths are integers, so with a buffer of 0 `beyond` is at least 1 or not positive.
    return -jnp.clip(beyond / jnp.maximum(buffer, 1e-6), 0.0, 1.0)


def informative_groups(scores: Array, group: int) -> Array:
    """Which prompts have completions with different scores.

    With a group baseline, a group of equal scores has no gradient (2503.14476).

    Args:
      scores: f32[B]; rows i*group to (i+1)*group - 1 are completions of one prompt.
      group: completions per prompt, static, a divisor of B. A group of one is never informative.

    Returns:
      bool[B/group].
    """
    chex.assert_rank(scores, 1)
    chex.assert_is_divisible(scores.shape[0], group)
    by_group = jnp.asarray(scores, jnp.float32).reshape(-1, group)
    return jnp.max(by_group, axis=1) > jnp.min(by_group, axis=1)
