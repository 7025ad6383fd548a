"""Reductions over real positions: sum, mean, variance, whitening, aggregation of a loss.

A mask is bool and True where a position is real. What stands elsewhere (pad, garbage, NaN) changes no value
and no gradient: it is replaced by 0 before any arithmetic, never multiplied by 0 after it. Everything is
float32 inside. Under `jit` with sharded arrays the reductions run over the global batch.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jax import Array

Axis = int | tuple[int, ...] | None


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
    """Variance of x[mask], in two passes: the mean first, then the squared distances from it.

    Args:
      x: any shape.
      mask: bool, same shape.
      unbiased: divide by count - 1 (Bessel's correction) instead of count.

    Returns:
      f32[]; 0 where fewer than two positions are real.
    """
    x = _real(x, mask)
    count = jnp.sum(mask, dtype=jnp.float32)
    squares = masked_sum(jnp.square(x - masked_mean(x, mask)), mask)
    return squares / jnp.maximum(count - 1.0 if unbiased else count, 1.0)


def whiten(x: Array, mask: Array, shift_mean: bool = True, epsilon: float = 1e-8) -> Array:
    """(x - mean) / sqrt(var + epsilon) over the real positions, with the unbiased variance.

    Args:
      x: any shape; for advantages the whole global batch, so that no device or minibatch has a scale of its own.
      mask: bool, same shape.
      shift_mean: False adds the mean back, which is how rewards are whitened (2403.17031).
      epsilon: added to the variance; a constant x becomes 0 (or its mean).

    Returns:
      f32 of x's shape; 0 where the mask is False.
    """
    x = _real(x, mask)
    mean = masked_mean(x, mask)
    whitened = (x - mean) / jnp.sqrt(masked_variance(x, mask) + epsilon)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def explained_variance(values: Array, returns: Array, mask: Array) -> Array:
    """1 - Var(returns - values) / Var(returns) over the real positions.

    1: the values predict the returns; 0: no better than a constant; below 0: worse than one.

    Args:
      values, returns: any one shape.
      mask: bool, same shape.

    Returns:
      f32[]; 0 where the returns do not vary.
    """
    values, returns = _real(values, mask), _real(returns, mask)
    total = masked_variance(returns, mask)
    # A constant is recognised by its range: its variance in float32 is the rounding error of its mean.
    highest = jnp.max(jnp.where(mask, returns, -jnp.inf))
    lowest = jnp.min(jnp.where(mask, returns, jnp.inf))
    varies = (highest > lowest) & (total > 0)
    left = masked_variance(returns - values, mask)
    return jnp.where(varies, 1.0 - left / jnp.where(varies, total, 1.0), 0.0)


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
