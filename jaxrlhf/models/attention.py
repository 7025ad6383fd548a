"""Attention, rotary positions and attention masks.

Sizes: B rows, T query positions, S key positions, N query heads, K key-value heads, G = N / K query heads per
key-value head, and H the head dimension.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models.block_attention import BLOCK, BLOCK_ON_CPU, Visibility, attend_blocks, visibility
from jaxrlhf.models.context import positions_whole
from jaxrlhf.models.fused_attention import attend_fused, attend_fused_causal
from jaxrlhf.models.target import ON_CPU, Target

# Largest number of query blocks, and smallest number of queries in a block. More or smaller blocks are slower.
_BLOCKS, _LEAST_QUERIES = 4, 32

# Longest sequence whose mask and scores are whole arrays. At 4,096 tokens and 16 heads, the scores of a row take 1 GiB.
LONGEST_WHOLE = 4096


def positions_of(segments_BT: jax.Array) -> jax.Array:
    """Returns the position of each real token in its segment, i32[B,T]. The first token has position 0.

    `segments_BT` is a mask (bool), or holds segment ids (i32; 0 is padding). For a left-padded mask the positions are
    max(cumsum(mask) - 1, 0).
    """
    segments_BT = segments_BT.astype(jnp.int32)
    real_BT = segments_BT > 0
    count_BT = jnp.cumsum(real_BT, axis=1) - 1
    before_BT = jnp.pad(segments_BT, ((0, 0), (1, 0)))[:, :-1]
    first_BT = jnp.where(real_BT & (segments_BT != before_BT), count_BT, 0)
    return jnp.maximum(count_BT - jax.lax.cummax(first_BT, axis=1), 0).astype(jnp.int32)


def causal_mask(segments_BT: jax.Array) -> jax.Array:
    """Returns the causal mask, bool[B, T queries, T keys].

    A query sees the real tokens of its segment up to and including its own position.
    """
    T = segments_BT.shape[1]
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    real_B1T = (segments_BT > 0)[:, None, :]
    return jnp.tril(jnp.ones((T, T), bool))[None] & same_BTT & real_B1T


def needs_mask(target: Target, softcap: float | None) -> bool:
    """Returns True if causal attention over whole sequences needs a mask even if rows have no padding on the left."""
    return target.attention != "cudnn" or softcap is not None


def mask_of(segments_BT: jax.Array, target: Target) -> jax.Array | Visibility:
    """Returns the causal mask, as an array bool[B,T,T] or as a `Visibility`, which needs no such array.

    The mask is a `Visibility` above `LONGEST_WHOLE` tokens, except for cuDNN, which can read only an array.
    """
    segments_BT = positions_whole(segments_BT)
    if segments_BT.shape[1] <= LONGEST_WHOLE or target.attention == "cudnn":
        return positions_whole(causal_mask(segments_BT))
    return visibility(segments_BT)


def queries_from(x_BT: jax.Array, first: int | jax.Array) -> jax.Array:
    """Returns the positions of x [B,T,...] from `first` on. If `first` is i32[B], only one of each row, [B,1,...]."""
    if isinstance(first, int):
        return x_BT[:, first:]
    return jnp.take_along_axis(x_BT, first.reshape(-1, *(1,) * (x_BT.ndim - 1)), axis=1)


def of_queries(mask: jax.Array | Visibility, first: int | jax.Array) -> jax.Array | Visibility:
    """Returns the mask of the queries that `queries_from` returns.

    If `first` is an integer, the last query must be in the last column. If not, the first one of a `Visibility` must be
    in column 0 or in its `start`, and the result is an array [B,1,S].
    """
    if not isinstance(mask, Visibility):
        return queries_from(mask, first)
    if isinstance(first, int):
        return mask
    slot = first + (0 if mask.start is None else mask.start)
    age = slot[:, None] - jnp.arange(mask.segments_BS.shape[1])
    seen = (age >= 0) & (mask.segments_BS == queries_from(mask.segments_BS, slot)) & (mask.segments_BS > 0)
    return (seen if mask.window is None else seen & (age < mask.window))[:, None]


def within_window(mask: jax.Array | Visibility, window: int) -> jax.Array | Visibility:
    """Removes from the mask [B,T,T] all keys that are `window` or more positions before the query.

    The real tokens of a row or segment are contiguous, so a distance in columns is also a distance in positions.
    """
    if isinstance(mask, Visibility):
        return mask.replace(window=window)
    T = mask.shape[1]
    return positions_whole(mask & (jnp.arange(T)[:, None] - jnp.arange(T) < window))


class RotaryTables(NamedTuple):
    """Cosine and sine of the rotary angles of each position, in float32. Layers with the same rope share the tables.

    F is the number of rotated pairs of dimensions.
    """

    cos_BT1F: jax.Array
    sin_BT1F: jax.Array


def rotary_tables(positions_BT: jax.Array, slots: int, frequencies: np.ndarray, factor: float = 1.0) -> RotaryTables:
    """Returns the rotary tables of positions i32[B,T]. All positions must be below `slots`.

    `frequencies` is f32[F], in radians per position. `factor` multiplies cosine and sine.
    """
    angle_SF = jnp.arange(slots, dtype=jnp.float32)[:, None] * frequencies
    # The tables are looked up by position. Without the lookup, XLA would compute the cosine again for every head and
    # layer.
    return RotaryTables(*((factor * f(angle_SF))[positions_BT][:, :, None] for f in (jnp.cos, jnp.sin)))


@jax.custom_vjp
def rotate(x_BTNH: jax.Array, rotary: RotaryTables) -> jax.Array:
    """Rotates the first 2F <= H dimensions of each head (2104.09864).

    Dimensions i and i + F are a pair, as in Hugging Face's Llama. The custom gradient rotates in the opposite
    direction. This is cheaper than the gradients of split and concatenation. The tables get no gradient.
    """
    cos, sin = rotary
    F = cos.shape[-1]
    first, second = jnp.split(x_BTNH[..., : 2 * F].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x_BTNH.dtype), x_BTNH[..., 2 * F :]], axis=-1)


def _rotate_back(rotary: RotaryTables, d_BTNH: jax.Array) -> tuple[jax.Array, RotaryTables]:
    return rotate(d_BTNH, RotaryTables(rotary.cos_BT1F, -rotary.sin_BT1F)), jax.tree.map(jnp.zeros_like, rotary)


rotate.defvjp(lambda x, rotary: (rotate(x, rotary), rotary), _rotate_back)


def attend(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    mask_BTS: jax.Array | Visibility,
    scale: float | None = None,
    softcap: float | None = None,
    target: Target = ON_CPU,
) -> jax.Array:
    """Computes grouped-query attention, [B,T,N,H]. The softmax is in float32.

    If a query sees no key, its outputs are arbitrary finite numbers. Keys and values have the layout of the cache.
    `scale` multiplies the products of queries and keys; None means H^-1/2. A `softcap` c replaces a score s by
    c tanh(s / c) (2408.00118). With a `Visibility` in place of a mask, the attention is computed in blocks.
    """
    if isinstance(mask_BTS, Visibility):
        block = min(BLOCK_ON_CPU if target.platform == "cpu" else BLOCK, q_BTNH.shape[1])
        return attend_blocks(q_BTNH, k_BKHS, v_BKSH, mask_BTS, scale, softcap, block)
    if q_BTNH.shape[1] > 1 and softcap is None and target.platform != "cpu":
        k_BSKH, v_BSKH = k_BKHS.transpose(0, 3, 1, 2), v_BKSH.transpose(0, 2, 1, 3)
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], scale=scale)
    B, T, N, H = q_BTNH.shape
    K = k_BKHS.shape[1]
    G = N // K
    # The G query heads that share a key head form one matrix of G * T rows. One large product is faster than G small
    # products.
    q_BKXH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    mask_B1XS = jnp.tile(mask_BTS, (1, G, 1))[:, None]
    scores = jnp.einsum("BKXH,BKHS->BKXS", q_BKXH, k_BKHS, preferred_element_type=jnp.float32)
    scores *= H**-0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(mask_B1XS, scores, jnp.finfo(jnp.float32).min), axis=-1)
    out_BKXH = jnp.einsum("BKXS,BKSH->BKXH", weights.astype(v_BKSH.dtype), v_BKSH)
    return out_BKXH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_causal(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    mask_BTS: jax.Array | Visibility | None,
    scale: float | None = None,
    softcap: float | None = None,
    target: Target = ON_CPU,
    window: int | None = None,
) -> jax.Array:
    """Computes causal attention, [B,T,N,H]. The queries are in the last T of S slots.

    The target chooses XLA or cuDNN. If there is a soft cap, XLA computes the attention, because cuDNN has no soft cap.
    On a CPU the queries are computed in blocks. Each block reads only the keys up to its end. This skips most of the
    masked scores above the diagonal. The mask may be None only for cuDNN and T = S. A query then sees its own and all
    earlier slots, or only those within `window`.
    """
    if mask_BTS is None:
        return attend_fused_causal(q_BTNH, k_BKHS.transpose(0, 3, 1, 2), v_BKSH.transpose(0, 2, 1, 3), scale, window)
    if isinstance(mask_BTS, Visibility):
        return attend(q_BTNH, k_BKHS, v_BKSH, mask_BTS, scale, softcap, target)
    T, S = mask_BTS.shape[1:]
    if target.attention == "cudnn" and T > 1 and softcap is None:
        return attend_fused(q_BTNH, k_BKHS.transpose(0, 3, 1, 2), v_BKSH.transpose(0, 2, 1, 3), mask_BTS, scale)
    if target.platform != "cpu":
        return attend(q_BTNH, k_BKHS, v_BKSH, mask_BTS, scale, softcap, target)
    size = max(_LEAST_QUERIES, -(-T // _BLOCKS))
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        keys = S - T + end
        block = q_BTNH[:, start:end], k_BKHS[..., :keys], v_BKSH[:, :, :keys], mask_BTS[:, start:end, :keys]
        blocks.append(attend(*block, scale, softcap, target))
    return jnp.concatenate(blocks, axis=1)
