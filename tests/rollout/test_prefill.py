"""Prompts that are read in chunks, or by stacked layers, give the same caches, states and completions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import Sampling
from jaxrlhf.models import attention
from jaxrlhf.models.config import LayerKind
from jaxrlhf.models.decoder import with_target
from jaxrlhf.models.layer_scan import with_stacked_layers
from jaxrlhf.models.target import Target
from jaxrlhf.rollout.decode import rollout
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


@pytest.mark.parametrize("longest_whole", [0, 4096])
def test_the_last_layer_computes_one_position_of_each_prompt(windowed, prompts, longest_whole, monkeypatch):
    """Masks are arrays, or `Visibility`s of which the last layer makes the row of its query."""
    monkeypatch.setattr(attention, "LONGEST_WHOLE", longest_whole)

    def all_positions(prompts):
        tokens, segments, last = first_in_column_0(prompts)
        mask = attention.mask_of(segments, windowed.config.target)
        hidden, cache = windowed.hidden(tokens, attention.positions_of(segments), mask, slots=11)
        return cache, jnp.take_along_axis(hidden, last[:, None, None], axis=1)

    whole, one = (
        jax.jit(run).lower(prompts).compile()
        for run in (all_positions, lambda prompts: prefill(windowed, prompts, 11, True))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one(prompts), whole(prompts))
    P, (D, F) = prompts.tokens.shape[1], (windowed.config.hidden_size, windowed.config.intermediate_size)
    skipped = len(prompts.tokens) * (P - 1) * 2 * (2 * D * D + 3 * D * F)  # q, o, gate, up and down of the last layer
    assert whole.cost_analysis()["flops"] - one.cost_analysis()["flops"] > 0.9 * skipped


def first_in_column_0(prompts):
    """Tokens and segments, each row moved to its start, and the column of its last token."""
    P, lengths = prompts.tokens.shape[1], jnp.sum(prompts.mask, axis=1)
    columns = (jnp.arange(P) + P - lengths[:, None]) % P
    tokens, mask = (jnp.take_along_axis(jnp.asarray(x), columns, axis=1) for x in (prompts.tokens, prompts.mask))
    return tokens, mask.astype(jnp.int32), lengths - 1


LOOP = Target("gpu", scan_layers=True)
SINGLE = dataclasses.replace(LOOP, scan_layers=False)


@pytest.fixture(scope="module")
def deep(make_decoder):
    """Five layers, every second one with a sliding window: two periods in the loop, and a layer after it."""
    return make_decoder(layers=5, scale=0.2, layer_kinds=(LayerKind(), LayerKind(window=3)))


@pytest.mark.parametrize("left_aligned", [False, True])
@pytest.mark.parametrize("layers", [5, 6])
def test_stacked_layers_give_the_caches_in_order(make_decoder, prompts, left_aligned, layers):
    base = make_decoder(layers=layers, scale=0.2, layer_kinds=(LayerKind(), LayerKind(window=3)))
    (stacked,) = with_stacked_layers(with_target(base, LOOP), last_apart=True)
    assert stacked.stacked is not None and len(stacked.layers) == layers - 4
    single, loop = (
        jax.jit(lambda prompts, model=model: prefill(model, prompts, 11, left_aligned))(prompts)
        for model in (with_target(base, SINGLE), stacked)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), single, loop)


@pytest.mark.parametrize("more", [{}, {"samples_per_prompt": 2}, {"merge_adapter": True}])
def test_completions_are_those_of_layers_one_by_one(deep, make_adapter, prompts, more):
    adapter, sampling = make_adapter(deep, 1, targets=("q_proj", "down_proj")), Sampling(max_new_tokens=R, **more)
    single, loop = (
        jax.jit(lambda model: rollout(model, adapter, prompts, jax.random.key(5), sampling))(with_target(deep, target))
        for target in (SINGLE, LOOP)
    )
    np.testing.assert_array_equal(loop.tokens, single.tokens)
    np.testing.assert_allclose(loop.sample_logprobs, single.sample_logprobs, atol=1e-5)


def test_layers_are_stacked_only_if_all_rows_enter_at_once(deep, prompts):
    def products(target, **more):
        sampling = Sampling(max_new_tokens=R, **more)
        run = jax.jit(lambda model: rollout(model, None, prompts, jax.random.key(5), sampling))
        return run.lower(with_target(deep, target)).as_text().count("stablehlo.dot_general")

    assert products(LOOP) < products(SINGLE)
    for more in ({"slots": 2}, {"prefill_chunk": 2}):
        assert products(LOOP, **more) == products(SINGLE, **more)
