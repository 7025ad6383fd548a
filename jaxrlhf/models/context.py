"""Ulysses attention (2309.14509): the mesh axis `context` splits heads inside attention, and positions elsewhere.

The functions only constrain shardings. XLA moves the arrays between the two shardings by all-to-alls. If the function
that is being traced does not split positions, the arrays are returned unchanged.

Sizes: B rows, T positions, N query heads, K key-value heads, and H the head dimension.
"""

import math

import jax
import jax.numpy as jnp

from jaxrlhf.distributed.mesh import BATCH_AXES, HEAD_AXES, POSITION_AXIS, constrain, position_parts, traced_sizes


def heads_split(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, always: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries, keys and values with all positions, and with heads split over `tensor` and `context`.

    If the number of parts, `tensor` x `context`, divides N but not K, the key-value heads are repeated until it divides
    their number. `always` means that heads are split over `tensor` even if positions are not split.
    """
    if position_parts() == 1 and not always:
        return q_BTNH, k_BTKH, v_BTKH
    parts = position_parts() * traced_sizes().get("tensor", 1)
    N, K = q_BTNH.shape[2], k_BTKH.shape[2]
    if N % parts == 0:  # the repeated heads then divide N too, and each stays with its own queries
        k_BTKH, v_BTKH = (jnp.repeat(x, math.lcm(K, parts) // K, axis=2) for x in (k_BTKH, v_BTKH))
    # The first constraint keeps XLA from splitting the heads before they are repeated.
    together = (positions_split(x) for x in (q_BTNH, k_BTKH, v_BTKH))
    q, k, v = (constrain(x, BATCH_AXES, None, HEAD_AXES) for x in together)
    return q, k, v


def positions_split(x_BTNH: jax.Array) -> jax.Array:
    """Returns an array whose positions are split over `context`, and whose heads are split over `tensor` only."""
    return x_BTNH if position_parts() == 1 else constrain(x_BTNH, BATCH_AXES, POSITION_AXIS, "tensor")


def positions_whole(x: jax.Array) -> jax.Array:
    """Returns an array [B,T,...], such as a mask, of which each device holds all positions of its rows."""
    return x if position_parts() == 1 else constrain(x, BATCH_AXES)
