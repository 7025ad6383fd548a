"""The pass over prompts before decoding."""

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention import causal_mask, positions_of
from jaxrlhf.models.cache import Cache
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.records import Prompts


def prefill(model: Decoder, prompts: Prompts, columns: int, left_aligned: bool) -> tuple[Cache, jax.Array]:
    """Returns (keys and values of prompts [B,K,H,P] by layer, hidden state after the last prompt token [B,1,D]).

    Prompts are padded on the left. The first token of each is in column 0 if `left_aligned`; otherwise the last token
    is in column P - 1. `columns` is the number of tokens of prompt and completion together.
    """
    P = prompts.tokens.shape[1]
    tokens, segments, lengths = prompts.tokens, prompts.mask.astype(jnp.int32), jnp.sum(prompts.mask, axis=1)
    if left_aligned:  # moving tokens is cheaper than moving their keys and values
        source = (jnp.arange(P) + P - lengths[:, None]) % P
        tokens, segments = (jnp.take_along_axis(x, source, axis=1) for x in (tokens, segments))
    first = 0 if left_aligned else P - 1
    hidden, cache = model.hidden(tokens, positions_of(segments), causal_mask(segments), first=first, slots=columns)
    if left_aligned:
        hidden = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    return cache, hidden
