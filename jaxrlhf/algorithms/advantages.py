"""Generalised advantage estimation (Schulman et al., 1506.02438).

Index convention: at response position t the policy sees state s_t, takes the token a_t and gets r_t. V_t is
the value of s_t, before the token. The end of an answer is a discount of 0 in the data, not a branch.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array


def _step_back(advantage: Array, at_t: tuple[Array, Array]) -> tuple[Array, Array]:
    """From A_{t+1} to A_t; a function of the module, so that `scan` recognises it and compiles it once."""
    delta, decay = at_t
    advantage = delta + decay * advantage
    return advantage, advantage


def truncated_gae(rewards: Array, values: Array, discounts: Array, lam: Array | float) -> Array:
    """Advantages of one sequence with a discount per step.

    delta_t = r_t + discount_t * V_{t+1} - V_t
    A_t     = delta_t + discount_t * lam * A_{t+1},  A_T = 0

    Advantages plus values are the TD(lambda) returns. Not masked: every position is real.

    Args:
      rewards: f32[T].
      values: f32[T+1]; the last one is the bootstrap value of the state after the last step.
      discounts: f32[T]; 0 where an episode ends with step t.
      lam: lambda, f32[].

    Returns:
      f32[T]; no gradient is stopped.
    """
    chex.assert_rank([rewards, values, discounts], 1)
    chex.assert_equal_shape([rewards, discounts])
    chex.assert_shape(values, (rewards.shape[0] + 1,))
    rewards, values, discounts = (jnp.asarray(x, jnp.float32) for x in (rewards, values, discounts))
    deltas = rewards + discounts * values[1:] - values[:-1]
    start = jnp.zeros((), jnp.float32)
    _, advantages = jax.lax.scan(_step_back, start, (deltas, discounts * lam), reverse=True)
    return advantages


def _gae_row(rewards: Array, values: Array, mask: Array, gamma: Array, lam: Array) -> tuple[Array, Array]:
    """`gae` of one row: everything [R]."""
    rewards = jnp.where(mask, jnp.asarray(rewards, jnp.float32), 0.0)
    values = jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)
    continues = jnp.append(mask[1:], False)
    discounts = jnp.where(continues, gamma, 0.0)
    advantages = truncated_gae(rewards, jnp.append(values, 0.0), discounts, lam)
    # Past the end rewards, values and discounts are 0, and so are the advantages.
    return advantages, advantages + values


def gae(
    rewards: Array, values: Array, mask: Array, gamma: Array | float, lam: Array | float
) -> tuple[Array, Array]:
    """Advantages and returns of answers of unequal length.

    The value after the last real token is 0: an answer ends there, whether with a stop token or at the length
    limit. What stands past the end never leaks in. Returns are of the advantages as they come out here,
    before any whitening.

    Args:
      rewards: f32[B,R].
      values: f32[B,R].
      mask: bool[B,R]; True from the first token to the last real one. A gap ends an answer and starts another.
      gamma: discount, f32[].
      lam: lambda, f32[]; 1 gives discounted rewards-to-go minus values, 0 the one-step TD error.

    Returns:
      advantages f32[B,R] and returns f32[B,R] = advantages + values; both 0 where the mask is False.
    """
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_type(mask, bool)
    gamma, lam = jnp.asarray(gamma, jnp.float32), jnp.asarray(lam, jnp.float32)
    return jax.vmap(_gae_row, in_axes=(0, 0, 0, None, None))(rewards, values, mask, gamma, lam)
