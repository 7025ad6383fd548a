"""Masked reductions: sum, mean, variance, whitening and the aggregation of a loss.

A mask is bool and True on real positions. Other positions may hold any number or NaN, and change no value and no
gradient. Their numbers are replaced by 0 before any arithmetic. A multiplication by 0 would keep NaN. All arithmetic
is float32. If arrays are sharded, the reductions under `jit` run over the global batch.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

Axis = int | tuple[int, ...] | None

# If float32 numbers differ by less than this share of the largest number, they differ by rounding only.
ROUNDING = 8 * float(jnp.finfo(jnp.float32).eps)


def zero_masked(mask: Array, *arrays: Array) -> tuple[Array, ...]:
    """Returns float32 arrays, 0 where the mask is False. Raises an error if shapes differ or the mask is not bool."""
    chex.assert_equal_shape([mask, *arrays])
    chex.assert_type(mask, bool)
    return tuple(jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0) for x in arrays)


def masked_sum(x: Array, mask: Array, axis: Axis = None) -> Array:
    """Returns the float32 sum of x[mask] along `axis`; None means all axes. `mask` is bool and has the shape of x."""
    (x,) = zero_masked(mask, x)
    return jnp.sum(x, axis=axis)


def at_last_token(per_row: Array, mask: Array) -> Array:
    """Puts the numbers `per_row`, f32[B], at the last real token of each row, and 0 elsewhere: f32[B,R].

    A row without a real token is 0 everywhere.
    """
    position = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, position, -1), axis=1, keepdims=True)  # -1 if the row is empty
    return jnp.where(position == last, jnp.asarray(per_row, jnp.float32)[:, None], 0.0)


def masked_mean(x: Array, mask: Array, axis: Axis = None) -> Array:
    """Returns the mean of x[mask]; 0 if no position is real. The arguments are those of `masked_sum`."""
    count = jnp.sum(mask, axis=axis, dtype=jnp.float32)
    return masked_sum(x, mask, axis) / jnp.maximum(count, 1.0)


def masked_variance(x: Array, mask: Array, unbiased: bool = True) -> Array:
    """Returns the variance of x[mask]. One pass computes the mean, a second pass the squared deviations.

    Args:
      x: any shape.
      mask: bool, same shape.
      unbiased: True divides by count - 1 (Bessel's correction), False by count.

    Returns:
      f32[]. The variance is exactly 0 if fewer than two positions are real, or if x varies by rounding only.
    """
    return _variance(_deviations(x, mask)[1], mask, unbiased)


def _variance(deviations: Array, mask: Array, unbiased: bool = True) -> Array:
    count = jnp.sum(mask, dtype=jnp.float32)
    return jnp.sum(jnp.square(deviations)) / jnp.maximum(count - 1.0 if unbiased else count, 1.0)


def _deviations(x: Array, mask: Array) -> tuple[Array, Array]:
    """Returns (mean, deviations). The mean is f32[]. The deviations are x - mean, f32 of x's shape, 0 outside the mask.

    The mean of many equal numbers may differ from these numbers by rounding. So the mean is clipped to the range of x,
    and a second pass subtracts the mean of the deviations. If the range is at most `ROUNDING` * the largest magnitude,
    x varies by rounding only, and the deviations are set to exactly 0. Without this rule, whitening would scale the
    rounding errors to a standard deviation of 1.
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
    """Returns (x - mean) / sqrt(variance + epsilon). Mean and unbiased variance are those of the real positions.

    Args:
      x: any shape. Pass the advantages of the global batch, so that all devices and minibatches have one scale.
      mask: bool, same shape.
      shift_mean: False adds the mean back to the result. Whitening of rewards uses False (2403.17031).
      epsilon: added to the variance. If x varies by rounding only, the result is exactly 0, or the mean if
        `shift_mean` is False.

    Returns:
      f32 of x's shape; 0 where the mask is False.
    """
    mean, deviations = _deviations(x, mask)
    whitened = deviations / jnp.sqrt(_variance(deviations, mask) + epsilon)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def explained_variance(values: Array, returns: Array, mask: Array) -> Array:
    """Returns the explained variance, 1 - Var(returns - values) / Var(returns), over the real positions.

    If the result is 1, the values predict the returns exactly. If the result is 0, the values predict no better than a
    constant. If the result is negative, the values predict worse than a constant.

    Args:
      values, returns: any shape, but both have the same shape.
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
    """Returns the part that a microbatch adds to the loss. The sum over all microbatches is the loss of the minibatch.

    N is `total_tokens`, B is `total_rows`. Sums are over the rows i and the real tokens t of this microbatch:

      token     sum_it loss_it / N           Every token has the same weight.
      sequence  sum_i (mean_t loss_it) / B   Every completion has the same weight. An empty completion adds 0.
      constant  sum_it loss_it / (B * R)     A token's weight does not depend on lengths (Dr. GRPO, 2503.20783).

    Args:
      loss: f32[b,R], per token.
      mask: bool[b,R].
      how: "token", "sequence" or "constant"; any other name raises `KeyError`.
      total_tokens: number of real tokens in the minibatch, over all microbatches and devices.
      total_rows: number of rows in the minibatch. If `total_rows` or `total_tokens` is 0, the loss is 0.
      length: R in the formula of "constant"; None takes R from the shape of `loss`. `length` is needed if the rows
        were cut to the longest completion of the microbatch.

    Returns:
      f32[].
    """
    chex.assert_rank(loss, 2)
    return AGGREGATIONS[how](loss, mask, total_tokens, total_rows, loss.shape[1] if length is None else length)
