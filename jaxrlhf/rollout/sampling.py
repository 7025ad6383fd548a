"""From logits to a token: truncation, and a draw by three uniform numbers per row.

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
    so do ties with the last one kept. Top-p keeps the fewest likeliest tokens that together have at least the
    probability `top_p`, as Hugging Face and vLLM do; with `top_p_rule` "within" the most that have at most that, as
    openai/lm-human-preferences does.
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
        # Rounded sums may pass 1 before a long vocabulary ends: at 1 nothing is left out.
        kept = (probabilities >= least) | (jnp.asarray(sampling.top_p) >= 1)
        logits = jnp.where(kept, logits, -jnp.inf)
    if sampling.min_p is not None:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits


def draw(logits: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Tokens i32[B] distributed as softmax(logits f32[B,V]), by inverting the cumulative distribution.

    `uniforms` are f32[B,3] in [0, 1), of `row_uniforms`. The vocabulary lies in a cube: the first number finds a slab
    by the slabs' sums, the second a line in the slab, the third a token in the line. Each is inverted from the least
    likely on (`_hit`), so that the probability of every token, however small, is right to a relative 1e-5 or so. One
    sum over the vocabulary would end at the steps of float32, 2^-24, at which most of 152,000 tokens have no place.
    """
    B, V = logits.shape
    side = max(1, round(V ** (1 / 3)))
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    cube = jnp.pad(weights, ((0, 0), (0, -V % side**2))).reshape(B, -1, side, side)
    rows, lines = jnp.arange(B), jnp.sum(cube, axis=1)  # sums over the last axis would take longer
    k = _hit(jnp.sum(lines, axis=1), uniforms[:, 0])
    j = _hit(lines[rows, :, k], uniforms[:, 1])
    i = _hit(cube[rows, :, j, k], uniforms[:, 2])
    return (i * side + j) * side + k


def _hit(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Places i32[B], distributed as weights f32[B,n] over their sum; a weight of 0 is never hit.

    The cumulative sum goes from the least weight to the greatest: there both it and a small uniform number f32[B] are
    fine-grained, and no weight is lost beside a greater one. Equal weights go by place. As n is small, each sum is
    taken by comparison with all others, which is cheaper than sorting.
    """
    places = jnp.arange(weights.shape[-1])
    this, other = weights[:, :, None], weights[:, None, :]
    before = (other < this) | ((other == this) & (places <= places[:, None]))
    cumulative = jnp.sum(jnp.where(before, other, 0.0), axis=-1)
    threshold = uniform * jnp.max(cumulative, axis=-1)
    passed = jnp.where((weights > 0) & (cumulative > threshold[:, None]), cumulative, jnp.inf)
    # Rounding may take the threshold up to the whole sum: that is the greatest weight's.
    greatest = jnp.argmax(cumulative, axis=-1)
    return jnp.where(jnp.isinf(jnp.min(passed, axis=-1)), greatest, jnp.argmin(passed, axis=-1)).astype(jnp.int32)


def row_uniforms(key: jax.Array, rows: int, steps: int) -> jax.Array:
    """Uniform numbers f32[rows, steps, 3] in [0, 1), each three from a key folded with its row's global index and step.

    So a row's numbers depend neither on how many rows, steps or devices there are. A number is made of 64 bits and
    has all digits of float32 also where it is small: 1e-9 is hit as often as it should be, not 4 times in 2^32.
    """

    def one(row: jax.Array, step: jax.Array) -> jax.Array:
        bits = jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, row), step), (2, 3), jnp.uint32)
        high, low = bits.astype(jnp.float32)
        return jnp.minimum(high * 2.0**-32 + low * 2.0**-64, 1 - 2.0**-24)  # high may round up to 2^32

    return jax.vmap(lambda row: jax.vmap(lambda step: one(row, step))(jnp.arange(steps)))(jnp.arange(rows))
