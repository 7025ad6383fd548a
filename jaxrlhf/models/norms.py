"""Norms over the hidden dimension D. The table `NORMS` maps the names in `DecoderConfig.norm` to norms."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """RMS normalisation (1910.07467), computed in float32."""

    def __init__(self, size: int, epsilon: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((size,), dtype))  # [D]
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale[...].astype(x.dtype) * self.normed(x).astype(x.dtype)

    def normed(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        return x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)


class RMSNormPlusOne(RMSNorm):
    """Gemma's RMSNorm, computed in float32. It multiplies by 1 + scale."""

    def __init__(self, size: int, epsilon: float, dtype: jnp.dtype):
        super().__init__(size, epsilon, dtype)
        self.scale = nnx.Param(jnp.zeros((size,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return (self.normed(x) * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation (1607.06450), computed in float32."""

    def __init__(self, size: int, epsilon: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((size,), dtype))  # [D]
        self.bias = nnx.Param(jnp.zeros((size,), dtype))  # [D]
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + self.epsilon)
        return (normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


NORMS = {"rms": RMSNorm, "rms_plus_one": RMSNormPlusOne, "layer": LayerNorm}
