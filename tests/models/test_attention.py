import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.attention import attend, attend_causal, causal_mask, positions_of, rotary_tables, rotate
from jaxrlhf.models.target import Target


@pytest.mark.parametrize(
    "segments, positions",
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([0, 0, 1, 1], [0, 0, 0, 1]),
        ([1, 1, 0, 0], [0, 1, 1, 1]),
        ([0, 1, 1, 0], [0, 0, 1, 1]),
        ([1, 1, 2, 2, 2, 3], [0, 1, 0, 1, 2, 0]),
        ([0, 1, 1, 2, 2, 0], [0, 0, 1, 0, 1, 1]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_positions_count_real_tokens_of_each_segment(segments, positions):
    assert positions_of(jnp.array([segments])).tolist() == [positions]


def test_positions_of_a_mask_are_its_cumulative_sum():
    mask = jnp.array([[False, False, True, True, True], [True] * 5])
    np.testing.assert_array_equal(positions_of(mask), jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0))


def test_causal_mask_by_hand():
    seen = causal_mask(jnp.array([[0, 1, 1, 2]]))[0].astype(int)
    assert seen.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_causal_mask_equals_its_definition():
    segments = np.random.default_rng(0).integers(0, 3, (4, 7))
    seen = np.asarray(causal_mask(segments))
    for b in range(4):
        for query in range(7):
            for key in range(7):
                expected = key <= query and segments[b, query] == segments[b, key] != 0
                assert seen[b, query, key] == expected


def test_rotation_is_one_of_complex_numbers():
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [0, 0, 7, 8, 900]])
    frequencies = 10000.0 ** -(np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, :, None, None] * frequencies)
    turns = rotary_tables(positions, 901, frequencies.astype(np.float32))
    rotated = np.asarray(jax.jit(rotate)(x, turns))
    np.testing.assert_allclose(rotated, np.concatenate([turned.real, turned.imag], -1), atol=2e-4)
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])  # position 0 turns nothing


def test_only_distances_enter_the_products():
    q, k = np.random.default_rng(1).standard_normal((2, 1, 1, 1, 16)).astype(np.float32)
    frequencies = (100.0 ** -(np.arange(8) / 8)).astype(np.float32)

    @jax.jit
    def product(i, j):
        turns_q, turns_k = (rotary_tables(jnp.full((1, 1), position), 50, frequencies) for position in (i, j))
        return jnp.sum(rotate(q, turns_q) * rotate(k, turns_k))

    np.testing.assert_allclose(product(3, 1), product(41, 39), atol=1e-4)
    assert abs(product(3, 1) - product(3, 2)) > 1e-2


def test_a_rotation_s_gradient_turns_back():
    generator = np.random.default_rng(2)
    x, d = generator.standard_normal((2, 2, 5, 3, 10)).astype(np.float32)  # of 10 dimensions 8 turn
    turns = rotary_tables(generator.integers(0, 9, (2, 5)), 9, (10000.0 ** -(np.arange(4) / 4)).astype(np.float32), 1.3)

    def plain(x):
        first, second = x[..., :4], x[..., 4:8]
        cos, sin = turns
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., 8:]], axis=-1)

    rotated, back = jax.vjp(lambda x: rotate(x, turns), x)
    np.testing.assert_allclose(rotated, plain(x), atol=1e-6)
    np.testing.assert_allclose(back(d)[0], jax.vjp(plain, x)[1](d)[0], atol=1e-6)


@jax.jit
def attended(q, k, v, mask, *more):
    """`attend` of keys and values [B,S,K,H]."""
    return attend(q, jnp.transpose(k, (0, 2, 3, 1)), jnp.transpose(v, (0, 2, 1, 3)), mask, *more)


@pytest.mark.parametrize("N, K", [(6, 2), (3, 1), (5, 5)])
def test_grouped_attention_equals_numpy(N, K):
    T, S, H = 4, 7, 8
    generator = np.random.default_rng(0)
    shapes = [(2, T, N, H), (2, S, K, H), (2, S, K, H)]
    q, k, v = (generator.standard_normal(shape).astype(np.float32) for shape in shapes)
    mask = generator.random((2, T, S)) < 0.6
    mask[:, :, 0] = True
    expected = np.zeros((2, T, N, H))
    for b in range(2):
        for n in range(N):
            kv = n // (N // K)
            scores = np.where(mask[b], q[b, :, n] @ k[b, :, kv].T / np.sqrt(H), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            expected[b, :, n] = weights / weights.sum(-1, keepdims=True) @ v[b, :, kv]
    np.testing.assert_allclose(attended(q, k, v, mask), expected, atol=1e-5)


@pytest.mark.parametrize("T, S", [(40, 40), (130, 130), (70, 131)])
def test_attention_in_blocks_and_a_card_s_equal_attention_at_once(T, S):
    """Values and gradients, of rows with padding, several segments and a query that sees nothing."""
    generator = np.random.default_rng(0)
    q = generator.standard_normal((2, T, 4, 8)).astype(np.float32)
    k, v = generator.standard_normal((2, 2, S, 2, 8)).astype(np.float32)
    segments = np.sort(generator.integers(0, 3, (2, S)))
    mask = causal_mask(segments)[:, S - T :]
    weight = generator.standard_normal(q.shape).astype(np.float32) * np.asarray(mask.any(-1))[..., None, None]

    def loss(run, q, k, v):
        return jnp.sum(run(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask) * weight)

    ways = (attend, attend_causal, functools.partial(attend_causal, target=Target("gpu")))
    computed = [jax.value_and_grad(lambda *x, run=run: loss(run, *x), (0, 1, 2)) for run in ways]
    once, *others = [jax.jit(compute)(q, k, v) for compute in computed]
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), once, other)


def test_a_query_that_sees_nothing_is_finite_with_finite_gradients():
    q, k, v = np.random.default_rng(2).standard_normal((3, 1, 2, 1, 4)).astype(np.float32)
    mask = np.array([[[False, False], [True, True]]])

    @jax.jit
    def run(q):
        out, gradient = jax.vjp(lambda q: attended(q, k, v, mask), q)
        return out, gradient(jnp.ones_like(out).at[:, 0].set(0))[0]

    out, gradient = jax.device_get(run(q))
    assert np.isfinite(out).all() and np.isfinite(gradient).all() and (gradient[:, 0] == 0).all()


def test_softmax_is_float32_in_bfloat16():
    # A sum of 1000 equal weights in bfloat16 would stop growing at 256.
    q, k = np.zeros((2, 1, 1000, 1, 4), jnp.bfloat16)
    v = np.ones((1, 1000, 1, 4), jnp.bfloat16)
    out = attended(q[:, :1], k, v, np.ones((1, 1, 1000), bool))
    np.testing.assert_allclose(np.asarray(out).astype(np.float32), 1.0, rtol=0.01)
