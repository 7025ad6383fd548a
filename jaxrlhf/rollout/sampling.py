"""Samples a token from logits: truncates by top-k, top-p and min-p, and draws with three uniform numbers per row.

Sizes: B rows, and V the vocabulary size.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.config import Sampling
from jaxrlhf.rollout.draw_kernel import draw_from_cube


def truncates(sampling: Sampling) -> bool:
    """Returns True if top-k, top-p or min-p may remove tokens from the model's distribution."""
    return bool(sampling.top_k) or sampling.top_p is not None or sampling.min_p is not None


def truncate(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns logits f32[B,V] that are -inf for removed tokens. Sources: top-p 1904.09751, min-p 2407.01082.

    Top-k, top-p and min-p remove tokens in this order. Each of the three looks only at the tokens that are left. The
    likeliest token is always kept. Tokens that are exactly as likely as the last kept token are kept too. Top-p keeps
    the smallest set of likeliest tokens with a total probability of at least `top_p`, as in Hugging Face and vLLM. If
    `top_p_rule` is "within", top-p keeps the largest set of likeliest tokens with a total probability of at most
    `top_p`, as in openai/lm-human-preferences.
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
        # In a long vocabulary the rounded sums may exceed 1 before the last token. top_p = 1 must keep every token.
        kept = (probabilities >= least) | (jnp.asarray(sampling.top_p) >= 1)
        logits = jnp.where(kept, logits, -jnp.inf)
    if sampling.min_p is not None:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits


def draw(logits: jax.Array, uniforms: jax.Array, use_kernel: bool = False) -> jax.Array:
    """Draws one token per row from softmax(logits f32[B,V]), and returns the tokens i32[B].

    The draw inverts the cumulative distribution. `uniforms` are numbers f32[B,3] in [0, 1) from `row_uniforms`. The
    vocabulary is arranged as a cube. The first number picks a slab of the cube, the second number a line in the slab,
    and the third number a token in the line. `_pick` adds the least likely items first. So even a very unlikely token
    is drawn with its own probability, up to a relative error of about 1e-5. One sum over the whole vocabulary would
    have rounding errors of 2^-24. In a vocabulary of 152,000 tokens, most tokens have a probability below 2^-24.
    `use_kernel` makes the three picks in one kernel, on a GPU.
    """
    B, V = logits.shape
    side = max(1, round(V ** (1 / 3)))
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    cube = jnp.pad(weights, ((0, 0), (0, -V % side**2))).reshape(B, -1, side, side)
    rows, lines = jnp.arange(B), jnp.sum(cube, axis=1)  # sums over the last axis would be slower
    if use_kernel:
        return draw_from_cube(weights, lines, uniforms)
    k = _pick(jnp.sum(lines, axis=1), uniforms[:, 0])
    j = _pick(lines[rows, :, k], uniforms[:, 1])
    i = _pick(cube[rows, :, j, k], uniforms[:, 2])
    return (i * side + j) * side + k


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draws an index in each row, i32[B]. The probability of an index is proportional to its weight in f32[B,n].

    An index of weight 0 is never drawn. The cumulative sum goes from the smallest weight to the largest weight.
    Otherwise small weights would be lost in the rounding of a larger sum. Equal weights are ordered by index. All pairs
    of weights are compared, because n is small and sorting would take longer.
    """
    index = jnp.arange(weights.shape[-1])
    this, other = weights[:, :, None], weights[:, None, :]
    before = (other < this) | ((other == this) & (index <= index[:, None]))
    cumulative = jnp.sum(jnp.where(before, other, 0.0), axis=-1)
    threshold = uniform * jnp.max(cumulative, axis=-1)
    above = jnp.where((weights > 0) & (cumulative > threshold[:, None]), cumulative, jnp.inf)
    # If the threshold is rounded up to the total sum, the largest weight is picked.
    largest = jnp.argmax(cumulative, axis=-1)
    return jnp.where(jnp.isinf(jnp.min(above, axis=-1)), largest, jnp.argmin(above, axis=-1)).astype(jnp.int32)


def row_uniforms(key: jax.Array, rows: int, steps: int) -> jax.Array:
    """Returns uniform numbers f32[rows, steps, 3] in [0, 1).

    A number depends on the key, on the global index of its row, and on the step. The number does not depend on how many
    rows, steps or devices there are. Each number comes from 64 random bits, so that small numbers have the full
    precision of float32. Numbers from 32 bits would be multiples of 2^-32.
    """

    def one(row: jax.Array, step: jax.Array) -> jax.Array:
        bits = jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, row), step), (2, 3), jnp.uint32)
        high, low = bits.astype(jnp.float32)
        return jnp.minimum(high * 2.0**-32 + low * 2.0**-64, 1 - 2.0**-24)  # `high` may be rounded up to 2^32

    return jax.vmap(lambda row: jax.vmap(lambda step: one(row, step))(jnp.arange(steps)))(jnp.arange(rows))
