"""Policy losses per token: PPO's clipped surrogate and its relatives, and importance weights.

`policy_loss` computes each loss in `POLICY_LOSSES`. To add a loss, write a function and add it to that table. Losses
per token are not reduced here (see `masked.aggregate`). All arithmetic is float32. Masked positions contribute 0 to
the loss and its gradient, even if they hold NaN.
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

# exp of a log-ratio above 88 is infinite in float32, and its gradient is then NaN even where the loss is clipped.
# At 20 the ratio is about 5e8. A sample with a larger ratio carries no information. verl has the same bound.
LOG_RATIO_BOUND = 20.0


class _Tokens(NamedTuple):
    """Inputs of a loss; f32[B,R] each, 0 where the mask is False. The ratio is exp(logprobs - old_logprobs)."""

    logprobs: Array
    log_ratio: Array  # not bounded
    advantages: Array  # constants
    mask: Array  # bool[B,R]
    bound: Bound  # of log-ratios


class _Loss(NamedTuple):
    """A loss per token [B,R] and its diagnostics."""

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
    """Loss per token of the policy, and its diagnostics.

    The gradient flows through `logprobs` only; old logprobs and advantages are constants.

    Args:
      logprobs: f32[B,R]; of the policy being trained.
      old_logprobs: f32[B,R]; of the policy that sampled.
      advantages: f32[B,R].
      mask: bool[B,R].
      clip_low, clip_high: f32[]; the ratio is clipped to [1 - clip_low, 1 + clip_high].
      dual_clip: f32[] > 1, 3 in the paper; None or infinity disables it.
      log_ratio_bound: f32[]; log-ratios are clipped to +- this before exp, and have no gradient beyond. None means
        unbounded: a ratio may then be infinite, and a gradient NaN.
      loss: a name from `POLICY_LOSSES`; another is a KeyError.

    Returns:
      loss f32[B,R], 0 where the mask is False; and diagnostics without gradient, each [B,R]:
        ratio        f32; 1 where the mask is False
        clipped_low  bool; A < 0 and the ratio is below its bound, so the token has no gradient
        clipped_high bool; A > 0 and the ratio is above its bound, so the token has no gradient
        clipped_dual bool; A < 0 and the ratio is above `dual_clip`, so the token has no gradient
        approx_kl    f32; (ratio - 1) - log ratio per token, k3 of KL(old || new); 0 where the mask is False
    """
    chex.assert_rank(mask, 2)
    # Masked before exp: the gradient of an infinite ratio is NaN even where its value is unused.
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
    """The clipped surrogate loss; 0 where the advantage is 0, which includes positions past the end."""
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

    With dual clip (1912.09729), loss_t = min(loss_t, dual_clip * |A_t|) where A_t < 0. This limits the loss of a bad
    token that has become much likelier. The first clip does not limit this loss.
    """
    ratio = jnp.exp(_bounded(tokens.log_ratio, tokens.bound))
    return _surrogate(ratio, tokens.advantages, clip_low, clip_high, dual_clip)


def _gspo(tokens: _Tokens, clip_low: Array | float, clip_high: Array | float, dual_clip: Bound) -> _Loss:
    """The clipped surrogate with one ratio per completion (2507.18071, GSPO-token).

    s   = exp(mean_t (logprob_t - old_logprob_t)),  a constant
    s_t = s * exp(logprob_t - stop_gradient(logprob_t))
    loss_t = max(-A_t * s_t, -A_t * clip(s_t, 1 - clip_low, 1 + clip_high)), with dual clip as in `_clip`

    Every s_t has the value s and the gradient of its own token. If all advantages of a completion have the same sign,
    either all its tokens are clipped or none. The mean keeps ratios close to 1: the paper clips at 3e-4 and 4e-4 and
    aggregates by sequence. The diagnostic `ratio` is s; `approx_kl` is per token.
    """
    mean = masked_mean(tokens.log_ratio, tokens.mask, axis=-1)[:, None]
    sequence = jnp.where(tokens.mask, mean, 0.0)
    # The difference is exactly 0. It is computed first, so that the ratio loses no precision.
    own = tokens.logprobs - stop_gradient(tokens.logprobs)
    ratio = jnp.exp(_bounded(stop_gradient(sequence) + own, tokens.bound))
    return _surrogate(ratio, tokens.advantages, clip_low, clip_high, dual_clip)


def _cispo(tokens: _Tokens, clip_low: Array | float, clip_high: Array | float, dual_clip: Bound) -> _Loss:
    """Policy gradient with a clipped importance weight (2506.13585).

    loss_t = -stop_gradient(clip(ratio_t, 1 - clip_low, 1 + clip_high)) * A_t * logprob_t

    Only the weight is clipped, so every token keeps a gradient. The paper has a wide upper bound and no lower bound,
    as with a clip_low of 1 or more. `dual_clip` is unused, because the upper bound holds for both signs of A. Here
    `clipped_low` and `clipped_high` are True where the ratio is past its bound, for either sign. Only the gradient of
    this loss is meaningful, not its value.
    """
    ratio = jnp.exp(_bounded(tokens.log_ratio, tokens.bound))
    weight = stop_gradient(jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high))
    low, high = tokens.mask & (ratio < 1.0 - clip_low), tokens.mask & (ratio > 1.0 + clip_high)
    return _Loss(-tokens.advantages * weight * tokens.logprobs, ratio, low, high)


def _pg(tokens: _Tokens, clip_low: Array | float, clip_high: Array | float, dual_clip: Bound) -> _Loss:
    """Plain policy gradient (Williams 1992): loss_t = -A_t * logprob_t.

    The gradient is unbiased only on samples from the current policy, so use this loss with one step per iteration.
    Nothing is clipped. The old logprobs are used for the diagnostics only.
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
    """Truncated importance weights that correct the gap between sampling and training logprobs.

      token     min(exp(train_t - sample_t), cap)
      sequence  min(exp(sum_t (train_t - sample_t)), cap), the same on all tokens of a completion

    The weights multiply the loss per token. Both logprobs belong to the policy that sampled. The sampler computed one,
    the training forward pass the other. The ratio to the policy being trained is part of the loss, not of the weights.
    Token weights have a bias and low variance, sequence weights have no bias and high variance. Sources: F. Yao et al.,
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025); truncation as in Ionides (2008).

    Args:
      logprobs_train: f32[B,R]; recomputed by the training forward pass, like the old logprobs.
      logprobs_sample: f32[B,R]; recorded while sampling.
      mask: bool[B,R].
      cap: f32[] > 0; usually 2.
      level: "token" or "sequence"; another name is a KeyError.
      log_ratio_bound: f32[]; log-weights are clipped to +- this before exp; None means unbounded.

    Returns:
      f32[B,R], constants; 0 where the mask is False.
    """
    chex.assert_rank(mask, 2)
    train, sample = zero_masked(mask, logprobs_train, logprobs_sample)
    weights = jnp.minimum(jnp.exp(_bounded(_LOG_WEIGHTS[level](train - sample, mask), log_ratio_bound)), cap)
    return stop_gradient(jnp.where(mask, weights, 0.0))
