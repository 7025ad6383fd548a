"""Rewards inside answers on their way to advantages, against plain numpy."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.algorithms.running import init_moments
from jaxrlhf.algorithms.shaping import informative_groups
from jaxrlhf.config import AdvantageConfig, KLConfig, PPOConfig, ScoreConfig
from jaxrlhf.records import Annotated, Rollout
from jaxrlhf.steps.annotate import Control, ExperienceSettings, build_experience, score_experience
from jaxrlhf.steps.scores import adjust_scores, score_moments

B, P, R = 6, 2, 7
LENGTHS, ENDED = (7, 3, 1, 5, 7, 2), (False, True, True, False, True, True)
build = jax.jit(
    build_experience,
    static_argnames=("estimator", "whiten_rewards", "whiten_advantages", "advantage", "group", "mask_truncated"),
)


@pytest.fixture(scope="module")
def answers():
    """Answers of one to seven tokens with logprobs and values; what stands past their ends is junk."""
    rng = np.random.default_rng(1)
    mask = np.arange(R) < np.array(LENGTHS)[:, None]
    logprobs, reference, values, sampled = rng.normal(size=(4, B, R)).astype(np.float32)
    whole = np.concatenate([np.ones((B, P), bool), mask], axis=1)
    rollout = Rollout(np.zeros((B, P + R), np.int32), whole, mask, sampled, np.array(ENDED), np.ones(B, np.float32))
    rewards = np.round(rng.normal(size=(B, R)), 2).astype(np.float32) * (rng.random((B, R)) < 0.5)
    annotated, rewards = Annotated(logprobs, reference, values), np.where(mask, rewards, 77)
    return SimpleNamespace(rollout=rollout, annotated=annotated, rewards=rewards, mask=mask)


def plain_gae(rewards, values, mask, gamma, lam):
    """Advantages and returns in float64, token by token from the last real one."""
    advantages = np.zeros(mask.shape)
    for i in range(len(mask)):
        following, value = 0.0, 0.0
        for t in np.flatnonzero(mask[i])[::-1]:
            following = rewards[i, t] + gamma * value - values[i, t] + gamma * lam * following
            advantages[i, t], value = following, values[i, t]
    return advantages, np.where(mask, advantages + values, 0)


@pytest.mark.parametrize(("gamma", "lam", "kl_coef"), [(1.0, 1.0, 0.0), (0.9, 0.8, 0.1)])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask_truncated"])
def test_gae_with_rewards_inside_answers(answers, gamma, lam, kl_coef, masked):
    """Truncated answers and answers of one token included; rewards past an end count for nothing."""
    given = answers.rollout, answers.annotated, jnp.asarray(answers.rewards), kl_coef
    made, metrics = build(*given, gamma=gamma, lam=lam, whiten_advantages=False, mask_truncated=masked)
    noted, mask = answers.annotated, answers.mask
    rewards = np.float64(answers.rewards) - kl_coef * (np.float64(noted.logprobs) - noted.ref_logprobs)
    advantages, returns = plain_gae(rewards, np.float64(noted.values), mask, gamma, lam)
    np.testing.assert_allclose(made.advantages, advantages, atol=1e-5)
    np.testing.assert_allclose(made.returns, returns, atol=1e-5)
    sums = np.where(mask, answers.rewards, 0).sum(axis=1)
    assert float(metrics["reward/score"]) == pytest.approx(sums.mean(), abs=1e-5)
    assert float(metrics["reward/shaped"]) == pytest.approx(np.where(mask, rewards, 0).sum(axis=1).mean(), abs=1e-5)
    learned = mask & np.array(ENDED)[:, None] if masked else mask
    np.testing.assert_array_equal(made.response_mask, learned)
    white = build(*given, gamma=gamma, lam=lam, mask_truncated=masked)[0].advantages
    wanted = (advantages - advantages[learned].mean()) / advantages[learned].std(ddof=1)
    np.testing.assert_allclose(np.asarray(white)[learned], wanted[learned], atol=1e-5)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_a_reward_at_the_last_token_is_a_score(answers, name):
    """The same bits for every estimator but GRPO, whose rule for steps computes the same in another order."""
    scores = np.float32([0.5, -1, 2, 0.25, 0.1, 3])
    inside = np.full((B, R), 5, np.float32) * ~answers.mask
    last = np.array(LENGTHS) - 1
    inside[np.arange(B), last] = scores
    settings = {"advantage": name, "group": 3, "greedy": jnp.ones(B)}
    steps = np.zeros((B, R), bool)
    steps[np.arange(B), last] = True
    number, metrics = build(answers.rollout, answers.annotated, jnp.asarray(scores), 0.0, **settings)
    process, others = build(answers.rollout, answers.annotated, jnp.asarray(inside), 0.0, steps=steps, **settings)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close if name == "grpo" else np.testing.assert_array_equal, (number, metrics), (process, others))


@pytest.mark.parametrize("name", ["rloo", "dr_grpo", "reinforce_plus_plus_baseline", "remax"])
def test_estimators_of_whole_answers_use_the_sum(answers, name):
    sums = np.where(answers.mask, answers.rewards, 0).sum(axis=1)
    settings = {"advantage": name, "group": 3, "greedy": jnp.ones(B)}
    number = build(answers.rollout, answers.annotated, jnp.asarray(sums), 0.0, **settings)[0]
    process = build(answers.rollout, answers.annotated, jnp.asarray(answers.rewards), 0.0, **settings)[0]
    np.testing.assert_allclose(process.advantages, number.advantages, atol=1e-5)


@pytest.mark.parametrize("name", ["reinforce", "reinforce_plus_plus"])
def test_estimators_with_rewards_to_go_pass_each_reward_back(answers, name):
    made, _ = build(
        answers.rollout, answers.annotated, jnp.asarray(answers.rewards), 0.0, advantage=name, whiten_advantages=False
    )
    zeros = np.zeros((B, R))
    to_go, _ = plain_gae(np.float64(answers.rewards), zeros, answers.mask, 1.0, 1.0)
    if name == "reinforce":
        wanted = to_go - to_go[:, 0].mean()
    else:
        wanted = (to_go - to_go[answers.mask].mean()) / to_go[answers.mask].std(ddof=1)
    np.testing.assert_allclose(made.advantages, np.where(answers.mask, wanted, 0), atol=1e-5)


def test_grpo_normalises_the_rewards_of_all_steps_of_a_group(answers):
    """DeepSeekMath, section 4.1.3. A step with the reward 0 is a step too, and a token within a step has its credit."""
    steps = answers.mask & (np.random.default_rng(2).random((B, R)) < 0.5)
    steps[np.arange(B), np.array(LENGTHS) - 1] = True
    rewards = np.where(steps, np.float64(answers.rewards), 0)
    assert (rewards[steps] == 0).any()
    given = answers.rollout, answers.annotated, jnp.asarray(rewards, jnp.float32), 0.0
    made, _ = build(*given, advantage="grpo", group=3, steps=steps)
    wanted = np.zeros((B, R))
    for group in (slice(0, 3), slice(3, 6)):
        of_steps = rewards[group][steps[group]]
        normal = np.where(steps[group], (rewards[group] - of_steps.mean()) / (of_steps.std(ddof=1) + 1e-4), 0)
        for t in range(R):
            wanted[group, t] = normal[:, t:].sum(axis=1)
    np.testing.assert_allclose(made.advantages, np.where(answers.mask, wanted, 0), atol=1e-4)
    by_token, _ = build(*given, advantage="grpo", group=3)
    explicit, _ = build(*given, advantage="grpo", group=3, steps=answers.mask)
    np.testing.assert_array_equal(by_token.advantages, explicit.advantages)
    equal, _ = build(*given[:2], jnp.where(steps, 0.3, 0.0), 0.0, advantage="grpo", group=3, steps=steps)
    assert not np.asarray(equal.advantages).any(), "steps of equal rewards teach nothing"


def test_groups_are_informative_by_the_rewards_of_their_steps():
    rewards = jnp.array([[1.0, 1, 0], [1, 0, 0], [1, 2, 0], [2, 1, 0]])
    steps = jnp.array([[True, True, False], [True, False, False], [True, True, False], [True, True, False]])
    assert informative_groups(rewards, 2, steps).tolist() == [False, True]
    assert informative_groups(rewards.sum(axis=1), 2).tolist() == [True, False]


CONFIGS = {
    "nothing": ScoreConfig(),
    "normalise": ScoreConfig(normalise="batch"),
    "clip": ScoreConfig(normalise="running", clip=0.4),
    "subtract": ScoreConfig(missing_eos_penalty=1.5, length_penalty=0.1, length_free=2),
    "replace": ScoreConfig(normalise="batch", missing_eos="replace", missing_eos_penalty=2.0),
    "overlong": ScoreConfig(clip=0.5, overlong_penalty=1.0, overlong_buffer=3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shaping_acts_on_the_sum(answers, name):
    """The adjusted rewards add up to the adjusted sum and keep their proportions; the last token has what is added."""
    config, mask = CONFIGS[name], answers.mask
    rewards = np.where(mask, answers.rewards, 0)
    sums = jnp.asarray(rewards.sum(axis=1))
    moments = score_moments(init_moments(), sums, config)
    wanted = np.asarray(adjust_scores(sums, answers.rollout, moments, config))
    found = np.asarray(adjust_scores(jnp.asarray(answers.rewards), answers.rollout, moments, config))
    np.testing.assert_allclose(found.sum(axis=1), wanted, atol=1e-5)
    assert not found[~mask].any()
    if name == "nothing":
        np.testing.assert_array_equal(found, rewards)
    inner = np.arange(R) < np.array(LENGTHS)[:, None] - 1
    for i in range(B):
        factors = found[i][inner[i] & (rewards[i] != 0)] / rewards[i][inner[i] & (rewards[i] != 0)]
        assert not found[i][inner[i] & (rewards[i] == 0)].any()
        if name == "replace" and not ENDED[i]:
            assert not factors.any()
        elif len(factors):
            np.testing.assert_allclose(factors, factors[0], rtol=1e-5)
            unclipped = name == "overlong" and abs(sums[i]) <= 0.5
            assert (factors[0] == 1) == (unclipped or name in ("nothing", "subtract"))


def test_an_iteration_logs_sums_and_normalises_by_them(answers):
    score, group = ScoreConfig(normalise="running"), 1
    settings = ExperienceSettings(KLConfig(coef=0.0), AdvantageConfig(), score, PPOConfig(), group)
    given = answers.rollout, answers.annotated, jnp.asarray(answers.rewards), None, Control.start(0.0), settings
    _, control, metrics = jax.jit(score_experience)(*given, steps=answers.mask)
    sums = np.where(answers.mask, answers.rewards, 0).sum(axis=1)
    assert float(metrics["reward/score"]) == pytest.approx(sums.mean(), abs=1e-5)
    assert float(metrics["reward/score_std"]) == pytest.approx(sums.std(), abs=1e-5)
    assert float(metrics["reward/adjusted"]) == pytest.approx(0, abs=1e-5)
    assert float(control.moments.mean) == pytest.approx(sums.mean(), abs=1e-5)
