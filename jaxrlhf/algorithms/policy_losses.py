"""What the policy is trained on, per token: PPO's clipped surrogate and its relatives.

`POLICY_LOSSES` names them behind one signature; a new one is a function and a line of that table. Nothing is
reduced over tokens here (`masked.aggregate` does that). Everything is float32 inside. Masked positions give 0 in
value and gradient whatever stands there.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxrlhf.algorithms.kl import Bound
from jaxrlhf.algorithms.masked import masked_mean, masked_sum

PolicyLoss = Callable[
    [Array, Array, Array, Array, Array | float, Array | float, Bound, Bound],
    tuple[Array, dict[str, Array]],
]

# exp of a log-ratio past 88 is infinite in float32, and its gradient then NaN even where it is clipped. Ratios end at
# exp(20), about 5e8, and have no gradient beyond: further away there is nothing to learn from the sample. As in verl.
LOG_RATIO_BOUND = 20.0


def _masked(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array
) -> tuple[Array, Array, Array]:
    """Logprobs, log-ratio (not bounded yet) and advantages: f32[B,R], 0 where the mask is False.

    Old logprobs and advantages are constants. Masked before exp: the gradient of an infinite ratio is NaN even
    where its value is thrown away.
    """
    chex.assert_rank([logprobs, old_logprobs, advantages, mask], 2)
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    chex.assert_type(mask, bool)
    logprobs, old_logprobs, advantages = (
        jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0) for x in (logprobs, old_logprobs, advantages)
    )
    return logprobs, logprobs - stop_gradient(old_logprobs), stop_gradient(advantages)


def _bounded(log_ratio: Array, bound: Bound) -> Array:
    return log_ratio if bound is None else jnp.clip(log_ratio, -bound, bound)


def _diagnostics(ratio: Array, log_ratio: Array, low: Array, high: Array, dual: Array) -> dict[str, Array]:
    """See `ppo_policy_loss`. `log_ratio` is the token's own and bounded, whatever `ratio` is made of."""
    noted = {
        "ratio": ratio,
        "clipped_low": low,
        "clipped_high": high,
        "clipped_dual": dual,
        "approx_kl": jnp.expm1(log_ratio) - log_ratio,
    }
    return jax.tree.map(stop_gradient, noted)


def _surrogate(
    ratio: Array,
    log_ratio: Array,
    advantages: Array,
    clip_low: Array | float,
    clip_high: Array | float,
    dual_clip: Bound,
) -> tuple[Array, dict[str, Array]]:
    """The clipped surrogate of a ratio and its diagnostics. Advantages of 0 past the end give a loss of 0."""
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(-advantages * ratio, -advantages * clipped)
    dual = jnp.zeros(ratio.shape, bool)
    if dual_clip is not None:
        loss = jnp.minimum(loss, jnp.where(advantages < 0, -advantages * dual_clip, jnp.inf))
        dual = (advantages < 0) & (ratio > dual_clip)
    low = (advantages < 0) & (ratio < 1.0 - clip_low)
    high = (advantages > 0) & (ratio > 1.0 + clip_high)
    return loss, _diagnostics(ratio, log_ratio, low, high, dual)


def ppo_policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    clip_low: Array | float,
    clip_high: Array | float,
    dual_clip: Bound = None,
    log_ratio_bound: Bound = LOG_RATIO_BOUND,
) -> tuple[Array, dict[str, Array]]:
    """Clipped surrogate objective (1707.06347, equation 7) with bounds of its own on each side (2503.14476).

    ratio_t = exp(logprob_t - old_logprob_t)
    loss_t  = max(-A_t * ratio_t, -A_t * clip(ratio_t, 1 - clip_low, 1 + clip_high))

    and with dual clip (1912.09729), where A_t < 0,

    loss_t  = min(loss_t, dual_clip * |A_t|)

    so that a bad token that has become much likelier than it was, which the first clip lets through, cannot
    dominate. The gradient is that of `logprobs` alone; the old ones and the advantages are constants.

    Args:
      logprobs: f32[B,R]; of the policy that is trained.
      old_logprobs: f32[B,R]; of the policy that sampled.
      advantages: f32[B,R].
      mask: bool[B,R].
      clip_low, clip_high: f32[].
      dual_clip: f32[] > 1, 3 in the paper; None or infinity switches it off.
      log_ratio_bound: f32[]; log-ratios are held within +- this before exp, and have no gradient beyond. None: no
        bound; a ratio may then be infinite, and a gradient NaN.

    Returns:
      loss f32[B,R], 0 where the mask is False; and diagnostics without gradient, each [B,R]:
        ratio        f32; 1 where the mask is False
        clipped_low  bool; A < 0 and the ratio is below its bound: this token has no gradient left
        clipped_high bool; A > 0 and the ratio is above its bound: likewise
        clipped_dual bool; A < 0 and the ratio is above `dual_clip`: likewise
        approx_kl    f32; (ratio - 1) - log ratio, k3 of KL(old || new); 0 where the mask is False
    """
    _, log_ratio, advantages = _masked(logprobs, old_logprobs, advantages, mask)
    log_ratio = _bounded(log_ratio, log_ratio_bound)
    return _surrogate(jnp.exp(log_ratio), log_ratio, advantages, clip_low, clip_high, dual_clip)


def gspo_policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    clip_low: Array | float,
    clip_high: Array | float,
    dual_clip: Bound = None,
    log_ratio_bound: Bound = LOG_RATIO_BOUND,
) -> tuple[Array, dict[str, Array]]:
    """The same surrogate with one ratio for the whole answer (2507.18071, its GSPO-token form).

    s   = exp(mean_t (logprob_t - old_logprob_t)),  a constant
    s_t = s * exp(logprob_t - stop_gradient(logprob_t))
    loss_t = max(-A_t * s_t, -A_t * clip(s_t, 1 - clip_low, 1 + clip_high)), dual clip as in `ppo_policy_loss`

    Every s_t has the value s and the gradient of its own token; an answer is clipped whole where its advantages
    have one sign. The mean makes ratios lie close to 1: the paper's bounds are 3e-4 and 4e-4, and its aggregation
    is by sequence.

    Arguments and results as in `ppo_policy_loss`. `ratio` is s and the clips are its own; `approx_kl` is of tokens.
    """
    logprobs, log_ratio, advantages = _masked(logprobs, old_logprobs, advantages, mask)
    whole = jnp.where(mask, masked_mean(log_ratio, mask, axis=-1)[:, None], 0.0)
    # The difference is 0 and is put together first: it takes no digit from the ratio.
    ratio = jnp.exp(_bounded(stop_gradient(whole) + (logprobs - stop_gradient(logprobs)), log_ratio_bound))
    return _surrogate(ratio, _bounded(log_ratio, log_ratio_bound), advantages, clip_low, clip_high, dual_clip)


def cispo_policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    clip_low: Array | float,
    clip_high: Array | float,
    dual_clip: Bound = None,
    log_ratio_bound: Bound = LOG_RATIO_BOUND,
) -> tuple[Array, dict[str, Array]]:
    """Policy gradient with a clipped importance weight (2506.13585).

    loss_t = -stop_gradient(clip(ratio_t, 1 - clip_low, 1 + clip_high)) * A_t * logprob_t

    The weight is clipped, the token never: all keep a gradient. The paper has no lower bound, which is a clip_low
    of 1 or more, and a wide upper one. `dual_clip` has nothing to do here: the upper bound holds for both signs.

    Arguments and results as in `ppo_policy_loss`, but `clipped_low` and `clipped_high` say that the ratio is past
    its bound, whatever the sign of A. The loss's value means little: only its gradient does.
    """
    logprobs, log_ratio, advantages = _masked(logprobs, old_logprobs, advantages, mask)
    log_ratio = _bounded(log_ratio, log_ratio_bound)
    ratio = jnp.exp(log_ratio)
    weight = stop_gradient(jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high))
    low, high = mask & (ratio < 1.0 - clip_low), mask & (ratio > 1.0 + clip_high)
    never = jnp.zeros(mask.shape, bool)
    return -advantages * weight * logprobs, _diagnostics(ratio, log_ratio, low, high, never)


def pg_policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    clip_low: Array | float,
    clip_high: Array | float,
    dual_clip: Bound = None,
    log_ratio_bound: Bound = LOG_RATIO_BOUND,
) -> tuple[Array, dict[str, Array]]:
    """Plain policy gradient (Williams 1992): loss_t = -A_t * logprob_t.

    Right on samples of the policy itself, so for one step an iteration. Nothing is clipped; the old logprobs are
    for the diagnostics alone. Arguments and results as in `ppo_policy_loss`.
    """
    logprobs, log_ratio, advantages = _masked(logprobs, old_logprobs, advantages, mask)
    log_ratio = _bounded(log_ratio, log_ratio_bound)
    never = jnp.zeros(mask.shape, bool)
    return -advantages * logprobs, _diagnostics(jnp.exp(log_ratio), log_ratio, never, never, never)


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "clip": ppo_policy_loss,
    "gspo": gspo_policy_loss,
    "cispo": cispo_policy_loss,
    "pg": pg_policy_loss,
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
    """Truncated importance weights for the gap between the engine that sampled and the one that trains.

      token     min(exp(train_t - sample_t), cap)
      sequence  min(exp(sum_t (train_t - sample_t)), cap), the same on all tokens of an answer

    Factors of the per-token loss. Both logprobs are those of the policy that sampled, computed twice: the ratio to
    the policy that is trained is the loss's own affair. After F. Yao et al., "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training" (2025); truncation after Ionides (2008). By token the weights are biased and
    vary little; by sequence it is the other way round.

    Args:
      logprobs_train: f32[B,R]; recomputed, as old logprobs are.
      logprobs_sample: f32[B,R]; noted while sampling.
      mask: bool[B,R].
      cap: f32[] > 0; 2 is usual.
      level: "token" or "sequence"; another name is a KeyError.
      log_ratio_bound: f32[]; what is under exp is held within +- this; None: no bound.

    Returns:
      f32[B,R], constants; 0 where the mask is False.
    """
    chex.assert_rank([logprobs_train, logprobs_sample, mask], 2)
    chex.assert_equal_shape([logprobs_train, logprobs_sample, mask])
    chex.assert_type(mask, bool)
    train, sample = (
        jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0) for x in (logprobs_train, logprobs_sample)
    )
    weights = jnp.minimum(jnp.exp(_bounded(_LOG_WEIGHTS[level](train - sample, mask), log_ratio_bound)), cap)
    return stop_gradient(jnp.where(mask, weights, 0.0))
