"""Faults that other trainers of this kind had, each as a relation that must hold here.

Logits against transformers are in models/test_decoder.py, probes with a known answer in test_probes.py, a killed
and resumed run in stages/test_run.py.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import OptimizerConfig, PPOConfig, Sampling
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.records import Prompts
from jaxrlhf.stages.keys import key_for
from jaxrlhf.steps import ppo
from jaxrlhf.steps.metrics import share
from jaxrlhf.steps.ppo import init_ppo, ppo_update

KEY = jax.random.key(13)


def same_bits(a, b):
    """Whether two trees of arrays are the same to the bit."""
    a, b = jax.device_get((a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def digest(base):
    """SHA-256 over all bytes of a decoder."""
    total = hashlib.sha256()
    for name, leaf in sorted(named_parameters(base).items()):
        total.update(name.encode() + np.asarray(leaf).tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def still():
    """Sixteen steps at learning rate 0."""
    off = OptimizerConfig(learning_rate=0.0)
    return PPOConfig(epochs=4, minibatches=4, optimizer=off, value_optimizer=off)


@pytest.fixture(scope="module")
def updated(programs, start, tiny, experience, sixteen):
    """(state, metrics) after sixteen steps from the experience."""
    return jax.device_get(programs.update(start, tiny, experience, KEY, sixteen))


# ---------------------------------------------------------------- 1: ratio 1 at first


def test_the_first_minibatch_has_ratio_1_and_the_later_ones_have_not(updated):
    metrics = updated[1]
    assert metrics["policy/first_ratio_error"] < 1e-5
    assert metrics["policy/ratio_max"] > 1 + 1e-4 and metrics["policy/approx_kl"] > 1e-8


def test_the_first_ratio_shows_old_logprobs_of_another_policy(programs, start, tiny, experience, sixteen):
    """The check above can fail: here the old logprobs are the reference's."""
    wrong = experience.replace(logprobs=experience.ref_logprobs)
    assert programs.update(start, tiny, wrong, KEY, sixteen)[1]["policy/first_ratio_error"] > 1e-2


def test_one_step_an_iteration_has_ratio_1_exactly(programs, start, tiny, experience):
    """Then the old logprobs are not even looked at, and the gap to sampling is measured in the update."""
    once = PPOConfig(epochs=1, minibatches=1)
    state, metrics = programs.update(start, tiny, experience, KEY, once)
    for name in ("ratio_mean", "ratio_max"):
        assert float(metrics[f"policy/{name}"]) == pytest.approx(1, abs=1e-6 if name == "ratio_mean" else 0)
    for name in ("first_ratio_error", "approx_kl", "clip_low", "clip_high"):
        assert float(metrics[f"policy/{name}"]) == 0
    assert 0 < float(metrics["gap/logprob_max"]) < 1e-5
    nonsense = experience.replace(logprobs=experience.logprobs - 3)
    assert same_bits(programs.update(start, tiny, nonsense, KEY, once)[0], state)
    assert not same_bits(state.policy, start.policy)


# ---------------------------------------------------------------- 2: learning rate 0


def test_learning_rate_0_leaves_weights_and_gap_alone_for_20_iterations(
    programs, start, tiny, prompts, sampling, scores, still
):
    state, gaps = start, []
    for iteration in range(20):
        out = programs.rollout(tiny, state.policy, prompts, jax.random.key(iteration), sampling)
        noted = programs.annotate(tiny, state.policy, state.value, None, out)
        made, metrics = programs.experience(out, noted, scores, 0.1)
        state, updates = programs.update(state, tiny, made, jax.random.key(100 + iteration), still)
        assert float(updates["optimizer/grad_norm"]) > 1e-3
        gaps.append(float(metrics["gap/logprob_max"]))
    assert same_bits((state.policy, state.value), (start.policy, start.value))
    assert int(state.step) == 20 * 16
    assert max(gaps) < 1e-5


# ---------------------------------------------------------------- 3, 4: rows, batches and padding


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_and_recomputed_logprobs_agree(programs, tiny, roles, prompts, temperature):
    sampling = Sampling(max_new_tokens=6, temperature=temperature)
    out = programs.rollout(tiny, roles.policy, prompts, KEY, sampling)
    again, _ = programs.logprobs(bind(tiny, roles.policy), out.tokens, out.mask, out.response_mask, out.temperature)
    np.testing.assert_allclose(out.sample_logprobs, again, atol=1e-5)
    assert np.abs(out.sample_logprobs).max() > 0.5


def test_a_row_alone_and_in_a_batch_has_the_same_logprobs_values_and_answer(
    programs, tiny, roles, sampled, prompts, sampling
):
    together = programs.annotate(tiny, roles.policy, roles.value, None, sampled)
    for row in range(8):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], sampled)
        noted = programs.annotate(tiny, roles.policy, roles.value, None, alone)
        for name in ("logprobs", "ref_logprobs", "values"):
            np.testing.assert_allclose(getattr(noted, name)[0], getattr(together, name)[row], atol=1e-5)
    # The answer of a row depends on its index (here 0), its prompt and the key.
    first = programs.rollout(
        tiny, roles.policy, Prompts(prompts.tokens[:1], prompts.mask[:1]), jax.random.key(5), sampling
    )
    np.testing.assert_array_equal(first.tokens[0], sampled.tokens[0])
    np.testing.assert_allclose(first.sample_logprobs[0], sampled.sample_logprobs[0], atol=1e-5)


def test_more_padding_on_the_left_changes_no_answer(programs, tiny, roles, sampled, prompts, sampling):
    junk = np.full((8, 4), 7)  # what stands in the padding is nobody's business
    wider = Prompts(jnp.concatenate([junk, prompts.tokens], 1), jnp.pad(prompts.mask, ((0, 0), (4, 0))))
    out = programs.rollout(tiny, roles.policy, wider, jax.random.key(5), sampling)
    np.testing.assert_array_equal(out.tokens[:, 4:], sampled.tokens)
    np.testing.assert_array_equal(out.response_mask, sampled.response_mask)
    np.testing.assert_allclose(out.sample_logprobs, sampled.sample_logprobs, atol=1e-5)


# ---------------------------------------------------------------- 5: past the end


def test_what_stands_past_the_end_changes_no_metric_and_no_gradient(
    programs, start, tiny, roles, sampled, scores, experience, sixteen, updated
):
    generator = np.random.default_rng(0)
    past = ~np.asarray(sampled.response_mask)
    assert past.sum() > 8 and past.any(axis=1).sum() > 2

    def spoiled(x, junk):
        x = np.array(x)
        x[:, -past.shape[1] :][past] = junk
        return jnp.asarray(x)

    tokens = spoiled(sampled.tokens, generator.integers(1, 12, past.sum()))
    noted = programs.annotate(tiny, roles.policy, roles.value, None, sampled.replace(tokens=tokens))
    noted = jax.tree.map(lambda x: spoiled(x, 1e3), noted)
    made, metrics = programs.experience(sampled.replace(tokens=tokens), noted, scores, 0.1)
    clean = programs.annotate(tiny, roles.policy, roles.value, None, sampled)
    assert same_bits(metrics, programs.experience(sampled, clean, scores, 0.1)[1])
    assert same_bits((made.advantages, made.returns), (experience.advantages, experience.returns))
    made = jax.tree.map(lambda x: spoiled(x, 1e3) if x.dtype == jnp.float32 and x.ndim == 2 else x, made)
    assert same_bits(programs.update(start, tiny, made, KEY, sixteen), updated)


# ---------------------------------------------------------------- 7: what moves


def test_everything_trainable_moves_and_the_base_does_not(
    programs, tiny, make_adapter, prompts, sampling, scores, sixteen
):
    """From a fresh start: LoRA pairs that end in zero, and a value head of zeros."""
    before = digest(tiny)
    first = init_ppo(make_adapter(tiny, 1, moved=False), make_adapter(tiny, 2, head="value", moved=False), sixteen)
    assert not np.asarray(first.value["score"]["kernel"]).any()
    out = programs.rollout(tiny, first.policy, prompts, KEY, sampling)
    noted = programs.annotate(tiny, first.policy, first.value, None, out)
    made, _ = programs.experience(out, noted, scores, 0.1)
    last, _ = programs.update(first, tiny, made, KEY, sixteen)
    for tree, old in ((last.policy, first.policy), (last.value, first.value)):
        for path, leaves in tree.items():
            for name, leaf in leaves.items():
                moved = not np.array_equal(leaf, old[path][name])
                assert moved == (name != "lora_scale"), f"{path}/{name}"
    assert digest(tiny) == before


def test_the_callers_trees_survive_donation(programs, tiny, roles, experience, sixteen):
    policy, value = (jax.tree.map(jnp.copy, tree) for tree in (roles.policy, roles.value))
    jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(init_ppo(policy, value, sixteen))
    assert same_bits((policy, value), (roles.policy, roles.value))


# ---------------------------------------------------------------- 8: rows and steps


def test_4_epochs_of_4_minibatches_are_16_steps(updated):
    state = updated[0]
    assert int(state.step) == 16
    counts = [leaf for leaf in jax.tree.leaves((state.policy_optimizer, state.value_optimizer)) if leaf.ndim == 0]
    counts = [int(c) for c in counts if c.dtype == np.int32]
    assert counts == [16, 16]


@pytest.mark.parametrize("size", [None, 2])
def test_each_row_is_used_once_an_epoch_in_an_order_of_its_own(monkeypatch, tiny, roles, experience, size):
    seen = []

    def spy(policy, value, base, part, *rest):
        jax.debug.callback(lambda rows: seen.append(rows.tolist()), part.returns[:, 0], ordered=True)
        still = 0.0 * sum(jnp.sum(x) for x in jax.tree.leaves((policy, value)))
        return still, {"policy/loss": share(still)}

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    config = PPOConfig(epochs=4, minibatches=2, microbatch_size=size)
    numbered = experience.replace(returns=jnp.tile(jnp.arange(8.0)[:, None], (1, 6)))
    small = {"layers.0.mlp.down_proj": roles.policy["layers.0.mlp.down_proj"]}
    run = jax.jit(lambda *args: ppo_update(*args))
    orders = []
    for key in (0, 1):
        seen.clear()
        jax.block_until_ready(run(init_ppo(small, small, config), tiny, numbered, jax.random.key(key), config))
        jax.effects_barrier()
        assert [len(rows) for rows in seen] == [size or 4] * (32 // (size or 4))
        rows = [row for part in seen for row in part]
        orders += [tuple(rows[start : start + 8]) for start in range(0, 32, 8)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len(set(orders)) == 8  # of each epoch, and of each key


# ---------------------------------------------------------------- 11: seeds


def test_two_seeds_differ_from_the_first_token_on_and_one_seed_does_not(programs, tiny, roles, prompts, sampling):
    def answers(seed, iteration):
        key = key_for(seed, "ppo", iteration, "rollout")
        return jax.device_get(programs.rollout(tiny, roles.policy, prompts, key, sampling))

    first = answers(0, 0)
    assert same_bits(first, answers(0, 0))
    for other in (answers(1, 0), answers(0, 1)):
        assert (first.tokens[:, 5] != other.tokens[:, 5]).any()
        assert (first.tokens != other.tokens).any(axis=1).mean() > 0.5
