"""Running statistics: moments of the scores, and a moving average of weights."""

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
    """Count, mean and spread of all scores so far; saved in checkpoints."""

    count: Array  # f32[]; exact up to 2^24 scores
    mean: Array  # f32[]
    squares: Array  # f32[]; sum of squared deviations from the mean


def init_moments() -> RunningMoments:
    """Moments before the first score."""
    return RunningMoments(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def merge_moments(a: RunningMoments, b: RunningMoments) -> RunningMoments:
    """Moments of two sets of scores together (Chan, Golub and LeVeque 1979).

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
    """The moments with the scores f32[B] added.

    The sum is over squared deviations, because a sum of raw squares loses precision if the mean is large.
    """
    chex.assert_rank(scores, 1)
    scores = jnp.asarray(scores, jnp.float32)
    count = jnp.float32(scores.shape[0])
    # Relative to the first score, so that equal scores have a spread of exactly 0.
    origin = jnp.sum(scores[:1])
    mean = origin + jnp.sum(scores - origin) / jnp.maximum(count, 1.0)
    return merge_moments(moments, RunningMoments(count, mean, jnp.sum(jnp.square(scores - mean))))


def gain_and_bias(moments: RunningMoments) -> tuple[Array, Array]:
    """(gain, bias) f32[] such that gain * score + bias equals `normalise` (1909.08593).

    gain = 1 / deviation;  bias = -mean / deviation
    """
    gain = 1.0 / _deviation(moments)
    return gain, -moments.mean * gain


def normalise(moments: RunningMoments, scores: Array) -> Array:
    """(score - mean) / deviation, with the mean and deviation of `moments`.

    The deviation is the root of the unbiased variance. It is taken as 1 if the moments hold fewer than two scores,
    or scores that vary by rounding only.

    Args:
      moments: moments of the scores of initial completions, of all completions so far, or of this batch (whitening).
      scores: f32[B].

    Returns:
      f32[B].
    """
    return (jnp.asarray(scores, jnp.float32) - moments.mean) / _deviation(moments)


def _deviation(moments: RunningMoments) -> Array:
    """Standard deviation f32[] of the scores so far; 1 if they do not vary, so that division by it is safe."""
    variance = moments.squares / jnp.maximum(moments.count - 1.0, 1.0)
    varies = variance > jnp.square(ROUNDING * moments.mean)
    return jnp.sqrt(jnp.where(varies, variance, 1.0))


def ema(old: Tree, new: Tree, decay: Array | float) -> Tree:
    """Exponential moving average of a tree of arrays: decay * old + (1 - decay) * new.

    The arithmetic is float32; each leaf keeps the dtype of `old`. Use float32 for `old`, because the steps of a slow
    average are below the resolution of bfloat16.

    Args:
      old, new: trees of the same structure and shapes.
      decay: f32[] in [0, 1]; 0 takes the new tree, 1 keeps the old one.

    Returns:
      A tree like `old`; unchanged where old and new are equal.
    """
    chex.assert_trees_all_equal_structs(old, new)
    chex.assert_trees_all_equal_shapes(old, new)
    step = 1.0 - jnp.asarray(decay, jnp.float32)

    def leaf(old: Array, new: Array) -> Array:
        wide = jnp.asarray(old, jnp.float32)
        moved = wide + step * (jnp.asarray(new, jnp.float32) - wide)
        return moved.astype(jnp.asarray(old).dtype)

    return jax.tree.map(leaf, old, new)
