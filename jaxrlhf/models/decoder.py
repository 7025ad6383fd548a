"""The decoder: one `flax.nnx` module for all model families. Families differ only in the decoder's config.

`jax.jit` and `jax.grad` accept the modules, because modules are pytrees. The weights of the layers are not stacked, so
the decode loop need not slice them. The code here does not sample, does not train, and does not know the role of the
model (policy, value, reward or reference). The adapter that `adapters.bind` attaches gives the model its role.

Sizes: B rows, T positions, S columns of a cache, D the hidden size, V the vocabulary size, N query heads, K key-value
heads, and H the head dimension.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxrlhf.distributed.mesh import BATCH_AXES, POSITION_AXIS, constrain
from jaxrlhf.models.attention import (
    RotaryTables,
    attend,
    attend_causal,
    mask_of,
    of_queries,
    positions_of,
    queries_from,
    rotary_tables,
    rotate,
    within_window,
)
from jaxrlhf.models.block_attention import Visibility
from jaxrlhf.models.cache import Cache, CacheIndex, LayerCache
from jaxrlhf.models.config import DecoderConfig, LayerKind
from jaxrlhf.models.context import heads_split, positions_split
from jaxrlhf.models.decode_attention import attend_newest, supported
from jaxrlhf.models.feed_forward import MLP
from jaxrlhf.models.initializer import Initializer
from jaxrlhf.models.remat import INPUT, rematerialised
from jaxrlhf.models.rope import frequencies
from jaxrlhf.models.sharding import leaf_name
from jaxrlhf.models.target import Target


class Embedding(nnx.Module):
    def __init__(self, embedding: jax.Array):
        self.embedding = nnx.Param(embedding)  # [V, D]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[...][tokens]


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, kind: LayerKind, make: Initializer):
        D, N, K, H = config.hidden_size, config.heads, config.kv_heads, config.head_dim
        self.q_proj = make.linear(D, N * H, config.qkv_bias)
        self.k_proj = make.linear(D, K * H, config.qkv_bias)
        self.v_proj = make.linear(D, K * H, config.qkv_bias)
        self.o_proj = make.linear(N * H, D, config.output_bias)
        self.qkv_proj = nnx.data(None)  # joins q_proj, k_proj and v_proj; `adapters.for_decoding` sets it
        norm_sizes = {"head": (H, H), "projection": (N * H, K * H)}.get(config.qk_norm)
        self.q_norm = nnx.data(norm_sizes and make.norm(norm_sizes[0]))
        self.k_norm = nnx.data(norm_sizes and make.norm(norm_sizes[1]))
        self.config, self.kind = config, kind

    def __call__(
        self,
        x_BTD,
        rotary: RotaryTables | None,
        mask_BTS,
        cache: LayerCache | None,
        index: CacheIndex | None,
        first: int | jax.Array,
    ):
        config = self.config
        if self.qkv_proj is None:
            projected = self.q_proj(queries_from(x_BTD, first)), self.k_proj(x_BTD), self.v_proj(x_BTD)
        else:
            N, K, H = config.heads, config.kv_heads, config.head_dim
            q_BTX, *projected = jnp.split(self.qkv_proj(x_BTD), [N * H, (N + K) * H], axis=-1)
            projected = queries_from(q_BTX, first), *projected
        q_BTNH, k_BTKH, v_BTKH = map(self._heads, projected, (self.q_norm, self.k_norm, None))
        scale = None if config.query_scalar is None else config.query_scalar**-0.5
        if index is not None and supported(config, len(x_BTD)):
            newest = q_BTNH[:, 0], k_BTKH[:, 0], v_BTKH[:, 0]
            window, softcap = self.kind.window, config.attention_softcap
            out_BTNH, *columns = attend_newest(*newest, rotary, index.filled, *cache, window, scale, softcap)
            return self.o_proj(out_BTNH.reshape(len(x_BTD), 1, -1)), LayerCache(*columns)
        if rotary is not None:
            q_BTNH = rotate(q_BTNH, RotaryTables(*(queries_from(x, first) for x in rotary)))
            k_BTKH = rotate(k_BTKH, rotary)
        read = LayerCache.of(k_BTKH, v_BTKH)
        if whole := cache is None:
            cache, long = read, isinstance(mask_BTS, Visibility)
            q_BTNH, *split = heads_split(q_BTNH, k_BTKH, v_BTKH, long)
            read = LayerCache.of(*split)
        elif index is None:
            cache = read = cache.with_chunk(read, mask_BTS.start)
        else:
            cache = read = cache.with_newest(read, index.column)
        run = attend_causal if whole else attend
        how = scale, config.attention_softcap, config.target
        if mask_BTS is None:
            out_BTNH = attend_causal(q_BTNH, read.k, read.v, None, *how, self.kind.window)
        else:
            out_BTNH = run(q_BTNH, read.k, read.v, of_queries(mask_BTS, first), *how)
        if whole:
            out_BTNH = positions_split(out_BTNH)
        return self.o_proj(out_BTNH.reshape(*out_BTNH.shape[:2], -1)), cache

    def _heads(self, x_BTX: jax.Array, norm: nnx.Module | None) -> jax.Array:
        """Splits a projection into heads. If `norm` is not None, also normalises the projection or its heads."""
        if self.config.qk_norm == "projection" and norm is not None:
            x_BTX = norm(x_BTX)
        heads = x_BTX.reshape(*x_BTX.shape[:2], -1, self.config.head_dim)
        return norm(heads) if self.config.qk_norm == "head" and norm is not None else heads


class Block(nnx.Module):
    def __init__(self, config: DecoderConfig, kind: LayerKind, make: Initializer):
        pre, post, size = config.pre_norms, config.post_norms, config.hidden_size
        self.attention_norm = nnx.data(make.norm(size) if pre else None)
        self.attention = Attention(config, kind, make)
        self.attention_post_norm = nnx.data(make.norm(size) if post else None)
        self.mlp_norm = nnx.data(make.norm(size) if pre else None)
        self.mlp = MLP(config, make)
        self.mlp_post_norm = nnx.data(make.norm(size) if post else None)
        self.parallel = config.parallel_residual

    def __call__(
        self,
        x_BTD,
        rotary: RotaryTables | None,
        mask_BTS,
        cache: LayerCache | None,
        index: CacheIndex | None,
        first: int | jax.Array,
    ):
        """Returns (hidden states [B,T-first,D], cache). The hidden states start at position `first`.

        If `first` is i32[B], the result has only the state at this position of each row, [B,1,D].
        """
        x_BTD = checkpoint_name(x_BTD, INPUT)
        attended, cache = self.attention(_normed(self.attention_norm, x_BTD), rotary, mask_BTS, cache, index, first)
        x_BTD = queries_from(x_BTD, first)
        middle_BTD = x_BTD + _normed(self.attention_post_norm, attended)
        read_BTD = x_BTD if self.parallel else middle_BTD
        mlp_BTD = self.mlp(_normed(self.mlp_norm, read_BTD))
        return middle_BTD + _normed(self.mlp_post_norm, mlp_BTD), cache


def _in_own_precision(method: Callable) -> Callable:
    """Decorates a method of the decoder. Matrix products in the method get the precision of the decoder's target."""

    @functools.wraps(method)
    def run(model: "Decoder", *args, **kwargs):
        with model.config.target.products():
            return method(model, *args, **kwargs)

    return run


def _normed(norm: nnx.Module | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """A decoder. It maps tokens to logits (`__call__`), or to hidden states (`hidden`) for `logits` or `scores`."""

    def __init__(self, config: DecoderConfig, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32):
        make = Initializer(config, key, jnp.dtype(dtype))
        self.config = config
        self.embed_tokens = Embedding(make.normal(config.vocab_size, config.hidden_size))
        positions = make.normal(config.max_positions, config.hidden_size) if config.learned_positions else None
        self.embed_positions = nnx.data(None if positions is None else Embedding(positions))
        self.layers = nnx.List([Block(config, config.layer_kind(i), make) for i in range(config.layers)])
        self.stacked = nnx.data(None)  # layers that run in a loop, see `layer_scan`; they come before `layers`
        self.final_norm = make.norm(config.hidden_size)
        self.lm_head = nnx.data(
            None if config.tie_embeddings else make.linear(config.hidden_size, config.vocab_size, False)
        )
        self.score = nnx.data(None)  # the scalar head of value and reward models; an adapter attaches it

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns the next-token logits f32[B,T,V] after each token. The tokens are i32[B,T].

        `mask` is bool[B,T], or holds the segment ids i32[B,T] of packed rows (0 is padding). None means no padding.
        """
        segments = jnp.ones(tokens.shape, jnp.int32) if mask is None else mask.astype(jnp.int32)
        return self.logits(self.encode(tokens, segments))

    def encode(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None,
        remat: str = "none",
        first: int = 0,
        slots: int | None = None,
    ) -> jax.Array:
        """Returns the hidden states [B,T-first,D] after the final norm, from position `first` on. Uses no cache.

        If `segments_BT` is None, each row starts in slot 0, and attention needs no mask (see `attention.needs_mask`).
        """
        if segments_BT is None:
            positions_BT, mask_BTT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape), None
        else:
            positions_BT, mask_BTT = positions_of(segments_BT), mask_of(segments_BT, self.config.target)
        return self.hidden(tokens_BT, positions_BT, mask_BTT, remat, first, slots, with_cache=False)[0]

    @_in_own_precision
    def hidden(
        self,
        tokens_BT,
        positions_BT,
        mask_BTT,
        remat: str = "none",
        first: int | jax.Array = 0,
        slots: int | None = None,
        with_cache: bool = True,
    ) -> tuple[jax.Array, Cache]:
        """Returns (hidden states [B,T-first,D] of whole sequences after the final norm, their keys and values).

        The mask is causal: an array, a `Visibility`, or None (see `attend_causal`). The states start at position
        `first`. The last layer skips the queries before `first`, because their outputs are not needed. If `first` is
        i32[B], only the state at this position of each row is returned, [B,1,D]. `remat` is "none", or a key of
        `remat.REMAT` if `first` is an integer. `slots` is the final length of the rows; None means T. The final
        length selects the factors of longrope.
        """
        windows = {kind.window for kind in self.config.layer_kinds}
        plain = windows if mask_BTT is None else {None}
        masks = {w: mask_BTT if w in plain else within_window(mask_BTT, w) for w in windows}
        run = rematerialised(Block.__call__, remat, static_argnums=6)
        # Weights are gathered, and activations stay on the devices of their rows and positions.
        S = tokens_BT.shape[1] if slots is None else slots
        axes = (BATCH_AXES, POSITION_AXIS)
        return self._run(run, tokens_BT, positions_BT, masks, S, axes, first=first, with_cache=with_cache)

    @_in_own_precision
    def extend(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        visible: Visibility,
        cache: Cache,
        slots: int,
        first: int | jax.Array = 0,
    ) -> tuple[jax.Array, Cache]:
        """Returns (hidden states of the next T tokens of each row, the cache with these tokens).

        The tokens are written to T columns from `visible.start` on. `slots` is the final length of the rows. The states
        are those of the positions 0 to T - 1 that `first` selects, as in `hidden`.
        """
        masks = {kind.window: visible.replace(window=kind.window) for kind in self.config.layer_kinds}
        axes = (BATCH_AXES, POSITION_AXIS)
        return self._run(Block.__call__, tokens_BT, positions_BT, masks, slots, axes, cache, first=first)

    @_in_own_precision
    def decode(self, tokens_B: jax.Array, cache: Cache, index: CacheIndex) -> tuple[jax.Array, Cache]:
        """Returns (hidden states [B,1,D] after the newest token of each row, the cache with this token).

        `index` says in which columns the keys and values of the newest tokens are written, and what each row sees.
        """
        S = cache[0].k.shape[3]
        masks = {kind.window: index.visible(S, kind.window)[:, None] for kind in self.config.layer_kinds}
        # Activations of one token per row are smaller than the weights, so they move to the shards of the weights.
        axes = ("data", None, "fsdp")
        tokens_B1, positions_B1 = tokens_B[:, None], index.positions[:, None]
        return self._run(Block.__call__, tokens_B1, positions_B1, masks, S, axes, cache, index)

    def _run(
        self,
        run,
        tokens_BT,
        positions_BT,
        masks,
        length: int,
        axes: tuple,
        cache=None,
        index=None,
        first: int | jax.Array = 0,
        with_cache: bool = True,
    ) -> tuple[jax.Array, Cache]:
        """Runs the embedding, all blocks and the final norm. `masks` has the mask of each window.

        All positions are below `length`. The activations are split over the mesh axes `axes`.
        """
        x_BTD = constrain(self.embed_tokens(tokens_BT), "data", POSITION_AXIS, "fsdp")  # D is split as in the embedding
        x_BTD = constrain(x_BTD, *axes)
        if self.config.embedding_scale != 1:  # the scale is rounded to the model's dtype, as in pretraining
            x_BTD *= jnp.asarray(self.config.embedding_scale, x_BTD.dtype)
        if self.embed_positions is not None:
            x_BTD += self.embed_positions(positions_BT)
        ropes, H = {kind.rope for kind in self.config.layer_kinds} - {None}, self.config.head_dim
        tables = {r: rotary_tables(positions_BT, length, *frequencies(r, H, length)) for r in ropes}
        caches = []
        if self.stacked is not None:

            def run_period(x_BTD: jax.Array, blocks: list[Block]) -> tuple[jax.Array, Cache | None]:
                made = []
                for block in blocks:
                    kind = block.attention.kind
                    x_BTD, new_cache = run(block, x_BTD, tables.get(kind.rope), masks[kind.window], None, None, 0)
                    x_BTD = constrain(x_BTD, *axes)
                    made.append(new_cache)
                return x_BTD, made if with_cache else None

            x_BTD, made = jax.lax.scan(run_period, x_BTD, self.stacked)
            x_BTD = x_BTD if len(self.layers) else queries_from(x_BTD, first)
            if with_cache:
                steps = len(made[0].k)
                caches = [LayerCache(of_period.k[i], of_period.v[i]) for i in range(steps) for of_period in made]
        for number, block in enumerate(self.layers):
            kind, old_cache = block.attention.kind, None if cache is None else cache[number]
            skipped = first if number == len(self.layers) - 1 else 0
            rotary, mask = tables.get(kind.rope), masks[kind.window]
            x_BTD, new_cache = run(block, x_BTD, rotary, mask, old_cache, index, skipped)
            x_BTD = constrain(x_BTD, *axes)
            caches.append(new_cache)
        return self.final_norm(x_BTD), caches

    @_in_own_precision
    def logits(self, hidden_BTD: jax.Array, kernel_DV: jax.Array | None = None) -> jax.Array:
        """Returns the next-token logits f32[B,T,V] of hidden states after the final norm.

        `kernel_DV` is the result of `head_kernel()`. If it is None, this method calls `head_kernel`.
        """
        kernel = self.head_kernel() if kernel_DV is None else kernel_DV
        # Logits are accumulated and kept in float32, because rounding to bfloat16 would change every logprob.
        logits = jnp.matmul(hidden_BTD, kernel.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32)
        if self.lm_head is not None and self.lm_head.lora_a is not None:
            logits += self.lm_head.pair_product(hidden_BTD)
        logits = constrain(logits, BATCH_AXES, POSITION_AXIS, "tensor")
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def head_kernel(self) -> jax.Array:
        """Returns the kernel [D,V] of the language-model head. The LoRA pair of the head is not merged into it."""
        return self.embed_tokens.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]

    @_in_own_precision
    def scores(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns the outputs f32[B,T] of the scalar head on hidden states. The head computes in float32."""
        return jnp.squeeze(self.score(hidden_BTD.astype(jnp.float32)), -1)


def abstract_decoder(config: DecoderConfig, dtype: jax.typing.DTypeLike = jnp.float32) -> Decoder:
    """Returns a decoder of `jax.ShapeDtypeStruct`s. They take no memory."""
    return jax.eval_shape(lambda: Decoder(config, jax.random.key(0), dtype))


def shallow_copy(model: Decoder) -> Decoder:
    """Returns a copy of the module tree. The copy shares the arrays of the model."""
    return jax.tree.map(lambda leaf: leaf, model)


def with_target(model: Decoder, target: Target) -> Decoder:
    """Returns a copy of the model with `target` in its config. The copy shares the arrays of the model."""
    return with_config(model, dataclasses.replace(model.config, target=target))


def with_config(model: Decoder, config: DecoderConfig) -> Decoder:
    """Returns a copy of the model with another config. The config must fit the arrays, which are shared."""
    model = shallow_copy(model)
    model.config = config
    for block in model.layers:
        block.attention.config = config
    return model


def named_parameters(tree) -> dict[str, jax.Array]:
    """Returns the leaves of a module by name. An example of a name is "layers.0.attention.q_proj/kernel"."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def with_parameters(tree, values: dict[str, jax.Array]):
    """Returns a copy of the module with the leaves of `values`. `values` must have an entry for every leaf name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[leaf_name(path)], tree)


def find_module(model: nnx.Module, path: str) -> nnx.Module:
    """Returns the module at a path, for example "layers.0.attention.q_proj"."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def linear_shapes(model: Decoder) -> dict[str, tuple[int, int]]:
    """Returns the shape (in, out) of every linear layer inside the blocks, by module path."""
    leaves = [name.split("/") for name in named_parameters(model) if name.startswith("layers.")]
    paths = dict.fromkeys(path for path, leaf in leaves if leaf.startswith("kernel"))
    return {path: find_module(model, path).shape for path in paths}
