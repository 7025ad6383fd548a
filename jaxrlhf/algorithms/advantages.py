"""Advantage estimators: generalised advantage estimation (GAE) and estimators without a value model.

Index convention: at response position t the policy sees state s_t, samples token a_t and receives reward r_t. V_t is
the value of s_t, before token a_t. The discount is 0 at the last token of a completion, so the code needs no branch
for the end of a completion.

An episode with an environment has the environment's tokens between the policy's turns. The mask is False there. All
estimators pass over these tokens: the token that follows the last token of a turn is the first token of the next turn.

The table `ADVANTAGES` holds all estimators. They have the same signature. To add an estimator, write a function and add
the function to `ADVANTAGES`.
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
    """Computes A_t from A_{t+1}. The function is at module level, so that `scan` compiles it only once."""
    delta, decay = at_t
    advantage = delta + decay * advantage
    return advantage, advantage


def truncated_gae(rewards: Array, values: Array, discounts: Array, lam: Array | float) -> Array:
    """Returns the advantages of one sequence without a mask. Each step has its own discount.

    delta_t = r_t + discount_t * V_{t+1} - V_t
    A_t     = delta_t + discount_t * lam * A_{t+1},  A_T = 0

    Advantages plus values are the TD(lambda) returns.

    Args:
      rewards: f32[T].
      values: f32[T+1]; the last value is that of the state after the last step (bootstrap).
      discounts: f32[T]; 0 at each step that ends an episode.
      lam: lambda, f32[] or f32[T].

    Returns:
      f32[T]. Gradients flow through all arguments.
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
    """Returns the result of `gae` for one row. All arrays have shape [R]; rewards and values are 0 off the mask.

    A position off the mask gets the value of the next token, the discount 1 and lambda 1. Its TD error is then exactly
    0, and the recursion passes over it.
    """
    position = jnp.arange(mask.shape[0])
    following = jax.lax.cummin(jnp.where(mask, position, mask.shape[0]), reverse=True)  # the position itself, if real
    next_values = jnp.append(values, 0.0)[jnp.append(following, mask.shape[0])]
    has_next = jnp.append(following[1:], mask.shape[0]) < mask.shape[0]
    discounts = jnp.where(mask, jnp.where(has_next, gamma, 0.0), 1.0)
    advantages = truncated_gae(rewards, next_values, discounts, jnp.where(mask, lam, 1.0))
    advantages = jnp.where(mask, advantages, 0.0)
    return advantages, advantages + values


def turn_discounts(gamma: Array | float, mask: Array) -> Array:
    """Returns the discount of each token, f32[B,R], if `gamma` is a discount per turn: gamma at the last token of a
    turn, 1 elsewhere. A turn is a run of tokens in `mask` bool[B,R].
    """
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(last, jnp.asarray(gamma, jnp.float32), 1.0)


def gae(
    rewards: Array, values: Array, mask: Array, gamma: Array | float, lam: Array | float
) -> tuple[Array, Array]:
    """Computes the advantages and returns of completions of unequal length (Schulman et al., 1506.02438).

    A completion ends at its last real token. The state after this token has the value 0, also if the completion
    reached the length limit.

    Args:
      rewards: f32[B,R].
      values: f32[B,R].
      mask: bool[B,R]; True on the policy's tokens. A gap in the mask, such as the tokens of an environment, is passed
        over: V_{t+1} and A_{t+1} are then those of the next token in the mask.
      gamma: discount, f32[], or one for each token, f32[B,R].
      lam: lambda, f32[]. If lambda is 1, the advantages are discounted rewards-to-go minus values. If lambda is 0, the
        advantages are one-step TD errors.

    Returns:
      (advantages, returns), f32[B,R] each; 0 where the mask is False. Returns are advantages + values. The advantages
      are not whitened.
    """
    chex.assert_rank(mask, 2)
    rewards, values = zero_masked(mask, rewards, values)
    gamma, lam = jnp.broadcast_to(jnp.asarray(gamma, jnp.float32), mask.shape), jnp.asarray(lam, jnp.float32)
    return jax.vmap(_gae_row, in_axes=(0, 0, 0, 0, None))(rewards, values, mask, gamma, lam)


# ---------------------------------------------------------------- one signature for all

Compute = Callable[
    [Array, Array, Array, int, Array, Array | float, Array | float],
    tuple[Array, Array],
]


@dataclasses.dataclass(frozen=True)
class Advantage:
    """An advantage estimator and its requirements.

      compute(rewards, mask, values, group, greedy, gamma, lam) -> (advantages, returns)

    Args of `compute`:
      rewards: f32[B,R]; rewards per token. If the KL penalty is part of the reward, these rewards include the penalty.
      mask: bool[B,R]; True on the policy's tokens. It may have gaps.
      values: f32[B,R]; 0 if there is no value model.
      group: int, static; completions per prompt, a divisor of B. Rows i*group to (i+1)*group - 1 have the same prompt.
      greedy: f32[B]; return of the greedy completion of the same prompt; 0 if no greedy completion was sampled.
      gamma: f32[] or f32[B,R]; discount. Estimators that treat a completion as one action ignore the discount.
      lam: f32[]; lambda. Only GAE uses lambda.

    Both results are f32[B,R] and 0 where the mask is False. The returns of GAE are the targets of the value model. The
    returns of REINFORCE and REINFORCE++ are rewards-to-go. The other estimators treat a completion as one action. Their
    returns are the completion's summed reward, repeated on each token.

    If there are rewards inside completions (process rewards), GAE, REINFORCE and REINFORCE++ give each token credit
    for the rewards that follow. The estimators that treat a completion as one action sum its rewards, as their papers
    do. GRPO has its own rule for steps:

      by_step(rewards, mask, steps, group) -> (advantages, returns)

    `steps` is bool[B,R] and True at the last token of each step. The returns are rewards-to-go.

    Means, deviations and group sizes do not count empty completions. If all compared completions have the same return,
    the advantages are exactly 0. If a completion is alone in its group, its advantage is 0.
    """

    compute: Compute
    source: str  # arXiv number, or author and year
    needs_value: bool = False  # needs a value model
    needs_group: bool = False  # needs several completions per prompt: group > 1
    needs_greedy: bool = False  # needs the return of a greedy completion per prompt
    by_step: Callable[[Array, Array, Array, int], tuple[Array, Array]] | None = None  # replaces `compute` for steps


def _mean(x: Array, real: Array, axis: Axis = None) -> Array:
    """Returns the mean of x[real] along `axis`. The axis is kept with length 1. The mean of equal numbers is exact.

    A plain sum / count of equal numbers may differ from these numbers by rounding. Division by a deviation near 0
    would amplify the difference. So the mean is computed relative to the largest number.
    """
    top = jnp.max(jnp.where(real, x, -jnp.inf), axis=axis, keepdims=True)
    top = stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))  # the maximum is -inf if no position is real
    count = jnp.sum(real, axis=axis, keepdims=True, dtype=jnp.float32)
    return top + jnp.sum(jnp.where(real, x - top, 0.0), axis=axis, keepdims=True) / jnp.maximum(count, 1.0)


def _rewards_to_go(rewards: Array, mask: Array, gamma: Array | float) -> Array:
    """Returns the rewards-to-go G_t = r_t + gamma * G_{t+1}, f32[B,R]: GAE with all values 0 and lambda 1."""
    return gae(rewards, jnp.zeros(rewards.shape), mask, gamma, 1.0)[0]


def _on_tokens(per_row: Array, mask: Array) -> Array:
    """Repeats the number of each completion on all its tokens: f32[B] -> f32[B,R]; 0 where the mask is False."""
    return jnp.where(mask, per_row[:, None], 0.0)


def _group_advantages(rewards: Array, mask: Array, group: int) -> tuple[Array, Array, Array]:
    """Returns (return - group mean, count, return) of each completion, f32[B] each.

    The count is the number of non-empty completions in the group. For an empty completion the first result is 0.
    """
    chex.assert_rank([rewards, mask], 2)
    chex.assert_is_divisible(rewards.shape[0], group)
    returns = masked_sum(rewards, mask, axis=1)
    by_group, real = returns.reshape(-1, group), jnp.any(mask, axis=1).reshape(-1, group)
    centered = jnp.where(real, by_group - _mean(by_group, real, axis=1), 0.0)
    count = jnp.broadcast_to(jnp.sum(real, axis=1, keepdims=True, dtype=jnp.float32), real.shape)
    return centered.reshape(-1), count.reshape(-1), returns


def _deviation(squares: Array, count: Array) -> Array:
    """Returns the unbiased standard deviation of `count` numbers; 0 if `squares` is 0.

    `squares` is the sum of their squared deviations from the mean.
    """
    variance = squares / jnp.maximum(count - 1.0, 1.0)
    # The square root has no finite gradient at 0. So the inner `where` replaces 0 by 1.
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)


def _gae(rewards, mask, values, group, greedy, gamma, lam):
    """Calls `gae` with the signature that all estimators share."""
    return gae(rewards, values, mask, gamma, lam)


def reinforce(rewards, mask, values, group, greedy, gamma, lam):
    """REINFORCE with a constant baseline (Williams 1992): A_t = G_t - mean of G_0 over the batch."""
    to_go = _rewards_to_go(rewards, mask, gamma)
    first = jnp.take_along_axis(to_go, jnp.argmax(mask, axis=1)[:, None], axis=1)
    baseline = _mean(first, jnp.any(mask, axis=1)[:, None])
    return jnp.where(mask, to_go - baseline, 0.0), to_go


def rloo(rewards, mask, values, group, greedy, gamma, lam):
    """RLOO (2402.14740): A_i = r_i - mean of the group's other n - 1 returns = n / (n - 1) * (r_i - group mean)."""
    centered, count, returns = _group_advantages(rewards, mask, group)
    advantages = centered * count / jnp.maximum(count - 1.0, 1.0)
    return _on_tokens(advantages, mask), _on_tokens(returns, mask)


def grpo(rewards, mask, values, group, greedy, gamma, lam):
    """GRPO (2402.03300): A_i = (r_i - group mean) / (group deviation + 1e-4). The deviation is unbiased, as in TRL."""
    centered, count, returns = _group_advantages(rewards, mask, group)
    squares = jnp.sum(jnp.square(centered).reshape(-1, group), axis=1, keepdims=True)
    squares = jnp.broadcast_to(squares, (squares.shape[0], group)).reshape(-1)
    return _on_tokens(centered / (_deviation(squares, count) + 1e-4), mask), _on_tokens(returns, mask)


def grpo_by_step(rewards: Array, mask: Array, steps: Array, group: int) -> tuple[Array, Array]:
    """GRPO with process supervision (2402.03300, section 4.1.3).

      r~_j = (r_j - mean) / (deviation + 1e-4)    mean and deviation of the rewards of all steps of the group
      A_t  = sum of r~_j over the steps j that end at token t or later

    The deviation is unbiased, as in `grpo`. Rewards at other tokens, such as a KL penalty, are also divided by
    deviation + 1e-4, but no mean is subtracted. The arguments are those of `Advantage`.
    """
    chex.assert_rank([rewards, mask, steps], 2)
    chex.assert_is_divisible(rewards.shape[0], group)
    by_group, ends, real = (x.reshape(-1, group * x.shape[1]) for x in (rewards, steps & mask, mask))
    centered = jnp.where(ends, by_group - _mean(by_group, ends, axis=1), 0.0)
    deviation = _deviation(jnp.sum(jnp.square(centered), axis=1, keepdims=True), jnp.sum(ends, axis=1, keepdims=True))
    normalised = jnp.where(ends, centered, jnp.where(real, by_group, 0.0)) / (deviation + 1e-4)
    return _rewards_to_go(normalised.reshape(mask.shape), mask, 1.0), _rewards_to_go(rewards, mask, 1.0)


def dr_grpo(rewards, mask, values, group, greedy, gamma, lam):
    """Dr. GRPO (2503.20783): A_i = r_i - group mean. Use this estimator with the aggregation "constant"."""
    centered, _, returns = _group_advantages(rewards, mask, group)
    return _on_tokens(centered, mask), _on_tokens(returns, mask)


def reinforce_plus_plus(rewards, mask, values, group, greedy, gamma, lam):
    """REINFORCE++ (2501.03262): A_t = (G_t - mean) / deviation. Both are taken over all tokens of the global batch.

    The whitening is part of the method. A second whitening of the result changes nothing.
    """
    to_go = _rewards_to_go(rewards, mask, gamma)
    return whiten(to_go - _mean(to_go, mask), mask), to_go


def reinforce_plus_plus_baseline(rewards, mask, values, group, greedy, gamma, lam):
    """REINFORCE++ with a group baseline (2501.03262): r_i - group mean, whitened over all tokens of the global batch.

    This estimator divides by the deviation of the batch. GRPO divides by the deviation of each group, and thus
    amplifies the advantages of a group with nearly equal scores. This estimator does not amplify them.
    """
    centered, _, returns = _group_advantages(rewards, mask, group)
    tokens = _on_tokens(centered, mask)
    return whiten(tokens - _mean(tokens, mask), mask), _on_tokens(returns, mask)


def remax(rewards, mask, values, group, greedy, gamma, lam):
    """ReMax (2310.10505): A_i = r_i - return of the greedy completion of the same prompt.

    If one of the two returns includes a KL penalty, the other return must include a KL penalty too.
    """
    chex.assert_rank([rewards, mask, greedy], [2, 2, 1])
    chex.assert_equal_shape_prefix([rewards, greedy], 1)
    returns = masked_sum(rewards, mask, axis=1)
    return _on_tokens(returns - jnp.asarray(greedy, jnp.float32), mask), _on_tokens(returns, mask)


ADVANTAGES: dict[str, Advantage] = {
    "gae": Advantage(_gae, "1506.02438", needs_value=True),
    "reinforce": Advantage(reinforce, "Williams 1992"),
    "rloo": Advantage(rloo, "2402.14740", needs_group=True),
    "grpo": Advantage(grpo, "2402.03300", needs_group=True, by_step=grpo_by_step),
    "dr_grpo": Advantage(dr_grpo, "2503.20783", needs_group=True),
    "reinforce_plus_plus": Advantage(reinforce_plus_plus, "2501.03262"),
    "reinforce_plus_plus_baseline": Advantage(reinforce_plus_plus_baseline, "2501.03262", needs_group=True),
    "remax": Advantage(remax, "2310.10505", needs_greedy=True),
}
