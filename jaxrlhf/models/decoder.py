"""The decoder: one `flax.nnx` module for all families; what differs between them is data in its config.

Modules are pytrees and go through plain `jax.jit` and `jax.grad`. Layers stand one by one, not stacked, so
that decoding slices no weights inside its loop. Nothing here samples, trains or knows roles: a role is an
adapter that `adapters.bind` attaches.

Not here: rope scaling, sliding windows, other norms and activations than their tables list.

B rows, T positions, S cache positions, D hidden, V vocabulary, N query heads, K key-value heads, H head dim.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrlhf.models.attention import attend, causal_mask, positions_of, rotate

ACTIVATIONS = {"silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a decoder, in our names; `families.py` reads it from a `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    activation: str = "silu"
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    family: str = "llama"
    bos_token: int | None = None
    stop_tokens: tuple[int, ...] = ()
    pad_token: int | None = None


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer."""

    k: jax.Array  # [B,S,K,H]
    v: jax.Array  # [B,S,K,H]


Cache = list[LayerCache]


class Linear(nnx.Module):
    """x @ kernel + bias, plus lora_scale * (x @ lora_a) @ lora_b where a LoRA pair is attached (2106.09685)."""

    def __init__(self, kernel: jax.Array, bias: jax.Array | None = None):
        self.kernel = nnx.Param(kernel)  # [in, out]
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))  # [out]
        self.lora_a = nnx.data(None)  # [in, rank]
        self.lora_b = nnx.data(None)  # [rank, out]
        self.lora_scale = nnx.data(None)  # []

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        if self.lora_a is not None:
            # The scale is a constant of the adapter that travels with it: no gradient.
            scale = jax.lax.stop_gradient(self.lora_scale[...]).astype(x.dtype)
            y += ((x @ self.lora_a[...].astype(x.dtype)) * scale) @ self.lora_b[...].astype(x.dtype)
        return y


class RMSNorm(nnx.Module):
    """1910.07467, in float32."""

    def __init__(self, scale: jax.Array, epsilon: float):
        self.scale = nnx.Param(scale)  # [D]
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return self.scale[...].astype(x.dtype) * normed.astype(x.dtype)


class Embedding(nnx.Module):
    def __init__(self, embedding: jax.Array):
        self.embedding = nnx.Param(embedding)  # [V, D]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[...][tokens]


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, make: "_Initializer"):
        D, N, K, H = config.hidden_size, config.heads, config.kv_heads, config.head_dim
        self.q_proj = make.linear(D, N * H, config.attention_bias)
        self.k_proj = make.linear(D, K * H, config.attention_bias)
        self.v_proj = make.linear(D, K * H, config.attention_bias)
        self.o_proj = make.linear(N * H, D, config.attention_bias)
        self.config = config

    def __call__(self, x_BTD, positions_BT, mask_BTS, cache: LayerCache | None, at):
        B, T, _ = x_BTD.shape
        H = self.config.head_dim
        frequencies = rope_frequencies(self.config)
        q_BTNH = rotate(self.q_proj(x_BTD).reshape(B, T, -1, H), positions_BT, frequencies)
        k_BTKH = rotate(self.k_proj(x_BTD).reshape(B, T, -1, H), positions_BT, frequencies)
        v_BTKH = self.v_proj(x_BTD).reshape(B, T, -1, H)
        if cache is None:
            cache = LayerCache(k_BTKH, v_BTKH)
        else:
            cache = LayerCache(
                jax.lax.dynamic_update_slice_in_dim(cache.k, k_BTKH.astype(cache.k.dtype), at, axis=1),
                jax.lax.dynamic_update_slice_in_dim(cache.v, v_BTKH.astype(cache.v.dtype), at, axis=1),
            )
        out_BTNH = attend(q_BTNH, cache.k, cache.v, mask_BTS)
        return self.o_proj(out_BTNH.reshape(B, T, -1)), cache


class MLP(nnx.Module):
    def __init__(self, config: DecoderConfig, make: "_Initializer"):
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = make.linear(D, F, config.mlp_bias)
        self.up_proj = make.linear(D, F, config.mlp_bias)
        self.down_proj = make.linear(F, D, config.mlp_bias)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, config: DecoderConfig, make: "_Initializer"):
        self.attention_norm = make.norm()
        self.attention = Attention(config, make)
        self.mlp_norm = make.norm()
        self.mlp = MLP(config, make)

    def __call__(self, x_BTD, positions_BT, mask_BTS, cache, at):
        attended, cache = self.attention(self.attention_norm(x_BTD), positions_BT, mask_BTS, cache, at)
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


class Decoder(nnx.Module):
    """Tokens to logits (`__call__`), in parts: `hidden`, then `logits` or `scores`."""

    def __init__(self, config: DecoderConfig, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32):
        make = _Initializer(config, key, jnp.dtype(dtype))
        self.config = config
        self.embed_tokens = Embedding(make.normal(config.vocab_size, config.hidden_size))
        self.layers = nnx.List([Block(config, make) for _ in range(config.layers)])
        self.final_norm = make.norm()
        self.lm_head = nnx.data(
            None if config.tie_embeddings else make.linear(config.hidden_size, config.vocab_size, False)
        )
        self.score = nnx.data(None)  # the scalar head of value and reward, attached by an adapter

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Next-token logits f32[B,T,V] of tokens i32[B,T].

        `mask` is bool[B,T], or i32 segment ids for packed rows (0 is padding); None: all are real.
        """
        segments = jnp.ones(tokens.shape, jnp.int32) if mask is None else mask.astype(jnp.int32)
        return self.logits(self.encode(tokens, segments))

    def encode(self, tokens_BT: jax.Array, segments_BT: jax.Array, remat: bool = False) -> jax.Array:
        """Normed hidden states [B,T,D] of whole sequences, without a cache."""
        hidden, _ = self.hidden(tokens_BT, positions_of(segments_BT), causal_mask(segments_BT), remat=remat)
        return hidden

    def hidden(
        self, tokens_BT, positions_BT, mask_BTS, cache: Cache | None = None, at=None, remat: bool = False
    ) -> tuple[jax.Array, Cache]:
        """Normed hidden states [B,T,D] and the cache.

        Without `cache`, S = T and the fresh keys and values are returned as the cache. With it, keys and
        values are written at slot `at` (i32[]), and `mask_BTS` spans the whole cache.
        """
        run = jax.checkpoint(Block.__call__) if remat else Block.__call__
        x_BTD = self.embed_tokens(tokens_BT)
        caches = []
        for index, block in enumerate(self.layers):
            x_BTD, layer_cache = run(
                block, x_BTD, positions_BT, mask_BTS, None if cache is None else cache[index], at
            )
            caches.append(layer_cache)
        return self.final_norm(x_BTD), caches

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Language-model logits f32[B,T,V] of hidden states."""
        if self.lm_head is None:
            kernel = self.embed_tokens.embedding[...].T
        else:
            kernel = self.lm_head.kernel[...]
        # Accumulated and left in float32: a rounding to bfloat16 here would show in every logprob.
        return jnp.matmul(hidden_BTD, kernel.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32)

    def scores(self, hidden_BTD: jax.Array) -> jax.Array:
        """Scalar head f32[B,T] of hidden states, computed in float32."""
        return jnp.squeeze(self.score(hidden_BTD.astype(jnp.float32)), -1)


class _Initializer:
    """Makes modules with random weights, each from a key of its own, as Hugging Face initialises Llama."""

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

    def norm(self) -> RMSNorm:
        return RMSNorm(jnp.ones((self.config.hidden_size,), self.dtype), self.config.norm_eps)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians per position of each rotated pair, f32[H/2]."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    return (1.0 / config.rope_theta**exponent).astype(np.float32)


def abstract_decoder(config: DecoderConfig, dtype: jax.typing.DTypeLike = jnp.float32) -> Decoder:
    """A decoder of `jax.ShapeDtypeStruct`s: the shapes, without the memory."""
    return jax.eval_shape(lambda: Decoder(config, jax.random.key(0), dtype))


def named_parameters(tree) -> dict[str, jax.Array]:
    """Leaves of a module by name: "layers.0.attention.q_proj/kernel"."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def with_parameters(tree, values: dict[str, jax.Array]):
    """The same module with each leaf replaced by the value of its name; all names must be there."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree_util.tree_unflatten(structure, [values[_name(path)] for path, _ in paths])


def _name(path) -> str:
    parts = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
    if parts[-1] == "value":  # the inside of an nnx.Param
        parts.pop()
    return ".".join(parts[:-1]) + "/" + parts[-1]
