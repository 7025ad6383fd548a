import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import OptimizerConfig
from jaxrlhf.models.adapters import bind
from jaxrlhf.records import SFTBatch, TrainState
from jaxrlhf.steps.optimizer import init_optimizer
from jaxrlhf.steps.sft import learned_tokens, sft_evaluate, sft_loss, sft_update

loss_jit = jax.jit(sft_loss)
update_jit = jax.jit(sft_update, static_argnames=("microbatches", "remat"))
L = 12
LENGTHS = [[5, 4], [7, 5], [3], [12], [2, 3], [6, 6]]  # of the rows packed into each sequence


def batch_of(lengths, seed=0):
    """Packed random rows; each row learns what follows its first token or two."""
    generator = np.random.default_rng(seed)
    shape = (len(lengths), L)
    tokens, segments, learnt = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for b, rows in enumerate(lengths):
        at = 0
        for number, n in enumerate(rows, 1):
            tokens[b, at : at + n] = generator.integers(1, 12, n)
            segments[b, at : at + n] = number
            learnt[b, at + 1 + n % 2 : at + n] = True
            at += n
    return SFTBatch(tokens, segments, learnt)


@pytest.fixture(scope="module")
def batch():
    return batch_of(LENGTHS)


@pytest.fixture(scope="module")
def adapter(tiny, make_adapter):
    return make_adapter(tiny, 1, targets=("q_proj", "down_proj"))


def alone(batch):
    """Each packed row in a sequence of its own."""
    rows = [(b, s) for b in range(len(batch.tokens)) for s in np.unique(batch.segments[b]) if s]
    out = SFTBatch(*(np.zeros((len(rows), L), x.dtype) for x in (batch.tokens, batch.segments, batch.loss_mask)))
    for i, (b, s) in enumerate(rows):
        real = batch.segments[b] == s
        n = real.sum()
        out.tokens[i, :n], out.segments[i, :n] = batch.tokens[b, real], 1
        out.loss_mask[i, :n] = batch.loss_mask[b, real]
    return out


def test_the_loss_equals_numpy_on_single_rows(programs, tiny, adapter, batch):
    """One row, unpadded in meaning: minus the log-softmax of each learnt token, summed."""
    rows = alone(batch)
    logits = np.asarray(programs.forward(bind(tiny, adapter), rows.tokens, rows.segments > 0), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -sum(
        logp[b, t - 1, rows.tokens[b, t]] for b, t in np.argwhere(rows.loss_mask)
    )
    got = loss_jit(tiny, adapter, rows)
    assert float(got) == pytest.approx(want, rel=1e-5) and got.dtype == jnp.float32
    # Packed: the same sum, with every row seeing itself alone.
    assert float(loss_jit(tiny, adapter, batch)) == pytest.approx(want, rel=1e-5)
    total, count = jax.jit(sft_evaluate)(tiny, adapter, batch)
    assert float(total) == pytest.approx(want, rel=1e-5) and int(count) == batch.loss_mask.sum()


def test_a_rows_first_token_is_not_learnt_from_the_row_before():
    packed = SFTBatch(
        tokens=np.ones((1, 6), np.int32), segments=np.array([[1, 1, 2, 2, 0, 0]]), loss_mask=np.ones((1, 6), bool)
    )
    assert np.asarray(learned_tokens(packed)).tolist() == [[True, False, True, False, False]]


def test_what_is_not_learnt_changes_nothing(tiny, adapter, batch):
    spoiled = batch.replace(tokens=np.where(batch.segments == 0, 9, batch.tokens))
    assert (spoiled.tokens != batch.tokens).sum() > 10
    assert float(loss_jit(tiny, adapter, spoiled)) == float(loss_jit(tiny, adapter, batch))


def test_microbatches_equal_the_whole_and_learning_lowers_the_loss(tiny, adapter, batch):
    """Parts of unequal numbers of learnt tokens."""
    config = OptimizerConfig(learning_rate=3e-3)
    state = TrainState(adapter, init_optimizer(adapter), jnp.int32(0))
    whole, noted = update_jit(state, tiny, batch, config)
    parts, same = update_jit(state, tiny, batch, config, microbatches=3, remat="full")
    assert len({int(n) for n in learned_tokens(batch).reshape(3, -1).sum(1)}) > 1
    for a, b in zip(jax.tree.leaves(parts.adapter), jax.tree.leaves(whole.adapter)):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for name in noted:
        assert float(same[name]) == pytest.approx(float(noted[name]), rel=1e-5), name
    count = batch.loss_mask.sum()
    mean = float(loss_jit(tiny, adapter, batch)) / count
    assert float(noted["sft/loss"]) == pytest.approx(mean, rel=1e-5) and int(noted["sft/tokens"]) == count
    state = whole
    for _ in range(60):
        state, noted = update_jit(state, tiny, batch, config)
    assert float(noted["sft/loss"]) < 0.75 * mean and int(state.step) == 61
