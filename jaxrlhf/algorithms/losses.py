"""Value, cross-entropy and pairwise losses; log-probabilities and entropies from logits.

Policy losses are in `policy_losses`. Losses per token are not reduced here (see `masked.aggregate`), so that
accumulation over microbatches is exact. All arithmetic is float32. Masked positions contribute 0 to the loss and its
gradient, even if they hold NaN.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxrlhf.algorithms.masked import zero_masked

_LOWEST = jnp.finfo(jnp.float32).min


def value_loss(
    values: Array, old_values: Array, returns: Array, mask: Array, clip: Array | float
) -> tuple[Array, Array]:
    """PPO's clipped value loss per token (2403.17031).

    loss_t = 1/2 max((V_t - R_t)^2, (clip(V_t, V_old_t - clip, V_old_t + clip) - R_t)^2)

    The gradient flows through `values` only.

    Args:
      values: f32[B,R]; of the value model being trained.
      old_values: f32[B,R]; the values from which the advantages were computed.
      returns: f32[B,R].
      mask: bool[B,R].
      clip: f32[]; infinity disables it.

    Returns:
      loss f32[B,R], 0 where the mask is False; and bool[B,R], True where the clipped error is the larger one. There
      the token has no gradient.
    """
    chex.assert_rank(mask, 2)
    values, old_values, returns = zero_masked(mask, values, old_values, returns)
    old_values, returns = stop_gradient((old_values, returns))
    clipped_values = jnp.clip(values, old_values - clip, old_values + clip)
    error = jnp.square(values - returns)
    clipped_error = jnp.square(clipped_values - returns)
    loss = jnp.where(mask, 0.5 * jnp.maximum(error, clipped_error), 0.0)
    return loss, clipped_error > error


# log softmax(logits / T) = shifted - log sum exp(shifted), with shifted = (logits - peak) / T. The peak is subtracted
# before the division, because float32 subtraction of near numbers is exact.


def _peak(logits: Array) -> Array:
    """The largest logit, without gradient: f32[...,V] -> f32[...,1]. It is finite even if all logits are -inf."""
    return stop_gradient(jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), _LOWEST))


def _log_total(shifted: Array) -> Array:
    """log sum exp of shifted logits: f32[...,V] -> f32[...,1]. A logit of -inf has probability 0 and gradient 0."""
    total = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)
    # The peak itself contributes 1, so the total is at least 1, or 0 if all logits are -inf. 1/2 separates these cases.
    return jnp.log(jnp.maximum(total, 0.5))


def _entropy(shifted: Array, log_total: Array) -> Array:
    """Entropy -sum p log p over the last axis, with 0 log 0 = 0 in value and gradient."""
    log_p = shifted - log_total
    return -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, _LOWEST), axis=-1)


def _at(logits: Array, tokens: Array) -> Array:
    """Gathers the tokens' logits: [...,V], i32[...] -> f32[...,1].

    Use this function on the raw logits. A gather from shifted logits would write the full [...,V] array to memory.
    """
    return jnp.asarray(jnp.take_along_axis(logits, tokens[..., None], axis=-1), jnp.float32)


def entropy_from_logits(logits: Array) -> Array:
    """Entropy of softmax(logits) in nats: [...,V] -> f32[...]. A logit of -inf has probability 0."""
    logits = jnp.asarray(logits, jnp.float32)
    shifted = logits - _peak(logits)
    return _entropy(shifted, _log_total(shifted))


def token_logprobs(logits: Array, tokens: Array, temperature: Array | float) -> tuple[Array, Array]:
    """Log-probabilities of tokens under softmax(logits / temperature), and the entropy of that distribution.

    Old, new and reference logprobs all come from this function, so that temperature applies equally to them.

    Args:
      logits: [B,R,V]; the predictions of `tokens`, before temperature.
      tokens: i32[B,R]; in [0, V), padding included.
      temperature: f32[B] or a scalar; greater than 0.

    Returns:
      logprobs f32[B,R] and entropy f32[B,R], in nats, not masked. A token with logit -inf has logprob -inf.
    """
    chex.assert_rank([logits, tokens], [3, 2])
    chex.assert_equal_shape_prefix([logits, tokens], 2)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (logits.shape[0],))[:, None, None]
    chosen = _at(logits, tokens)
    logits = jnp.asarray(logits, jnp.float32)
    peak = _peak(logits)
    shifted = (logits - peak) / temperature
    log_total = _log_total(shifted)
    logprobs = (chosen - peak) / temperature - log_total
    return logprobs[..., 0], _entropy(shifted, log_total)


def cross_entropy(logits: Array, targets: Array, mask: Array) -> Array:
    """-log softmax(logits)[target] per token.

    Args:
      logits: [...,V].
      targets: i32[...]; in [0, V) where the mask is True; elsewhere unused, so -100 is allowed.
      mask: bool[...]; the tokens to learn.

    Returns:
      f32[...] in nats; 0 where the mask is False.
    """
    chex.assert_equal_shape([targets, mask])
    chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
    chex.assert_type(mask, bool)
    logits = jnp.where(mask[..., None], jnp.asarray(logits, jnp.float32), 0.0)
    peak = _peak(logits)
    chosen = _at(logits, jnp.where(mask, targets, 0))
    loss = _log_total(logits - peak) - (chosen - peak)
    return jnp.where(mask, loss[..., 0], 0.0)


def pairwise_loss(
    chosen_scores: Array, rejected_scores: Array, margin: Array, center_rewards_coef: Array | float, weight: Array
) -> tuple[Array, Array]:
    """Bradley-Terry loss of a reward model (2203.02155) with margin (2307.09288) and centering (2312.09244).

    loss = -log sigmoid(chosen - rejected - margin) + center_rewards_coef * (chosen + rejected)^2

    Args:
      chosen_scores: f32[B]; of the better completions.
      rejected_scores: f32[B].
      margin: f32[B]; 0 if unknown.
      center_rewards_coef: f32[]; keeps scores near 0, because the first term depends on differences only.
      weight: f32[B]; 0 on padding rows, whose scores are ignored.

    Returns:
      loss f32[], the weighted mean over pairs; accuracy f32[], the weighted share of pairs with chosen > rejected
      (a tie counts as wrong). Both are 0 if all weights are.
    """
    chex.assert_rank([chosen_scores, rejected_scores, margin, weight], 1)
    chex.assert_equal_shape([chosen_scores, rejected_scores, margin, weight])
    weight = jnp.asarray(weight, jnp.float32)
    chosen, rejected, margin = (
        jnp.where(weight > 0, jnp.asarray(x, jnp.float32), 0.0)
        for x in (chosen_scores, rejected_scores, margin)
    )
    # softplus(-x) = -log sigmoid(x), without overflow on either side.
    losses = jax.nn.softplus(rejected + margin - chosen) + center_rewards_coef * jnp.square(chosen + rejected)
    total = jnp.sum(weight)
    share = weight / jnp.where(total > 0, total, 1.0)
    return jnp.sum(share * losses), jnp.sum(share * (chosen > rejected))
