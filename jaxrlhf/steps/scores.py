"""Adjusts the scores of the reward, before they become part of the experience: normalises, clips, adds penalties.

Sizes: B completions and R response tokens.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.running import RunningMoments, init_moments, normalise, update_moments
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
    """Returns the scores f32[B] after normalisation, clipping, missing-EOS rule and length penalties, in this order."""
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
