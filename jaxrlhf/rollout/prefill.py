"""The pass over prompts before decoding.

Sizes: B prompts, P prompt tokens, C tokens of a chunk, K key-value heads, H the head dimension, and D the hidden size.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.distributed.mesh import BATCH_AXES, constrain
from jaxrlhf.models.attention import mask_of, positions_of
from jaxrlhf.models.block_attention import visibility
from jaxrlhf.models.cache import Cache, LayerCache
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.records import Prompts


def prefill(
    model: Decoder, prompts: Prompts, columns: int, left_aligned: bool, chunk: int | None = None
) -> tuple[Cache, jax.Array]:
    """Returns (keys and values of prompts [B,K,H,P] by layer, hidden state after the last prompt token [B,1,D]).

    Prompts are padded on the left. The first token of each is in column 0 if `left_aligned`; otherwise the last token
    is in column P - 1. `columns` is the number of tokens of prompt and completion together. Prompts longer than `chunk`
    tokens are read in chunks of this size.
    """
    P = prompts.tokens.shape[1]
    tokens, segments, lengths = prompts.tokens, prompts.mask.astype(jnp.int32), jnp.sum(prompts.mask, axis=1)
    if left_aligned:  # moving tokens is cheaper than moving their keys and values
        source = (jnp.arange(P) + P - lengths[:, None]) % P
        tokens, segments = (jnp.take_along_axis(x, source, axis=1) for x in (tokens, segments))
    last = jnp.maximum(lengths - 1, 0) if left_aligned else jnp.full_like(lengths, P - 1)
    if chunk is not None and chunk < P:
        return _in_chunks(model, tokens, segments, last, columns, chunk)
    mask, first = mask_of(segments, model.config.target), last if left_aligned else P - 1
    hidden, cache = model.hidden(tokens, positions_of(segments), mask, first=first, slots=columns)
    return cache, hidden


def _in_chunks(
    model: Decoder, tokens: jax.Array, segments: jax.Array, last: jax.Array, columns: int, chunk: int
) -> tuple[Cache, jax.Array]:
    """Returns what `prefill` returns. `last` i32[B] is the column of each prompt's last token.

    A chunk sees the keys of the chunks before it in the cache. So only one chunk has activations at a time.
    """
    (B, P), config = tokens.shape, model.config
    K, H, length = config.kv_heads, config.head_dim, -(-P // chunk) * chunk
    tokens, segments = (jnp.pad(x, ((0, 0), (0, length - P))) for x in (tokens, segments))
    positions, visible = positions_of(segments), visibility(segments)
    dtype = jax.eval_shape(model.embed_tokens, tokens).dtype
    empty = LayerCache(jnp.zeros((B, K, H, length), dtype), jnp.zeros((B, K, length, H), dtype))
    empty = LayerCache(*(constrain(x, BATCH_AXES, "tensor") for x in empty))

    def step(carry: tuple[Cache, jax.Array], start: jax.Array):
        cache, state = carry
        inputs = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (tokens, positions))
        place = last - start
        only = jnp.clip(place, 0, chunk - 1)
        found, cache = model.extend(*inputs, visible.replace(start=start), cache, columns, only)
        return (cache, jnp.where((place == only)[:, None, None], found, state)), None

    state = jnp.zeros((B, 1, config.hidden_size), dtype)
    (cache, state), _ = jax.lax.scan(step, ([empty] * config.layers, state), jnp.arange(0, length, chunk))
    return [LayerCache(layer.k[..., :P], layer.v[:, :, :P]) for layer in cache], state
