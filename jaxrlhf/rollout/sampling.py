"""From logits to a token: truncation, greedy choice, and one uniform number per row.

B rows, V vocabulary.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.config import Sampling


def truncates(sampling: Sampling) -> bool:
    """Whether top-k, top-p or min-p make the sampled distribution another than the model's."""
    return bool(sampling.top_k) or sampling.top_p is not None or sampling.min_p is not None


def truncate(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits f32[B,V] with -inf on tokens that top-k, top-p (1904.09751) or min-p (2407.01082) leave out.

    The three apply in that order, each to what the one before has kept. The likeliest token always stays, and
    so do ties with the last one kept. Top-p counts as openai/lm-human-preferences does: the likeliest tokens
    that together have at most the probability `top_p`; others add the token that passes it.
    """
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(logits)
        ordered = jnp.sort(probabilities, axis=-1, descending=True)
        within = (jnp.cumsum(ordered, axis=-1) <= sampling.top_p).at[:, 0].set(True)
        least = jnp.min(jnp.where(within, ordered, jnp.inf), axis=-1, keepdims=True)
        # Rounded sums may pass 1 before a long vocabulary ends: at 1 nothing is left out.
        kept = (probabilities >= least) | (jnp.asarray(sampling.top_p) >= 1)
        logits = jnp.where(kept, logits, -jnp.inf)
    if sampling.min_p is not None:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits


def draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """Tokens i32[B] distributed as softmax(logits f32[B,V]), by inverting the cumulative distribution.

    `uniform` is f32[B] in [0, 1). One number a row instead of one per token of the vocabulary. The sums go in two
    levels, over blocks of tokens and then inside the block that is hit: a cumulative sum over the whole vocabulary
    takes several times as long.
    """
    B, V = logits.shape
    size = max(1, round(V**0.5))
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    blocks = jnp.pad(weights, ((0, 0), (0, -V % size))).reshape(B, -1, size)
    totals = jnp.sum(blocks, axis=-1)
    block, rest = _hit(totals, uniform * jnp.sum(totals, axis=-1))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token, _ = _hit(inside, rest)
    return block * size + token


def _hit(weights: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(place i32[B] where the cumulative sum of weights f32[B,n] passes a threshold f32[B], what is left of it there).

    Rounding may take a threshold past the end, or to a weight of 0: the place is then the last before with a weight.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    possible, places = weights > 0, jnp.arange(weights.shape[-1])
    passed = jnp.sum(cumulative <= threshold[:, None], axis=-1)
    last = jnp.max(jnp.where(possible & (places <= passed[:, None]), places, 0), axis=-1)
    first = jnp.argmax(possible, axis=-1)  # where nothing before has a weight
    place = jnp.maximum(last, first).astype(jnp.int32)
    before = jnp.take_along_axis(cumulative - weights, place[:, None], axis=-1)[:, 0]
    return place, jnp.maximum(threshold - before, 0.0)


def row_uniforms(key: jax.Array, rows: int, steps: int) -> jax.Array:
    """Uniform numbers f32[rows, steps], each from a key folded with its row's global index and its step.

    So a row's numbers depend neither on how many rows, steps or devices there are.
    """

    def one(row: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), step))

    return jax.vmap(lambda row: jax.vmap(lambda step: one(row, step))(jnp.arange(steps)))(jnp.arange(rows))
