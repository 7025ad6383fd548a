"""Advantage estimators: generalised advantage estimation (GAE) and estimators without a value model.

Index convention: at response position t the policy sees state s_t, takes token a_t and receives r_t. V_t is the
value of s_t, before the token. The end of a completion is a discount of 0 in the data, not a branch.

`ADVANTAGES` holds every estimator behind one signature. To add an estimator, write a function and add it to that table.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxrlhf.algorithms.masked import Axis, masked_sum, whiten, zero_masked


def _step_back(advantage: Array, at_t: tuple[Array, Array]) -> tuple[Array, Array]:
    """Computes A_t from A_{t+1}. It is a module-level function, so that `scan` compiles it once."""
    delta, decay = at_t
    advantage = delta + decay * advantage
    return advantage, advantage


def truncated_gae(rewards: Array, values: Array, discounts: Array, lam: Array | float) -> Array:
    """Advantages of one unmasked sequence with a discount per step.

    delta_t = r_t + discount_t * V_{t+1} - V_t
    A_t     = delta_t + discount_t * lam * A_{t+1},  A_T = 0

    Advantages plus values are the TD(lambda) returns.

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
    """Returns `gae` of one row. All arrays have shape [R] and are 0 past the end of the completion."""
    discounts = jnp.where(jnp.append(mask[1:], False), gamma, 0.0)
    advantages = truncated_gae(rewards, jnp.append(values, 0.0), discounts, lam)
    return advantages, advantages + values


def gae(
    rewards: Array, values: Array, mask: Array, gamma: Array | float, lam: Array | float
) -> tuple[Array, Array]:
    """Advantages and returns of completions of unequal length (Schulman et al., 1506.02438).

    A completion ends at its last real token, by a stop token or by the length limit. The value of the state after that
    token is 0.

    Args:
      rewards: f32[B,R].
      values: f32[B,R].
      mask: bool[B,R]; True from the first token to the last real one. A gap ends one episode and starts another.
      gamma: discount, f32[].
      lam: lambda, f32[]; 1 gives discounted rewards-to-go minus values, 0 the one-step TD error.

    Returns:
      advantages f32[B,R], not whitened, and returns f32[B,R] = advantages + values; both 0 where the mask is False.
    """
    chex.assert_rank(mask, 2)
    rewards, values = zero_masked(mask, rewards, values)
    gamma, lam = jnp.asarray(gamma, jnp.float32), jnp.asarray(lam, jnp.float32)
    return jax.vmap(_gae_row, in_axes=(0, 0, 0, None, None))(rewards, values, mask, gamma, lam)


# ---------------------------------------------------------------- one signature for all

Compute = Callable[
    [Array, Array, Array, int, Array, Array | float, Array | float],
    tuple[Array, Array],
]


@dataclasses.dataclass(frozen=True)
class Advantage:
    """An estimator and its requirements.

      compute(rewards, mask, values, group, greedy, gamma, lam) -> (advantages, returns)

    Args of `compute`:
      rewards: f32[B,R]; per token, including the KL penalty where that is part of the reward.
      mask: bool[B,R]; True from the first token to the last real one.
      values: f32[B,R]; 0 without a value model.
      group: int, static, a divisor of B; rows i*group to (i+1)*group - 1 are completions of one prompt.
      greedy: f32[B]; return of the greedy completion for the same prompt, 0 if none was sampled.
      gamma: f32[]; discount. Estimators that treat a completion as one action ignore it.
      lam: f32[]; lambda, used by GAE only.

    Both results are f32[B,R] and 0 where the mask is False. GAE's returns are the value model's target. The other
    estimators return rewards-to-go or, where a completion is one action, its summed reward on each of its tokens.

    Empty completions are left out of means, deviations and group sizes. If all compared completions have the same
    return, the advantages are exactly 0. A completion alone in its group has advantage 0.
    """

    compute: Compute
    source: str  # arXiv number, or author and year
    needs_value: bool = False  # a value model
    needs_group: bool = False  # several completions per prompt: group > 1
    needs_greedy: bool = False  # the return of a greedy completion per prompt


def _mean(x: Array, real: Array, axis: Axis = None) -> Array:
    """Mean of x[real] along `axis`, which is kept. The mean of equal numbers is exactly that number.

    The usual sum / count may differ from equal numbers by rounding, and dividing by the deviation would amplify this
    difference.
    """
    top = jnp.max(jnp.where(real, x, -jnp.inf), axis=axis, keepdims=True)
    top = stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))  # -inf: no position is real
    count = jnp.sum(real, axis=axis, keepdims=True, dtype=jnp.float32)
    return top + jnp.sum(jnp.where(real, x - top, 0.0), axis=axis, keepdims=True) / jnp.maximum(count, 1.0)


def _rewards_to_go(rewards: Array, mask: Array, gamma: Array | float) -> Array:
    """G_t = r_t + gamma * G_{t+1}: f32[B,R]. This is GAE with values of 0 and lambda 1."""
    return gae(rewards, jnp.zeros(rewards.shape), mask, gamma, 1.0)[0]


def _on_tokens(per_row: Array, mask: Array) -> Array:
    """Repeats one number per completion on each of its tokens: f32[B] -> f32[B,R], 0 where the mask is False."""
    return jnp.where(mask, per_row[:, None], 0.0)


def _group_advantages(rewards: Array, mask: Array, group: int) -> tuple[Array, Array, Array]:
    """Per completion, f32[B] each: return minus group mean, non-empty completions in the group, return.

    The return minus the group mean is 0 for empty completions.
    """
    chex.assert_rank([rewards, mask], 2)
    chex.assert_is_divisible(rewards.shape[0], group)
    returns = masked_sum(rewards, mask, axis=1)
    by_group, real = returns.reshape(-1, group), jnp.any(mask, axis=1).reshape(-1, group)
    centered = jnp.where(real, by_group - _mean(by_group, real, axis=1), 0.0)
    count = jnp.broadcast_to(jnp.sum(real, axis=1, keepdims=True, dtype=jnp.float32), real.shape)
    return centered.reshape(-1), count.reshape(-1), returns


def _gae(rewards, mask, values, group, greedy, gamma, lam):
    """`gae` with the common signature."""
    return gae(rewards, values, mask, gamma, lam)


def reinforce(rewards, mask, values, group, greedy, gamma, lam):
    """A_t = G_t - mean of G_0 over the batch (Williams 1992, with a constant baseline)."""
    to_go = _rewards_to_go(rewards, mask, gamma)
    baseline = _mean(to_go[:, :1], jnp.any(mask, axis=1)[:, None])
    return jnp.where(mask, to_go - baseline, 0.0), to_go


def rloo(rewards, mask, values, group, greedy, gamma, lam):
    """A_i = r_i - mean of the group's other completions = n / (n - 1) * (r_i - group mean) (2402.14740)."""
    centered, count, returns = _group_advantages(rewards, mask, group)
    advantages = centered * count / jnp.maximum(count - 1.0, 1.0)
    return _on_tokens(advantages, mask), _on_tokens(returns, mask)


def grpo(rewards, mask, values, group, greedy, gamma, lam):
    """A_i = (r_i - mean) / (deviation + 1e-4) of the group, with the unbiased deviation (2402.03300; as in TRL)."""
    centered, count, returns = _group_advantages(rewards, mask, group)
    squares = jnp.sum(jnp.square(centered).reshape(-1, group), axis=1, keepdims=True)
    squares = jnp.broadcast_to(squares, (squares.shape[0], group)).reshape(-1)
    variance = squares / jnp.maximum(count - 1.0, 1.0)
    # The square root has no gradient at 0.
    deviation = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    return _on_tokens(centered / (deviation + 1e-4), mask), _on_tokens(returns, mask)


def dr_grpo(rewards, mask, values, group, greedy, gamma, lam):
    """A_i = r_i - group mean: GRPO without the deviation (2503.20783). Use it with the aggregation "constant"."""
    centered, _, returns = _group_advantages(rewards, mask, group)
    return _on_tokens(centered, mask), _on_tokens(returns, mask)


def reinforce_plus_plus(rewards, mask, values, group, greedy, gamma, lam):
    """A_t = (G_t - mean) / deviation, over all tokens of the global batch (2501.03262).

    The whitening is part of the method. Whitening the result again changes nothing.
    """
    to_go = _rewards_to_go(rewards, mask, gamma)
    return whiten(to_go - _mean(to_go, mask), mask), to_go


def reinforce_plus_plus_baseline(rewards, mask, values, group, greedy, gamma, lam):
    """A_i = r_i - group mean, then whitened over all tokens of the global batch (2501.03262).

    The deviation is over the batch, while GRPO uses the deviation of each group. So the advantages of a group whose
    scores are nearly equal are not amplified.
    """
    centered, _, returns = _group_advantages(rewards, mask, group)
    tokens = _on_tokens(centered, mask)
    return whiten(tokens - _mean(tokens, mask), mask), _on_tokens(returns, mask)


def remax(rewards, mask, values, group, greedy, gamma, lam):
    """A_i = r_i - return of the greedy completion for the same prompt (2310.10505).

    Either both returns include a KL penalty or neither does.
    """
    chex.assert_rank([rewards, mask, greedy], [2, 2, 1])
    chex.assert_equal_shape_prefix([rewards, greedy], 1)
    returns = masked_sum(rewards, mask, axis=1)
    return _on_tokens(returns - jnp.asarray(greedy, jnp.float32), mask), _on_tokens(returns, mask)


ADVANTAGES: dict[str, Advantage] = {
    "gae": Advantage(_gae, "1506.02438", needs_value=True),
    "reinforce": Advantage(reinforce, "Williams 1992"),
    "rloo": Advantage(rloo, "2402.14740", needs_group=True),
    "grpo": Advantage(grpo, "2402.03300", needs_group=True),
    "dr_grpo": Advantage(dr_grpo, "2503.20783", needs_group=True),
    "reinforce_plus_plus": Advantage(reinforce_plus_plus, "2501.03262"),
    "reinforce_plus_plus_baseline": Advantage(reinforce_plus_plus_baseline, "2501.03262", needs_group=True),
    "remax": Advantage(remax, "2310.10505", needs_greedy=True),
}
