"""Answers that did not end, left out of the update (`mask_truncated`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.masked import masked_mean, masked_variance
from jaxrlhf.config import PPOConfig
from jaxrlhf.steps.annotate import build_experience
from jaxrlhf.steps.microbatches import accumulate
from jaxrlhf.steps.ppo import init_ppo, ppo_loss, ppo_update

LAST = "layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def noted(programs, tiny, roles, sampled):
    ended = np.asarray(sampled.ended)
    assert 0 < ended.sum() < len(ended)
    return programs.annotate(tiny, roles.policy, roles.value, None, sampled)


def learnt(sampled, noted, scores, **settings):
    return build_experience(sampled, noted, scores, 0.1, mask_truncated=True, **settings)


def few(roles):
    """Trees of one layer: they compile faster."""
    return {LAST: roles.policy[LAST]}, {LAST: roles.value[LAST], "score": roles.value["score"]}


def other(x, rows, seed=0):
    """x with the given rows replaced by noise, or by their negation."""
    at = rows.reshape(-1, *[1] * (x.ndim - 1))
    if x.dtype == bool:
        return jnp.where(at, ~x, x)
    noise = np.random.default_rng(seed).standard_normal(x.shape)
    return jnp.where(at, jnp.asarray(5 + 3 * np.abs(noise), x.dtype), x)


def test_whitening_is_over_the_answers_that_are_learnt(sampled, noted, scores):
    whole, _ = build_experience(sampled, noted, scores, 0.1)
    masked, metrics = learnt(sampled, noted, scores)
    kept = np.asarray(sampled.response_mask & sampled.ended[:, None])
    np.testing.assert_array_equal(masked.response_mask, kept)
    assert float(masked_mean(masked.advantages, masked.response_mask)) == pytest.approx(0, abs=1e-6)
    assert float(masked_variance(masked.advantages, masked.response_mask)) == pytest.approx(1, abs=1e-5)
    assert float(masked_variance(whole.advantages, masked.response_mask)) != pytest.approx(1, abs=1e-2)
    assert float(metrics["length/masked_share"]) == pytest.approx(1 - float(sampled.ended.mean()))
    # What is measured stays that of all answers.
    lengths = np.asarray(sampled.response_mask).sum(1)
    assert float(metrics["length/mean"]) == pytest.approx(lengths.mean())


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_with_a_value_model_a_truncated_answer_changes_nothing_for_others(sampled, noted, scores, whiten_rewards):
    rows = ~np.asarray(sampled.ended)
    changed = jax.tree.map(lambda x: other(x, rows), noted)
    given = dict(whiten_rewards=whiten_rewards)
    a, _ = learnt(sampled, noted, scores, **given)
    b, _ = learnt(sampled, changed, other(scores, rows), **given)
    for name in ("advantages", "returns", "values", "logprobs"):
        one, two = (np.where(a.response_mask, getattr(x, name), 0) for x in (a, b))
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7, err_msg=name)


def test_in_a_group_its_score_still_counts(sampled, noted, scores):
    """As in TRL and DAPO's release: the completion mask is zeroed after the group's mean was taken."""
    given = dict(advantage="dr_grpo", group=4)
    whole, _ = build_experience(sampled, noted, scores, 0.1, **given)
    masked, _ = learnt(sampled, noted, scores, **given)
    np.testing.assert_array_equal(whole.advantages, masked.advantages)


@pytest.mark.parametrize(("loss", "aggregation"), [("clip", "token"), ("gspo", "sequence")])
def test_rows_changed_at_will_and_microbatches_give_the_same_gradient(
    tiny, roles, sampled, noted, scores, loss, aggregation
):
    config = PPOConfig(
        epochs=2, loss=loss, aggregation=aggregation, entropy_coef=0.1, kl_loss="k3", importance_cap=2.0
    )
    experience, _ = learnt(sampled, noted, scores, kl_in_loss=True)
    rows = ~np.asarray(sampled.ended)
    noise = {
        name: other(getattr(experience, name), rows)
        for name in ("advantages", "returns", "values", "logprobs", "ref_logprobs", "sample_logprobs")
    }
    changed = experience.replace(**noise, tokens=jnp.where(rows[:, None], 3, experience.tokens))
    tokens, R = jnp.sum(experience.response_mask), experience.response_mask.shape[1]

    def run(experience, parts):
        share = lambda trees, part: ppo_loss(*trees, tiny, part, config, tokens, 8, R)  # noqa: E731
        return accumulate(share, few(roles), experience, parts)

    run = jax.jit(run, static_argnums=1)
    whole = run(experience, 1)
    assert float(jnp.abs(whole[2][0][LAST]["lora_a"]).max()) > 1e-4
    for again in (run(changed, 1), run(experience, 4)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), again[::2], whole[::2])


def test_a_minibatch_of_truncated_answers_moves_nothing(tiny, roles, sampled, noted, scores):
    none = sampled.replace(ended=jnp.zeros_like(sampled.ended))
    config, (policy, value) = PPOConfig(epochs=1, minibatches=2, aggregation="sequence", entropy_coef=0.1), few(roles)
    update = jax.jit(ppo_update)
    for whiten in (False, True):
        experience, metrics = learnt(none, noted, scores, whiten_advantages=whiten)
        assert float(metrics["length/masked_share"]) == 1 and not experience.response_mask.any()
        state, metrics = update(init_ppo(policy, value, config), tiny, experience, jax.random.key(0), config)
        assert int(state.step) == 2 and float(metrics["optimizer/skipped"]) == 0
        assert all(np.isfinite(x) for x in metrics.values()) and float(metrics["optimizer/grad_norm"]) == 0
        for before, after in zip(jax.tree.leaves((policy, value)), jax.tree.leaves((state.policy, state.value))):
            np.testing.assert_array_equal(before, after)
