"""Prompts that are read in chunks give the same caches, states and completions."""

import jax
import numpy as np
import pytest

from jaxrlhf.config import Sampling
from jaxrlhf.models.config import LayerKind
from jaxrlhf.rollout.prefill import prefill

R = 6  # response tokens


@pytest.fixture(scope="module")
def windowed(make_decoder):
    """Two layers, one with a sliding window of 3 tokens."""
    return make_decoder(layers=2, layer_kinds=(LayerKind(), LayerKind(window=3)))


@pytest.mark.parametrize("left_aligned", [False, True])
@pytest.mark.parametrize("chunk", [2, 3])
def test_caches_and_last_states_are_those_of_whole_prompts(windowed, prompts, left_aligned, chunk):
    def run(chunk):
        return jax.jit(lambda prompts: prefill(windowed, prompts, 11, left_aligned, chunk))(prompts)

    (whole, state), (chunked, of_chunks) = run(None), run(chunk)
    np.testing.assert_allclose(of_chunks, state, atol=1e-5)
    lengths, columns = np.asarray(prompts.mask).sum(1)[:, None], np.arange(prompts.mask.shape[1])
    real = columns < lengths if left_aligned else np.asarray(prompts.mask)
    for a, b in zip(whole, chunked, strict=True):
        assert a.k.shape == b.k.shape and a.v.shape == b.v.shape
        np.testing.assert_allclose(np.where(real[:, None, None], b.k - a.k, 0), 0, atol=1e-5)
        np.testing.assert_allclose(np.where(real[:, None, :, None], b.v - a.v, 0), 0, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"samples_per_prompt": 2, "slots": 4}])
def test_completions_are_those_after_whole_prompts(programs, windowed, prompts, more):
    key = jax.random.key(5)
    whole, chunked = (
        programs.rollout(windowed, None, prompts, key, Sampling(max_new_tokens=R, prefill_chunk=chunk, **more))
        for chunk in (None, 2)
    )
    np.testing.assert_array_equal(chunked.tokens, whole.tokens)
    np.testing.assert_array_equal(chunked.response_mask, whole.response_mask)
    np.testing.assert_allclose(chunked.sample_logprobs, whole.sample_logprobs, atol=1e-5)
