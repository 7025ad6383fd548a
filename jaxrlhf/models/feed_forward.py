"""The feed-forward part of a decoder's block."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.models.activations import ACTIVATIONS
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.initializer import Initializer


class MLP(nnx.Module):
    def __init__(self, config: DecoderConfig, make: Initializer):
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nnx.data(make.linear(D, F, config.mlp_bias) if config.gated_mlp else None)
        self.up_proj = make.linear(D, F, config.mlp_bias)
        self.down_proj = make.linear(F, D, config.mlp_bias)
        self.gate_up_proj = nnx.data(None)  # joins gate_proj and up_proj; `adapters.for_decoding` sets it
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        activate = ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            return self.down_proj(activate(self.up_proj(x)))
        if self.gate_up_proj is not None:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
            return self.down_proj(activate(gate) * up)
        return self.down_proj(activate(self.gate_proj(x)) * self.up_proj(x))
