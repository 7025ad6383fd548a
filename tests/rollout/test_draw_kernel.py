"""The kernel of a draw, run by Pallas' interpreter on a CPU, against `draw` itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.rollout import sampling
from jaxrlhf.rollout.draw_kernel import draw_from_cube
from jaxrlhf.rollout.sampling import draw, row_uniforms

NEARLY_1 = np.nextafter(np.float32(1), np.float32(0))


@pytest.mark.parametrize("vocabulary", [1, 7, 15, 1000, 9000])
def test_the_kernel_draws_the_tokens_that_draw_draws(monkeypatch, vocabulary):
    """Flat and peaked rows, impossible tokens at both ends and between, and numbers at both ends of [0, 1)."""
    rows = 24
    generator = np.random.default_rng(vocabulary)
    logits = np.float32(generator.normal(0, 1, (rows, vocabulary)) * np.linspace(0, 8, rows)[:, None])
    impossible = generator.random(logits.shape) < 0.3
    impossible[:, vocabulary // 2] = False
    impossible[::2, [0, -1]] = vocabulary > 2
    logits[impossible] = -np.inf
    uniforms = np.array(row_uniforms(jax.random.key(vocabulary), rows, 1)[:, 0])
    uniforms[:4], uniforms[4:8] = 0.0, NEARLY_1
    interpreted = lambda *given: draw_from_cube(*given, interpret=True)  # noqa: E731
    monkeypatch.setattr(sampling, "draw_from_cube", interpreted)
    ours = np.asarray(jax.jit(lambda *given: draw(*given, use_kernel=True))(logits, uniforms))
    np.testing.assert_array_equal(ours, jax.jit(draw)(logits, uniforms))
    assert not impossible[np.arange(rows), ours].any() and ours.dtype == np.int32


def test_greedy_decoding_on_a_card_draws_the_largest_logit():
    """There the temperature is 1e-30 in place of a condition that the host would wait for."""
    logits = np.random.default_rng(0).normal(0, 3, (20, 500)).astype(np.float32)
    uniforms = jnp.asarray(row_uniforms(jax.random.key(0), 20, 1)[:, 0])
    np.testing.assert_array_equal(jax.jit(draw)(logits / np.float32(1e-30), uniforms), logits.argmax(-1))
