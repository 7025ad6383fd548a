import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SMALL, random_decoder

from jaxrlhf.hf.weights import load_pretrained
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.attention import causal_mask
from jaxrlhf.models.cache import CacheIndex, LayerCache
from jaxrlhf.models.config import LayerKind
from jaxrlhf.models.decoder import Decoder, abstract_decoder, named_parameters, with_parameters
from jaxrlhf.records import Prompts
from jaxrlhf.rollout.prefill import prefill


def tokens_and_mask(vocabulary, B=3, T=20):
    """Left-padded rows of 20, 13 and 1 real tokens."""
    tokens = np.random.default_rng(3).integers(0, vocabulary, (B, T)).astype(np.int32)
    return tokens, np.arange(T)[None] >= np.array([0, 7, 19])[:, None]


def test_logits_equal_those_of_transformers(llama_case, make_llama, torch_logits, forward, tmp_path):
    theirs = make_llama(tmp_path, **llama_case)
    ours, tokenizer = load_pretrained(tmp_path)
    tokens, mask = tokens_and_mask(61)
    expected = torch_logits(theirs, tokens, mask)
    assert tokenizer is None
    assert expected[mask].std() > 0.3  # a model whose logits hardly vary would prove nothing
    np.testing.assert_allclose(forward(ours, tokens, mask)[mask], expected[mask], atol=1e-4)


def test_logits_equal_those_of_transformers_from_a_real_model(stories260k, torch_logits, forward):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    ours, tokenizer = load_pretrained(stories260k)
    theirs = transformers.LlamaForCausalLM.from_pretrained(stories260k)
    assert ours.config.stop_tokens == (1, 2) and ours.config.pad_token == 0
    rows = [tokenizer.encode_prompt(text) for text in ("Once upon a time, there was", "Lily and", "The dog")]
    width = max(map(len, rows))
    tokens = np.array([[0] * (width - len(row)) + row for row in rows], np.int32)
    mask = np.array([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    expected = torch_logits(theirs, tokens, mask)
    np.testing.assert_allclose(forward(ours, tokens, mask)[mask], expected[mask], atol=1e-4)


@pytest.mark.parametrize("ring", [True, False], ids=["one column for all rows", "contiguous rows"])
@pytest.mark.parametrize("window", [None, 3])
def test_decoding_with_a_cache_equals_the_full_forward(batch, ring, window):
    """Prompts of 5, 2 and 0 tokens, and then one token at a time. Columns that no row has written must not be seen."""
    tokens, mask = batch
    config = dataclasses.replace(SMALL, layer_kinds=(LayerKind(window=window), LayerKind()))
    model, P, S, lengths = random_decoder(config), 5, tokens.shape[1], mask[:, :5].sum(1)
    full = np.asarray(jax.jit(Decoder.encode)(model, tokens, mask.astype(np.int32)))
    prompts = Prompts(jnp.asarray(tokens[:, :P]), jnp.asarray(mask[:, :P]))
    first, start = jax.jit(prefill, static_argnums=(2, 3))(model, prompts, S, not ring), 7
    written = np.arange(S)[None] < lengths[:, None]  # a ring of 9 columns has prompts in the columns 2 to 6
    written = np.roll(np.arange(S)[None] >= S - lengths[:, None], start, 1) if ring else written
    cache = [layer.as_ring(S, start) if ring else layer.widened(S) for layer in first[0]]
    cache = [
        LayerCache(jnp.where(written[:, None, None], k, 9.0), jnp.where(written[:, None, :, None], v, 9.0))
        for k, v in cache
    ]
    step, parts = jax.jit(Decoder.decode), [np.asarray(first[1])]
    for t in range(S - P):
        filled = jnp.asarray(mask[:, : P + t + 1].sum(1))
        index = CacheIndex.ring(jnp.int32(start + t), filled, S) if ring else CacheIndex.contiguous(filled)
        hidden, cache = step(model, tokens[:, P + t], cache, index)
        parts.append(np.asarray(hidden))
    real = mask[:, P - 1 :]
    np.testing.assert_allclose(np.concatenate(parts, 1)[real], full[:, P - 1 :][real], atol=1e-5)


@pytest.mark.parametrize("queues", [1, 2])
def test_rows_are_put_into_their_slots_alone(queues):
    """Six slots: three rows enter by one queue, or two by two queues, of which one is left out."""
    slots = {1: [[4, 0, 6]], 2: [[2], [3]]}[queues]
    at = {1: {0: 4, 1: 0}, 2: {0: 2}}[queues]  # which row is in which slot at the end
    generator = np.random.default_rng(0)
    old, new = (
        LayerCache(*(generator.normal(size=(rows, *shape)).astype(np.float32) for shape in ((2, 3, P), (2, P, 3))))
        for rows, P in ((6, 5), (sum(map(len, slots)), 4))
    )
    got = jax.jit(LayerCache.with_rows)(old, new, jnp.array(slots))
    k, v = old.k.copy(), old.v.copy()
    for row, slot in at.items():
        k[slot, :, :, :4], v[slot, :, :4] = new.k[row], new.v[row]
    np.testing.assert_array_equal(got.k, k)
    np.testing.assert_array_equal(got.v, v)


@pytest.mark.parametrize(
    "segments", [[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 0]], ids=["whole", "left-padded", "packed"]
)
def test_gradients_flow_to_visible_tokens_only(small, segments):
    # Each position has a token of its own, so a row of the embedding's gradient belongs to one position.
    T = len(segments)
    tokens, segments = np.arange(T)[None], np.array([segments])

    def summed(table):
        model = bind(small, {"embed_tokens": {"embedding": table}})
        return model(tokens, segments)[0].sum(-1)

    gradient = jax.jit(jax.jacrev(summed))(small.embed_tokens.embedding[...])  # [T, V, D]
    reached = (np.asarray(gradient)[:, :T] != 0).any(-1)
    real = segments[0] > 0
    np.testing.assert_array_equal(reached[real], np.asarray(causal_mask(segments))[0][real])


def test_packed_rows_equal_the_rows_alone(small, forward):
    lengths = [4, 1, 6]
    rows = [np.random.default_rng(n).integers(0, 31, (1, n)) for n in lengths]
    tokens = np.pad(np.concatenate(rows, 1), ((0, 0), (0, 3)), constant_values=7)
    segments = np.array([[1] * 4 + [2] + [3] * 6 + [0] * 3])
    packed = forward(small, tokens, segments)[0]
    for row, end in zip(rows, np.cumsum(lengths)):
        n = row.shape[1]
        alone = forward(small, np.pad(row, ((0, 0), (0, 14 - n))), (np.arange(14) < n)[None].astype(int))
        np.testing.assert_allclose(packed[end - n : end], alone[0, :n], atol=1e-5)


def test_a_row_alone_equals_the_row_in_a_batch(small, batch, forward):
    tokens, mask = batch
    together = forward(small, tokens, mask)
    for i in range(3):
        alone = forward(small, tokens[i : i + 1], mask[i : i + 1])
        np.testing.assert_allclose(alone[0][mask[i]], together[i][mask[i]], atol=1e-5)


def test_more_padding_and_other_tokens_in_it_change_nothing(small, batch, forward):
    tokens, mask = batch
    plain, sides = forward(small, tokens, mask), ((0, 0), (5, 2))
    wide = forward(small, np.pad(tokens, sides, constant_values=29), np.pad(mask, sides))
    np.testing.assert_allclose(wide[:, 5:-2][mask], plain[mask], atol=1e-5)
    other = forward(small, np.where(mask, tokens, (tokens + 1) % 31), mask)
    np.testing.assert_array_equal(other[mask], plain[mask])


def test_no_mask_means_all_real(small, batch, forward):
    tokens, _ = batch
    given = forward(small, tokens, np.ones(tokens.shape, bool))
    np.testing.assert_allclose(forward(small, tokens, None), given, atol=1e-5)


def test_bfloat16_weights_give_float32_logits_near_the_float32_ones(small, batch, forward):
    tokens, mask = batch
    half = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(jnp.bfloat16)), small)
    logits = forward(half, tokens, mask)
    assert logits.dtype == np.float32
    assert not (logits == logits.astype(jnp.bfloat16)).all()  # accumulated and left in float32
    exact = forward(small, tokens, mask)
    assert np.abs(logits - exact)[mask].mean() < 0.03 * exact[mask].std()


def test_a_new_decoder_starts_as_transformers_starts(small):
    config = dataclasses.replace(small.config, layers=1)
    model = jax.device_get(Decoder(config, jax.random.key(1)))
    for name, leaf in named_parameters(model).items():
        if "norm" in name:
            assert (leaf == 1).all()
        elif name.endswith("bias"):
            assert (leaf == 0).all()
        else:
            assert abs(leaf.std() / small.config.initializer_range - 1) < 0.2, name
    kernels = [leaf.ravel()[:4] for name, leaf in named_parameters(model).items() if name.endswith("kernel")]
    assert len({tuple(k.tolist()) for k in kernels}) == len(kernels)  # no two start alike


def test_an_abstract_decoder_has_the_shapes_and_takes_values(small, batch, forward):
    abstract = abstract_decoder(small.config)
    wanted = {name: (leaf.shape, leaf.dtype) for name, leaf in named_parameters(abstract).items()}
    assert wanted == {name: (leaf.shape, leaf.dtype) for name, leaf in named_parameters(small).items()}
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    filled = with_parameters(abstract, named_parameters(small))
    np.testing.assert_array_equal(forward(filled, *batch), forward(small, *batch))
    with pytest.raises(KeyError):
        with_parameters(abstract, {})


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype, error", [(jnp.bfloat16, 0.05), (jnp.float16, 0.01)])
def test_half_precision_in_memory_computes_nearly_the_same(small, batch, forward, dtype, error, softcap):
    tokens, mask = batch
    whole = jax.tree.map(lambda leaf: leaf, small)
    whole.config = dataclasses.replace(small.config, attention_softcap=softcap)
    for block in whole.layers:
        block.attention.config = whole.config
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), whole)
    exact, rounded = forward(whole, tokens, mask)[mask], forward(half, tokens, mask)[mask]
    assert rounded.dtype == np.float32
    distance = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < distance < error, distance
