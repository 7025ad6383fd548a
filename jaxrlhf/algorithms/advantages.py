"""How much better a token was than expected: generalised advantage estimation and its relatives without values.

Index convention: at response position t the policy sees state s_t, takes the token a_t and gets r_t. V_t is
the value of s_t, before the token. The end of an answer is a discount of 0 in the data, not a branch.

`ADVANTAGES` names them all behind one signature. A new one is a function and a line of that table.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxrlhf.algorithms.masked import Axis, masked_sum, whiten


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
    """Advantages and returns of answers of unequal length (Schulman et al., 1506.02438).

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


# ---------------------------------------------------------------- one signature for all

Compute = Callable[
    [Array, Array, Array, int, Array, Array | float, Array | float],
    tuple[Array, Array],
]


@dataclasses.dataclass(frozen=True)
class Advantage:
    """One estimator, and what must be there for it.

      compute(rewards, mask, values, group, greedy, gamma, lam) -> (advantages, returns)

    Args of `compute`:
      rewards: f32[B,R]; per token, shaped with the KL penalty where that is part of the reward.
      mask: bool[B,R]; True from the first token to the last real one.
      values: f32[B,R]; 0 where there is no value model.
      group: int, static; rows i*group to (i+1)*group - 1 answer the same prompt. It must divide B.
      greedy: f32[B]; the return of the greedy answer to the same prompt, 0 where none was sampled.
      gamma: f32[]; discount, of those that reason by token. Whole answers are not discounted.
      lam: f32[]; lambda, of GAE alone.

    Both results are f32[B,R] and 0 where the mask is False. Returns are what the baseline was taken from: GAE's
    are the value model's target; the others' are rewards-to-go or, where the answer counts as one action, its
    summed rewards on each of its tokens.

    An empty answer has no token to learn from. It counts for nothing: means, deviations and the number of answers
    in a group are those of the others. Where all answers that are compared have one and the same return, the
    advantages are exactly 0; so are those of an answer that is alone in its group.
    """

    compute: Compute
    source: str  # the paper: its arXiv number, or author and year
    needs_value: bool = False  # a value model
    needs_group: bool = False  # several answers to each prompt: group > 1
    needs_greedy: bool = False  # the return of a greedy answer to each prompt


def _mean(x: Array, real: Array, axis: Axis = None) -> Array:
    """Mean of x[real] along `axis`, which is kept; exactly x where all of them are equal.

    Rounding would otherwise leave a remainder, and a division by the deviation makes that large.
    """
    top = jnp.max(jnp.where(real, x, -jnp.inf), axis=axis, keepdims=True)
    top = stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))  # -inf: nothing is real
    count = jnp.sum(real, axis=axis, keepdims=True, dtype=jnp.float32)
    return top + jnp.sum(jnp.where(real, x - top, 0.0), axis=axis, keepdims=True) / jnp.maximum(count, 1.0)


def _rewards_to_go(rewards: Array, mask: Array, gamma: Array | float) -> Array:
    """G_t = r_t + gamma * G_{t+1}: f32[B,R]; GAE without values, at lambda 1."""
    return gae(rewards, jnp.zeros(rewards.shape), mask, gamma, 1.0)[0]


def _on_tokens(answers: Array, mask: Array) -> Array:
    """One number per answer on each of its tokens: f32[B] -> f32[B,R], 0 where the mask is False."""
    return jnp.where(mask, answers[:, None], 0.0)


def _above_group(rewards: Array, mask: Array, group: int) -> tuple[Array, Array, Array]:
    """Answers among those to the same prompt: return minus the group's mean, answers that count, returns.

    Each f32[B]; the first is 0 for empty answers, and the second is at least 0 and at most `group`.
    """
    chex.assert_rank([rewards, mask], 2)
    chex.assert_is_divisible(rewards.shape[0], group)
    returns = masked_sum(rewards, mask, axis=1)
    by_group, real = returns.reshape(-1, group), jnp.any(mask, axis=1).reshape(-1, group)
    above = jnp.where(real, by_group - _mean(by_group, real, axis=1), 0.0)
    count = jnp.broadcast_to(jnp.sum(real, axis=1, keepdims=True, dtype=jnp.float32), real.shape)
    return above.reshape(-1), count.reshape(-1), returns


def _gae(rewards, mask, values, group, greedy, gamma, lam):
    """`gae` behind the common signature."""
    return gae(rewards, values, mask, gamma, lam)


def reinforce(rewards, mask, values, group, greedy, gamma, lam):
    """A_t = G_t - mean over the batch's answers of G_0 (Williams 1992, with a constant baseline)."""
    to_go = _rewards_to_go(rewards, mask, gamma)
    baseline = _mean(to_go[:, :1], jnp.any(mask, axis=1)[:, None])
    return jnp.where(mask, to_go - baseline, 0.0), to_go


def rloo(rewards, mask, values, group, greedy, gamma, lam):
    """A_i = r_i - mean of the group's other answers = n / (n - 1) * (r_i - mean of the group) (2402.14740)."""
    above, count, returns = _above_group(rewards, mask, group)
    advantages = above * count / jnp.maximum(count - 1.0, 1.0)
    return _on_tokens(advantages, mask), _on_tokens(returns, mask)


def grpo(rewards, mask, values, group, greedy, gamma, lam):
    """A_i = (r_i - mean) / (deviation + 1e-4) of the group, with the unbiased deviation (2402.03300; as in TRL)."""
    above, count, returns = _above_group(rewards, mask, group)
    squares = jnp.sum(jnp.square(above).reshape(-1, group), axis=1, keepdims=True)
    squares = jnp.broadcast_to(squares, (squares.shape[0], group)).reshape(-1)
    variance = squares / jnp.maximum(count - 1.0, 1.0)
    # The square root has no gradient at 0.
    deviation = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    return _on_tokens(above / (deviation + 1e-4), mask), _on_tokens(returns, mask)


def dr_grpo(rewards, mask, values, group, greedy, gamma, lam):
    """A_i = r_i - mean of the group: GRPO without deviation (2503.20783), whose loss aggregates by constant."""
    above, _, returns = _above_group(rewards, mask, group)
    return _on_tokens(above, mask), _on_tokens(returns, mask)


def reinforce_plus_plus(rewards, mask, values, group, greedy, gamma, lam):
    """A_t = (G_t - mean) / deviation, over all tokens of the global batch (2501.03262).

    The normalisation is part of the method and done here, by `whiten`; done once more it changes nothing.
    """
    to_go = _rewards_to_go(rewards, mask, gamma)
    return whiten(to_go - _mean(to_go, mask), mask), to_go


def reinforce_plus_plus_baseline(rewards, mask, values, group, greedy, gamma, lam):
    """A_i = r_i - mean of the group, then normalised over all tokens of the global batch (2501.03262).

    Unlike GRPO's, the deviation is that of the batch: a group that nearly agrees is not blown up.
    """
    above, _, returns = _above_group(rewards, mask, group)
    tokens = _on_tokens(above, mask)
    return whiten(tokens - _mean(tokens, mask), mask), _on_tokens(returns, mask)


def remax(rewards, mask, values, group, greedy, gamma, lam):
    """A_i = r_i - return of the greedy answer to the same prompt (2310.10505).

    Both returns should be of one kind: if the sampled one holds a KL penalty, so should the greedy one.
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
