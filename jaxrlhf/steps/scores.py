"""Adjusts the scores of the reward, before they become part of the experience: normalises, clips, adds penalties.

Rewards may also stand inside completions (process rewards). The score of a completion is then the sum of its rewards,
and every setting acts on this sum.

Sizes: B completions and R response tokens.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.masked import at_last_token, masked_sum, zero_masked
from jaxrlhf.algorithms.running import RunningMoments, gain_and_bias, init_moments, normalise, update_moments
from jaxrlhf.algorithms.shaping import clip_scores, length_penalty, missing_eos, overlong_penalty
from jaxrlhf.config import ScoreConfig
from jaxrlhf.records import Rollout


def score_moments(moments: RunningMoments, scores: jax.Array, config: ScoreConfig) -> RunningMoments:
    """Returns the moments that normalise the scores f32[B] of this iteration. The next iteration starts from them.

    If `normalise` is "running", the result is `moments` with the scores added. If `normalise` is "batch", the result is
    the moments of these scores only. If `normalise` is "initial", the result is `moments`, from before the first
    iteration.
    """
    if config.normalise == "running":
        return update_moments(moments, scores)
    if config.normalise == "batch":
        return update_moments(init_moments(), scores)
    return moments


def adjust_scores(scores: jax.Array, rollout: Rollout, moments: RunningMoments, config: ScoreConfig) -> jax.Array:
    """Returns the scores f32[B] after normalisation, clipping, missing-EOS rule and length penalties, in this order.

    Rewards f32[B,R] inside the completions are also accepted, see `_adjust_inside`.
    """
    if scores.ndim == 2:
        return _adjust_inside(scores, rollout, moments, config)
    scores = scores.astype(jnp.float32)
    if config.normalise != "none":
        scores = normalise(moments, scores)
    if config.clip is not None:
        scores = clip_scores(scores, config.clip)
    scores = missing_eos(scores, rollout.ended, config.missing_eos_penalty, config.missing_eos)
    lengths = jnp.sum(rollout.response_mask, axis=1)
    scores += length_penalty(lengths, config.length_free, config.length_penalty)
    limit = rollout.response_mask.shape[1]
    return scores + config.overlong_penalty * overlong_penalty(lengths, limit, config.overlong_buffer)


def completion_scores(scores: jax.Array, rollout: Rollout) -> jax.Array:
    """Returns the score of each completion, f32[B]: the sum of its rewards if `scores` is f32[B,R]."""
    return scores if scores.ndim == 1 else masked_sum(scores, rollout.response_mask, axis=1)


def _adjust_inside(rewards: jax.Array, rollout: Rollout, moments: RunningMoments, config: ScoreConfig) -> jax.Array:
    """Returns the adjusted rewards f32[B,R]. Their sums are the adjusted sums of `rewards` f32[B,R].

    The rewards of a completion keep their proportions: they are divided by the deviation, and multiplied by one factor
    if the sum is clipped. All that is added to the sum (the mean of the normalisation, the penalties) is added at the
    last token. A mean subtracted at each step would be a penalty or a bonus for the number of steps. If
    `missing_eos` is "replace", a completion that did not end loses its rewards.
    """
    (rewards,) = zero_masked(rollout.response_mask, rewards)
    sums = jnp.sum(rewards, axis=1)
    adjusted = adjust_scores(sums, rollout, moments, config)
    factor = jnp.ones(sums.shape, jnp.float32)
    if config.normalise != "none":
        factor *= gain_and_bias(moments)[0]
        sums = normalise(moments, sums)
    if config.clip is not None:
        size = jnp.abs(sums)
        factor *= jnp.where(size > config.clip, config.clip / jnp.maximum(size, config.clip), 1.0)
    if config.missing_eos == "replace":
        factor = jnp.where(rollout.ended, factor, 0.0)
    rewards *= factor[:, None]
    return rewards + at_last_token(adjusted - jnp.sum(rewards, axis=1), rollout.response_mask)
