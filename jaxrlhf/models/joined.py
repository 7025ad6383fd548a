"""Linear layers with the same input whose LoRA pairs are joined, for decoding in 16 bits on a GPU.

Sizes: T tokens, D inputs, F outputs of all layers together, r the sum of the ranks of their pairs, and P parts of D.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.distributed.mesh import automatic_axes
from jaxrlhf.models.linear import Linear

_MOST_TOKENS = 512  # of a decode step; more tokens, as in prefill, go through the layers themselves
_PARTS = 16  # parts of the sum over D; lora_a has so few columns that one product would fill a few multiprocessors
_TOKENS, _OUTPUTS = 64, 128  # of one program of the kernel


class JoinedLinear(nnx.Module):
    """Linear layers with the same input. Their LoRA pairs are one pair, in the dtype of the activations.

    In a decode step a small product takes about as long as its launch. So the pairs are joined: lora_a side by side,
    and lora_b as a block-diagonal matrix that contains lora_scale. The kernels are not joined, because a joined kernel
    would be a copy. The rank is filled up with zeros to a power of 2, which Triton needs.
    """

    def __init__(self, layers: list[Linear], dtype: jax.typing.DTypeLike, use_kernel: bool):
        """At least one of the layers has a LoRA pair. `dtype` is that of the activations.

        `use_kernel` computes the product with lora_b by a kernel (Pallas) that also adds the parts of x @ lora_a. If
        XLA splits the program over devices, the kernel is not used.
        """
        self.layers, self.use_kernel = nnx.List(layers), use_kernel
        down, blocks = [], []
        for layer in layers:
            if layer.lora_a is None:
                blocks.append(jnp.zeros((0, layer.shape[1])))
            else:
                down.append(layer.lora_a[...])
                blocks.append(layer.lora_scale[...] * layer.lora_b[...])
        a, b = jnp.concatenate(down, axis=1), jax.scipy.linalg.block_diag(*blocks)
        unused = max(16, 1 << (a.shape[1] - 1).bit_length()) - a.shape[1]
        self.lora_a = nnx.Param(jnp.pad(a, ((0, 0), (0, unused))).astype(dtype))  # [D, r]
        self.lora_b = nnx.Param(jnp.pad(b, ((0, unused), (0, 0))).astype(dtype))  # [r, F]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the outputs of the layers side by side, [..., F]."""
        if x.size // x.shape[-1] > _MOST_TOKENS:
            # XLA drops this concatenation where outputs are split again. If prefill computed joined outputs, queries
            # would stay in memory with their keys and values until the caches are written.
            return jnp.concatenate([layer(x) for layer in self.layers], axis=-1)
        y = jnp.concatenate([layer.project(x) for layer in self.layers], axis=-1) + self._pair_product(x)
        biases = [layer.bias for layer in self.layers if layer.bias is not None]  # all layers have one, or none
        return y + jnp.concatenate([bias[...] for bias in biases]).astype(x.dtype) if biases else y

    def _pair_product(self, x: jax.Array) -> jax.Array:
        a, b = self.lora_a[...], self.lora_b[...]
        # XLA joins products of the same input and dtype, and would copy the kernels to join them with lora_a. So the
        # products with lora_a are in float32, and rounded afterwards.
        if not self.use_kernel or automatic_axes() or x.shape[-1] % (16 * _PARTS):
            return jnp.matmul(x, a, preferred_element_type=jnp.float32).astype(x.dtype) @ b
        x_TPX, a_PXr = x.reshape(-1, _PARTS, x.shape[-1] // _PARTS), a.reshape(_PARTS, -1, a.shape[1])
        narrow_PTr = jnp.einsum("TPX,PXr->PTr", x_TPX, a_PXr, preferred_element_type=jnp.float32)
        return product_of_parts(narrow_PTr, b).reshape(*x.shape[:-1], -1)


def product_of_parts(narrow_PTr: jax.Array, b_rF: jax.Array, interpret: bool = False) -> jax.Array:
    """Returns the sum over P of `narrow_PTr`, rounded to the dtype of b, times b: [T,F], in one kernel."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    T, F = narrow_PTr.shape[1], b_rF.shape[1]
    tokens = min(_TOKENS, max(16, 1 << (T - 1).bit_length()))
    return pl.pallas_call(
        functools.partial(_kernel, tokens),
        out_shape=jax.ShapeDtypeStruct((T, F), b_rF.dtype),
        grid=(pl.cdiv(T, tokens), pl.cdiv(F, _OUTPUTS)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="product_of_parts",
    )(narrow_PTr, b_rF)


def _kernel(tokens: int, narrow_ref, b_ref, out_ref) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (P, T, r), F = narrow_ref.shape, b_ref.shape[1]
    first, left = pl.program_id(0) * tokens, pl.program_id(1) * _OUTPUTS
    own = None if T % tokens == 0 else (first + jnp.arange(tokens) < T)[:, None]
    inside = None if F % _OUTPUTS == 0 else (left + jnp.arange(_OUTPUTS) < F)[None]

    def add(part: jax.Array, total: jax.Array) -> jax.Array:
        other = None if own is None else 0.0
        return total + triton.load(narrow_ref.at[part, pl.ds(first, tokens), :], mask=own, other=other)

    narrow = jax.lax.fori_loop(0, P, add, jnp.zeros((tokens, r), jnp.float32))
    b = triton.load(b_ref.at[:, pl.ds(left, _OUTPUTS)], mask=inside, other=None if inside is None else 0.0)
    out = jnp.dot(narrow.astype(b.dtype), b, preferred_element_type=jnp.float32).astype(out_ref.dtype)
    masks = [mask for mask in (own, inside) if mask is not None]
    mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), out.shape) if masks else None
    triton.store(out_ref.at[pl.ds(first, tokens), pl.ds(left, _OUTPUTS)], out, mask=mask)
