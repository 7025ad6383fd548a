"""TRL's recorded updates and rlax's and tunix's published numbers, reproduced (see golden/README.md)."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import advantages, kl, losses, masked, policy_losses

GOLDEN = Path(__file__).parent / "golden"
VECTORS = json.loads((GOLDEN / "published_vectors.json").read_text())
SETTINGS = json.loads((GOLDEN / "settings.json").read_text())
RECORDINGS = pytest.mark.parametrize("name", ["k1", "k3_whiten", "lora_k1"])
UPDATES = pytest.mark.parametrize("update", [0, 1, 2])
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

# Compiled once per shape: faster than operation by operation.
gae = jax.jit(advantages.gae)
# TRL and tunix have no bound on k3.
kl_estimate = jax.jit(functools.partial(kl.kl_estimate, bound=None), static_argnames="estimator")
shape_rewards = jax.jit(functools.partial(kl.shape_rewards, kl_bound=None), static_argnames="estimator")
policy_loss = jax.jit(policy_losses.policy_loss)
token_logprobs = jax.jit(losses.token_logprobs)
value_loss = jax.jit(losses.value_loss)
aggregate = jax.jit(masked.aggregate, static_argnames="how")
masked_mean = jax.jit(masked.masked_mean)
whiten = jax.jit(masked.whiten, static_argnames="shift_mean")


@functools.cache
def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def recorded(name, update):
    """One update: settings, arrays, mask of the real tokens, mask of those and the slot after them."""
    record = {key: array[update] for key, array in load(name).items()}
    return SETTINGS[name], record, ~record["padding_mask"], ~record["padding_mask_p1"]


# ---------------------------------------------------------------- TRL


@RECORDINGS
@UPDATES
def test_kl_and_its_reward(name, update):
    settings, record, real, _ = recorded(name, update)
    estimate = kl_estimate(record["logprobs"], record["ref_logprobs"], settings["kl"])
    close(estimate, record["kl"])
    shaped = shape_rewards(
        jnp.zeros(16),
        record["logprobs"],
        record["ref_logprobs"],
        real,
        settings["kl_coef"],
        settings["kl"],
    )
    close(shaped, record["non_score_reward"])


@RECORDINGS
@UPDATES
def test_rewards_agree_but_for_the_slot_of_the_score(name, update):
    settings, record, real, _ = recorded(name, update)
    ours = np.array(
        shape_rewards(
            record["scores"],
            record["logprobs"],
            record["ref_logprobs"],
            real,
            settings["kl_coef"],
            settings["kl"],
        )
    )
    theirs = record.get("rewards_before_whiten", record["rewards"])
    full = real.all(axis=1)
    close(ours[full], theirs[full])
    rows = np.arange(16)
    ours[rows, real.sum(axis=1) - 1] -= record["scores"]
    ours[rows, record["actual_end"]] += record["scores"]
    close(ours, theirs)


@RECORDINGS
@UPDATES
def test_whitened_rewards_advantages_and_returns(name, update):
    settings, record, real, real_p1 = recorded(name, update)
    rewards = record["rewards"]
    if settings["whiten_rewards"]:
        rewards = whiten(record["rewards_before_whiten"], real_p1, shift_mean=False)
        close(rewards, record["rewards"])
    adv, ret = gae(rewards, record["values"], real_p1, settings["gamma"], settings["lam"])
    close(adv, record["advantages"])
    close(ret, record["returns"])
    close(whiten(adv, real), record["advantages_whitened"])


@pytest.mark.parametrize("name, update", [("k1", 2)])
def test_from_scores_to_whitened_advantages_in_one_go(name, update):
    """In this update every answer fills its row, and both placements of the score are the same."""
    settings, record, real, _ = recorded(name, update)
    assert real.all()

    @jax.jit
    def prepare(scores, logprobs, ref_logprobs, values, kl_coef, gamma, lam):
        rewards = shape_rewards(scores, logprobs, ref_logprobs, real, kl_coef, settings["kl"])
        adv, ret = gae(rewards, values, real, gamma, lam)
        return rewards, ret, whiten(adv, real)

    keys = ("scores", "logprobs", "ref_logprobs", "values")
    numbers = (settings["kl_coef"], settings["gamma"], settings["lam"])
    rewards, ret, adv = prepare(*(record[key] for key in keys), *numbers)
    close(rewards, record["rewards"])
    close(ret, record["returns"])
    close(adv, record["advantages_whitened"])


@RECORDINGS
@UPDATES
@pytest.mark.parametrize("minibatch", [0, 1, 2, 3])
def test_losses_of_a_minibatch(name, update, minibatch):
    settings, record, real, real_p1 = recorded(name, update)
    step = {
        k.removeprefix("minibatch_"): v[minibatch] for k, v in record.items() if k.startswith("minibatch_")
    }
    rows = step["rows"]
    real, real_p1 = real[rows], real_p1[rows]
    clip = settings["cliprange"]
    policy, diagnostics = policy_loss(
        step["new_logprobs"], record["logprobs"][rows], record["advantages_whitened"][rows], real, clip, clip
    )
    value, value_clipped = value_loss(
        step["vpred"],
        record["values"][rows],
        record["returns"][rows],
        real_p1,
        settings["cliprange_value"],
    )
    policy = aggregate(policy, real, "token", real.sum(), 8)
    value = aggregate(value, real_p1, "token", real_p1.sum(), 8)
    close(diagnostics["ratio"], step["ratio"])
    close(policy, step["pg_loss"])
    close(value, step["vf_loss"])
    close(masked_mean(value_clipped, real_p1), step["vf_clipfrac"])
    close(policy + settings["vf_coef"] * value, step["loss"])


# ---------------------------------------------------------------- rlax


@pytest.mark.parametrize("lam", ["1.0", "0.7", "0.4"])
def test_rlax_truncated_gae(lam):
    vector = VECTORS["gae"]
    arrays = [jnp.array(vector[key], jnp.float32) for key in ("r", "v_len_T_plus_1", "discount")]
    found = jax.vmap(advantages.truncated_gae, in_axes=(0, 0, 0, None))(*arrays, float(lam))
    np.testing.assert_allclose(found, vector["expected"][lam], atol=vector["atol"])


@pytest.mark.parametrize("first_value", [0.0, 7.0])
def test_rlax_lambda_returns_are_advantages_plus_values(first_value):
    vector = VECTORS["lambda_returns"]
    values = np.insert(np.array(vector["v_t"], np.float32), 0, first_value, axis=1)
    arrays = (np.array(vector["r"], np.float32), values, np.array(vector["discount"], np.float32))
    found = jax.vmap(advantages.truncated_gae, in_axes=(0, 0, 0, None))(*arrays, vector["lambda"])
    close(found + values[:, :-1], vector["expected"])


def test_rlax_clipped_surrogate():
    vector = VECTORS["clipped_surrogate"]
    actions = jnp.array(vector["actions"])[None]
    new, _ = token_logprobs(jnp.array(vector["logits"], jnp.float32)[None], actions, 1.0)
    old, _ = token_logprobs(jnp.array(vector["old_logits"], jnp.float32)[None], actions, 1.0)
    everything = jnp.ones((1, 3), bool)
    for adv, expected in zip(vector["advantages"], vector["expected_loss"], strict=True):
        epsilon = vector["epsilon"]
        for dual_clip in (None, 10.0):  # no ratio comes near 10
            loss, _ = policy_loss(new, old, jnp.array([adv]), everything, epsilon, epsilon, dual_clip)
            np.testing.assert_allclose(loss.mean(), expected, atol=vector["atol"])


def test_rlax_policy_gradient_by_the_table():
    vector = {key: np.array(VECTORS["policy_gradient"][key]) for key in VECTORS["policy_gradient"]}
    logprobs, _ = token_logprobs(vector["logits"], vector["actions"], 1.0)
    weighted = vector["advantages"] * vector["weights"]
    loss, _ = policy_losses.policy_loss(logprobs, logprobs, weighted, np.ones((2, 3), bool), 0.2, 0.2, loss="pg")
    np.testing.assert_allclose(loss.mean(axis=1), vector["expected"], atol=vector["atol"])


def test_rlax_policy_gradient_and_entropy_loss():
    vector = {key: np.array(VECTORS["policy_gradient"][key]) for key in VECTORS["policy_gradient"]}
    logprobs, entropy = token_logprobs(vector["logits"], vector["actions"], 1.0)
    found = np.mean(-logprobs * vector["advantages"] * vector["weights"], axis=1)
    np.testing.assert_allclose(found, vector["expected"], atol=vector["atol"])
    vector = {key: np.array(VECTORS["entropy_loss"][key]) for key in VECTORS["entropy_loss"]}
    np.testing.assert_allclose(
        -np.mean(entropy * vector["weights"], axis=1), vector["expected"], atol=vector["atol"]
    )
    np.testing.assert_allclose(losses.entropy_from_logits(vector["logits"]), entropy, rtol=1e-6)


def test_rlax_cross_entropy():
    vector = VECTORS["cross_entropy"]
    targets = jnp.argmax(jnp.array(vector["labels"]), axis=-1)
    found = losses.cross_entropy(jnp.array(vector["logits"]), targets, jnp.ones(2, bool))
    np.testing.assert_allclose(found, vector["expected"], atol=vector["atol"])


# ---------------------------------------------------------------- tunix


def test_tunix_masked_statistics():
    vector = VECTORS["masked_stats"]
    x, mask = jnp.array(vector["x"]), jnp.array(vector["mask"], bool)
    np.testing.assert_allclose(masked_mean(x, mask), vector["mean"], rtol=vector["rtol"])
    np.testing.assert_allclose(masked.masked_variance(x, mask), vector["var_unbiased"], rtol=vector["rtol"])


@pytest.mark.parametrize("estimator, key", [("k1", "k1_d"), ("k2", "k2_mse"), ("k3", "k3_low_var")])
def test_tunix_kl_estimators(estimator, key):
    difference = np.array(VECTORS["kl_estimators"]["k1_d"], np.float32)
    found = kl_estimate(difference, np.zeros_like(difference), estimator)
    np.testing.assert_allclose(found, VECTORS["kl_estimators"][key], rtol=1e-5, atol=1e-6)


def test_tunix_rloo():
    """Whole answers' rewards, here spread over two tokens each."""
    vector = VECTORS["rloo"]
    scores = np.array(vector["rewards"], np.float32)
    rewards, mask = np.stack([scores - 7, np.full(6, 7.0)], axis=1), np.ones((6, 2), bool)
    nothing = (np.zeros((6, 2)), vector["num_generations"], np.zeros(6), 1.0, 1.0)
    found, returns = advantages.ADVANTAGES["rloo"].compute(rewards, mask, *nothing)
    close(found, np.repeat(np.array(vector["expected"])[:, None], 2, axis=1))
    close(returns, np.repeat(scores[:, None], 2, axis=1))
