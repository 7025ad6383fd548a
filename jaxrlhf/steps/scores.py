"""From the scores that a reward gives to those that are learnt from: their scale, then penalties in that scale.

B answers, R response tokens.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.running import RunningMoments, init_moments, normalise, update_moments
from jaxrlhf.algorithms.shaping import clip_scores, length_penalty, missing_eos, overlong_penalty
from jaxrlhf.config import ScoreConfig
from jaxrlhf.records import Rollout


def score_moments(moments: RunningMoments, scores: jax.Array, config: ScoreConfig) -> RunningMoments:
    """The moments that an iteration with these scores, f32[B], normalises by, and that the next one goes on from.

    `initial`: those given, which were fitted before the first iteration. `running`: with these scores in them.
    `batch`: of these scores alone.
    """
    if config.normalise == "running":
        return update_moments(moments, scores)
    if config.normalise == "batch":
        return update_moments(init_moments(), scores)
    return moments


def adjust_scores(scores: jax.Array, rollout: Rollout, moments: RunningMoments, config: ScoreConfig) -> jax.Array:
    """Scores f32[B] normalised by the moments and clipped; then the missing-EOS rule and penalties for length."""
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
