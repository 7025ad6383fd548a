import jax
import numpy as np
import pytest

from jaxrlhf.config import AdvantageConfig, KLConfig, PPOConfig, Sampling, ScoreConfig
from jaxrlhf.steps.annotate import Control, ExperienceSettings, annotate_experience


@pytest.fixture(scope="module")
def noted(programs, tiny, roles, sampled):
    return programs.annotate(tiny, roles.policy, roles.value, None, sampled)


def test_microbatches_equal_the_whole(programs, tiny, roles, sampled, noted):
    parts = programs.annotate(tiny, roles.policy, roles.value, None, sampled, microbatches=4)
    for name in ("logprobs", "ref_logprobs", "values"):
        np.testing.assert_allclose(getattr(parts, name), getattr(noted, name), rtol=1e-5, atol=5e-6, err_msg=name)
    with pytest.raises(ValueError, match="8 rows cannot be split into 3"):
        programs.annotate(tiny, roles.policy, roles.value, None, sampled, microbatches=3)


def test_the_roles_are_not_mixed_up(programs, tiny, roles, sampled, noted):
    """Policy and reference swap their logprobs; each differs from the other."""
    swapped = programs.annotate(tiny, None, roles.value, roles.policy, sampled)
    np.testing.assert_allclose(swapped.ref_logprobs, noted.logprobs, atol=1e-6)
    np.testing.assert_allclose(swapped.logprobs, noted.ref_logprobs, atol=1e-6)
    assert np.abs(noted.logprobs - noted.ref_logprobs).max() > 0.1
    past = ~np.asarray(sampled.response_mask)
    assert all((np.asarray(x)[past] == 0).all() for x in jax.tree.leaves(noted))


def test_without_recomputing_the_policys_logprobs_are_those_of_sampling(programs, tiny, roles, sampled, noted):
    kept = programs.annotate(tiny, roles.policy, roles.value, None, sampled, recompute_policy=False)
    np.testing.assert_array_equal(kept.logprobs, sampled.sample_logprobs)
    np.testing.assert_allclose(kept.values, noted.values, atol=1e-6)
    np.testing.assert_allclose(kept.ref_logprobs, noted.ref_logprobs, atol=1e-6)


def test_a_fresh_adapter_has_no_kl_at_temperature_0_7(programs, tiny, make_adapter, roles, prompts, scores):
    fresh = make_adapter(tiny, 5, moved=False)
    out = programs.rollout(
        tiny, fresh, prompts, jax.random.key(0), Sampling(max_new_tokens=6, temperature=0.7)
    )
    noted = programs.annotate(tiny, fresh, roles.value, None, out)
    _, metrics = programs.experience(out, noted, scores, 0.1)
    assert all(abs(float(metrics[f"kl/{k}"])) < 1e-5 for k in ("k1", "k2", "k3"))
    assert float(metrics["gap/logprob_max"]) < 1e-5
    # At another temperature it would not be 0: temperature reaches both sides.
    warm = programs.annotate(tiny, fresh, roles.value, None, out, temperature=1.0)
    assert np.abs(warm.ref_logprobs - noted.ref_logprobs).max() > 0.05
    np.testing.assert_allclose(warm.ref_logprobs, warm.logprobs, atol=1e-5)
    np.testing.assert_array_equal(warm.values, noted.values)


def k3(r):
    """exp(r) - 1 - r up to a slope of 10, the bound; beyond it the straight line that touches it there."""
    knee = np.log(11.0)
    return np.where(r > knee, 10 - knee + 10 * (r - knee), np.expm1(np.minimum(r, knee)) - r)


def by_hand(rollout, noted, scores, kl_coef, gamma, lam, estimator, whiten_rewards, whiten_advantages):
    """(rewards, advantages, returns) with loops, in float64."""
    mask = np.asarray(rollout.response_mask)
    r = np.asarray(noted.ref_logprobs, np.float64) - np.asarray(noted.logprobs, np.float64)
    kl = {"k1": -r, "k2": r * r / 2, "k3": k3(r)}[estimator]
    rewards = np.where(mask, -kl_coef * kl, 0)
    for b, row in enumerate(mask):
        rewards[b, row.sum() - 1] += float(scores[b])
    shaped = rewards.sum(1).mean()
    if whiten_rewards:
        rewards = np.where(mask, (rewards - rewards[mask].mean()) / rewards[mask].std(ddof=1), 0)
        # The mean stays: only the scale is whitened.
        original = np.where(mask, -kl_coef * kl, 0)
        for b, row in enumerate(mask):
            original[b, row.sum() - 1] += float(scores[b])
        rewards = np.where(mask, rewards + original[mask].mean(), 0)
        shaped = rewards.sum(1).mean()
    values, advantages = np.asarray(noted.values, np.float64), np.zeros(mask.shape)
    for b, row in enumerate(mask):
        ahead, value_ahead = 0.0, 0.0
        for t in range(row.sum() - 1, -1, -1):
            ahead = rewards[b, t] + gamma * value_ahead - values[b, t] + gamma * lam * ahead
            advantages[b, t], value_ahead = ahead, values[b, t]
    returns = np.where(mask, advantages + values, 0)
    if whiten_advantages:
        advantages = np.where(mask, (advantages - advantages[mask].mean()) / advantages[mask].std(ddof=1), 0)
    return shaped, advantages, returns


@pytest.mark.parametrize(
    ("estimator", "whiten_rewards", "whiten_advantages"),
    [("k1", False, True), ("k2", True, False), ("k3", False, False)],
)
def test_experience_equals_loops(programs, sampled, noted, scores, estimator, whiten_rewards, whiten_advantages):
    numbers = (0.3, 0.9, 0.8)
    made, metrics = programs.experience(
        sampled, noted, scores, 0.3, gamma=0.9, lam=0.8, estimator=estimator, whiten_rewards=whiten_rewards,
        whiten_advantages=whiten_advantages,
    )  # fmt: skip
    shaped, advantages, returns = by_hand(
        sampled, noted, scores, *numbers, estimator, whiten_rewards, whiten_advantages
    )
    np.testing.assert_allclose(made.advantages, advantages, atol=1e-5)
    np.testing.assert_allclose(made.returns, returns, atol=1e-5)
    assert float(metrics["reward/shaped"]) == pytest.approx(shaped, abs=1e-5)
    for name in ("tokens", "mask", "response_mask", "temperature", "sample_logprobs"):
        np.testing.assert_array_equal(getattr(made, name), getattr(sampled, name))
    for name in ("logprobs", "ref_logprobs", "values"):
        np.testing.assert_array_equal(getattr(made, name), getattr(noted, name))


def test_metrics_by_hand(programs, sampled, noted, scores):
    _, metrics = programs.experience(sampled, noted, scores, 0.1)
    mask = np.asarray(sampled.response_mask)
    r = np.where(mask, noted.ref_logprobs - noted.logprobs, 0)
    gap = np.abs(noted.logprobs - sampled.sample_logprobs)[mask]
    want = {
        "reward/score": scores.mean(),
        "reward/score_std": scores.std(),
        "kl/k1": (-r).sum(1).mean(),
        "kl/k2": (r * r / 2).sum(1).mean(),
        "kl/k3": k3(r).sum(1).mean(),
        "value/mean": np.asarray(noted.values)[mask].mean(),
        "length/mean": mask.sum(1).mean(),
        "length/eos_share": np.asarray(sampled.ended).mean(),
        "gap/logprob_max": gap.max(),
        "gap/logprob_mean": gap.mean(),
    }
    for name, x in want.items():
        assert float(metrics[name]) == pytest.approx(float(x), rel=1e-4, abs=1e-6), name


def test_one_program_for_all_and_the_next_coefficient(programs, tiny, roles, sampled, noted, scores):
    """The fused program equals its parts; its numbers compile nothing; the coefficient reacts where a target is."""
    run = jax.jit(annotate_experience)

    def fused(target, coef=0.1, gamma=1.0, penalty=0.0):
        kl, advantage = KLConfig(coef=0.1, target=target, horizon=100), AdvantageConfig(gamma=gamma)
        chosen = ExperienceSettings(kl, advantage, ScoreConfig(missing_eos_penalty=penalty), PPOConfig())
        given = (sampled, scores, None, Control.start(coef), chosen)
        return run(tiny, roles.policy, roles.value, None, *given)

    experience, control, metrics = fused(target=None)
    coef = control.kl_coef
    parts, part_metrics = programs.experience(sampled, noted, scores, 0.1)
    for name in ("logprobs", "values", "advantages", "returns"):
        np.testing.assert_allclose(getattr(experience, name), getattr(parts, name), atol=1e-5, err_msg=name)
    assert set(metrics) == {*part_metrics, "kl/coef", "reward/adjusted"}
    assert float(coef) == float(metrics["kl/coef"]) == np.float32(0.1)
    fused(target=None, coef=0.2, gamma=0.9, penalty=1.0)
    assert run._cache_size() == 1
    measured = float(metrics["kl/k1"])
    for target, factor in ((measured * 100, 1 - 0.2 * 8 / 100), (measured / 100, 1 + 0.2 * 8 / 100), (measured, 1)):
        assert measured > 0
        assert float(fused(target=target)[1].kl_coef) == pytest.approx(0.1 * factor, rel=1e-5)
    assert run._cache_size() == 2
