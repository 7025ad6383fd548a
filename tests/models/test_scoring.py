import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.losses import token_logprobs
from jaxrlhf.models.adapters import SCORE, bind
from jaxrlhf.models.scoring import from_logits, response_logprobs, response_values, sequence_scores


@pytest.fixture(scope="module")
def scored(small):
    kernel = np.random.default_rng(0).standard_normal((24, 1)).astype(np.float32)
    return bind(small, {SCORE: {"kernel": kernel}})


@pytest.fixture(scope="module")
def all_scores(scored, batch):
    tokens, mask = batch
    run = jax.jit(lambda model: model.scores(model.encode(tokens, mask.astype(int))))
    return np.asarray(run(scored))


def test_sequence_scores_are_those_of_the_last_real_token(scored, batch, all_scores):
    tokens, mask = batch
    run = jax.jit(sequence_scores)
    np.testing.assert_allclose(run(scored, tokens, mask), all_scores[:, -1], atol=1e-5)
    # The same rows, padded on the right.
    lengths = mask.sum(1)
    right = np.stack([np.roll(row, -(9 - n)) for row, n in zip(tokens, lengths)])
    np.testing.assert_allclose(run(scored, right, np.arange(9)[None] < lengths[:, None]), all_scores[:, -1], atol=1e-5)


def test_response_logprobs_equal_numpy(small, batch, forward):
    tokens, mask = batch
    R = 4
    answer = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    mask = np.concatenate([mask[:, :-R], answer], 1)
    mask[2, 4] = True  # a prompt of one token
    temperature = np.array([1.0, 0.7, 2.0], np.float32)
    logprobs, entropy = jax.jit(response_logprobs, static_argnums=5)(small, tokens, mask, answer, temperature, False)
    logits = forward(small, tokens, mask)[:, -R - 1 : -1].astype(np.float64) / temperature[:, None, None]
    distribution = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taken = np.take_along_axis(distribution, tokens[:, -R:, None], -1)[..., 0]
    np.testing.assert_allclose(logprobs, np.where(answer, taken, 0), atol=1e-5)
    expected = -(np.exp(distribution) * distribution).sum(-1)
    np.testing.assert_allclose(entropy, np.where(answer, expected, 0), atol=1e-5)


def test_a_value_belongs_to_the_state_before_its_token(scored, batch, all_scores):
    tokens, mask = batch
    answer = mask[:, -3:] & (np.arange(3) < 2)
    values = np.asarray(jax.jit(response_values)(scored, tokens, mask, answer))
    np.testing.assert_allclose(values, np.where(answer, all_scores[:, -4:-1], 0), atol=1e-5)
    # A different token at t changes no value up to and including t.
    other = tokens.copy()
    other[:, -2] = (other[:, -2] + 1) % 31
    changed = np.asarray(jax.jit(response_values)(scored, other, mask, mask[:, -3:]))
    np.testing.assert_allclose(changed[0, :2], values[0, :2], atol=1e-5)
    assert abs(changed[0, 2] - all_scores[0, -2]) > 1e-3


@pytest.mark.parametrize("held", [1, 3 * 31 * 2, 3 * 31 * 5])  # logits: of one position, of two, of five of seven
def test_logits_in_parts_give_the_same(small, held):
    """Values and gradients, of the hidden states and of the head."""
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((3, 7, small.config.hidden_size)).astype(np.float32)
    tokens = generator.integers(0, 31, (3, 7))
    weights = generator.standard_normal((2, 3, 7)).astype(np.float32)
    temperature = np.array([1.0, 0.5, 2.0], np.float32)

    def loss(model, hidden, held):
        both = from_logits(model, hidden, tokens, lambda x, tokens: token_logprobs(x, tokens, temperature), held)
        return jnp.sum(jnp.stack(both) * weights), both

    compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    parts, whole = compute(small, hidden, held), compute(small, hidden, 10**9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), parts, whole)
    lowered = compute.lower(small, hidden, held).as_text()
    assert "3x7x31xf32" not in lowered and "3x7x31xf32" in compute.lower(small, hidden, 10**9).as_text()
