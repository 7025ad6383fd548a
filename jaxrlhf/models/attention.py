"""Attention, rotary positions and the masks that say who sees whom.

B rows, T query positions, S key positions, N query heads, K key-value heads, G = N / K of the queries to each, H head
dimension.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models.fused_attention import attend_fused
from jaxrlhf.models.target import ON_CPU, Target

_BLOCKS, _LEAST_QUERIES = 4, 32  # more or smaller blocks of attention save less than they cost


def positions_of(segments_BT: jax.Array) -> jax.Array:
    """Positions that count real tokens only, from 0 in each segment; i32[B,T].

    `segments` is a mask (bool) or segment ids (i32; 0 is padding). For a left-padded mask this is
    `cumsum(mask) - 1`, clipped at 0.
    """
    segments_BT = segments_BT.astype(jnp.int32)
    real_BT = segments_BT > 0
    count_BT = jnp.cumsum(real_BT, axis=1) - 1
    before_BT = jnp.pad(segments_BT, ((0, 0), (1, 0)))[:, :-1]
    first_BT = jnp.where(real_BT & (segments_BT != before_BT), count_BT, 0)
    return jnp.maximum(count_BT - jax.lax.cummax(first_BT, axis=1), 0).astype(jnp.int32)


def causal_mask(segments_BT: jax.Array) -> jax.Array:
    """Who sees whom: real tokens of the same segment, up to oneself; bool[B,T,T] (query, key)."""
    T = segments_BT.shape[1]
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    real_B1T = (segments_BT > 0)[:, None, :]
    return jnp.tril(jnp.ones((T, T), bool))[None] & same_BTT & real_B1T


def within_window(mask_BTS: jax.Array, window: int, at: jax.Array | int = 0) -> jax.Array:
    """The mask without keys that are `window` or more slots before their query; query t stands in slot at + t.

    Real tokens of a row or segment stand side by side, so that slots count as positions do.
    """
    T, S = mask_BTS.shape[1:]
    return mask_BTS & (at + jnp.arange(T)[:, None] - jnp.arange(S) < window)


class RotaryTables(NamedTuple):
    """Cosine and sine of each position's angles, for all layers and heads that turn alike; float32."""

    cos_BT1F: jax.Array
    sin_BT1F: jax.Array


def rotary_tables(positions_BT: jax.Array, slots: int, frequencies: np.ndarray, factor: float = 1.0) -> RotaryTables:
    """Of positions below `slots`; `frequencies` is f32[F], radians per position, and `factor` multiplies both."""
    angle_SF = jnp.arange(slots, dtype=jnp.float32)[:, None] * frequencies
    # Looked up in a table: XLA would compute a cosine anew for every head that it rotates, in every layer.
    return RotaryTables(*((factor * f(angle_SF))[positions_BT][:, :, None] for f in (jnp.cos, jnp.sin)))


@jax.custom_vjp
def rotate(x_BTNH: jax.Array, rotary: RotaryTables) -> jax.Array:
    """Rotary positions (2104.09864), halves paired as in Hugging Face's Llama: the first 2F <= H dimensions turn.

    The gradient turns back; that of what was split and joined would be padded and summed. None reaches the tables.
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
    mask_BTS: jax.Array,
    scale: float | None = None,
    softcap: float | None = None,
    target: Target = ON_CPU,
) -> jax.Array:
    """Grouped-query attention with softmax in float32; [B,T,N,H]. A query that sees no key gets finite junk.

    Keys and values lie as the products read them, each head in one piece, as a cache keeps them for decoding.
    `scale` multiplies q k (None: H^-1/2); `softcap` c bends the product to c tanh(product / c) (2408.00118).
    """
    if q_BTNH.shape[1] > 1 and softcap is None and target.platform != "cpu":
        k_BSKH, v_BSKH = k_BKHS.transpose(0, 3, 1, 2), v_BKSH.transpose(0, 2, 1, 3)
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], scale=scale)
    B, T, N, H = q_BTNH.shape
    K = k_BKHS.shape[1]
    G = N // K
    # The queries that share keys stand in one matrix of G T rows: products as large as they can be.
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
    mask_BTS: jax.Array,
    scale: float | None = None,
    softcap: float | None = None,
    target: Target = ON_CPU,
) -> jax.Array:
    """`attend` where the queries are the last T of S slots, and none sees a slot behind its own.

    The target says by whom: XLA, or cuDNN, which has no soft cap (`fused_attention`). XLA's on a CPU goes in blocks of
    queries, each with the keys up to its end: of the products above the diagonal, which the mask throws away, few are
    computed.
    """
    T, S = mask_BTS.shape[1:]
    if target.attention == "cudnn" and T > 1 and softcap is None:
        return attend_fused(q_BTNH, k_BKHS.transpose(0, 3, 1, 2), v_BKSH.transpose(0, 2, 1, 3), mask_BTS, scale)
    if target.platform != "cpu":
        return attend(q_BTNH, k_BKHS, v_BKSH, mask_BTS, scale, softcap, target)
    size = max(_LEAST_QUERIES, -(-T // _BLOCKS))
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        seen = S - T + end
        given = q_BTNH[:, start:end], k_BKHS[..., :seen], v_BKSH[:, :, :seen], mask_BTS[:, start:end, :seen]
        blocks.append(attend(*given, scale, softcap, target))
    return jnp.concatenate(blocks, axis=1)
