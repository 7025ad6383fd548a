"""Scores on their way to rewards, through the program that runs use, against plain Python."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrlhf.algorithms.running import init_moments
from jaxrlhf.config import AdvantageConfig, KLConfig, PPOConfig, ScoreConfig
from jaxrlhf.records import Rollout
from jaxrlhf.steps.annotate import Control, ExperienceSettings, annotate_experience
from jaxrlhf.steps.scores import adjust_scores, score_moments

B, R = 6, 5
quick = hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
adjusted = jax.jit(lambda scores, rollout, moments, config: adjust_scores(scores, rollout, moments, config))
moments_of = jax.jit(score_moments)


def answers(lengths, ended):
    mask = jnp.arange(R) < jnp.array(lengths)[:, None]
    nothing = jnp.zeros((B, R))
    return Rollout(nothing.astype(jnp.int32), mask, mask, nothing, jnp.array(ended), jnp.ones(B))


def by_hand(score, length, ended, mean, deviation, config):
    """One score, in the order that the settings promise: scale, clip, missing EOS, penalties."""
    score = (score - mean) / deviation
    if config.clip is not None:
        score = max(-config.clip, min(config.clip, score))
    if not ended:
        score = (score if config.missing_eos == "subtract" else 0) - config.missing_eos_penalty
    score -= config.length_penalty * max(0, length - config.length_free)
    if config.overlong_penalty:
        begins = R - config.overlong_buffer
        score -= config.overlong_penalty * min(1, max(0, (length - begins) / config.overlong_buffer))
    return score


@quick
@hypothesis.given(
    st.lists(st.floats(-50, 50, width=32), min_size=B, max_size=B),
    st.lists(st.integers(0, R), min_size=B, max_size=B),
    st.lists(st.booleans(), min_size=B, max_size=B),
    st.sampled_from(["none", "running", "batch"]),
    st.sampled_from([None, 0.7]),
    st.sampled_from(["subtract", "replace"]),
    st.floats(0, 3),
    st.sampled_from([(0.0, 0), (0.25, 1), (1.5, 3)]),
    st.sampled_from([(0.0, 0), (2.0, 3), (0.5, 1)]),
)
def test_adjusted_scores_equal_plain_python(scores, lengths, ended, how, clip, rule, eos, length, overlong):
    config = ScoreConfig(
        normalise=how, clip=clip, missing_eos=rule, missing_eos_penalty=eos, length_penalty=length[0],
        length_free=length[1], overlong_penalty=overlong[0], overlong_buffer=overlong[1],
    )  # fmt: skip
    deviation = float(np.std(np.float64(scores), ddof=1))
    hypothesis.assume(deviation == 0 or deviation > 0.5)
    mean, scale = (np.mean(scores), deviation or 1) if how != "none" else (0, 1)
    given_scores = jnp.array(scores, jnp.float32)
    moments = moments_of(init_moments(), given_scores, config)
    found = adjusted(given_scores, answers(lengths, ended), moments, config)
    want = [by_hand(*row, mean, scale, config) for row in zip(scores, lengths, ended)]
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=2e-3)


def test_which_moments_are_kept():
    """Running ones gather, initial ones stay, a batch's forget what was before."""
    first, second = jnp.array([1.0, 3.0]), jnp.array([10.0, 20.0, 30.0])
    for how, mean in (("running", 12.8), ("batch", 20.0), ("initial", 2.0), ("none", 2.0)):
        before = score_moments(init_moments(), first, ScoreConfig(normalise="running"))
        assert float(score_moments(before, second, ScoreConfig(normalise=how)).mean) == pytest.approx(mean)


def test_in_an_iteration_running_moments_include_its_own_scores_and_go_on(tiny, roles, sampled, scores):
    program = jax.jit(annotate_experience)

    def iterated(config, control, scores):
        chosen = ExperienceSettings(KLConfig(coef=0.0), AdvantageConfig(), config, PPOConfig())
        return program(tiny, roles.policy, roles.value, None, sampled, scores, None, control, chosen)[1:]

    running = ScoreConfig(normalise="running")
    control, metrics = iterated(running, Control.start(0.0), scores)
    assert float(metrics["reward/adjusted"]) == pytest.approx(0, abs=1e-5)
    assert float(metrics["reward/score"]) == pytest.approx(float(scores.mean()), abs=1e-5)
    control, metrics = iterated(running, control, scores + 2)
    both = np.concatenate([scores, scores + 2])
    want = ((np.asarray(scores) + 2 - both.mean()) / both.std(ddof=1)).mean()
    assert float(metrics["reward/adjusted"]) == pytest.approx(want, abs=1e-4)
    kept, _ = iterated(ScoreConfig(), control, scores)
    jax.tree.map(np.testing.assert_array_equal, kept, control)


def test_greedy_scores_are_adjusted_as_the_sampled_ones_are(tiny, roles, sampled, scores):
    """ReMax subtracts the greedy answer's score: of the same answers nothing is left, whatever the scale."""
    config = ScoreConfig(normalise="batch", clip=1.0, length_penalty=0.1, missing_eos_penalty=0.5)
    chosen = ExperienceSettings(KLConfig(coef=0.0), AdvantageConfig(estimator="remax"), config, PPOConfig())
    given = (tiny, roles.policy, {}, None, sampled, scores, (sampled, scores), Control.start(0.0), chosen)
    made, _, _ = jax.jit(annotate_experience)(*given)
    np.testing.assert_allclose(made.advantages, 0, atol=1e-6)
