"""Adapters are trainable trees. They make one frozen base the policy, the value, the reward or the reference model.

An adapter is a dict: module path -> leaf name -> array (see `records.Adapter`). `bind` attaches an adapter to a copy
of the base's module tree. The copy shares the arrays of the base. Gradients are taken with respect to the adapter
only, so the base stays frozen. A full adapter holds a copy of every weight. A LoRA adapter holds LoRA pairs (lora_a
and lora_b).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.config import AdapterConfig
from jaxrlhf.errors import UserError
from jaxrlhf.models.decoder import Attention, Block, Decoder, find_module, linear_shapes, named_parameters, shallow_copy
from jaxrlhf.models.joined import JoinedLinear
from jaxrlhf.models.linear import Linear
from jaxrlhf.models.quantize import dequantize_decoder, quantization
from jaxrlhf.records import Adapter

SCORE, HEAD = "score", "lm_head"
LORA_LEAVES = ("lora_a", "lora_b", "lora_scale")


def init_adapter(
    base: Decoder, config: AdapterConfig, key: jax.Array, head: Literal["value", "reward"] | None = None
) -> Adapter:
    """Returns a new adapter. The base computes the same hidden states with and without the new adapter.

    LoRA pairs are initialised as in PEFT: lora_a is uniform in [-1/sqrt(in), 1/sqrt(in)], and lora_b is zero. A full
    adapter is a float32 copy of the base. A value head starts at zero. A reward head is drawn from N(0, 1/(D+1))
    (2009.01325, appendix). Raises `UserError` if `target_modules` names a module that the base lacks. Also raises
    `UserError` if the base is quantised and the config requests a full adapter.
    """
    check_kind(base, config)
    adapter = _init_lora(base, config, key) if config.kind == "lora" else _copy_weights(base)
    return adapter if head is None else with_head(adapter, base, head, jax.random.fold_in(key, len(adapter)))


def _copy_weights(base: Decoder) -> Adapter:
    """Returns a full adapter: a float32 copy of every weight of the base."""
    adapter: Adapter = {}
    for name, leaf in named_parameters(base).items():
        path, leaf_name = name.split("/")
        adapter.setdefault(path, {})[leaf_name] = jnp.array(leaf, jnp.float32, copy=True)
    return adapter


def with_head(adapter: Adapter, base: Decoder, head: Literal["value", "reward"], key: jax.Array) -> Adapter:
    """Returns the adapter with a new scalar head. If the adapter has a head already, the new head replaces it.

    A value head has a bias, f32[1]. A reward head has no bias, because the loss on preference pairs does not depend on
    a bias. The score layers of transformers have no bias either.
    """
    D = base.config.hidden_size
    if head == "value":
        return {**adapter, SCORE: {"kernel": jnp.zeros((D, 1)), "bias": jnp.zeros(1)}}
    return {**adapter, SCORE: {"kernel": jax.random.normal(key, (D, 1)) / jnp.sqrt(D + 1.0)}}


def scaled_head(adapter: Adapter, gain: jax.Array | float, bias: jax.Array | float) -> Adapter:
    """Returns the adapter with a new scalar head that computes gain * old score + bias. The new head has a bias."""
    head = adapter[SCORE]
    return {**adapter, SCORE: {"kernel": gain * head["kernel"], "bias": gain * head.get("bias", jnp.zeros(1)) + bias}}


def value_head(base: Decoder) -> Adapter:
    """Returns an adapter that holds only a value head of zeros, for a value model that shares the policy's trunk."""
    return with_head({}, base, "value", jax.random.key(0))


def as_kind(base: Decoder, adapter: Adapter, kind: Literal["lora", "full"]) -> Adapter:
    """Converts an adapter and its head to `kind`, and returns the result as a trainable copy.

    The kind "full" merges LoRA pairs into a copy of every weight. Raises `UserError` if the adapter is full and `kind`
    is "lora", because LoRA pairs cannot represent full weights.
    """
    if kind == "lora" and is_full(adapter):
        raise UserError("the adapter holds full weights, but kind is lora; set kind to full, or give a LoRA adapter")
    if kind == "lora" or is_full(adapter):
        return jax.tree.map(lambda x: jnp.array(x, copy=True), adapter)
    check_kind(base, AdapterConfig(kind="full"))
    full = _copy_weights(base)
    for path, leaves in adapter.items():
        own = {name: jnp.array(x, copy=True) for name, x in leaves.items() if name not in LORA_LEAVES}
        if path == HEAD and HEAD not in full:  # the base's head is tied to its embedding
            full[HEAD] = {"kernel": _head_kernel(base)}
        full[path] = full.get(path, {}) | own
        if "lora_a" in leaves:
            full[path]["kernel"] += lora_product(leaves)
    return full


def bare(base: Decoder, adapter: Adapter) -> Adapter:
    """Returns an adapter that has the leaves of `adapter` but does not change the outputs of the base.

    Each lora_b becomes zero. Full weights become the weights of the base. The scalar head is removed.
    """
    weights = named_parameters(base)
    weights.setdefault(f"{HEAD}/kernel", base.head_kernel())

    def reset(path: str, name: str, leaf: jax.Array) -> jax.Array:
        if name == "lora_b":
            return jnp.zeros_like(leaf)
        return jnp.array(leaf if name in LORA_LEAVES else weights[f"{path}/{name}"], leaf.dtype, copy=True)

    return {
        path: {name: reset(path, name, leaf) for name, leaf in leaves.items()}
        for path, leaves in without_head(adapter).items()
    }


def lora_product(leaves: dict[str, jax.Array], precision: str = "highest") -> jax.Array:
    """Returns the array that a LoRA pair adds to its kernel: lora_scale * lora_a @ lora_b, f32[in, out]."""
    a, b = (leaves[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
    return leaves["lora_scale"] * jnp.matmul(a, b, precision=precision)


def stack_pairs(pairs: list[dict[str, jax.Array] | None], axis: int = 0) -> dict[str, jax.Array]:
    """Returns LoRA pairs stacked along a new dimension `axis`.

    Pairs of lower rank are padded with zeros, and None stands for a pair of zeros. The padding gets no gradient.
    """
    present = [pair for pair in pairs if pair is not None]
    rank = max(pair["lora_a"].shape[-1] for pair in present)
    like = next(pair for pair in present if pair["lora_a"].shape[-1] == rank)

    def stacked(name: str) -> jax.Array:
        leaves = [jnp.zeros_like(like[name]) if pair is None else pair[name] for pair in pairs]
        pads = [[(0, size - own) for size, own in zip(like[name].shape, leaf.shape)] for leaf in leaves]
        return jnp.stack([jnp.pad(leaf, pad) if any(map(sum, pad)) else leaf for leaf, pad in zip(leaves, pads)], axis)

    return {name: stacked(name) for name in like}


def without_head(adapter: Adapter) -> Adapter:
    """Returns the adapter without its scalar head."""
    return {path: leaves for path, leaves in adapter.items() if path != SCORE}


def bind(base: Decoder, adapter: Adapter | None) -> Decoder:
    """Attaches the adapter to a copy of the base, and returns the copy. `bind(base, None)` returns the base.

    The copy shares the arrays of the base. Full weights are cast to the base's dtype. LoRA pairs and scalar heads stay
    in float32. If the adapter has leaves for `lm_head`, the head of the copy is no longer tied to the embedding. Raises
    `UserError` if a full weight has no counterpart in the base.
    """
    if adapter is None:
        return base
    model = shallow_copy(base)
    for path, values in adapter.items():
        if path == SCORE:
            model.score = Linear(values["kernel"], values.get("bias"))
            continue
        if path == HEAD and model.lm_head is None:
            model.lm_head = Linear(base.head_kernel())
            model.config = dataclasses.replace(model.config, tie_embeddings=False)
        module = find_module(model, path)
        for name, value in values.items():
            if name not in LORA_LEAVES:
                if not hasattr(module, name):
                    raise UserError(
                        f"the adapter holds the full weight {path}/{name}, but this base has no such weight, or "
                        "has it quantised; give the base of the adapter, and do not quantise it"
                    )
                value = value.astype(getattr(module, name)[...].dtype)
            setattr(module, name, nnx.Param(value))
    return model


def with_merged_pairs(model: Decoder, rounded: bool = False) -> Decoder:
    """Returns an equivalent model in which the LoRA pairs of float32 kernels are merged into copies of the kernels.

    `rounded` also merges pairs into 16-bit kernels, which rounds the sum. The copies take memory while the program
    runs.
    """
    model = shallow_copy(model)
    for block in model.layers:
        for parent in (block.attention, block.mlp):
            for name, layer in vars(parent).items():
                if isinstance(layer, Linear) and layer.merges(rounded) and layer.lora_a is not None:
                    pair = {leaf: getattr(layer, leaf)[...] for leaf in LORA_LEAVES}
                    update = lora_product(pair, model.config.target.precision)
                    kernel = (layer.float32_kernel() + update).astype(layer.kernel.dtype)
                    setattr(parent, name, Linear(kernel, None if layer.bias is None else layer.bias[...]))
    return model


def for_decoding(model: Decoder, merge_rounded: bool = False) -> Decoder:
    """Returns an equivalent model that decodes faster, because it has fewer matrix products per layer.

    Pairs are merged as by `with_merged_pairs`. Float32 query, key and value projections of attention become one
    projection, which is a copy. On a GPU, the pairs that are not merged are joined, and their kernels are not copied
    (see `JoinedLinear`).
    """
    model = with_merged_pairs(model, merge_rounded)
    dtype, target = model.embed_tokens.embedding.dtype, model.config.target
    for block in model.layers:
        _fuse_qkv(block.attention)
        if target.platform == "gpu":
            _join_pairs(block, dtype, target.decode_kernels)
    return model


def _outputs_split() -> bool:
    """Returns True if the mesh splits the outputs of q, k, v, gate and up.

    Joined outputs would then have to move between devices.
    """
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1


def _fuse_qkv(attention: Attention) -> None:
    """Joins the q, k and v projections into one projection.

    Does nothing if one of the three is not float32, has a LoRA pair, or is split over the mesh axis `tensor`.
    """
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    if _outputs_split() or not all(part.can_merge and part.lora_a is None for part in parts):
        return
    bias = None if parts[0].bias is None else jnp.concatenate([part.bias[...] for part in parts])
    attention.qkv_proj = Linear(jnp.concatenate([part.kernel[...] for part in parts], axis=1), bias)


def _join_pairs(block: Block, dtype: jax.typing.DTypeLike, use_kernel: bool) -> None:
    """Joins the LoRA pairs of q, k and v, and of gate and up. Casts all pairs of the block to `dtype`."""
    attention, mlp = block.attention, block.mlp
    groups = []
    if not _outputs_split():
        groups.append((attention, "qkv_proj", [attention.q_proj, attention.k_proj, attention.v_proj]))
        if mlp.gate_proj is not None:
            groups.append((mlp, "gate_up_proj", [mlp.gate_proj, mlp.up_proj]))
    grouped = [id(layer) for *_, layers in groups for layer in layers]
    for parent in (attention, mlp):
        for name, layer in vars(parent).items():
            if isinstance(layer, Linear) and id(layer) not in grouped:
                groups.append((parent, name, [layer]))
    for parent, name, layers in groups:
        if any(layer.lora_a is not None for layer in layers):
            setattr(parent, name, JoinedLinear(layers, dtype, use_kernel))


def merge(base: Decoder, adapter: Adapter | None) -> Decoder:
    """Merges the adapter into the weights of the base, and returns a new base. The scalar head is dropped.

    The product of each LoRA pair is added in float32, and the sum is rounded once to the base's dtype. A quantised base
    is first dequantised to the dtype of its embedding. If `adapter` is None and the base is not quantised, the function
    returns the base.
    """
    plain = dequantize_decoder(base)
    if adapter is None:
        return plain
    full_weights = {
        path: {name: value for name, value in leaves.items() if name not in LORA_LEAVES}
        for path, leaves in without_head(adapter).items()
    }
    merged = bind(plain, full_weights)
    for path, leaves in adapter.items():
        if "lora_a" in leaves:
            module = find_module(merged, path)
            if "kernel" in leaves:
                kernel = leaves["kernel"].astype(jnp.float32)
            else:
                kernel = _head_kernel(base) if path == HEAD else find_module(base, path).float32_kernel()
            module.kernel = nnx.Param((kernel + lora_product(leaves)).astype(module.kernel.dtype))
    return merged


def has_only_pairs(adapter: Adapter) -> bool:
    """Returns True if all leaves of the adapter, except those of the scalar head and `lm_head`, are LoRA pairs."""
    trunk = {path: leaves for path, leaves in adapter.items() if path not in (SCORE, HEAD)}
    return all(set(leaves) == set(LORA_LEAVES) for leaves in trunk.values())


def is_full(adapter: Adapter) -> bool:
    """Returns True if the adapter holds full weights: it has no LoRA pair, and it has more than a scalar head."""
    return bool(without_head(adapter)) and not any("lora_a" in leaves for leaves in adapter.values())


def _head_kernel(base: Decoder) -> jax.Array:
    """Returns a float32 copy of the language-model head's kernel, f32[D,V]."""
    return jnp.array(base.head_kernel(), jnp.float32, copy=True)


def parameter_count(adapter: Adapter) -> int:
    """Returns the number of trained parameters in the adapter."""
    return sum(leaf.size for leaves in adapter.values() for name, leaf in leaves.items() if name != "lora_scale")


def check_kind(base: Decoder, config: AdapterConfig) -> None:
    """Raises `UserError` if the config requests a full adapter and the base is quantised."""
    kind = quantization(base)
    if config.kind == "full" and kind is not None:
        raise UserError(
            f"kind: must be lora, not full, because this base is quantised ({kind}); set kind to lora, or load the "
            "base without quantize"
        )


def target_paths(base: Decoder, config: AdapterConfig) -> list[str]:
    """Returns the paths of the modules that get a LoRA pair. Raises `UserError` if a target matches no module."""
    shapes = linear_shapes(base)
    targets = config.target_modules
    for target in targets:
        if target != "all-linear" and not any(target in (p, p.split(".")[-1]) for p in shapes):
            known = sorted({p.split(".")[-1] for p in shapes})
            raise UserError(f"target_modules: this model has no module {target!r}; its modules are {', '.join(known)}")
    return [p for p in shapes if "all-linear" in targets or p in targets or p.split(".")[-1] in targets]


def _init_lora(base: Decoder, config: AdapterConfig, key: jax.Array) -> Adapter:
    shapes = linear_shapes(base)
    divisor = config.rank**0.5 if config.rank_stabilised else config.rank
    adapter = {}
    for index, path in enumerate(target_paths(base, config)):
        (fan_in, fan_out), own_key = shapes[path], jax.random.fold_in(key, index)
        bound = fan_in**-0.5
        adapter[path] = {
            "lora_a": jax.random.uniform(own_key, (fan_in, config.rank), minval=-bound, maxval=bound),
            "lora_b": jnp.zeros((config.rank, fan_out)),
            "lora_scale": jnp.asarray(config.alpha / divisor, jnp.float32),
        }
    return adapter
