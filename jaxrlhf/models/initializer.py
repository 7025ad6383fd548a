"""Random weights of a new decoder."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.linear import Linear
from jaxrlhf.models.norms import NORMS


class Initializer:
    """Builds modules with random weights, as Hugging Face's Llama does. Each kernel has its own random key."""

    def __init__(self, config: DecoderConfig, key: jax.Array, dtype: jnp.dtype):
        self.config, self.key, self.dtype = config, key, dtype
        self.count = 0

    def normal(self, *shape: int) -> jax.Array:
        self.count += 1
        noise = jax.random.normal(jax.random.fold_in(self.key, self.count), shape, jnp.float32)
        return (noise * self.config.initializer_range).astype(self.dtype)

    def linear(self, fan_in: int, fan_out: int, bias: bool) -> Linear:
        kernel = self.normal(fan_in, fan_out)
        return Linear(kernel, jnp.zeros((fan_out,), self.dtype) if bias else None)

    def norm(self, size: int) -> nnx.Module:
        return NORMS[self.config.norm](size, self.config.norm_eps, self.dtype)
