"""Episodes with the environment's tokens between the policy's turns: every estimator, beside plain numpy."""

import functools
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.config import PPOConfig
from jaxrlhf.records import Annotated, Rollout
from jaxrlhf.steps.annotate import build_experience
from jaxrlhf.steps.ppo import ppo_loss

B, P, R, GROUP = 8, 2, 9, 4
ESTIMATORS = sorted(ADVANTAGES)
_STATIC = ("whiten_advantages", "whiten_rewards", "advantage", "group", "gamma_per", "mask_truncated", "kl_in_loss")
build = jax.jit(build_experience, static_argnames=_STATIC)


def made(seed):
    """Random masks with gaps, one empty row, and garbage at every token that is not the policy's."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, R)) < 0.6
    mask[0], mask[1] = np.arange(R) < 4, False
    ended = rng.random(B) < 0.7
    logprobs, reference, values, sampled, rewards = rng.normal(size=(5, B, R)).astype(np.float32)
    rewards *= rng.random((B, R)) < 0.4
    clean = [np.where(mask, x, 0) for x in (logprobs, reference, values, sampled, rewards)]
    return SimpleNamespace(mask=mask, ended=ended, clean=clean)


def rows(episodes, garbage=0.0):
    """(rollout, annotated, rewards) with `garbage` at the tokens of the environment."""
    mask = episodes.mask
    logprobs, reference, values, sampled, rewards = (np.where(mask, x, garbage) for x in episodes.clean)
    whole = np.concatenate([np.ones((B, P), bool), np.ones((B, R), bool)], axis=1)
    tokens = np.zeros((B, P + R), np.int32)
    rollout = Rollout(tokens, whole, mask, sampled, episodes.ended, np.ones(B, np.float32))
    return rollout, Annotated(logprobs, reference, values), jnp.asarray(rewards)


def discounts(mask, gamma, per):
    """gamma at each token, or at the last token of each run of tokens."""
    last = mask & ~np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    return np.where(last | (per == "token"), gamma, 1.0)


def plain_gae(rewards, values, mask, discount, lam):
    advantages = np.zeros(mask.shape)
    for i in range(len(mask)):
        following, value = 0.0, 0.0
        for t in np.flatnonzero(mask[i])[::-1]:
            following = rewards[i, t] + discount[i, t] * value - values[i, t] + discount[i, t] * lam * following
            advantages[i, t], value = following, values[i, t]
    return advantages


def white(x, mask):
    return np.where(mask, (x - x[mask].mean()) / x[mask].std(ddof=1), 0)


def reference(name, rewards, values, mask, discount, lam, greedy):
    """The advantages of an estimator, in float64, without whitening that is not part of the method."""
    if name == "gae":
        return plain_gae(rewards, values, mask, discount, lam)
    to_go = plain_gae(rewards, np.zeros(mask.shape), mask, discount, 1.0)
    real = mask.any(axis=1)
    if name == "reinforce":
        first = np.array([to_go[i, np.flatnonzero(mask[i])[0]] for i in np.flatnonzero(real)])
        return np.where(mask, to_go - first.mean(), 0)
    if name == "reinforce_plus_plus":
        return white(to_go, mask)
    returns = np.where(mask, rewards, 0).sum(axis=1)
    per_row = np.zeros(B)
    for start in range(0, B, GROUP):
        group = [i for i in range(start, start + GROUP) if real[i]]
        for i in group:
            others = [returns[j] for j in group if j != i]
            centered = returns[i] - returns[group].mean()
            per_row[i] = {
                "rloo": returns[i] - np.mean(others),
                "grpo": centered / (returns[group].std(ddof=1) + 1e-4),
                "remax": returns[i] - greedy[i],
            }.get(name, centered)
    advantages = np.where(mask, per_row[:, None], 0)
    return white(advantages, mask) if name == "reinforce_plus_plus_baseline" else advantages


@pytest.mark.parametrize("per", ["token", "turn"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_passes_over_the_environment(name, per):
    """Rewards of turns and a KL penalty at the policy's tokens only. GRPO compares the returns of episodes."""
    for seed in range(3):
        episodes = made(seed)
        rollout, annotated, rewards = rows(episodes)
        scores = rewards if name != "grpo" else rewards.sum(axis=1)
        greedy = np.linspace(-1, 1, B).astype(np.float32)
        found, metrics = build(
            rollout, annotated, scores, 0.3, gamma=0.9, lam=0.8, advantage=name, group=GROUP, greedy=greedy,
            whiten_advantages=False, gamma_per=per,
        )  # fmt: skip
        logprobs, ref, values, _, given = (np.float64(x) for x in episodes.clean)
        if name == "grpo":
            last = R - 1 - np.argmax(episodes.mask[:, ::-1], axis=1)
            given = np.where(np.arange(R) == last[:, None], given.sum(axis=1)[:, None], 0) * episodes.mask
        shaped = np.where(episodes.mask, given - 0.3 * (logprobs - ref), 0)
        wanted = reference(name, shaped, values, episodes.mask, discounts(episodes.mask, 0.9, per), 0.8, greedy)
        np.testing.assert_allclose(found.advantages, wanted, atol=2e-5)
        kl = np.where(episodes.mask, logprobs - ref, 0).sum(axis=1).mean()
        assert float(metrics["kl/k1"]) == pytest.approx(kl, abs=1e-5)
        assert float(metrics["length/mean"]) == episodes.mask.sum() / B


@pytest.mark.parametrize("name", ESTIMATORS)
def test_numbers_at_the_environments_tokens_change_nothing(name):
    settings = {
        "advantage": name, "group": GROUP, "greedy": jnp.ones(B), "mask_truncated": True, "gamma": 0.9,
        "whiten_rewards": name == "gae", "steps": jnp.asarray(made(5).mask),
    }  # fmt: skip
    clean, dirty = (build(*rows(made(5), garbage), 0.1, **settings) for garbage in (0.0, np.nan))
    names = ("response_mask", "advantages", "returns")
    for field in names:
        np.testing.assert_array_equal(getattr(clean[0], field), getattr(dirty[0], field))
    assert all(np.isfinite(value) and value == dirty[1][metric] for metric, value in clean[1].items())


def test_one_turn_is_an_answer():
    """The defaults of gamma_per and a mask without gaps give the bits that answers have without an environment."""
    episodes = made(7)
    episodes.mask = np.arange(R) < np.arange(1, B + 1)[:, None]
    rollout, annotated, rewards = rows(episodes)
    per_token, per_turn = (build(rollout, annotated, rewards, 0.1, gamma_per=per)[0] for per in ("token", "turn"))
    np.testing.assert_array_equal(per_token.advantages, per_turn.advantages)  # gamma is 1
    assert "gamma_per" in inspect.signature(build_experience).parameters


@pytest.mark.parametrize("settings", [
    {}, {"loss": "gspo"}, {"loss": "cispo"}, {"importance_cap": 2.0, "importance_level": "sequence"},
    {"aggregation": "sequence", "entropy_coef": 0.1, "kl_loss": "k3"}, {"packed": True}, {"value_trunk": "policy"},
], ids=str)  # fmt: skip
def test_losses_ignore_the_environments_tokens(settings, tiny, roles):
    """Loss, metrics and gradients keep every bit if the numbers at tokens of the environment change to garbage."""
    from jaxrlhf.models.adapters import value_head
    from jaxrlhf.models.packing import pack_rows, take_pass

    episodes = made(9)
    config = PPOConfig(epochs=2, minibatches=1, **settings)
    tokens = np.random.default_rng(0).integers(3, 12, (B, P + R)).astype(np.int32)

    def experience(garbage):
        rollout, annotated, rewards = rows(episodes)
        exp, _ = build(rollout.replace(tokens=tokens), annotated, rewards, 0.1, kl_in_loss=bool(config.kl_loss))
        spoil = functools.partial(np.where, episodes.mask)
        spoilt = ("sample_logprobs", "logprobs", "ref_logprobs", "values", "advantages", "returns")
        return exp.replace(**{field: spoil(getattr(exp, field), garbage) for field in spoilt})

    value = value_head(tiny) if config.value_trunk == "policy" else roles.value
    total = int(episodes.mask.sum())

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(exp, packed):
        of_pass = take_pass(pack_rows(exp, B), 0) if packed else None
        run = jax.value_and_grad(
            lambda trees: ppo_loss(*trees, tiny, exp, config, total, B, R, of_pass), has_aux=True
        )
        (loss, metrics), grads = run((roles.policy, value))
        return loss, {name: metric.value for name, metric in metrics.items()}, grads

    clean, dirty = (gradients(experience(garbage), config.packed) for garbage in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(clean[2]))
