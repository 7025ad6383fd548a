"""Masked reductions: sum, mean, variance, whitening, aggregation of a loss.

A mask is bool and True where a position is real. Other positions (padding, garbage, NaN) change no value and no
gradient: they are replaced by 0 before any arithmetic, not multiplied by 0 after it. All arithmetic is float32.
Under `jit` with sharded arrays the reductions run over the global batch.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

Axis = int | tuple[int, ...] | None

# Float32 numbers that differ by less than this, relative to the largest, differ by rounding only.
ROUNDING = 8 * float(jnp.finfo(jnp.float32).eps)


def zero_masked(mask: Array, *arrays: Array) -> tuple[Array, ...]:
    """The arrays in float32, 0 where the mask is False. Raises an error if a shape differs or the mask is not bool."""
    chex.assert_equal_shape([mask, *arrays])
    chex.assert_type(mask, bool)
    return tuple(jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0) for x in arrays)


def masked_sum(x: Array, mask: Array, axis: Axis = None) -> Array:
    """Sum of x[mask] in float32, along `axis` or over all axes. `mask` is bool and has the shape of x."""
    (x,) = zero_masked(mask, x)
    return jnp.sum(x, axis=axis)


def masked_mean(x: Array, mask: Array, axis: Axis = None) -> Array:
    """Mean of x[mask], as in `masked_sum`; 0 where the mask is False everywhere."""
    count = jnp.sum(mask, axis=axis, dtype=jnp.float32)
    return masked_sum(x, mask, axis) / jnp.maximum(count, 1.0)


def masked_variance(x: Array, mask: Array, unbiased: bool = True) -> Array:
    """Variance of x[mask], in two passes: first the mean, then the squared deviations (see `_deviations`).

    Args:
      x: any shape.
      mask: bool, same shape.
      unbiased: whether to divide by count - 1 (Bessel's correction) instead of count.

    Returns:
      f32[]; exactly 0 if fewer than two positions are real or x varies by rounding only.
    """
    return _variance(_deviations(x, mask)[1], mask, unbiased)


def _variance(deviations: Array, mask: Array, unbiased: bool = True) -> Array:
    count = jnp.sum(mask, dtype=jnp.float32)
    return jnp.sum(jnp.square(deviations)) / jnp.maximum(count - 1.0 if unbiased else count, 1.0)


def _deviations(x: Array, mask: Array) -> tuple[Array, Array]:
    """(mean f32[], x - mean f32 of x's shape, 0 where the mask is False).

    The mean of many equal numbers may differ from them by rounding. So the mean is clipped to the range of x, and a
    second pass subtracts the mean of the deviations. If the range is at most `ROUNDING` of the largest magnitude,
    x varies by rounding only and the deviations are exactly 0. Whitening would turn rounding into noise of deviation 1.
    """
    (x,) = zero_masked(mask, x)
    lowest = stop_gradient(jnp.min(jnp.where(mask, x, jnp.inf)))
    highest = stop_gradient(jnp.max(jnp.where(mask, x, -jnp.inf)))
    mean = jnp.where(jnp.any(mask), jnp.clip(masked_mean(x, mask), lowest, highest), 0.0)
    deviations = jnp.where(mask, x - mean, 0.0)
    remainder = masked_mean(deviations, mask)
    varies = highest - lowest > ROUNDING * jnp.maximum(jnp.abs(lowest), jnp.abs(highest))
    return mean + remainder, jnp.where(mask & varies, deviations - remainder, 0.0)


def whiten(x: Array, mask: Array, shift_mean: bool = True, epsilon: float = 1e-8) -> Array:
    """(x - mean) / sqrt(var + epsilon) over the real positions, with the unbiased variance.

    Args:
      x: any shape; for advantages the global batch, so that all devices and minibatches share one scale.
      mask: bool, same shape.
      shift_mean: False adds the mean back, as for rewards (2403.17031).
      epsilon: added to the variance. If x varies by rounding only, the result is exactly 0 (or the mean).

    Returns:
      f32 of x's shape; 0 where the mask is False.
    """
    mean, deviations = _deviations(x, mask)
    whitened = deviations / jnp.sqrt(_variance(deviations, mask) + epsilon)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def explained_variance(values: Array, returns: Array, mask: Array) -> Array:
    """1 - Var(returns - values) / Var(returns) over the real positions.

    1 means that the values predict the returns. 0 means that they predict no better than a constant, and a negative
    number that they predict worse.

    Args:
      values, returns: any shape, the same for both.
      mask: bool, same shape.

    Returns:
      f32[]; 0 if the returns vary by rounding only.
    """
    values, returns = zero_masked(mask, values, returns)
    total = masked_variance(returns, mask)
    unexplained = masked_variance(returns - values, mask)
    return jnp.where(total > 0, 1.0 - unexplained / jnp.where(total > 0, total, 1.0), 0.0)


AGGREGATIONS: dict[str, Callable[[Array, Array, Array | float, Array | float, int], Array]] = {
    "token": lambda loss, mask, tokens, rows, length: masked_sum(loss, mask) / jnp.maximum(tokens, 1),
    "sequence": lambda loss, mask, tokens, rows, length: (
        jnp.sum(masked_mean(loss, mask, axis=-1)) / jnp.maximum(rows, 1)
    ),
    "constant": lambda loss, mask, tokens, rows, length: (
        masked_sum(loss, mask) / (jnp.maximum(rows, 1) * length)
    ),
}


def aggregate(
    loss: Array,
    mask: Array,
    how: str,
    total_tokens: Array | float,
    total_rows: Array | float,
    length: int | None = None,
) -> Array:
    """A microbatch's share of its minibatch's loss; the shares of all microbatches sum to that loss.

    With N = total_tokens, B = total_rows and sums over this microbatch's rows i and real tokens t:

      token     sum_it loss_it / N           every token has the same weight
      sequence  sum_i (mean_t loss_it) / B   every completion has the same weight; an empty one adds 0
      constant  sum_it loss_it / (B * R)     a token's weight does not depend on lengths (Dr. GRPO, 2503.20783)

    Args:
      loss: f32[b,R], per token.
      mask: bool[b,R].
      how: "token", "sequence" or "constant"; another name is a KeyError.
      total_tokens: real tokens of the minibatch, over all microbatches and devices.
      total_rows: rows of the minibatch. If `total_rows` or `total_tokens` is 0, the loss is 0.
      length: R in the formula of "constant". Give it if these rows were cut to their longest completion; None takes R
        from `loss`.

    Returns:
      f32[].
    """
    chex.assert_rank(loss, 2)
    return AGGREGATIONS[how](loss, mask, total_tokens, total_rows, loss.shape[1] if length is None else length)
