"""What is carried from one iteration to the next: moments of the scores, averages of weights."""

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
    """Count, mean and spread of all scores so far; part of what a checkpoint holds."""

    count: Array  # f32[]; whole up to 2^24 answers, a share of them beyond
    mean: Array  # f32[]
    squares: Array  # f32[]; sum of squared distances from the mean


def init_moments() -> RunningMoments:
    """Returns the moments before any score has been seen."""
    return RunningMoments(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def merge_moments(a: RunningMoments, b: RunningMoments) -> RunningMoments:
    """Moments of both together (Chan, Golub and LeVeque 1979).

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
    """The moments with f32[B] more scores. No sum of raw squares: it would lose the spread beside a large mean."""
    chex.assert_rank(scores, 1)
    scores = jnp.asarray(scores, jnp.float32)
    count = jnp.float32(scores.shape[0])
    # Counted from the first score: equal ones then have exactly no spread, and not that of rounding.
    origin = jnp.sum(scores[:1])
    mean = origin + jnp.sum(scores - origin) / jnp.maximum(count, 1.0)
    return merge_moments(moments, RunningMoments(count, mean, jnp.sum(jnp.square(scores - mean))))


def gain_and_bias(moments: RunningMoments) -> tuple[Array, Array]:
    """(gain, bias) f32[] of 1909.08593, 1 / deviation and -mean / deviation: gain * score + bias is `normalise`."""
    gain = 1.0 / _deviation(moments)
    return gain, -moments.mean * gain


def normalise(moments: RunningMoments, scores: Array) -> Array:
    """(score - mean) / deviation by the moments.

    The deviation is the root of the unbiased variance. Moments of fewer than two scores, or of scores that were all
    equal (or differed by rounding only), have no scale: their deviation is taken as 1.

    Args:
      moments: of some answers at the start, of all so far, or of this batch alone (whitening).
      scores: f32[B].

    Returns:
      f32[B].
    """
    return (jnp.asarray(scores, jnp.float32) - moments.mean) / _deviation(moments)


def _deviation(moments: RunningMoments) -> Array:
    """Standard deviation f32[] of the scores so far; 1 where they do not vary, so that it can divide."""
    variance = moments.squares / jnp.maximum(moments.count - 1.0, 1.0)
    varies = variance > jnp.square(ROUNDING * moments.mean)
    return jnp.sqrt(jnp.where(varies, variance, 1.0))


def ema(old: Tree, new: Tree, decay: Array | float) -> Tree:
    """Exponential moving average of a tree of arrays: decay * old + (1 - decay) * new.

    In float32, and each leaf in the dtype that the old one has. Keep the average in float32: the steps of a slow
    one are below the resolution of bfloat16.

    Args:
      old, new: trees of one structure and of equal shapes.
      decay: f32[] in [0, 1]; 0 takes the new tree, 1 keeps the old one.

    Returns:
      tree of the structure of `old`; where both are equal, exactly that.
    """
    chex.assert_trees_all_equal_structs(old, new)
    chex.assert_trees_all_equal_shapes(old, new)
    step = 1.0 - jnp.asarray(decay, jnp.float32)

    def leaf(old: Array, new: Array) -> Array:
        wide = jnp.asarray(old, jnp.float32)
        moved = wide + step * (jnp.asarray(new, jnp.float32) - wide)
        return moved.astype(jnp.asarray(old).dtype)

    return jax.tree.map(leaf, old, new)
