"""Policy losses per token, such as PPO's clipped surrogate, and importance weights.

`policy_loss` computes any loss of the table `POLICY_LOSSES`. To add a loss, write a function and add the function to
this table. Losses per token are returned unreduced (see `masked.aggregate`). All arithmetic is float32. Where the
mask is False, the loss and its gradient are 0, even if the inputs there are NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxrlhf.algorithms.kl import Bound
from jaxrlhf.algorithms.masked import masked_mean, masked_sum, zero_masked

# exp of a log-ratio above 88 is infinite in float32, and the gradient is then NaN, even if the loss is clipped.
# At 20 the ratio is about 5e8. A sample with a larger ratio carries no information. verl has the same bound of 20.
LOG_RATIO_BOUND = 20.0


class _Tokens(NamedTuple):
    """The inputs of a loss: f32[B,R] each; 0 where the mask is False. The ratio is exp(logprobs - old_logprobs)."""

    logprobs: Array
    log_ratio: Array  # not bounded
    advantages: Array  # constants
    mask: Array  # bool[B,R]
    bound: Bound  # bound of log-ratios


class _Loss(NamedTuple):
    """The loss of each token [B,R] and its diagnostics."""

    loss: Array
    ratio: Array
    clipped_low: Array | bool = False
    clipped_high: Array | bool = False
    clipped_dual: Array | bool = False


def policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    clip_low: Array | float,
    clip_high: Array | float,
    dual_clip: Bound = None,
    log_ratio_bound: Bound = LOG_RATIO_BOUND,
    loss: str = "clip",
) -> tuple[Array, dict[str, Array]]:
    """Returns the policy's loss per token, and diagnostics of the loss.

    The gradient flows through `logprobs` only. Old logprobs and advantages are constants.

    Args:
      logprobs: f32[B,R]; from the policy in training.
      old_logprobs: f32[B,R]; from the policy before the update.
      advantages: f32[B,R].
      mask: bool[B,R].
      clip_low, clip_high: f32[]; the ratio is clipped to [1 - clip_low, 1 + clip_high].
      dual_clip: f32[] > 1, 3 in the paper; None or infinity disables the dual clip.
      log_ratio_bound: f32[]. Log-ratios are clipped to [-log_ratio_bound, log_ratio_bound] before exp. A clipped
        log-ratio has no gradient. None means no bound: a ratio may then be infinite, and a gradient NaN.
      loss: a name in `POLICY_LOSSES`; any other name raises `KeyError`.

    Returns:
      (loss, diagnostics). The loss is f32[B,R]; 0 where the mask is False. The diagnostics have no gradient. They are
      [B,R] each:
        ratio        f32; 1 where the mask is False
        clipped_low  bool; A < 0 and the ratio is below 1 - clip_low, so the token has no gradient
        clipped_high bool; A > 0 and the ratio is above 1 + clip_high, so the token has no gradient
        clipped_dual bool; A < 0 and the ratio is above `dual_clip`, so the token has no gradient
        approx_kl    f32; (ratio - 1) - log ratio, the k3 estimate of KL(old || new); 0 where the mask is False
    """
    chex.assert_rank(mask, 2)
    # The mask is applied before exp: the gradient of an infinite ratio is NaN even if the ratio is not used.
    logprobs, old_logprobs, advantages = zero_masked(mask, logprobs, old_logprobs, advantages)
    log_ratio = logprobs - stop_gradient(old_logprobs)
    tokens = _Tokens(logprobs, log_ratio, stop_gradient(advantages), mask, log_ratio_bound)
    result = POLICY_LOSSES[loss](tokens, clip_low, clip_high, dual_clip)
    bounded = _bounded(log_ratio, log_ratio_bound)
    diagnostics = {
        "ratio": result.ratio,
        "clipped_low": jnp.broadcast_to(result.clipped_low, mask.shape),
        "clipped_high": jnp.broadcast_to(result.clipped_high, mask.shape),
        "clipped_dual": jnp.broadcast_to(result.clipped_dual, mask.shape),
        "approx_kl": jnp.expm1(bounded) - bounded,
    }
    return result.loss, jax.tree.map(stop_gradient, diagnostics)


def _bounded(log_ratio: Array, bound: Bound) -> Array:
    return log_ratio if bound is None else jnp.clip(log_ratio, -bound, bound)


def _surrogate(
    ratio: Array, advantages: Array, clip_low: Array | float, clip_high: Array | float, dual_clip: Bound
) -> _Loss:
    """Returns the clipped surrogate loss. It is 0 where the advantage is 0, so also where the mask is False."""
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(-advantages * ratio, -advantages * clipped)
    dual = False
    if dual_clip is not None:
        loss = jnp.minimum(loss, jnp.where(advantages < 0, -advantages * dual_clip, jnp.inf))
        dual = (advantages < 0) & (ratio > dual_clip)
    low = (advantages < 0) & (ratio < 1.0 - clip_low)
    high = (advantages > 0) & (ratio > 1.0 + clip_high)
    return _Loss(loss, ratio, low, high, dual)


def _clip(tokens: _Tokens, clip_low: Array | float, clip_high: Array | float, dual_clip: Bound) -> _Loss:
    """PPO's clipped surrogate (1707.06347, equation 7) with separate bounds (2503.14476).

    ratio_t = exp(logprob_t - old_logprob_t)
    loss_t  = max(-A_t * ratio_t, -A_t * clip(ratio_t, 1 - clip_low, 1 + clip_high))

    If A_t < 0, the dual clip (1912.09729) limits loss_t to dual_clip * |A_t|. A negative advantage marks a bad token.
    If a bad token has become much likelier, the first clip does not limit its loss.
    """
    ratio = jnp.exp(_bounded(tokens.log_ratio, tokens.bound))
    return _surrogate(ratio, tokens.advantages, clip_low, clip_high, dual_clip)


def _gspo(tokens: _Tokens, clip_low: Array | float, clip_high: Array | float, dual_clip: Bound) -> _Loss:
    """GSPO: the clipped surrogate with one ratio per completion (2507.18071, GSPO-token).

    s   = exp(mean_t (logprob_t - old_logprob_t)),  a constant
    s_t = s * exp(logprob_t - stop_gradient(logprob_t))
    loss_t = max(-A_t * s_t, -A_t * clip(s_t, 1 - clip_low, 1 + clip_high))

    The dual clip is that of `_clip`. Every s_t has the value s and the gradient of its own token. If all advantages of
    a completion have the same sign, either all its tokens are clipped or none. The mean keeps ratios close to 1, so the
    clip range is small. The paper uses 3e-4 and 4e-4, and the aggregation "sequence". The diagnostic `ratio` is s. The
    diagnostic `approx_kl` is per token.
    """
    mean = masked_mean(tokens.log_ratio, tokens.mask, axis=-1)[:, None]
    sequence = jnp.where(tokens.mask, mean, 0.0)
    # This difference is exactly 0. The brackets compute it first, so that the ratio loses no precision.
    own = tokens.logprobs - stop_gradient(tokens.logprobs)
    ratio = jnp.exp(_bounded(stop_gradient(sequence) + own, tokens.bound))
    return _surrogate(ratio, tokens.advantages, clip_low, clip_high, dual_clip)


def _cispo(tokens: _Tokens, clip_low: Array | float, clip_high: Array | float, dual_clip: Bound) -> _Loss:
    """CISPO: policy gradient with a clipped importance weight (2506.13585).

    loss_t = -stop_gradient(clip(ratio_t, 1 - clip_low, 1 + clip_high)) * A_t * logprob_t

    Only the weight is clipped, so every token keeps a gradient. The paper uses a high upper bound and no lower bound.
    A clip_low of 1 or more means no lower bound. `dual_clip` is not used, because the upper bound holds for both signs
    of A. `clipped_low` is True where the ratio is below the lower bound, and `clipped_high` where it is above the upper
    bound, for both signs of A. Only the gradient of this loss has a meaning. The value of the loss has none.
    """
    ratio = jnp.exp(_bounded(tokens.log_ratio, tokens.bound))
    weight = stop_gradient(jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high))
    low, high = tokens.mask & (ratio < 1.0 - clip_low), tokens.mask & (ratio > 1.0 + clip_high)
    return _Loss(-tokens.advantages * weight * tokens.logprobs, ratio, low, high)


def _pg(tokens: _Tokens, clip_low: Array | float, clip_high: Array | float, dual_clip: Bound) -> _Loss:
    """Plain policy gradient (Williams 1992): loss_t = -A_t * logprob_t.

    The gradient is unbiased only if the current policy sampled the tokens. So use this loss with one optimizer step
    per iteration. Nothing is clipped. Only the diagnostics use the old logprobs.
    """
    ratio = jnp.exp(_bounded(tokens.log_ratio, tokens.bound))
    return _Loss(-tokens.advantages * tokens.logprobs, ratio)


POLICY_LOSSES: dict[str, Callable[[_Tokens, Array | float, Array | float, Bound], _Loss]] = {
    "clip": _clip,
    "gspo": _gspo,
    "cispo": _cispo,
    "pg": _pg,
}

_LOG_WEIGHTS: dict[str, Callable[[Array, Array], Array]] = {
    "token": lambda gap, mask: gap,
    "sequence": lambda gap, mask: jnp.broadcast_to(masked_sum(gap, mask, axis=-1)[:, None], gap.shape),
}


def importance_weights(
    logprobs_train: Array,
    logprobs_sample: Array,
    mask: Array,
    cap: Array | float,
    level: str = "token",
    log_ratio_bound: Bound = LOG_RATIO_BOUND,
) -> Array:
    """Returns importance weights. They correct for the difference between sampling and training logprobs.

      token     min(exp(train_t - sample_t), cap)
      sequence  min(exp(sum_t (train_t - sample_t)), cap), the same on all tokens of a completion

    The caller multiplies the loss per token by the weights. `logprobs_train` are those of the policy before the
    update, from the training forward pass. `logprobs_sample` are those of the policy that sampled the tokens, from the
    sampler. Both are the same policy, or the policy that sampled is some updates behind. The ratio of the policy in
    training to the policy before the update is part of the loss, not of the weights. Token weights have a bias and a
    low variance. Sequence weights have no bias and a high variance. Sources: F. Yao et al., "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training" (2025); for the truncation, Ionides (2008).

    Args:
      logprobs_train: f32[B,R]; old logprobs, computed by the training forward pass.
      logprobs_sample: f32[B,R]; recorded during sampling.
      mask: bool[B,R].
      cap: f32[] > 0; usually 2.
      level: "token" or "sequence"; any other name raises `KeyError`.
      log_ratio_bound: f32[]. Log-weights are clipped to [-log_ratio_bound, log_ratio_bound] before exp. None means no
        bound.

    Returns:
      f32[B,R]; constants; 0 where the mask is False.
    """
    chex.assert_rank(mask, 2)
    train, sample = zero_masked(mask, logprobs_train, logprobs_sample)
    weights = jnp.minimum(jnp.exp(_bounded(_LOG_WEIGHTS[level](train - sample, mask), log_ratio_bound)), cap)
    return stop_gradient(jnp.where(mask, weights, 0.0))
