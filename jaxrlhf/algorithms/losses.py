"""Value, cross-entropy and pairwise losses; log-probabilities and entropies from logits.

Policy losses are in `policy_losses`. Losses per token are returned unreduced (see `masked.aggregate`), so that
accumulation over microbatches is exact. All arithmetic is float32. Where the mask is False, the loss and its gradient
are 0, even if the inputs there are NaN.
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
    """Returns PPO's clipped value loss of each token (2403.17031).

    loss_t = 1/2 max((V_t - R_t)^2, (clip(V_t, V_old_t - clip, V_old_t + clip) - R_t)^2)

    The gradient flows through `values` only.

    Args:
      values: f32[B,R]; from the value model in training.
      old_values: f32[B,R]; the values from which the advantages were computed.
      returns: f32[B,R].
      mask: bool[B,R].
      clip: f32[]; infinity disables clipping.

    Returns:
      (loss, clipped). loss: f32[B,R]; 0 where the mask is False. clipped: bool[B,R]; True where the clipped error is
      larger than the unclipped error. These tokens have no gradient.
    """
    chex.assert_rank(mask, 2)
    values, old_values, returns = zero_masked(mask, values, old_values, returns)
    old_values, returns = stop_gradient((old_values, returns))
    clipped_values = jnp.clip(values, old_values - clip, old_values + clip)
    error = jnp.square(values - returns)
    clipped_error = jnp.square(clipped_values - returns)
    loss = jnp.where(mask, 0.5 * jnp.maximum(error, clipped_error), 0.0)
    return loss, clipped_error > error


# log softmax(logits / T) = shifted - log sum exp(shifted), with shifted = (logits - peak) / T. The subtraction comes
# before the division, because the float32 difference of two close numbers is exact.


def _peak(logits: Array) -> Array:
    """Returns the largest logit, f32[...,1], without gradient. The result is finite even if all logits are -inf."""
    return stop_gradient(jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), _LOWEST))


def _log_total(shifted: Array) -> Array:
    """Returns log sum exp of shifted logits: f32[...,V] -> f32[...,1]. A logit of -inf adds 0 and has gradient 0."""
    total = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)
    # The peak contributes 1, so the total is at least 1. If all logits are -inf, the total is 0. The limit 1/2
    # separates the two cases.
    return jnp.log(jnp.maximum(total, 0.5))


def _entropy(shifted: Array, log_total: Array) -> Array:
    """Returns the entropy -sum p log p over the last axis. Where p is 0, p log p has value 0 and gradient 0."""
    log_p = shifted - log_total
    return -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, _LOWEST), axis=-1)


def _at(logits: Array, tokens: Array) -> Array:
    """Returns the logits of the tokens: logits [...,V], tokens i32[...] -> f32[...,1].

    Call this function before the maximum is subtracted from the logits. After the subtraction, XLA would write the full
    [...,V] array to memory.
    """
    return jnp.asarray(jnp.take_along_axis(logits, tokens[..., None], axis=-1), jnp.float32)


def entropy_from_logits(logits: Array) -> Array:
    """Returns the entropy of softmax(logits) in nats: [...,V] -> f32[...]. A logit of -inf has probability 0."""
    logits = jnp.asarray(logits, jnp.float32)
    shifted = logits - _peak(logits)
    return _entropy(shifted, _log_total(shifted))


def token_logprobs(logits: Array, tokens: Array, temperature: Array | float) -> tuple[Array, Array]:
    """Returns the logprobs of tokens under softmax(logits / temperature), and the entropies of these distributions.

    This function computes old, new and reference logprobs, so that the temperature has the same effect on all three.

    Args:
      logits: [B,R,V]; the model's predictions of `tokens`, not yet divided by the temperature.
      tokens: i32[B,R]; all values, also those of padding, are in [0, V).
      temperature: f32[B,R], f32[B] or a scalar; greater than 0.

    Returns:
      (logprobs, entropies), f32[B,R] each, in nats, not masked. A token with logit -inf has logprob -inf.
    """
    chex.assert_rank([logits, tokens], [3, 2])
    chex.assert_equal_shape_prefix([logits, tokens], 2)
    temperature = jnp.asarray(temperature, jnp.float32)
    temperature = temperature.reshape(*temperature.shape, *(1,) * (3 - temperature.ndim))
    chosen = _at(logits, tokens)
    logits = jnp.asarray(logits, jnp.float32)
    peak = _peak(logits)
    shifted = (logits - peak) / temperature
    log_total = _log_total(shifted)
    logprobs = (chosen - peak) / temperature - log_total
    return logprobs[..., 0], _entropy(shifted, log_total)


def cross_entropy(logits: Array, targets: Array, mask: Array) -> Array:
    """Returns -log softmax(logits)[target] of each token.

    Args:
      logits: [...,V].
      targets: i32[...]; in [0, V) where the mask is True. Other targets are not used, and may be -100.
      mask: bool[...]; True on the tokens to learn.

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
    """Returns a reward model's Bradley-Terry loss (2203.02155) with margin (2307.09288) and centering (2312.09244).

    loss = -log sigmoid(chosen - rejected - margin) + center_rewards_coef * (chosen + rejected)^2

    Args:
      chosen_scores: f32[B]; scores of the better completions.
      rejected_scores: f32[B]; scores of the worse completions.
      margin: f32[B]; 0 if unknown.
      center_rewards_coef: f32[]; weight of the term that keeps scores near 0. The first term depends only on the
        difference of the two scores.
      weight: f32[B]; 0 on padding rows. Scores of padding rows are ignored.

    Returns:
      (loss, accuracy), f32[] each. The loss is the weighted mean over pairs. The accuracy is the weighted share of
      pairs with chosen > rejected; a tie counts as wrong. If all weights are 0, loss and accuracy are 0.
    """
    chex.assert_rank([chosen_scores, rejected_scores, margin, weight], 1)
    chex.assert_equal_shape([chosen_scores, rejected_scores, margin, weight])
    weight = jnp.asarray(weight, jnp.float32)
    chosen, rejected, margin = (
        jnp.where(weight > 0, jnp.asarray(x, jnp.float32), 0.0)
        for x in (chosen_scores, rejected_scores, margin)
    )
    # softplus(-x) = -log sigmoid(x). softplus overflows neither for large positive nor for large negative x.
    losses = jax.nn.softplus(rejected + margin - chosen) + center_rewards_coef * jnp.square(chosen + rejected)
    total = jnp.sum(weight)
    share = weight / jnp.where(total > 0, total, 1.0)
    return jnp.sum(share * losses), jnp.sum(share * (chosen > rejected))
