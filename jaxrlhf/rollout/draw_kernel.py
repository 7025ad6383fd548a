"""The three choices of `sampling.draw` in one kernel for a GPU (Pallas, lowered by Triton).

XLA launches about a dozen kernels for them, although each row has only some thousand numbers to compare. The kernel has
never run on a card. It compiles for an H100, and Pallas' interpreter runs it on a CPU in the tests.
"""

import functools

import jax
import jax.numpy as jnp


def draw_from_cube(weights_BV: jax.Array, lines_Bjk: jax.Array, uniforms_B3: jax.Array, interpret: bool = False):
    """Returns the drawn tokens i32[B]. `weights_BV` has the weight of each token, not necessarily of sum 1.

    `lines_Bjk` has, for each j and k, the sum over i of the weights of the tokens (i * side + j) * side + k. The
    arithmetic is that of `sampling.draw`, but sums may be in another order.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    side = lines_Bjk.shape[1]
    padding = (0, _power_of_2(side) - side)
    lines_Bjk = jnp.pad(lines_Bjk, ((0, 0), padding, padding))  # Triton loads powers of 2
    return pl.pallas_call(
        functools.partial(_kernel, side),
        out_shape=jax.ShapeDtypeStruct((weights_BV.shape[0],), jnp.int32),
        grid=(weights_BV.shape[0],),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="draw_from_cube",
    )(weights_BV, lines_Bjk, uniforms_B3)


def _kernel(side: int, weights_ref, lines_ref, uniforms_ref, token_ref) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    V, n, row = weights_ref.shape[1], lines_ref.shape[1], pl.program_id(0)
    index, number = jnp.arange(n), jnp.arange(_power_of_2(pl.cdiv(V, side**2)))
    lines = lines_ref[row]
    k = _pick(jnp.sum(lines, axis=0), uniforms_ref[row, 0])
    j = _pick(jnp.sum(jnp.where(index[None] == k, lines, 0.0), axis=1), uniforms_ref[row, 1])
    tokens = (number * side + j) * side + k
    weights = triton.load(weights_ref.at[row, jnp.minimum(tokens, V - 1)], mask=tokens < V, other=0.0)
    i = _pick(weights, uniforms_ref[row, 2])
    token_ref[row] = (i * side + j) * side + k


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns the index i32[] that `sampling._pick` returns for one row of weights f32[n]."""
    n = weights.shape[0]
    index = jnp.arange(n)
    this, other = weights[:, None], weights[None]
    before = (other < this) | ((other == this) & (index[None] <= index[:, None]))
    cumulative = jnp.sum(jnp.where(before, other, 0.0), axis=1)
    total = jnp.max(cumulative)
    above = jnp.where((weights > 0) & (cumulative > uniform * total), cumulative, jnp.inf)
    least = jnp.min(above)
    chosen = jnp.where(jnp.isinf(least), cumulative == total, above == least)
    return jnp.min(jnp.where(chosen, index, n)).astype(jnp.int32)


def _power_of_2(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
