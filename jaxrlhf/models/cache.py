"""The keys and values that decoding keeps, and the columns in which it writes and reads them.

Sizes: B rows, K key-value heads, H the head dimension, P columns of prompts, and S columns of a cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class CacheIndex:
    """The columns of one decode step. Position p of row b is in column (p + offset[b]) mod S.

    Padding of prompts is never visible. A row with `filled` = 0 does not decode: it sees nothing, and its outputs are
    arbitrary finite numbers.
    """

    column: jax.Array  # the column of the newest token: i32[] if all rows share it, else i32[B]
    filled: jax.Array  # i32[B]; number of the row's tokens in the cache, including the newest token
    offset: jax.Array  # i32[B]; from 0 to S - 1

    @classmethod
    def ring(cls, column: jax.Array, filled: jax.Array, columns: int) -> "CacheIndex":
        """Returns the index in which all rows write one column i32[]. A write is one `dynamic_update_slice`.

        The S columns are a ring, so a row may enter in any step. Used on a CPU.
        """
        return cls(column % columns, filled, (column + 1 - filled) % columns)

    @classmethod
    def contiguous(cls, filled: jax.Array) -> "CacheIndex":
        """Returns the index in which each row's tokens start at column 0. So a kernel can read only filled columns."""
        return cls(jnp.maximum(filled - 1, 0), filled, jnp.zeros_like(filled))

    @property
    def positions(self) -> jax.Array:
        """The position of the newest token of each row, i32[B]."""
        return jnp.maximum(self.filled - 1, 0)

    def visible(self, columns: int, window: int | None = None) -> jax.Array:
        """Returns the mask bool[B,S] of the columns that the newest token sees: its own and all earlier tokens.

        If `window` is not None, only the last `window` tokens are visible.
        """
        position = jnp.arange(columns) - self.offset[:, None]
        position = jnp.where(position < 0, position + columns, position)
        filled = self.filled[:, None]
        return (position < filled) if window is None else (position < filled) & (position >= filled - window)


class LayerCache(NamedTuple):
    """The rotated keys and the values of one layer. Each head is contiguous, because decoding reads head by head."""

    k: jax.Array  # [B,K,H,S]
    v: jax.Array  # [B,K,S,H]

    @classmethod
    def of(cls, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "LayerCache":
        """Returns the cache of T positions."""
        return cls(k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3))

    def with_chunk(self, new: "LayerCache", start: jax.Array) -> "LayerCache":
        """Returns the cache with T new positions of each row in the columns from `start` (i32[]) on."""
        return LayerCache(
            jax.lax.dynamic_update_slice_in_dim(self.k, new.k.astype(self.k.dtype), start, axis=3),
            jax.lax.dynamic_update_slice_in_dim(self.v, new.v.astype(self.v.dtype), start, axis=2),
        )

    def with_newest(self, new: "LayerCache", column: jax.Array) -> "LayerCache":
        """Returns the cache with one new position of each row in its column; see `CacheIndex.column`."""
        k, v = new.k.astype(self.k.dtype), new.v.astype(self.v.dtype)
        if column.ndim == 0:
            write = jax.lax.dynamic_update_slice_in_dim
            return LayerCache(write(self.k, k, column, axis=3), write(self.v, v, column, axis=2))
        rows = jnp.arange(column.shape[0])
        options = {"unique_indices": True, "indices_are_sorted": True, "mode": "promise_in_bounds"}
        return LayerCache(
            self.k.at[rows, :, :, column].set(k[..., 0], **options),
            self.v.at[rows, :, column].set(v[:, :, 0], **options),
        )

    def with_rows(self, new: "LayerCache", slots: jax.Array) -> "LayerCache":
        """Returns the cache with `new` rows [Q k,K,H,T] in the first T columns of the slots i32[Q,k].

        The B rows of the cache are B / Q slots of each of Q queues. Rows whose slot is B / Q are left out.
        """
        Q = slots.shape[0]

        def put(old: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
            at = (slots, *(slice(size) for size in new.shape[1:]))
            return old.at[at].set(new.astype(old.dtype), mode="drop", unique_indices=True)

        if Q == 1:
            return LayerCache(*(put(old, x, slots[0]) for old, x in zip(self, new)))
        by_queue = [(old.reshape(Q, -1, *old.shape[1:]), x.reshape(Q, -1, *x.shape[1:])) for old, x in zip(self, new)]
        return LayerCache(*(jax.vmap(put)(old, x, slots).reshape(-1, *old.shape[2:]) for old, x in by_queue))

    def widened(self, columns: int) -> "LayerCache":
        """Returns the cache with empty columns added at the end, so that it has S = `columns` columns."""
        more = columns - self.k.shape[3]
        return LayerCache(
            jnp.pad(self.k, ((0, 0),) * 3 + ((0, more),)), jnp.pad(self.v, ((0, 0),) * 2 + ((0, more), (0, 0)))
        )

    def as_ring(self, columns: int, column: jax.Array) -> "LayerCache":
        """Returns left-padded prompts in a ring of S columns, with the last token in the column before `column`."""
        shift = column - self.k.shape[3]
        k, v = self.widened(columns)
        return LayerCache(jnp.roll(k, shift, axis=3), jnp.roll(v, shift, axis=2))


Cache = list[LayerCache]
