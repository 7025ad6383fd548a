"""Adapters: the small trainable trees that turn one frozen base into policy, value, reward and reference.

An adapter is a plain dict: module path -> leaf name -> array (see `records.Adapter`). `bind` attaches it to
a copy of the module tree that shares the base's arrays, so the base is frozen by structure: gradients are
taken with respect to the adapter alone.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.config import AdapterConfig
from jaxrlhf.errors import UserError
from jaxrlhf.models.decoder import Attention, Decoder, find_module, linear_shapes, named_parameters
from jaxrlhf.models.linear import Linear
from jaxrlhf.models.quantize import dequantize_decoder, quantization
from jaxrlhf.records import Adapter

SCORE, HEAD = "score", "lm_head"
LORA_LEAVES = ("lora_a", "lora_b", "lora_scale")


def init_adapter(
    base: Decoder, config: AdapterConfig, key: jax.Array, head: Literal["value", "reward"] | None = None
) -> Adapter:
    """A fresh adapter under which the base computes what it computed before.

    LoRA pairs start as PEFT's do (lora_a uniform in +-1/sqrt(in), lora_b zero); a full adapter is a float32 copy of
    the base. A value head starts at zero, a reward head at N(0, 1/(D+1)) (2009.01325, appendix). Raises
    `UserError` where `target_modules` names a module that the base lacks, and for a full adapter of a quantised base.
    """
    check_kind(base, config)
    if config.kind == "lora":
        adapter = _init_lora(base, config, key)
    else:
        adapter = {}
        for name, leaf in named_parameters(base).items():
            path, leaf_name = name.split("/")
            adapter.setdefault(path, {})[leaf_name] = jnp.array(leaf, jnp.float32, copy=True)
    return adapter if head is None else with_head(adapter, base, head, jax.random.fold_in(key, len(adapter)))


def with_head(adapter: Adapter, base: Decoder, head: Literal["value", "reward"], key: jax.Array) -> Adapter:
    """The adapter with a fresh scalar head in place of the one it has, if any.

    A value head has a bias, f32[1]. A reward head has none: no loss on pairs says what it should be, and transformers'
    score layers have none either.
    """
    D = base.config.hidden_size
    if head == "value":
        return {**adapter, SCORE: {"kernel": jnp.zeros((D, 1)), "bias": jnp.zeros(1)}}
    return {**adapter, SCORE: {"kernel": jax.random.normal(key, (D, 1)) / jnp.sqrt(D + 1.0)}}


def scaled_head(adapter: Adapter, gain: jax.Array | float, bias: jax.Array | float) -> Adapter:
    """The adapter with a head that says gain * what it said + bias; a head without a bias has one of 0 (see `bind`)."""
    kernel = adapter[SCORE]["kernel"]
    own = adapter[SCORE].get("bias", jnp.zeros(1))
    return {**adapter, SCORE: {"kernel": gain * kernel, "bias": gain * own + bias}}


def value_head(base: Decoder) -> Adapter:
    """A value head alone, at zero: for a value model on the policy's trunk."""
    return with_head({}, base, "value", jax.random.key(0))


def as_kind(base: Decoder, adapter: Adapter, kind: Literal["lora", "full"]) -> Adapter:
    """A copy of the adapter to go on training, with its head: for `full`, LoRA pairs become a copy of every weight.

    `lora` of an adapter that is whole is a `UserError`: no pairs of a low rank compute what it does.
    """
    if kind == "lora" and is_full(adapter):
        raise UserError("holds whole weights, which LoRA pairs cannot stand for; give kind full, or a LoRA adapter")
    if kind == "lora" or is_full(adapter):
        return jax.tree.map(lambda x: jnp.array(x, copy=True), adapter)
    whole = init_adapter(base, AdapterConfig(kind="full"), jax.random.key(0))
    for path, leaves in adapter.items():
        own = {name: jnp.array(x, copy=True) for name, x in leaves.items() if name not in LORA_LEAVES}
        if path == HEAD and HEAD not in whole:  # the base's is its embedding
            whole[HEAD] = {"kernel": _head_kernel(base)}
        whole[path] = whole.get(path, {}) | own
        if "lora_a" in leaves:
            whole[path]["kernel"] += lora_product(leaves)
    return whole


def bare(base: Decoder, adapter: Adapter) -> Adapter:
    """An adapter with the leaves of the given one under which the base computes what it computes alone; no head."""
    plain = named_parameters(base)
    if f"{HEAD}/kernel" not in plain:
        plain[f"{HEAD}/kernel"] = base.embed_tokens.embedding[...].T

    def leaf(path: str, name: str, given: jax.Array) -> jax.Array:
        if name == "lora_b":
            return jnp.zeros_like(given)
        origin = given if name in LORA_LEAVES else plain[f"{path}/{name}"]
        return jnp.array(origin, given.dtype, copy=True)

    return {
        path: {name: leaf(path, name, given) for name, given in leaves.items()}
        for path, leaves in without_head(adapter).items()
    }


def lora_product(leaves: dict[str, jax.Array], precision: str = "highest") -> jax.Array:
    """What a LoRA pair adds to its kernel, f32[in, out]."""
    a, b = (leaves[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
    return leaves["lora_scale"] * jnp.matmul(a, b, precision=precision)


def without_head(adapter: Adapter) -> Adapter:
    """The adapter without its scalar head."""
    return {path: leaves for path, leaves in adapter.items() if path != SCORE}


def bind(base: Decoder, adapter: Adapter | None) -> Decoder:
    """The base with the adapter attached: same arrays, no copy. `bind(base, None)` is the base.

    Full leaves are cast to the base's dtype; LoRA pairs and heads keep their own (float32). A head may have no bias. An
    adapter of `lm_head` parts it from an embedding to which it is tied.
    """
    if adapter is None:
        return base
    leaves, structure = jax.tree.flatten(base)
    model = jax.tree.unflatten(structure, leaves)
    for path, values in adapter.items():
        if path == SCORE:
            model.score = Linear(values["kernel"], values.get("bias"))
            continue
        if path == HEAD and model.lm_head is None:
            _part_head(model, base)
        module = find_module(model, path)
        for name, value in values.items():
            if name not in LORA_LEAVES:
                if not hasattr(module, name):
                    raise UserError(f"adapter: {path}/{name} replaces a weight that this base lacks, or has as codes")
                value = value.astype(getattr(module, name)[...].dtype)
            setattr(module, name, nnx.Param(value))
    return model


def for_decoding(model: Decoder) -> Decoder:
    """A bound model that computes the same with fewer products: for a loop of one token a row at a time.

    Layers that may be merged (see `linear.Linear.merges`) have their LoRA pairs in their kernels, and attention's three
    input projections are one. Takes the memory of a copy of the kernels that change, while the program runs.
    """
    leaves, structure = jax.tree.flatten(model)
    model = jax.tree.unflatten(structure, leaves)
    for block in model.layers:
        for room in (block.attention, block.mlp):
            for name, layer in vars(room).items():
                if isinstance(layer, Linear) and layer.merges and layer.lora_a is not None:
                    pair = {name: getattr(layer, name)[...] for name in LORA_LEAVES}
                    change = lora_product(pair, model.config.target.precision)
                    setattr(room, name, Linear(layer.kernel[...] + change, _value(layer.bias)))
        _join_inputs(block.attention)
    return model


def _join_inputs(attention: Attention) -> None:
    """q, k and v as one product, where they are plain float32 and not split over devices."""
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    split = jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1
    if split or not all(part.merges and part.lora_a is None for part in parts):
        return
    biases = [_value(part.bias) for part in parts]
    bias = None if biases[0] is None else jnp.concatenate(biases)
    attention.qkv_proj = Linear(jnp.concatenate([part.kernel[...] for part in parts], axis=1), bias)


def _value(parameter: nnx.Param | None) -> jax.Array | None:
    return None if parameter is None else parameter[...]


def merge(base: Decoder, adapter: Adapter | None) -> Decoder:
    """A new base whose plain weights compute what base and adapter did; a scalar head is left out.

    LoRA products are added in float32 and rounded once to the base's dtype; that of a quantised base is its
    embedding's. Without an adapter a base of plain weights is returned as it is.
    """
    plain = dequantize_decoder(base)
    if adapter is None:
        return plain
    whole = {
        path: {name: value for name, value in leaves.items() if name not in LORA_LEAVES}
        for path, leaves in without_head(adapter).items()
    }
    merged = bind(plain, whole)
    for path, leaves in adapter.items():
        if "lora_a" in leaves:
            module = find_module(merged, path)
            if "kernel" in leaves:
                kernel = leaves["kernel"].astype(jnp.float32)
            else:
                kernel = _head_kernel(base) if path == HEAD else find_module(base, path).float32_kernel()
            module.kernel = nnx.Param((kernel + lora_product(leaves)).astype(module.kernel.dtype))
    return merged


def is_full(adapter: Adapter) -> bool:
    """Whether the adapter is a copy of the model's own weights: neither LoRA pairs nor a scalar head alone."""
    return bool(without_head(adapter)) and not any("lora_a" in leaves for leaves in adapter.values())


def _part_head(model: Decoder, base: Decoder) -> None:
    """Gives the model a head of its own that computes what the base's embedding does as a head."""
    model.lm_head = Linear(base.embed_tokens.embedding[...].T)
    model.config = dataclasses.replace(model.config, tie_embeddings=False)


def _head_kernel(base: Decoder) -> jax.Array:
    """f32[D,V], a copy."""
    return jnp.array(base.head_kernel(), jnp.float32, copy=True)


def parameter_count(adapter: Adapter) -> int:
    """How many numbers are trained."""
    return sum(
        leaf.size for leaves in adapter.values() for name, leaf in leaves.items() if name != "lora_scale"
    )


def check_kind(base: Decoder, config: AdapterConfig) -> None:
    """`UserError` for a full adapter of a quantised base."""
    kind = quantization(base)
    if config.kind == "full" and kind is not None:
        raise UserError(
            f"kind: full trains a copy of every weight, and this base is quantised ({kind}): its weights are codes; "
            "give kind lora, or load the base without quantize"
        )


def target_paths(base: Decoder, config: AdapterConfig) -> list[str]:
    """Paths of the modules that get a LoRA pair; `UserError` where a target is in no layer."""
    shapes = linear_shapes(base)
    wanted = config.target_modules
    for target in wanted:
        if target != "all-linear" and not any(target in (p, p.split(".")[-1]) for p in shapes):
            known = sorted({p.split(".")[-1] for p in shapes})
            raise UserError(f"target_modules: no module {target!r} in this model; it has {', '.join(known)}")
    return [p for p in shapes if "all-linear" in wanted or p in wanted or p.split(".")[-1] in wanted]


def _init_lora(base: Decoder, config: AdapterConfig, key: jax.Array) -> Adapter:
    shapes = linear_shapes(base)
    divisor = config.rank**0.5 if config.rank_stabilised else config.rank
    adapter = {}
    for index, path in enumerate(target_paths(base, config)):
        fan_in, fan_out = shapes[path]
        bound = fan_in**-0.5
        adapter[path] = {
            "lora_a": jax.random.uniform(
                jax.random.fold_in(key, index), (fan_in, config.rank), minval=-bound, maxval=bound
            ),
            "lora_b": jnp.zeros((config.rank, fan_out)),
            "lora_scale": jnp.asarray(config.alpha / divisor, jnp.float32),
        }
    return adapter
