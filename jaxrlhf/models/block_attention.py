"""Attention of long sequences in blocks, without arrays of the size [T,S] (online softmax: 1805.02867, 2205.14135).

A loop goes over pairs of a block of queries and a block of keys. Each pair adds to a running maximum, a running sum and
a running output. So memory grows linearly with the length. The mask of a pair is computed from segments and slots when
it is needed. Pairs that no query sees are left out: pairs above the diagonal, pairs outside the window, and pairs of
different segments. The backward pass computes the scores again.

Sizes: B rows, T queries, S keys, N query heads, K key-value heads, G = N / K, H the head dimension, C the queries or
keys of a block, and X = G C.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrlhf.distributed.mesh import BATCH_AXES, HEAD_AXES, constrain
from jaxrlhf.models.linear import ambient_precision

BLOCK, BLOCK_ON_CPU = 1024, 512  # on a GPU, each pair of blocks must be large enough to hide the launch of its kernels


@struct.dataclass
class Visibility:
    """What a causal mask [B,T,S] says, in memory that is linear in S. The queries are in T consecutive slots."""

    segments_BS: jax.Array  # i32; 0 is padding
    oldest_S: jax.Array  # i32; first slot that a query in slot s sees, the smallest over rows; S if the slot is padding
    start: jax.Array | None = None  # i32[]; slot of the first query; None means that the queries are in the last slots
    window: int | None = struct.field(pytree_node=False, default=None)


def visibility(segments_BS: jax.Array, start: jax.Array | None = None) -> Visibility:
    """Returns what a query sees: the real tokens of its segment up to and including its own slot."""
    S = segments_BS.shape[1]
    segments_BS, slots = segments_BS.astype(jnp.int32), jnp.arange(S)
    before_BS = jnp.pad(segments_BS, ((0, 0), (1, 0)))[:, :-1]
    first_BS = jax.lax.cummax(jnp.where(segments_BS != before_BS, slots, 0), axis=1)
    return Visibility(segments_BS, jnp.min(jnp.where(segments_BS > 0, first_BS, S), axis=0), start)


class _Options(NamedTuple):
    """The static options of `_attend`."""

    window: int | None
    scale: float
    softcap: float | None
    block: int
    precision: str | None  # the backward pass is traced later, when the default may be another one


def attend_blocks(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    visible: Visibility,
    scale: float | None = None,
    softcap: float | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Computes causal grouped-query attention, [B,T,N,H]. The arguments are those of `attention.attend`.

    If a query sees no key, its outputs are 0. The results equal those of `attend` except for rounding.
    """
    H = q_BTNH.shape[-1]
    options = _Options(visible.window, H**-0.5 if scale is None else scale, softcap, block, ambient_precision())
    return _attend(options, q_BTNH, k_BKHS, v_BKSH, visible)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, q_BTNH, k_BKHS, v_BKSH, visible: Visibility) -> jax.Array:
    return _forward(options, q_BTNH, k_BKHS, v_BKSH, visible)[0]


def _forward(options: _Options, q_BTNH, k_BKHS, v_BKSH, visible: Visibility):
    """Returns (output [B,T,N,H], what the backward pass needs)."""
    work = _Blocks(options, q_BTNH, k_BKHS, v_BKSH, visible)
    B, K, X, H, n = *work.q.shape[1:], work.q.shape[0]
    empty = (jnp.full((B, K, X), jnp.finfo(jnp.float32).min), jnp.zeros((B, K, X)), jnp.zeros((B, K, X, H)))

    def step(carry, pair):
        (largest, total, out), outs, logs = carry
        i, j, is_first, is_seen = pair

        def add():
            scores, mask = work.scores(i, j)[:2]
            now = jnp.maximum(largest, jnp.max(jnp.where(mask, scores, largest[..., None]), axis=-1))
            weights = jnp.where(mask, jnp.exp(scores - now[..., None]), 0.0)
            kept = jnp.exp(largest - now)
            new = _product("BKXS,BKSH->BKXH", weights.astype(v_BKSH.dtype), work.values(j))
            return now, kept * total + jnp.sum(weights, axis=-1), kept[..., None] * out + new

        largest, total, out = jax.tree.map(lambda x, y: jnp.where(is_first, x, y), empty, (largest, total, out))
        running = jax.lax.cond(is_seen, add, lambda: (largest, total, out))
        largest, total, out = running = jax.tree.map(_by_heads, running)
        seen = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        outs = _put(outs, (out / seen[..., None]).astype(outs.dtype), i)
        return (running, _by_heads(outs, 1), _by_heads(_put(logs, largest + jnp.log(seen), i), 1)), None

    outs, logs = jnp.zeros((n, B, K, X, H), q_BTNH.dtype), jnp.zeros((n, B, K, X))
    with jax.default_matmul_precision(options.precision):
        (_, outs, logs), _ = jax.lax.scan(step, (empty, outs, logs), work.pairs())
    out_BTNH = work.joined(outs)
    return out_BTNH, (q_BTNH, k_BKHS, v_BKSH, visible, out_BTNH, logs)


def _backward(options: _Options, saved, d_BTNH: jax.Array):
    q_BTNH, k_BKHS, v_BKSH, visible, out_BTNH, logs = saved
    work = _Blocks(options, q_BTNH, k_BKHS, v_BKSH, visible)
    d = work.split(d_BTNH)
    inner = work.split(jnp.sum(d_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)[..., None])[..., 0]

    def step(carry, pair):
        dq, dk, dv = carry
        i, j, _, is_seen = pair

        def gradients():
            scores, mask, slope = work.scores(i, j)
            weights = jnp.where(mask, jnp.exp(scores - logs[i][..., None]), 0.0)
            d_weights = _product("BKXH,BKSH->BKXS", d[i], work.values(j))
            d_scores = (weights * (d_weights - inner[i][..., None]) * slope * options.scale).astype(q_BTNH.dtype)
            of_q = _product("BKXS,BKHS->BKXH", d_scores, work.keys(j))
            of_k = _product("BKXS,BKXH->BKHS", d_scores, work.q[i])
            return of_q, of_k, _product("BKXS,BKXH->BKSH", weights.astype(d.dtype), d[i])

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients))
        of_q, of_k, of_v = jax.lax.cond(is_seen, gradients, lambda: nothing)
        C = options.block
        dk = jax.lax.dynamic_update_slice_in_dim(dk, work.keys(j, dk) + of_k, j * C, axis=3)
        dv = jax.lax.dynamic_update_slice_in_dim(dv, work.values(j, dv) + of_v, j * C, axis=2)
        return (_by_heads(_put(dq, dq[i] + of_q, i), 1), _by_heads(dk), _by_heads(dv)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (work.q, work.k, work.v))
    with jax.default_matmul_precision(options.precision):
        (dq, dk, dv), _ = jax.lax.scan(step, zeros, work.pairs())
    S = k_BKHS.shape[3]
    dk, dv = dk[..., :S].astype(k_BKHS.dtype), dv[:, :, :S].astype(v_BKSH.dtype)
    return work.joined(dq).astype(q_BTNH.dtype), dk, dv, None


_attend.defvjp(_forward, _backward)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _by_heads(x: jax.Array, axis: int = 0) -> jax.Array:
    """Returns x with rows (dimension `axis`) and heads (the next one) split.

    Without this constraint, XLA would gather the arrays that a loop carries.
    """
    return constrain(x, *(None,) * axis, BATCH_AXES, HEAD_AXES)


def _put(blocks: jax.Array, block: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(blocks, block, i, axis=0)


class _Blocks:
    """Queries, keys and values in blocks. Lengths are padded to multiples of the block size."""

    def __init__(self, options: _Options, q_BTNH, k_BKHS, v_BKSH, visible: Visibility):
        self.options, self.visible, self.T, self.S = options, visible, q_BTNH.shape[1], k_BKHS.shape[3]
        C, self.K = options.block, k_BKHS.shape[1]
        self.counts = -(-self.T // C), -(-self.S // C)
        more = self.counts[1] * C - self.S
        self.q = self.split(q_BTNH)  # [n,B,K,X,H]
        self.k = _by_heads(jnp.pad(k_BKHS, ((0, 0),) * 3 + ((0, more),)))
        self.v = _by_heads(jnp.pad(v_BKSH, ((0, 0), (0, 0), (0, more), (0, 0))))
        self.start = self.S - self.T if visible.start is None else visible.start
        room = self.S + 2 * C  # a slice that starts at a query never reaches beyond this
        self.segments = constrain(jnp.pad(visible.segments_BS, ((0, 0), (0, room - self.S))), BATCH_AXES)
        self.oldest = jnp.pad(visible.oldest_S, (0, room - self.S), constant_values=self.S)

    def split(self, x_BTNH: jax.Array) -> jax.Array:
        """Returns [n,B,K,X,H]: the query heads that share a key head are rows of one matrix."""
        (n, _), C = self.counts, self.options.block
        B, T, N, H = x_BTNH.shape
        x = jnp.pad(x_BTNH, ((0, 0), (0, n * C - T), (0, 0), (0, 0)))
        x = x.reshape(B, n, C, self.K, N // self.K, H).transpose(1, 0, 3, 4, 2, 5)
        return _by_heads(x.reshape(n, B, self.K, -1, H), 1)

    def joined(self, x: jax.Array) -> jax.Array:
        """Returns [B,T,N,H], the reverse of `split`."""
        n, B, K, _, H = x.shape
        x = x.reshape(n, B, K, -1, self.options.block, H).transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(B, n * self.options.block, -1, H)[:, : self.T]

    def keys(self, j: jax.Array, of: jax.Array | None = None) -> jax.Array:
        C = self.options.block
        return jax.lax.dynamic_slice_in_dim(self.k if of is None else of, j * C, C, axis=3)

    def values(self, j: jax.Array, of: jax.Array | None = None) -> jax.Array:
        C = self.options.block
        return jax.lax.dynamic_slice_in_dim(self.v if of is None else of, j * C, C, axis=2)

    def pairs(self) -> tuple[jax.Array, ...]:
        """Returns the pairs of blocks to compute, as four arrays with one entry for each pair.

        The entries are the query block, the key block, whether the pair is the first one of its query block, and
        whether a query of the pair may see one of its keys.

        If the slot of the first query is static, pairs above the diagonal or outside the window are left out.
        """
        (n, m), C = self.counts, self.options.block
        i, j = (x.reshape(-1) for x in np.meshgrid(np.arange(n), np.arange(m), indexing="ij"))
        if self.visible.start is None:
            reached = self._in_reach(i, j)
            # Every block of queries keeps a pair, which sets its output to 0 if its queries see nothing.
            reached |= ~np.isin(i, i[reached]) & (j == 0)
            i, j = i[reached], j[reached]
        is_first = np.concatenate([[True], i[1:] != i[:-1]])
        oldest = jnp.min(self._from_query(self.oldest, np.arange(n)[:, None] * C + np.arange(C)), axis=1)
        is_seen = self._in_reach(i, j) & ((j + 1) * C > oldest[i])
        return jnp.array(i), jnp.array(j), jnp.array(is_first), is_seen

    def _in_reach(self, i: np.ndarray, j: np.ndarray) -> np.ndarray | jax.Array:
        """Returns whether block j of the keys is below the diagonal and inside the window for block i of queries."""
        C, first = self.options.block, self.start + i * self.options.block
        below = j * C < np.minimum(i * C + C, self.T) + self.start
        return below if self.options.window is None else below & ((j + 1) * C > first - self.options.window + 1)

    def _from_query(self, x: jax.Array, query: np.ndarray) -> jax.Array:
        return x[..., jnp.minimum(self.start + query, x.shape[-1] - 1)]

    def scores(self, i: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | float]:
        """Returns (scores f32[B,K,X,C], their mask, and the derivative of the soft cap) of a pair of blocks."""
        C, options = self.options.block, self.options
        scores = _product("BKXH,BKHS->BKXS", self.q[i], self.keys(j)) * options.scale
        slope = 1.0
        if options.softcap is not None:
            capped = jnp.tanh(scores / options.softcap)
            scores, slope = options.softcap * capped, 1.0 - capped * capped
        query, key = self.start + i * C + jnp.arange(C)[:, None], j * C + jnp.arange(C)
        of_query = jax.lax.dynamic_slice_in_dim(self.segments, self.start + i * C, C, axis=1)[:, :, None]
        of_key = jax.lax.dynamic_slice_in_dim(self.segments, j * C, C, axis=1)[:, None]
        mask = (key <= query) & (of_query == of_key) & (of_key > 0)
        if options.window is not None:
            mask &= query - key < options.window
        return scores, jnp.tile(mask, (1, scores.shape[2] // C, 1))[:, None], slope
