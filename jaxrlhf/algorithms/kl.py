"""The distance from the reference: its estimators, its coefficient's controller, the rewards made of it."""

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

# The steepest slope of one token's estimate. verl (k3) and OpenRLHF (k2, k3) hold the estimate itself within 10.
BOUND = 10.0

Bound = Array | float | None  # f32[]; None switches a bound off


def _k1(r: Array, bound: Bound) -> Array:
    return -r


def _k2(r: Array, bound: Bound) -> Array:
    if bound is None:
        return 0.5 * jnp.square(r)
    near = jnp.clip(r, -bound, bound)
    return 0.5 * jnp.square(near) + near * (r - near)


def _k3(r: Array, bound: Bound) -> Array:
    if bound is None:
        return jnp.expm1(r) - r
    near = jnp.minimum(r, jnp.log1p(bound))
    return jnp.expm1(near) - near + jnp.expm1(near) * (r - near)


# On the log-ratio r = ref - policy of a token that the policy sampled (J. Schulman, "Approximating KL
# Divergence", 2020). All estimate KL(policy || ref). k1 has no bias and may be negative; k2 has a bias and is
# not; k3 has no bias and is never negative.
ESTIMATORS: dict[str, Callable[[Array, Bound], Array]] = {"k1": _k1, "k2": _k2, "k3": _k3}


def kl_estimate(logprobs: Array, ref_logprobs: Array, estimator: str, bound: Bound = BOUND) -> Array:
    """Per-token estimate of KL(policy || reference).

      k1  -r
      k2  r^2 / 2          up to |r| = bound
      k3  exp(r) - 1 - r   up to r = log(1 + bound)

    Beyond, k2 and k3 go on as the straight line that touches them there, of slope `bound`: a token that the policy
    has left far behind is drawn back, and cannot outweigh all others (k3 of one token 20 nats off weighs as much as
    480 million tokens; at 89 nats it is infinite). Peers cut the estimate off instead, and with it the pull.

    There is no mask here: where gradients flow, put 0 into both logprobs past the end first, for k3 of garbage
    may be infinite.

    Args:
      logprobs: any shape; of the sampled tokens under the policy.
      ref_logprobs: same shape; under the reference.
      estimator: "k1", "k2" or "k3"; another name is a KeyError.
      bound: f32[] of at least 1; None: none.

    Returns:
      f32 of the same shape, in nats.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    r = jnp.asarray(ref_logprobs, jnp.float32) - jnp.asarray(logprobs, jnp.float32)
    return ESTIMATORS[estimator](r, bound)


def kl_loss(logprobs: Array, ref_logprobs: Array, mask: Array, estimator: str, bound: Bound = BOUND) -> Array:
    """The estimate as a term of the loss, per token: the gradient flows through `logprobs`.

    A good estimate of the value need not have the gradient of the KL. With r = ref - policy, on samples of the
    policy itself (2510.01555):

      k1  grad = grad logprob              of expectation 0, whatever the reference: useless in a loss
      k2  grad = -r * grad logprob         in expectation the gradient of KL(policy || ref), and that of k1
                                           in the reward: the one to take
      k3  grad = (1 - exp(r)) * grad logprob   -r to first order, so biased; in expectation the gradient of the
                                           other direction, KL(ref || policy). As in GRPO (2402.03300)

    On samples of an older policy all three lack its importance ratio. The factor of grad logprob is held within
    `bound` (see `kl_estimate`).

    Args:
      logprobs: f32[B,R]; of the policy that is trained.
      ref_logprobs: f32[B,R]; constants.
      mask: bool[B,R].
      estimator: a name from `ESTIMATORS`.
      bound: as in `kl_estimate`.

    Returns:
      f32[B,R] in nats; 0 where the mask is False.
    """
    chex.assert_rank([logprobs, ref_logprobs, mask], 2)
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    chex.assert_type(mask, bool)
    # Both are 0 past the end, and so is every estimate of a log-ratio of 0.
    ref_logprobs = stop_gradient(jnp.where(mask, ref_logprobs, 0.0))
    return kl_estimate(jnp.where(mask, logprobs, 0.0), ref_logprobs, estimator, bound)


def adapt_kl_coef(
    kl_coef: Array | float,
    kl: Array | float,
    target: Array | float,
    batch: Array | float,
    horizon: Array | float,
) -> Array:
    """The log-space proportional controller of 1909.08593, section 2.2.

    kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * batch / horizon)

    Args:
      kl_coef: f32[]; the coefficient in use.
      kl: f32[]; measured KL per answer (summed over its tokens, mean over answers), in nats.
      target: f32[] > 0; the KL per answer to aim at.
      batch: answers in this iteration.
      horizon: answers over which the coefficient reacts.

    Returns:
      f32[]; the coefficient of the next iteration. Of the same sign as before while batch < 5 * horizon.
    """
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return jnp.asarray(kl_coef, jnp.float32) * (1.0 + error * batch / horizon)


def shape_rewards(
    scores: Array,
    logprobs: Array,
    ref_logprobs: Array,
    mask: Array,
    kl_coef: Array | float,
    estimator: str = "k1",
    kl_bound: Bound = BOUND,
) -> Array:
    """Rewards per token: -kl_coef * KL_t everywhere, and the score on the last real token (1909.08593).

    Args:
      scores: f32[B]; one per answer.
      logprobs: f32[B,R]; of the policy that sampled.
      ref_logprobs: f32[B,R].
      mask: bool[B,R]; the answer's real tokens.
      kl_coef: f32[].
      estimator: a name from `ESTIMATORS`.
      kl_bound: as in `kl_estimate`.

    Returns:
      f32[B,R]; 0 where the mask is False. An empty answer has no token to hold its score, and gets nothing.
    """
    chex.assert_rank([scores, logprobs, ref_logprobs, mask], [1, 2, 2, 2])
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    chex.assert_equal_shape_prefix([scores, logprobs], 1)
    chex.assert_type(mask, bool)
    kl = kl_estimate(jnp.where(mask, logprobs, 0.0), jnp.where(mask, ref_logprobs, 0.0), estimator, kl_bound)
    position = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, position, -1), axis=1, keepdims=True)  # -1, which is nowhere: empty
    score = jnp.where(position == last, jnp.asarray(scores, jnp.float32)[:, None], 0.0)
    return jnp.where(mask, -kl_coef * kl, 0.0) + score
