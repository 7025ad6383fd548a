"""Attention in blocks equals attention at once, skips what nobody sees, and its memory grows with the length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import attention, block_attention
from jaxrlhf.models.attention import attend, causal_mask, mask_of, of_queries, within_window
from jaxrlhf.models.block_attention import Visibility, attend_blocks, visibility
from jaxrlhf.models.target import ON_CPU, Target


def drawn(T, S, seed=0):
    """(queries, keys, values, segments with padding, weights of outputs whose query sees something)."""
    generator = np.random.default_rng(seed)
    q = generator.standard_normal((2, T, 4, 8)).astype(np.float32)
    k, v = generator.standard_normal((2, 2, 2, 8, S)).astype(np.float32)
    segments = np.sort(generator.integers(0, 4, (2, S)))
    seen = np.asarray(causal_mask(segments)[:, S - T :].any(-1))
    return q, k, v.transpose(0, 1, 3, 2), segments, generator.standard_normal(q.shape) * seen[..., None, None]


@pytest.mark.parametrize(
    ("T", "S", "window", "softcap"),
    [(40, 40, None, None), (130, 130, 20, None), (70, 131, None, 5.0), (1, 50, 9, None), (64, 64, 16, 3.0)],
)
def test_values_and_gradients_equal_attention_at_once(T, S, window, softcap):
    """With a start that is static and one that is traced, and for two models at once."""
    q, k, v, segments, weight = drawn(T, S)
    mask = causal_mask(segments)
    mask = (mask if window is None else within_window(mask, window))[:, S - T :]

    def once(q, k, v):
        return jnp.sum(attend(q, k, v, mask, None, softcap) * weight)

    def blocks(q, k, v, start=None):
        seen = visibility(segments, start).replace(window=window)
        return jnp.sum(attend_blocks(q, k, v, seen, None, softcap, block=16) * weight)

    expected = jax.jit(jax.value_and_grad(once, (0, 1, 2)))(q, k, v)
    compute = jax.jit(jax.value_and_grad(blocks, (0, 1, 2)))
    for found in (compute(q, k, v), compute(q, k, v, jnp.int32(S - T))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, found)
    both = jax.jit(jax.vmap(jax.grad(blocks), (0, None, None)))(np.stack([0 * q, q]), k, v)
    np.testing.assert_allclose(both[1], expected[1][0], rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_is_zero_with_zero_gradients():
    q, k, v, _, _ = drawn(8, 8)
    seen = visibility(np.array([[0] * 8, [0, 0, 0, 0, 1, 1, 1, 1]]))

    def run(q):
        out, gradient = jax.vjp(lambda q: attend_blocks(q, k, v, seen, block=4), q)
        return out, gradient(jnp.ones_like(out))[0]

    for x in jax.device_get(jax.jit(run)(q)):
        assert (x[0] == 0).all() and (x[1, :4] == 0).all() and (x[1, 4:] != 0).any() and np.isfinite(x).all()


@pytest.mark.parametrize(("window", "start"), [(None, None), (5, None), (None, 16), (5, 16)])
def test_only_pairs_of_blocks_that_somebody_sees_are_computed(window, start):
    """Whether the start is static or traced. A pair that is left out, or not seen, adds nothing."""
    S, C = 64, 8
    T = S if start is None else 24
    q, k, v, _, _ = drawn(T, S)
    segments = np.repeat([[0, 1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 2, 2, 3]], C, axis=1)
    options = block_attention._Options(window, 1.0, None, C, None)
    seen = visibility(segments, None if start is None else jnp.int32(start)).replace(window=window)
    i, j, first, needed = map(np.asarray, block_attention._Blocks(options, q, k, v, seen).pairs())
    mask = np.asarray(causal_mask(segments) if window is None else within_window(causal_mask(segments), window))
    mask = mask[:, (start or 0) : (start or 0) + T].reshape(2, T // C, C, S // C, C).any((0, 2, 4))
    found = {(int(a), int(b)) for a, b, is_seen in zip(i, j, needed) if is_seen}
    assert found >= set(zip(*map(np.ndarray.tolist, np.nonzero(mask))))
    # A block of keys between two that a row sees counts as seen.
    assert len(found) <= 1.3 * mask.sum() and sorted(i) == list(i) and first.sum() == T // C


def test_memory_grows_linearly():
    def temporaries(T):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, T, 2, 8), (1, 2, 8, T), (1, 2, T, 8))]
        seen = jax.eval_shape(visibility, jax.ShapeDtypeStruct((1, T), jnp.int32))
        run = jax.grad(lambda q, k, v, seen: attend_blocks(q, k, v, seen, block=64).sum(), (0, 1, 2))
        return jax.jit(run).lower(*shapes, seen).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(4096), temporaries(16384)
    assert large < 4.5 * small and large < 16384**2  # the mask alone would take as much


def test_short_sequences_and_cudnn_keep_a_mask(monkeypatch):
    segments = jnp.ones((1, 9), jnp.int32)
    assert isinstance(mask_of(segments, ON_CPU), jax.Array)
    monkeypatch.setattr(attention, "LONGEST_WHOLE", 8)
    assert isinstance(mask_of(segments, Target("gpu", "cudnn")), jax.Array)
    long = mask_of(segments, ON_CPU)
    assert isinstance(long, Visibility) and of_queries(long, 3) is long and within_window(long, 4).window == 4
