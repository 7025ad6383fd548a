import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import OptimizerConfig
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.scoring import sequence_scores
from jaxrlhf.records import PreferenceBatch, TrainState
from jaxrlhf.steps.optimizer import init_optimizer
from jaxrlhf.steps.reward_model import pair_scores, reward_model_update

update_jit = jax.jit(reward_model_update, static_argnames=("microbatches", "remat"))
B, L = 16, 7
CONFIG = OptimizerConfig(learning_rate=1e-2)


def pairs(seed, count=B):
    """Answers of three to seven tokens that differ in one: the chosen one holds a 5 where the other has a 7."""
    generator = np.random.default_rng(seed)
    tokens = generator.choice([3, 4, 6, 8, 9, 10], (count, L)).astype(np.int32)
    lengths = generator.integers(3, L + 1, count)
    mask = np.arange(L) < lengths[:, None]
    at = generator.integers(0, lengths)
    chosen, rejected = tokens.copy(), tokens.copy()
    chosen[np.arange(count), at], rejected[np.arange(count), at] = 5, 7
    zeros, ones = np.zeros(count, np.float32), np.ones(count, np.float32)
    return PreferenceBatch(chosen * mask, mask, rejected * mask, mask, zeros, ones)


@pytest.fixture(scope="module")
def state(tiny, make_adapter):
    adapter = make_adapter(tiny, 3, head="reward", moved=False, targets=("q_proj", "v_proj", "down_proj"))
    return TrainState(adapter, init_optimizer(adapter), jnp.int32(0))


def test_separable_pairs_are_learnt_and_so_are_new_ones(tiny, state):
    _, first = update_jit(state, tiny, pairs(0), CONFIG, 0.01)
    assert float(first["reward_model/accuracy"]) < 0.9
    for step in range(80):
        state, metrics = update_jit(state, tiny, pairs(step), CONFIG, 0.01)
    chosen, rejected = jax.jit(pair_scores)(tiny, state.adapter, pairs(1000))
    assert (np.asarray(chosen) > np.asarray(rejected)).mean() == 1.0
    assert float(metrics["reward_model/loss"]) < 0.3 < float(first["reward_model/loss"])
    assert abs(float(metrics["reward_model/score"])) < 1.0  # centred


def test_pair_scores_are_those_of_each_side(tiny, state):
    batch = pairs(1)
    score = jax.jit(sequence_scores)
    model = bind(tiny, state.adapter)
    chosen, rejected = jax.jit(pair_scores)(tiny, state.adapter, batch)
    np.testing.assert_allclose(chosen, score(model, batch.chosen, batch.chosen_mask), atol=1e-5)
    np.testing.assert_allclose(rejected, score(model, batch.rejected, batch.rejected_mask), atol=1e-5)
    assert np.abs(chosen - rejected).max() > 1e-2


def test_microbatches_and_rows_of_weight_0(tiny, state):
    """Weights and margins that differ between the parts; a row of weight 0 may hold anything."""
    generator = np.random.default_rng(0)
    weight = generator.random(B).astype(np.float32)
    weight[-5:] = 0  # the whole last part, and one more
    batch = pairs(2).replace(weight=weight, margin=generator.random(B).astype(np.float32))
    whole, noted = update_jit(state, tiny, batch, CONFIG, 0.1)
    spoiled = batch.replace(chosen=np.where(weight[:, None] > 0, batch.chosen, 11))
    for other, parts in ((batch, 4), (spoiled, 1)):
        new, same = update_jit(state, tiny, other, CONFIG, 0.1, microbatches=parts)
        for a, b in zip(jax.tree.leaves(new.adapter), jax.tree.leaves(whole.adapter)):
            np.testing.assert_allclose(a, b, atol=1e-6)
        for name in noted:
            assert float(same[name]) == pytest.approx(float(noted[name]), rel=1e-4), name
    model_chosen, model_rejected = jax.device_get(jax.jit(pair_scores)(tiny, state.adapter, batch))
    share = weight / weight.sum()
    apart = model_chosen - model_rejected - batch.margin
    want = (share * (np.log1p(np.exp(-apart)) + 0.1 * (model_chosen + model_rejected) ** 2)).sum()
    assert float(noted["reward_model/loss"]) == pytest.approx(want, rel=1e-4)
    assert float(noted["reward_model/accuracy"]) == pytest.approx((share * (model_chosen > model_rejected)).sum())
