"""KL divergence from the reference: per-token estimators, the KL loss, the adaptive coefficient, shaped rewards."""

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxrlhf.algorithms.masked import zero_masked

# The largest slope of one token's KL estimate, as a function of r. verl (k3) and OpenRLHF (k2, k3) clip the estimate
# itself at 10.
BOUND = 10.0

Bound = Array | float | None  # f32[]; None means unbounded


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


# Estimators of KL(policy || reference) (J. Schulman, "Approximating KL Divergence", 2020). For a token
# that the policy sampled, r = ref_logprob - logprob. k1 is unbiased and may be negative. k2 is biased and never
# negative. k3 is unbiased and never negative.
ESTIMATORS: dict[str, Callable[[Array, Bound], Array]] = {"k1": _k1, "k2": _k2, "k3": _k3}


def kl_estimate(logprobs: Array, ref_logprobs: Array, estimator: str, bound: Bound = BOUND) -> Array:
    """Per-token estimate of KL(policy || reference).

      k1  -r
      k2  r^2 / 2          up to |r| = bound
      k3  exp(r) - 1 - r   up to r = log(1 + bound)

    Beyond these points k2 and k3 continue as their tangent line, whose slope is `bound`. So a token far from the
    reference is still pulled back but cannot outweigh the batch. Without a bound, k3 of a token 20 nats away is 480
    million.

    This function does not mask. If gradients flow, first set both logprobs to 0 past the end, because k3 of padding may
    be infinite.

    Args:
      logprobs: any shape; logprobs of the sampled tokens under the policy.
      ref_logprobs: same shape; logprobs of the same tokens under the reference.
      estimator: "k1", "k2" or "k3"; another name is a KeyError.
      bound: f32[] of at least 1; None means unbounded.

    Returns:
      f32 of the same shape, in nats.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    r = jnp.asarray(ref_logprobs, jnp.float32) - jnp.asarray(logprobs, jnp.float32)
    return ESTIMATORS[estimator](r, bound)


def kl_loss(logprobs: Array, ref_logprobs: Array, mask: Array, estimator: str, bound: Bound = BOUND) -> Array:
    """The KL estimate as a loss per token; the gradient flows through `logprobs`.

    The gradient of a good estimate of the KL may differ from the gradient of the KL. With r = ref - policy, on samples
    from the policy (2510.01555):

      k1  grad = grad logprob              0 in expectation, so useless as a loss
      k2  grad = -r * grad logprob         in expectation the gradient of KL(policy || ref), as with k1 in the
                                           reward; recommended
      k3  grad = (1 - exp(r)) * grad logprob   equal to the gradient of k2 to first order in r, so biased; in
                                           expectation the gradient of KL(ref || policy); used by GRPO
                                           (2402.03300)

    On samples from an older policy all three gradients lack the importance ratio. `bound` limits the factor of
    grad logprob.

    Args:
      logprobs: f32[B,R]; of the policy being trained.
      ref_logprobs: f32[B,R]; constants.
      mask: bool[B,R].
      estimator: a name from `ESTIMATORS`.
      bound: as in `kl_estimate`.

    Returns:
      f32[B,R] in nats; 0 where the mask is False.
    """
    chex.assert_rank(mask, 2)
    logprobs, ref_logprobs = zero_masked(mask, logprobs, ref_logprobs)  # every estimate at r = 0 is 0
    return kl_estimate(logprobs, stop_gradient(ref_logprobs), estimator, bound)


def adapt_kl_coef(
    kl_coef: Array | float,
    kl: Array | float,
    target: Array | float,
    batch: Array | float,
    horizon: Array | float,
) -> Array:
    """KL coefficient of the next iteration, by the proportional controller of 1909.08593, section 2.2.

    kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * batch / horizon)

    Args:
      kl_coef: f32[]; the current coefficient.
      kl: f32[]; measured KL per completion (summed over its tokens, mean over completions), in nats.
      target: f32[] > 0; the desired KL per completion, in nats.
      batch: completions in this iteration.
      horizon: completions over which the coefficient adapts.

    Returns:
      f32[]; the new coefficient. It has the same sign as `kl_coef` if batch < 5 * horizon.
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
    """Rewards per token: -kl_coef * KL_t on every token, plus the score on the last real token (1909.08593).

    Args:
      scores: f32[B]; one per completion.
      logprobs: f32[B,R]; of the policy that sampled.
      ref_logprobs: f32[B,R].
      mask: bool[B,R]; the completion's real tokens.
      kl_coef: f32[].
      estimator: a name from `ESTIMATORS`.
      kl_bound: as in `kl_estimate`.

    Returns:
      f32[B,R]; 0 where the mask is False. The score of an empty completion is lost, because no token can hold it.
    """
    chex.assert_rank([scores, mask], [1, 2])
    chex.assert_equal_shape_prefix([scores, mask], 1)
    kl = kl_estimate(*zero_masked(mask, logprobs, ref_logprobs), estimator, kl_bound)
    position = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, position, -1), axis=1, keepdims=True)  # -1 matches no position: empty
    score = jnp.where(position == last, jnp.asarray(scores, jnp.float32)[:, None], 0.0)
    return jnp.where(mask, -kl_coef * kl, 0.0) + score
