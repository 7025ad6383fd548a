"""Score shaping: clipping, the missing-EOS rule and length penalties. Each of the B completions has one score.

Length penalties are 0 or negative, and the caller adds them to the scores. Normalisation is in `running`.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jax import Array


def clip_scores(scores: Array, limit: Array | float) -> Array:
    """Returns the scores clipped to [-limit, limit]: f32[B] -> f32[B]. A limit of infinity disables clipping."""
    return jnp.clip(jnp.asarray(scores, jnp.float32), -limit, limit)


MISSING_EOS: dict[str, Callable[[Array, Array | float], Array]] = {
    "subtract": lambda scores, penalty: scores - penalty,
    "replace": lambda scores, penalty: jnp.zeros_like(scores) - penalty,
}


def missing_eos(scores: Array, ended: Array, penalty: Array | float, how: str = "subtract") -> Array:
    """Penalises completions that did not end with a stop token, and returns all scores.

      subtract  The new score is score - penalty (as in TRL).
      replace   The new score is -penalty (2403.17031, where the penalty is 1).

    Args:
      scores: f32[B].
      ended: bool[B].
      penalty: f32[] >= 0.
      how: a name in `MISSING_EOS`; any other name raises `KeyError`.

    Returns:
      f32[B]. A completion that ended with a stop token keeps its score.
    """
    chex.assert_rank([scores, ended], 1)
    chex.assert_equal_shape([scores, ended])
    chex.assert_type(ended, bool)
    scores = jnp.asarray(scores, jnp.float32)
    return jnp.where(ended, scores, MISSING_EOS[how](scores, penalty))


def length_penalty(lengths: Array, free: Array | float, per_token: Array | float) -> Array:
    """Returns -per_token * max(0, length - free): i32[B] -> f32[B]. The caller adds this penalty to the scores."""
    return -per_token * jnp.maximum(jnp.asarray(lengths, jnp.float32) - free, 0.0)


def overlong_penalty(lengths: Array, limit: Array | float, buffer: Array | float) -> Array:
    """Returns DAPO's soft overlong penalty (2503.14476, equation 13). The caller scales the penalty and adds it.

      0                                    if length <= limit - buffer
      (limit - buffer - length) / buffer   if limit - buffer < length <= limit
      -1                                   if length > limit

    Args:
      lengths: i32[B]; number of tokens of each completion.
      limit: f32[]; number of tokens. Longer completions get the full penalty of -1.
      buffer: f32[] >= 0; number of tokens before the limit. Over these tokens the penalty grows from 0 to -1. A buffer
        of 0 makes the limit hard.

    Returns:
      f32[B] in [-1, 0].
    """
    limit, buffer = jnp.asarray(limit, jnp.float32), jnp.asarray(buffer, jnp.float32)
    beyond = jnp.asarray(lengths, jnp.float32) - (limit - buffer)
    # Lengths are integers. So if the buffer is 0, `beyond` is either at least 1 or not positive.
    return -jnp.clip(beyond / jnp.maximum(buffer, 1e-6), 0.0, 1.0)


def informative_groups(scores: Array, group: int, steps: Array | None = None) -> Array:
    """Returns True for each prompt whose completions have different scores, else False.

    If all scores of a group are equal and the baseline is the group mean, the group has no gradient (2503.14476).

    Args:
      scores: f32[B]; rows i*group to (i+1)*group - 1 are the completions of one prompt. With `steps`, f32[B,R].
      group: completions per prompt; static; a divisor of B. The result is False for groups of one completion.
      steps: bool[B,R]; True where `scores` holds the reward of a step. The group mean is then that of these rewards.

    Returns:
      bool[B/group].
    """
    chex.assert_rank(scores, 1 if steps is None else 2)
    chex.assert_is_divisible(scores.shape[0], group)
    by_group = jnp.asarray(scores, jnp.float32).reshape(scores.shape[0] // group, -1)
    real = True if steps is None else jnp.asarray(steps).reshape(by_group.shape)
    return jnp.max(by_group, axis=1, where=real, initial=-jnp.inf) > jnp.min(
        by_group, axis=1, where=real, initial=jnp.inf
    )
