"""A linear layer with an optional LoRA pair, and a matrix product that merges the pair into the kernel.

Sizes: D inputs, F outputs, and r the rank of the LoRA pair.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxrlhf.distributed.mesh import position_parts
from jaxrlhf.models.remat import PRODUCT


class Linear(nnx.Module):
    """A linear layer, x @ kernel + bias. A LoRA pair adds lora_scale * (x @ lora_a) @ lora_b (2106.09685)."""

    def __init__(self, kernel: jax.Array, bias: jax.Array | None = None):
        self.kernel = nnx.Param(kernel)  # [in, out]
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))  # [out]
        self.lora_a = nnx.data(None)  # [in, rank]
        self.lora_b = nnx.data(None)  # [rank, out]
        self.lora_scale = nnx.data(None)  # []

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the kernel, (in, out)."""
        return self.kernel.shape

    @property
    def can_merge(self) -> bool:
        """True if a LoRA pair may be merged into the kernel. In bfloat16, rounding would lose the small update."""
        return self.kernel.dtype == jnp.float32

    def merges(self, rounded: bool) -> bool:
        """Returns True if decoding merges the LoRA pair; with `rounded` also if this rounds weights to 16 bits."""
        return rounded or self.can_merge

    def float32_kernel(self) -> jax.Array:
        """Returns the kernel as f32[in, out]."""
        return self.kernel[...].astype(jnp.float32)

    def project(self, x: jax.Array) -> jax.Array:
        """Returns x @ kernel, in the dtype of x."""
        return x @ self.kernel[...].astype(x.dtype)

    def pair_product(self, x: jax.Array) -> jax.Array:
        """Returns only the output of the LoRA pair, f32[..., out]."""
        a, b, scale = (leaf[...].astype(jnp.float32) for leaf in (self.lora_a, self.lora_b, self.lora_scale))
        return ((x.astype(jnp.float32) @ a) * jax.lax.stop_gradient(scale)) @ b

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self._with_pair(x)
        return checkpoint_name(y if self.bias is None else y + self.bias[...].astype(x.dtype), PRODUCT)

    def _with_pair(self, x: jax.Array) -> jax.Array:
        if self.lora_a is None:
            return self.project(x)
        scale = jax.lax.stop_gradient(self.lora_scale[...])  # in the adapter's tree, but not trained
        pair = self.lora_a[...], self.lora_b[...]
        # XLA may compute the merged kernels of all layers early. Compared with the activations of many tokens, these
        # kernels take little memory.
        many = x.size // x.shape[-1] >= max(self.shape)
        if self.can_merge and many and x.dtype == jnp.float32:
            return merged_product(x, self.kernel[...], *pair, scale)
        a, b = (leaf.astype(x.dtype) for leaf in pair)
        return self.project(x) + ((x @ a) * scale.astype(x.dtype)) @ b


def merged_product(x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns x @ (kernel + scale * a @ b), for x [...,D], kernel [D,F], a [D,r], b [r,F]. The scale has no gradient.

    The sum of two outputs, x @ kernel and scale * x @ a @ b, would be equal. But that sum would write and read an array
    [...,F] two more times in the forward pass, and two more times in the backward pass.
    """
    return _merged_product(ambient_precision(), x, kernel, a, b, scale)


def ambient_precision() -> str | None:
    """Returns the default matmul precision at this point of tracing.

    A custom gradient keeps this precision as a constant, because jax traces the gradient later. The default may have
    changed by then.
    """
    return jax.config.jax_default_matmul_precision


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merged_product(precision, x, kernel, a, b, scale):
    with jax.default_matmul_precision(precision):
        return x @ (kernel + (scale * a) @ b)


def _forward(precision, x, kernel, a, b, scale):
    return _merged_product(precision, x, kernel, a, b, scale), (x, kernel, a, b, scale)


def _backward(precision, saved, dy):
    with jax.default_matmul_precision(precision):
        x, kernel, a, b, scale = saved
        rows, d_rows = _rows(x), _rows(dy)
        # The merged kernel is computed again, because the saved kernels would take as much memory as the weights.
        dx = dy @ (kernel + (scale * a) @ b).T
        # The transposed product reads its inputs row by row. On a CPU this takes a third of the time. The barrier
        # keeps XLA from undoing the transposition.
        da = jax.lax.optimization_barrier(_summed(scale * (d_rows @ b.T), rows)).T
        db = _summed(scale * (rows @ a), d_rows)
        return dx, _summed(rows, d_rows), da, db, jnp.zeros_like(scale)  # XLA drops an unused kernel gradient


def _rows(x: jax.Array) -> jax.Array:
    """Returns x as [rows,D], or unchanged if its positions are split, because a reshape would gather them."""
    return x if position_parts() > 1 else x.reshape(-1, x.shape[-1])


def _summed(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the sum of the outer products of the last dimensions, for x [...,D] and y [...,F]: [D,F]."""
    leading = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, y, ((leading, leading), ((), ())))


_merged_product.defvjp(_forward, _backward)
