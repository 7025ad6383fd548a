"""PPO's on-policy relatives through the real programs: groups, no value model, other losses; each learns a probe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.algorithms.policy_losses import POLICY_LOSSES
from jaxrlhf.config import AdvantageConfig, KLConfig, OptimizerConfig, PPOConfig, Sampling, ScoreConfig
from jaxrlhf.models.adapters import bind, value_head
from jaxrlhf.records import Prompts
from jaxrlhf.steps.annotate import Control, ExperienceSettings, annotate_experience
from jaxrlhf.steps.ppo import init_ppo, ppo_update

PROMPT = 3
ANNOTATE = jax.jit(annotate_experience)
UPDATE = jax.jit(ppo_update)
KEY = jax.random.key(3)


def settings(estimator="gae", update=None, group=1):
    advantage = AdvantageConfig(estimator=estimator)
    return ExperienceSettings(KLConfig(), advantage, ScoreConfig(), PPOConfig() if update is None else update, group)


@pytest.fixture(scope="module")
def flat(make_decoder):
    """Six tokens, none of which ends an answer."""
    return make_decoder(vocabulary=6, stop_tokens=(), scale=0.5, seed=11)


# ---------------------------------------------------------------- groups


def test_a_group_is_the_prompts_repeated(programs, tiny, roles, prompts):
    """Same rows, same noise: one prefill for a group changes nothing but its time."""
    grouped = programs.rollout(tiny, roles.policy, prompts, KEY, Sampling(max_new_tokens=6, samples_per_prompt=3))
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), prompts)
    alone = programs.rollout(tiny, roles.policy, repeated, KEY, Sampling(max_new_tokens=6))
    for name in ("tokens", "mask", "response_mask", "ended"):
        np.testing.assert_array_equal(getattr(grouped, name), getattr(alone, name), err_msg=name)
    np.testing.assert_allclose(grouped.sample_logprobs, alone.sample_logprobs, atol=1e-5)
    first = np.asarray(grouped.tokens[:, prompts.tokens.shape[1] :]).reshape(-1, 3, 6)
    assert any(len({row.tobytes() for row in group}) > 1 for group in first), "answers to one prompt differ"


# ---------------------------------------------------------------- no value model


def test_without_a_value_model_nothing_of_it_is_there(programs, tiny, roles, sampled, scores):
    config = PPOConfig(epochs=2, minibatches=2)
    reinforce = settings("reinforce", config)
    experience, _, noted = ANNOTATE(
        tiny, roles.policy, {}, None, sampled, scores, None, Control.start(0.1), reinforce
    )
    assert not np.asarray(experience.values).any() and np.asarray(experience.advantages).any()
    state, metrics = UPDATE(init_ppo(roles.policy, None, config), tiny, experience, KEY, config)
    assert state.value == {} and int(state.step) == 4
    assert not [name for name in metrics if name.startswith(("value/", "optimizer/value"))]
    assert all(np.isfinite(value) for value in jax.tree.leaves((metrics, noted)))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.policy, roles.policy)
    assert any(leaves["lora_b"] for leaves in moved.values())


# ---------------------------------------------------------------- KL in the loss, importance weights


def test_kl_in_the_loss_leaves_the_reward_alone_and_pulls_back(programs, tiny, roles, sampled, scores):
    def made(in_loss):
        chosen = settings(update=PPOConfig(kl_loss="k2" if in_loss else None))
        return ANNOTATE(tiny, roles.policy, roles.value, None, sampled, scores, None, Control.start(0.5), chosen)

    (inside, _, noted), (outside, _, shaped) = made(True), made(False)
    assert noted["reward/shaped"] == pytest.approx(float(noted["reward/score"]), abs=1e-6)
    assert abs(shaped["reward/shaped"] - shaped["reward/score"]) > 1e-3
    assert (np.asarray(inside.kl_coef) == 0.5).all() and not np.asarray(outside.kl_coef).any()

    # With no advantage at all the KL term is all there is: a step along its gradient brings the policy nearer.
    fast = OptimizerConfig(learning_rate=1e-2)
    config = PPOConfig(epochs=8, minibatches=1, kl_loss="k2", value_coef=0.0, optimizer=fast)
    still = inside.replace(advantages=jnp.zeros_like(inside.advantages))
    state, metrics = UPDATE(init_ppo(roles.policy, roles.value, config), tiny, still, KEY, config)
    assert metrics["policy/kl_loss"] > 0 and metrics["policy/loss"] == pytest.approx(0, abs=1e-6)

    def distance(policy):
        again = programs.annotate(tiny, policy, roles.value, None, sampled)
        return float((jnp.where(sampled.response_mask, again.logprobs - again.ref_logprobs, 0.0) ** 2).sum())

    assert distance(state.policy) < 0.9 * distance(roles.policy)


def test_importance_weights_are_those_of_the_gap(tiny, roles, experience):
    """Sampling logprobs that were all too high by log 2 halve the loss; too low by log 2, they are cut off at 1."""
    config = PPOConfig(epochs=1, minibatches=1, importance_cap=1.0)

    def loss(shift):
        shifted = experience.replace(sample_logprobs=experience.logprobs + shift)
        _, metrics = UPDATE(init_ppo(roles.policy, roles.value, config), tiny, shifted, KEY, config)
        return float(metrics["policy/loss"]), float(metrics["policy/importance_weight"])

    plain, halved, cut = loss(0.0), loss(np.log(2.0)), loss(-np.log(2.0))
    assert plain[1] == pytest.approx(1, abs=1e-5) and cut[1] == pytest.approx(1, abs=1e-5)
    assert halved[1] == pytest.approx(0.5, abs=1e-5)
    assert halved[0] == pytest.approx(plain[0] / 2, abs=1e-5) and cut[0] == pytest.approx(plain[0], abs=1e-5)


# ---------------------------------------------------------------- each learns


PAY = np.array([0.2, 0.1, 0.5, 0.3, 0.9, 0.7])


def bandit(programs, base, make_adapter, estimator, loss, iterations=90, prompts=8, **update):
    """Mean pay of the first iteration and of the last five, and the last distribution of the first token."""
    kind = ADVANTAGES[estimator]
    group = 4
    clips = {"gspo": dict(clip_low=0.2, clip_high=0.2), "cispo": dict(clip_low=1.0)}.get(loss, {})
    config = PPOConfig(
        epochs=2, minibatches=1, loss=loss, value_coef=1.0, optimizer=OptimizerConfig(learning_rate=0.03),
        value_optimizer=OptimizerConfig(learning_rate=0.03), **clips, **update,
    )  # fmt: skip
    sampling = Sampling(max_new_tokens=1, pad_token=PROMPT, samples_per_prompt=group)
    targets = ("q_proj", "v_proj", "down_proj")
    policy = make_adapter(base, 1, moved=False, rank=4, targets=targets)
    value = make_adapter(base, 2, "value", moved=False, rank=4, targets=targets) if kind.needs_value else None
    if config.value_trunk == "policy":
        value = value_head(base)
    state = init_ppo(policy, value, config)
    asked = Prompts(jnp.full((prompts, 1), PROMPT, jnp.int32), jnp.ones((prompts, 1), bool))
    earned = []
    for step in range(iterations):
        key = jax.random.fold_in(KEY, step)
        out = programs.rollout(base, state.policy, asked, key, sampling)
        scores = jnp.asarray(PAY[np.asarray(out.tokens)[:, 1]], jnp.float32)
        greedy = None
        if kind.needs_greedy:
            one = sampling.model_copy(update={"temperature": 0.0, "samples_per_prompt": 1})
            best = programs.rollout(base, state.policy, asked, key, one)
            greedy = best, jnp.asarray(PAY[np.asarray(best.tokens)[:, 1]], jnp.float32)
        made, _, _ = ANNOTATE(
            base, state.policy, state.value, None, out, scores, greedy, Control.start(0.0),
            settings(estimator, config, group),
        )  # fmt: skip
        state, _ = UPDATE(state, base, made, key, config)
        earned.append(float(scores.mean()))
    logits = programs.forward(bind(base, state.policy), jnp.full((1, 1), PROMPT, jnp.int32), jnp.ones((1, 1), bool))
    return earned[0], np.mean(earned[-5:]), np.asarray(jax.nn.softmax(logits[0, 0]))


@pytest.mark.parametrize("estimator", sorted(ADVANTAGES))
def test_every_estimator_finds_the_best_arm(programs, flat, make_adapter, estimator):
    first, last, after = bandit(programs, flat, make_adapter, estimator, "clip")
    assert first < 0.6 and last > 0.8 and after.argmax() == PAY.argmax(), (first, last, after)


@pytest.mark.parametrize("loss", sorted(set(POLICY_LOSSES) - {"clip"}))
def test_every_loss_finds_the_best_arm(programs, flat, make_adapter, loss):
    first, last, after = bandit(programs, flat, make_adapter, "rloo", loss)
    assert first < 0.6 and last > 0.8 and after.argmax() == PAY.argmax(), (first, last, after)


def test_dual_clip_finds_the_best_arm(programs, flat, make_adapter):
    first, last, after = bandit(programs, flat, make_adapter, "grpo", "clip", dual_clip=3.0)
    assert first < 0.6 and last > 0.8 and after.argmax() == PAY.argmax(), (first, last, after)


def test_a_shared_trunk_finds_the_best_arm(programs, flat, make_adapter):
    first, last, after = bandit(programs, flat, make_adapter, "gae", "clip", value_trunk="policy")
    assert first < 0.6 and last > 0.8 and after.argmax() == PAY.argmax(), (first, last, after)


def test_the_tables_are_the_settings():
    """A row that no setting can name, or a name without a row, would be found by a user only."""
    import typing

    named = typing.get_args(AdvantageConfig.model_fields["estimator"].annotation)
    assert set(named) == set(ADVANTAGES)
    assert set(typing.get_args(PPOConfig.model_fields["loss"].annotation)) == set(POLICY_LOSSES)
