"""Reductions over real positions: sum, mean, variance, whitening, aggregation of a loss.

A mask is bool and True where a position is real. What stands elsewhere (pad, garbage, NaN) changes no value
and no gradient: it is replaced by 0 before any arithmetic, never multiplied by 0 after it. Everything is
float32 inside. Under `jit` with sharded arrays the reductions run over the global batch.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

Axis = int | tuple[int, ...] | None

# Float32 numbers this near to each other, relative to the largest, differ by the rounding of a few sums.
ROUNDING = 8 * float(jnp.finfo(jnp.float32).eps)


def _real(x: Array, mask: Array) -> Array:
    """x in float32, 0 where the mask is False."""
    chex.assert_equal_shape([x, mask])
    chex.assert_type(mask, bool)
    return jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0)


def masked_sum(x: Array, mask: Array, axis: Axis = None) -> Array:
    """Sum of x[mask] along `axis` (all of it by default). x any shape, mask bool of the same shape; f32."""
    return jnp.sum(_real(x, mask), axis=axis)


def masked_mean(x: Array, mask: Array, axis: Axis = None) -> Array:
    """Mean of x[mask] along `axis` (all of it by default), 0 where the mask is empty. Shapes as `masked_sum`."""
    count = jnp.sum(mask, axis=axis, dtype=jnp.float32)
    return masked_sum(x, mask, axis) / jnp.maximum(count, 1.0)


def masked_variance(x: Array, mask: Array, unbiased: bool = True) -> Array:
    """Variance of x[mask], in two passes: the mean first, then the squared distances from it (see `_deviations`).

    Args:
      x: any shape.
      mask: bool, same shape.
      unbiased: divide by count - 1 (Bessel's correction) instead of count.

    Returns:
      f32[]; exactly 0 where fewer than two positions are real, or where x differs by rounding only.
    """
    return _variance(_deviations(x, mask)[1], mask, unbiased)


def _variance(deviations: Array, mask: Array, unbiased: bool = True) -> Array:
    count = jnp.sum(mask, dtype=jnp.float32)
    return jnp.sum(jnp.square(deviations)) / jnp.maximum(count - 1.0 if unbiased else count, 1.0)


def _deviations(x: Array, mask: Array) -> tuple[Array, Array]:
    """(mean f32[], x - mean f32 of x's shape, 0 where the mask is False).

    The sum of many equal numbers rounds, so that their mean may lie beside them: it is held within the range of x, and
    what the first mean left over is taken off in a second pass. Where the range is at most `ROUNDING` of the largest
    magnitude, nothing but rounding varies, and the deviations are exactly 0: divided by their own size they would
    be noise of deviation 1.
    """
    x = _real(x, mask)
    lowest = stop_gradient(jnp.min(jnp.where(mask, x, jnp.inf)))
    highest = stop_gradient(jnp.max(jnp.where(mask, x, -jnp.inf)))
    mean = jnp.where(jnp.any(mask), jnp.clip(masked_mean(x, mask), lowest, highest), 0.0)
    deviations = jnp.where(mask, x - mean, 0.0)
    left = masked_mean(deviations, mask)
    varies = highest - lowest > ROUNDING * jnp.maximum(jnp.abs(lowest), jnp.abs(highest))
    return mean + left, jnp.where(mask & varies, deviations - left, 0.0)


def whiten(x: Array, mask: Array, shift_mean: bool = True, epsilon: float = 1e-8) -> Array:
    """(x - mean) / sqrt(var + epsilon) over the real positions, with the unbiased variance.

    Args:
      x: any shape; for advantages the whole global batch, so that no device or minibatch has a scale of its own.
      mask: bool, same shape.
      shift_mean: False adds the mean back, which is how rewards are whitened (2403.17031).
      epsilon: added to the variance. An x that differs by rounding only becomes exactly 0 (or its mean).

    Returns:
      f32 of x's shape; 0 where the mask is False.
    """
    mean, deviations = _deviations(x, mask)
    whitened = deviations / jnp.sqrt(_variance(deviations, mask) + epsilon)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def explained_variance(values: Array, returns: Array, mask: Array) -> Array:
    """1 - Var(returns - values) / Var(returns) over the real positions.

    1: the values predict the returns; 0: no better than a constant; below 0: worse than one.

    Args:
      values, returns: any one shape.
      mask: bool, same shape.

    Returns:
      f32[]; 0 where the returns do not vary, or by rounding only.
    """
    values, returns = _real(values, mask), _real(returns, mask)
    total = masked_variance(returns, mask)
    left = masked_variance(returns - values, mask)
    return jnp.where(total > 0, 1.0 - left / jnp.where(total > 0, total, 1.0), 0.0)


def _by_token(loss: Array, mask: Array, total_tokens: Array, total_rows: Array, length: int) -> Array:
    return masked_sum(loss, mask) / jnp.maximum(total_tokens, 1)


def _by_sequence(loss: Array, mask: Array, total_tokens: Array, total_rows: Array, length: int) -> Array:
    return jnp.sum(masked_mean(loss, mask, axis=-1)) / jnp.maximum(total_rows, 1)


def _by_constant(loss: Array, mask: Array, total_tokens: Array, total_rows: Array, length: int) -> Array:
    return masked_sum(loss, mask) / (jnp.maximum(total_rows, 1) * length)


AGGREGATIONS: dict[str, Callable[[Array, Array, Array, Array, int], Array]] = {
    "token": _by_token,
    "sequence": _by_sequence,
    "constant": _by_constant,
}


def aggregate(
    loss: Array,
    mask: Array,
    how: str,
    total_tokens: Array | float,
    total_rows: Array | float,
    length: int | None = None,
) -> Array:
    """One microbatch's share of a minibatch's loss: the shares of all microbatches sum to the loss of the whole.

    With N = total_tokens, B = total_rows and sums over this microbatch's rows i and real tokens t:

      token     sum_it loss_it / N                  every token of the minibatch weighs the same
      sequence  sum_i (mean_t loss_it) / B          every answer weighs the same; an empty one adds 0
      constant  sum_it loss_it / (B * R)            long answers are not diluted (Dr. GRPO, 2503.20783)

    Args:
      loss: f32[b,R], per token.
      mask: bool[b,R].
      how: "token", "sequence" or "constant"; another name is a KeyError.
      total_tokens: real tokens of the whole minibatch, over all microbatches and devices.
      total_rows: rows of the whole minibatch. 0 of either gives a loss of 0.
      length: the R of "constant", where these rows were cut to the length of their longest answer; None: the loss's.

    Returns:
      f32[].
    """
    chex.assert_rank(loss, 2)
    return AGGREGATIONS[how](loss, mask, total_tokens, total_rows, loss.shape[1] if length is None else length)
