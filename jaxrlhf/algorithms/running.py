"""Running statistics: the moments of scores, and the moving average of weights."""

from typing import TypeVar

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxrlhf.algorithms.masked import ROUNDING

Tree = TypeVar("Tree")


@struct.dataclass
class RunningMoments:
    """Count, mean and spread of all scores so far. Checkpoints contain these moments."""

    count: Array  # f32[]; exact up to 2^24 scores
    mean: Array  # f32[]
    squares: Array  # f32[]; sum of squared deviations from the mean


def init_moments() -> RunningMoments:
    """Returns the moments before the first score."""
    return RunningMoments(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def merge_moments(a: RunningMoments, b: RunningMoments) -> RunningMoments:
    """Returns the moments of the union of two sets of scores (Chan, Golub and LeVeque 1979).

    delta = mean_b - mean_a;  n = n_a + n_b
    mean  = mean_a + delta * n_b / n
    squares = squares_a + squares_b + delta^2 * n_a * n_b / n
    """
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1.0)
    delta = b.mean - a.mean
    squares = a.squares + b.squares + jnp.square(delta) * a.count * share
    return RunningMoments(count, a.mean + delta * share, squares)


def update_moments(moments: RunningMoments, scores: Array) -> RunningMoments:
    """Adds the scores f32[B] to the moments, and returns the new moments.

    The moments hold the sum of squared deviations. A sum of squared scores would lose precision if the mean is large.
    """
    chex.assert_rank(scores, 1)
    scores = jnp.asarray(scores, jnp.float32)
    count = jnp.float32(scores.shape[0])
    # The mean is computed relative to the first score, so that equal scores have a spread of exactly 0.
    origin = jnp.sum(scores[:1])
    mean = origin + jnp.sum(scores - origin) / jnp.maximum(count, 1.0)
    return merge_moments(moments, RunningMoments(count, mean, jnp.sum(jnp.square(scores - mean))))


def gain_and_bias(moments: RunningMoments) -> tuple[Array, Array]:
    """Returns (gain, bias), f32[] each, such that gain * score + bias is the normalised score (1909.08593).

    gain = 1 / deviation;  bias = -mean / deviation
    """
    gain = 1.0 / _deviation(moments)
    return gain, -moments.mean * gain


def normalise(moments: RunningMoments, scores: Array) -> Array:
    """Returns (score - mean) / deviation. Mean and deviation come from `moments`.

    The deviation is the square root of the unbiased variance. If the moments hold fewer than two scores, or if the
    scores vary by rounding only, the deviation is 1.

    Args:
      moments: moments of the initial completions' scores, of all scores so far, or of this batch's scores (whitening).
      scores: f32[B].

    Returns:
      f32[B].
    """
    return (jnp.asarray(scores, jnp.float32) - moments.mean) / _deviation(moments)


def _deviation(moments: RunningMoments) -> Array:
    """Returns the standard deviation of the scores so far, f32[]. If the scores do not vary, the result is 1."""
    variance = moments.squares / jnp.maximum(moments.count - 1.0, 1.0)
    varies = variance > jnp.square(ROUNDING * moments.mean)
    return jnp.sqrt(jnp.where(varies, variance, 1.0))


def ema(old: Tree, new: Tree, decay: Array | float) -> Tree:
    """Returns the exponential moving average of a tree of arrays: decay * old + (1 - decay) * new.

    The arithmetic is float32. Each leaf keeps the dtype of `old`. Use float32 for `old`: bfloat16 cannot represent the
    small steps of a slow average.

    Args:
      old, new: trees of arrays with the same structure and shapes.
      decay: f32[] in [0, 1]. 0 returns the new tree, 1 the old tree.

    Returns:
      A tree with the structure of `old`. Where old and new are equal, the number does not change.
    """
    chex.assert_trees_all_equal_structs(old, new)
    chex.assert_trees_all_equal_shapes(old, new)
    step = 1.0 - jnp.asarray(decay, jnp.float32)

    def leaf(old: Array, new: Array) -> Array:
        wide = jnp.asarray(old, jnp.float32)
        moved = wide + step * (jnp.asarray(new, jnp.float32) - wide)
        return moved.astype(jnp.asarray(old).dtype)

    return jax.tree.map(leaf, old, new)
