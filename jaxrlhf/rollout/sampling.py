"""Sampling a token from logits: top-k, top-p and min-p truncation, and a draw from three uniform numbers per row.

B rows, V vocabulary.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.config import Sampling


def truncates(sampling: Sampling) -> bool:
    """Whether top-k, top-p or min-p truncate the model's distribution."""
    return bool(sampling.top_k) or sampling.top_p is not None or sampling.min_p is not None


def truncate(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns logits f32[B,V] that are -inf for tokens removed by top-k, top-p (1904.09751) or min-p (2407.01082).

    Top-k, top-p and min-p apply in this order, each to the tokens that the previous one kept. The likeliest token is
    always kept, and so are ties with the last token that is kept. Top-p keeps the smallest set of likeliest tokens
    whose total probability is at least `top_p`, as Hugging Face and vLLM do. With `top_p_rule` "within" it keeps the
    largest set of likeliest tokens whose total probability is at most `top_p`, as openai/lm-human-preferences does.
    """
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(logits)
        ordered = jnp.sort(probabilities, axis=-1, descending=True)
        sums = jnp.cumsum(ordered, axis=-1)
        within = sums <= sampling.top_p if sampling.top_p_rule == "within" else sums - ordered < sampling.top_p
        within = within.at[:, 0].set(True)
        least = jnp.min(jnp.where(within, ordered, jnp.inf), axis=-1, keepdims=True)
        # Rounded sums may exceed 1 before the end of a long vocabulary, but top_p = 1 must keep every token.
        kept = (probabilities >= least) | (jnp.asarray(sampling.top_p) >= 1)
        logits = jnp.where(kept, logits, -jnp.inf)
    if sampling.min_p is not None:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits


def draw(logits: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Draws tokens i32[B] from softmax(logits f32[B,V]), by inverting the cumulative distribution.

    `uniforms` are f32[B,3] in [0, 1) from `row_uniforms`. The vocabulary is arranged as a cube: the first number picks
    a slab, the second a line in the slab, the third a token in the line. Each pick (`_pick`) sums from the least likely
    item up, so every token is drawn with its probability up to a relative error of about 1e-5, even very unlikely ones.
    A single sum over the vocabulary would round at 2^-24, which is more than the probability of most of 152,000 tokens.
    """
    B, V = logits.shape
    side = max(1, round(V ** (1 / 3)))
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    cube = jnp.pad(weights, ((0, 0), (0, -V % side**2))).reshape(B, -1, side, side)
    rows, lines = jnp.arange(B), jnp.sum(cube, axis=1)  # sums over the last axis would take longer
    k = _pick(jnp.sum(lines, axis=1), uniforms[:, 0])
    j = _pick(lines[rows, :, k], uniforms[:, 1])
    i = _pick(cube[rows, :, j, k], uniforms[:, 2])
    return (i * side + j) * side + k


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draws an index of each row, i32[B], with probability proportional to weights f32[B,n]; never one of weight 0.

    The cumulative sum goes from the smallest weight to the largest, so that small weights are not lost when a larger
    sum is rounded. Equal weights are ordered by index. The order comes from comparing all pairs of weights, because n
    is small and sorting would take longer.
    """
    index = jnp.arange(weights.shape[-1])
    this, other = weights[:, :, None], weights[:, None, :]
    before = (other < this) | ((other == this) & (index <= index[:, None]))
    cumulative = jnp.sum(jnp.where(before, other, 0.0), axis=-1)
    threshold = uniform * jnp.max(cumulative, axis=-1)
    above = jnp.where((weights > 0) & (cumulative > threshold[:, None]), cumulative, jnp.inf)
    # The threshold may round up to the total sum; then the largest weight is picked.
    largest = jnp.argmax(cumulative, axis=-1)
    return jnp.where(jnp.isinf(jnp.min(above, axis=-1)), largest, jnp.argmin(above, axis=-1)).astype(jnp.int32)


def row_uniforms(key: jax.Array, rows: int, steps: int) -> jax.Array:
    """Returns uniform numbers f32[rows, steps, 3] in [0, 1), from the key, each row's global index, and the step.

    The numbers of a row do not depend on how many rows, steps or devices there are. Each number is made of 64 random
    bits, so that small numbers have the full precision of float32; numbers from 32 bits would be multiples of 2^-32.
    """

    def one(row: jax.Array, step: jax.Array) -> jax.Array:
        bits = jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, row), step), (2, 3), jnp.uint32)
        high, low = bits.astype(jnp.float32)
        return jnp.minimum(high * 2.0**-32 + low * 2.0**-64, 1 - 2.0**-24)  # high may round up to 2^32

    return jax.vmap(lambda row: jax.vmap(lambda step: one(row, step))(jnp.arange(steps)))(jnp.arange(rows))
