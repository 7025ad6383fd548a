"""Packs rows of unequal length side by side into sequences of a fixed length, so that fewer slots hold padding.

`pack` chooses places, `pack_rows` writes the tokens of rows to their places, and `take_pass` takes the sequences of one
pass. All shapes are static: the number of sequences in use is known on the devices only.

Sizes: B rows of S tokens in G groups of devices, N = B / G rows per group, R response tokens per row. A group has N
sequences of S slots, of which the last may be empty, and C sequences per pass.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxrlhf.distributed.mesh import BATCH_AXES, batch_groups, constrain
from jaxrlhf.records import Experience, Rollout


class Places(NamedTuple):
    """Where each number of a result is taken from: result[g, i] = x[g, index[g, i]] if the mask is True, else 0."""

    index: jax.Array  # i32[G,n]
    mask: jax.Array  # bool[G,n]


@struct.dataclass
class Layout:
    """Rows side by side. Slot s of sequence m has the number m S + s in its group.

    A slot predicts a learned token if this token follows the slot's token in its row.
    """

    tokens: jax.Array  # i32[G,N,S]
    segments: jax.Array  # i32[G,N,S]; number of the row in its group, from 1 on; 0 on empty slots
    predicts: jax.Array  # bool[G,N,S]; True on slots that predict a learned token
    targets: jax.Array  # i32[G,N,S]; the learned token
    temperature: jax.Array  # f32[G,N,S]; the temperature of its row
    response: jax.Array  # i32[G,N,S]; the number n R + t of the learned token in its group
    before: jax.Array  # i32[G,N,R]; the slot before each response token
    learned: jax.Array  # bool[G,N,R]; `response_mask` in groups
    passes: jax.Array  # i32[]; number of passes that hold all rows
    sequences: int = struct.field(pytree_node=False)  # C


@struct.dataclass
class PackedRows:
    """The sequences of one pass. The states of slots that predict a learned token are called the needed states.

    States and slots are numbered from 0 to C S - 1, and response tokens from 0 to N R - 1.
    """

    tokens: jax.Array  # i32[G C,S]
    segments: jax.Array  # i32[G C,S]
    slot_of_state: Places  # for each needed state the slot, in ascending order
    state_of_slot: Places
    state_of_response: Places
    response_of_state: Places
    targets: jax.Array  # i32[G,C S]; the learned token that each needed state predicts
    temperature: jax.Array  # f32[G,C S]
    count: jax.Array  # i32[]; number of needed states, of the group that has most
    mask: jax.Array  # bool[B,R]; True on the learned tokens of the pass

    def states(self, hidden: jax.Array) -> jax.Array:
        """Returns the needed states [G,C S,D], given all hidden states [G C,S,D]. The rest is 0."""
        grouped = hidden.reshape(*self.targets.shape, hidden.shape[-1])
        return moved(grouped, self.slot_of_state, self.state_of_slot)

    def rows(self, x: jax.Array) -> jax.Array:
        """Maps x f32[G,C S], a number per needed state, to f32[B,R], a number per response token; 0 outside `mask`."""
        found = moved(x, self.state_of_response, self.response_of_state)
        return constrain(found.reshape(self.mask.shape), BATCH_AXES)


@jax.custom_vjp
def moved(x: jax.Array, there: Places, back: Places) -> jax.Array:
    """Returns x [G,m,...] moved to the places `there`, [G,n,...]. `back` are the inverse places.

    No number may be moved twice. The gradient is then moved back, which is faster than the sum that jax would make.
    """
    found = jax.vmap(lambda x, index: x[index])(constrain(x, BATCH_AXES), there.index)
    mask = there.mask.reshape(*there.mask.shape, *(1,) * (x.ndim - 2))
    return constrain(jnp.where(mask, found, 0), BATCH_AXES)


moved.defvjp(
    lambda x, there, back: (moved(x, there, back), (there, back)),
    lambda places, d: (moved(d, *places[::-1]), None, None),
)


def pack(lengths: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Places rows of `lengths` i32[N] in sequences of `capacity` slots: the longest first, each in the first that fits.

    Returns (sequence of each row i32[N], its first slot i32[N], number of sequences in use i32[]). If no row is
    longer than capacity / c, at most ceil(N / c) sequences are in use.
    """
    order = jnp.argsort(-lengths, stable=True)

    def place(filled: jax.Array, size: jax.Array):
        sequence = jnp.argmax(filled + size <= capacity).astype(jnp.int32)
        return filled.at[sequence].add(size), (sequence, filled[sequence])

    filled, places = jax.lax.scan(place, jnp.zeros_like(lengths), lengths[order])
    sequence, start = (jnp.zeros_like(lengths).at[order].set(x) for x in places)
    return sequence, start, jnp.sum(filled > 0, dtype=jnp.int32)


def pack_rows(rows: Rollout | Experience, size: int) -> Layout:
    """Packs rows [B,S] for passes of `size` x S slots. The rows of a device stay on it.

    A packed sequence has the length of a padded row. Sequences of twice this length would need hardly fewer passes, and
    attention over them would take twice the time per slot. Of each row, the tokens before the last learned token are
    packed. The rest does not affect the loss.
    """
    B, S = rows.tokens.shape
    G = batch_groups(size)
    C = size // G

    def of_group(tokens, mask, response_mask, temperature):
        N, R = response_mask.shape
        first = jnp.argmax(mask, axis=1)  # column of the first real token; the real tokens are contiguous
        end = S - R + jnp.max(jnp.where(response_mask, jnp.arange(R), 0), axis=1)  # column of the last learned token
        length = jnp.where(jnp.any(response_mask, axis=1), end - first, 0)
        sequence, start, used = pack(length, S)
        start += sequence * S
        # The row of a slot is the one that starts last, up to this slot.
        begins = jnp.where(length > 0, start, N * S)
        row_of_start = jnp.zeros(N * S, jnp.int32).at[begins].set(jnp.arange(N), mode="drop")
        slot = jnp.arange(N * S)
        row = row_of_start[jax.lax.cummax(jnp.zeros_like(slot).at[begins].set(begins, mode="drop"))]
        column = first[row] + slot - start[row]
        real = (column >= first[row]) & (column < first[row] + length[row])
        target = jnp.clip(column + 1, 0, S - 1)
        response = row * R + jnp.maximum(target - (S - R), 0)
        predicts = real & (target >= S - R) & response_mask.reshape(-1)[response]
        by_slot = (
            jnp.where(real, tokens[row, target - 1], 0), jnp.where(real, row + 1, 0), predicts, tokens[row, target],
            temperature[row], response,
        )  # fmt: skip
        before = start[:, None] + jnp.arange(S - R, S) - first[:, None] - 1
        by_slot = (x.reshape(N, S) for x in by_slot)
        return Layout(*by_slot, before, response_mask, -(-used // C), C)

    arrays = (rows.tokens, rows.mask, rows.response_mask, rows.temperature)
    packed = jax.vmap(of_group)(*(constrain(x.reshape(G, B // G, *x.shape[1:]), BATCH_AXES) for x in arrays))
    return packed.replace(passes=jnp.max(packed.passes))


def take_pass(packed: Layout, number: jax.Array) -> PackedRows:
    """Returns the sequences of a pass."""
    (G, _, S), C = packed.tokens.shape, packed.sequences
    names = ("tokens", "segments", "predicts", "targets", "temperature", "response")
    part = {name: jax.lax.dynamic_slice_in_dim(getattr(packed, name), number * C, C, axis=1) for name in names}
    tokens, segments = (constrain(part[name].reshape(G * C, S), BATCH_AXES) for name in names[:2])
    predicts, targets, temperature, response = (part[name].reshape(G, C * S) for name in names[2:])
    slots, state = jnp.argsort(~predicts, axis=1, stable=True), jnp.cumsum(predicts, axis=1) - 1
    needed = jnp.take_along_axis(predicts, slots, axis=1)
    before = packed.before.reshape(G, -1) - number * C * S
    inside = packed.learned.reshape(G, -1) & (before >= 0) & (before < C * S)
    before = jnp.clip(before, 0, C * S - 1)
    targets, temperature, response = (jnp.take_along_axis(x, slots, axis=1) for x in (targets, temperature, response))
    return PackedRows(
        tokens, segments, Places(slots, needed), Places(state, predicts),
        Places(jnp.take_along_axis(state, before, axis=1), inside), Places(response, needed),
        targets, temperature, jnp.max(state[:, -1]) + 1,
        constrain(inside.reshape(-1, packed.learned.shape[2]), BATCH_AXES),
    )  # fmt: skip
