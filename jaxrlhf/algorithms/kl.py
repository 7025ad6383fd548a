"""KL divergence of policy and reference: estimates per token, KL loss, adaptive coefficient, KL penalty in rewards."""

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxrlhf.algorithms.masked import at_last_token, zero_masked

# The largest allowed slope of a token's KL estimate as a function of r (see `kl_estimate`). Other libraries limit the
# estimate and not the slope: verl clips k3 at 10, OpenRLHF clips k2 and k3 at 10.
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


# Estimators of KL(policy || reference) from tokens that the policy sampled, with r = ref_logprob - logprob. k1 is
# unbiased and may be negative. k2 is biased and never negative. k3 is unbiased and never negative. Source:
# J. Schulman, "Approximating KL Divergence", 2020.
ESTIMATORS: dict[str, Callable[[Array, Bound], Array]] = {"k1": _k1, "k2": _k2, "k3": _k3}


def kl_estimate(logprobs: Array, ref_logprobs: Array, estimator: str, bound: Bound = BOUND) -> Array:
    """Returns an estimate of KL(policy || reference) for each token.

      k1  -r
      k2  r^2 / 2          up to |r| = bound
      k3  exp(r) - 1 - r   up to r = log(1 + bound)

    Beyond these points k2 and k3 continue as a straight line with slope `bound`. So a token far from the reference
    still has a gradient, but this token cannot outweigh the batch. Without a bound, k3 at r = 20 is 480 million.

    This function does not mask. k3 of padding may be infinite. If gradients flow, first set both logprobs to 0 past
    the end of each completion.

    Args:
      logprobs: any shape; logprobs of the sampled tokens under the policy.
      ref_logprobs: same shape; logprobs of the same tokens under the reference.
      estimator: "k1", "k2" or "k3"; any other name raises `KeyError`.
      bound: f32[], at least 1; None means no bound.

    Returns:
      f32 of the same shape, in nats.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    r = jnp.asarray(ref_logprobs, jnp.float32) - jnp.asarray(logprobs, jnp.float32)
    return ESTIMATORS[estimator](r, bound)


def kl_loss(logprobs: Array, ref_logprobs: Array, mask: Array, estimator: str, bound: Bound = BOUND) -> Array:
    """Returns the KL estimate of each token as a loss. The gradient flows through `logprobs` only.

    The gradient of a good KL estimate may differ from the gradient of the KL. With r = ref_logprob - logprob and tokens
    from the policy, the gradients are (2510.01555):

      k1  grad logprob                  The expectation is 0, so k1 is useless as a loss.
      k2  -r * grad logprob             The expectation is the gradient of KL(policy || ref). k1 in the reward gives
                                        the same expected gradient. k2 is recommended.
      k3  (1 - exp(r)) * grad logprob   The expectation is the gradient of KL(ref || policy). So k3 is biased. Its
                                        gradient equals that of k2 only to first order in r. GRPO uses k3
                                        (2402.03300).

    If an older policy sampled the tokens, all three gradients lack the importance ratio. `bound` limits the factor
    before grad logprob.

    Args:
      logprobs: f32[B,R]; from the policy in training.
      ref_logprobs: f32[B,R]; constants.
      mask: bool[B,R].
      estimator: a name in `ESTIMATORS`.
      bound: see `kl_estimate`.

    Returns:
      f32[B,R] in nats; 0 where the mask is False.
    """
    chex.assert_rank(mask, 2)
    logprobs, ref_logprobs = zero_masked(mask, logprobs, ref_logprobs)  # at r = 0 every estimate is 0
    return kl_estimate(logprobs, stop_gradient(ref_logprobs), estimator, bound)


def adapt_kl_coef(
    kl_coef: Array | float,
    kl: Array | float,
    target: Array | float,
    batch: Array | float,
    horizon: Array | float,
) -> Array:
    """Returns the KL coefficient for the next iteration. A proportional controller adapts it (1909.08593, section 2.2).

    kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * batch / horizon)

    Args:
      kl_coef: f32[]; the current coefficient.
      kl: f32[]; measured KL in nats: summed over the tokens of a completion, then averaged over completions.
      target: f32[] > 0; the desired KL per completion, in nats.
      batch: number of completions in this iteration.
      horizon: number of completions over which the coefficient adapts.

    Returns:
      f32[]; the new coefficient. The new coefficient has the sign of `kl_coef` if batch < 5 * horizon.
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
    """Returns the rewards: -kl_coef * KL_t on every token, plus the score on the last real token (1909.08593).

    Args:
      scores: f32[B], one score per completion; or f32[B,R], a reward for each token, which is added at this token.
      logprobs: f32[B,R]; from the policy before the update.
      ref_logprobs: f32[B,R]; from the reference.
      mask: bool[B,R]; True on the completion's real tokens.
      kl_coef: f32[].
      estimator: a name in `ESTIMATORS`.
      kl_bound: the `bound` of `kl_estimate`.

    Returns:
      f32[B,R]; 0 where the mask is False. An empty completion has no token, so its score is lost.
    """
    chex.assert_rank([scores, mask], [{1, 2}, 2])
    chex.assert_equal_shape_prefix([scores, mask], 1)
    kl = kl_estimate(*zero_masked(mask, logprobs, ref_logprobs), estimator, kl_bound)
    score = at_last_token(scores, mask) if scores.ndim == 1 else zero_masked(mask, scores)[0]
    return jnp.where(mask, -kl_coef * kl, 0.0) + score
