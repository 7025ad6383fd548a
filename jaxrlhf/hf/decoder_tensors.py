"""Reads the parameters of a decoder from the tensors of a checkpoint, and converts parameters to tensors to write.

The headers of all files are checked before any array is made. Then each device reads its own slices from memory-mapped
files. So no host and no device holds more than its share.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.distributed.mesh import fetch, finite_leaves
from jaxrlhf.errors import UserError
from jaxrlhf.hf.families import FAMILIES, address_of, is_ignored
from jaxrlhf.hf.family import Part, TensorAddress
from jaxrlhf.hf.tensor_files import Pending, StoredTensor
from jaxrlhf.hf.wrappers import plain_name
from jaxrlhf.models.adapters import merge
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder, abstract_decoder, linear_shapes, named_parameters, with_parameters
from jaxrlhf.models.quantize import abstract_quantized, kind_of, load_quantized
from jaxrlhf.models.sharding import parameter_sharding
from jaxrlhf.models.target import target_of
from jaxrlhf.records import Adapter
from jaxrlhf.tracking.notices import notice


def match(config: DecoderConfig, tensors: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """Returns the stored tensor of every parameter, by the name of the parameter.

    Raises `UserError` if a tensor is missing or has a wrong shape. A checkpoint may hold tensors that the decoder does
    not use, such as a value head, a vision tower or more layers than in `config.json`. These tensors are skipped, and a
    notice is printed. transformers prints a warning in this case.
    """
    if config.layers > len(tensors):  # checked before a decoder with this many layers is built
        info = folder / "config.json"
        raise UserError(f"{info}: requires {config.layers} layers, but the weights have only {len(tensors)} tensors")
    matched, used = {}, set()
    for name, parameter in named_parameters(abstract_decoder(config)).items():
        address = address_of(config, name)
        tensor_name = _name_in(tensors, config, address.tensor)
        if tensor_name not in tensors:
            hint = ""
            if name == "lm_head/kernel":
                hint = "; if the head is tied to the embedding, set tie_word_embeddings: true in config.json"
            raise UserError(
                f"{folder}: tensor {tensor_name} is missing, but {folder / 'config.json'} requires it{hint}"
            )
        tensor = matched[name] = tensors[tensor_name]
        used.add(tensor_name)
        tensor.check_dtype()
        tensor.check_shape(stored_shape(parameter.shape, config, address), "config.json")
    unused = [tensor.name for name, tensor in tensors.items() if name not in used and not is_ignored(config, name)]
    if unused:
        notice(f"{folder}: skipped tensors that this {config.family} decoder does not use: {_summary(unused)}")
    return matched


def plain_tensors(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the tensors of a checkpoint by name. Names of a multimodal model become those of a text-only model."""
    return {plain_name(name): tensor for name, tensor in tensors.items()}


def untie_if_different(
    config: DecoderConfig, tensors: dict[str, StoredTensor], folder: Path
) -> tuple[DecoderConfig, dict[str, StoredTensor]]:
    """Returns (config, tensors). The tensors decide whether the head is tied to the embedding, as in transformers 5.

    If `config.json` ties the head but the stored head differs from the embedding, the head becomes untied. If the head
    is tied and the embedding is not stored, the stored head is also the embedding.
    """
    head, embedding = (
        _name_in(tensors, config, address_of(config, name).tensor)
        for name in ("lm_head/kernel", "embed_tokens/embedding")
    )
    if not config.tie_embeddings or head not in tensors:
        return config, tensors
    if embedding not in tensors:
        return config, {name: tensor for name, tensor in tensors.items() if name != head} | {embedding: tensors[head]}
    if _equal(tensors[head], tensors[embedding]):
        return config, tensors
    notice(
        f"{folder}: config.json ties the head to the embedding, but the tensors {embedding} and {head} differ; the "
        "head is read as a separate tensor"
    )
    return dataclasses.replace(config, tie_embeddings=False), tensors


def _name_in(tensors: dict[str, StoredTensor], config: DecoderConfig, tensor: str) -> str:
    """Returns the name of a tensor in this checkpoint. If a model was saved without a head, names lack the prefix."""
    prefix = FAMILIES[config.family].prefix
    has_prefix = any(name.startswith(prefix) for name in tensors)
    return tensor if has_prefix else tensor.removeprefix(prefix)


def _equal(one: StoredTensor, other: StoredTensor, rows: int = 4096) -> bool:
    """Returns True if two tensors hold the same numbers. Compares `rows` rows at a time."""
    for tensor in (one, other):
        tensor.check_dtype()
    if one.shape != other.shape:
        return False
    a, b = one.view(), other.view()
    parts = (slice(start, start + rows) for start in range(0, len(a), rows))
    return all(np.array_equal(a[part].astype(np.float32), b[part].astype(np.float32)) for part in parts)


def _summary(names: list[str], shown: int = 4) -> str:
    """Returns a list of tensors as text: "v_head.summary (2 tensors), lm_head.bias and 7 more".

    Tensors are grouped by module. Modules with the most tensors come first.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.split(r"\.\d+\.|\.[^.]+$", name)[0], []).append(name)
    largest = sorted(groups.items(), key=lambda item: -len(item[1]))
    listed = [f"{group} ({len(inside)} tensors)" if len(inside) > 1 else inside[0] for group, inside in largest[:shown]]
    rest = sum(len(inside) for _, inside in largest[shown:])
    return ", ".join(listed) + (f" and {rest} more" if rest else "")


def read_decoder(
    config: DecoderConfig,
    stored: dict[str, StoredTensor],
    dtype: str,
    mesh: jax.sharding.Mesh | None,
    quantize: str | None = None,
) -> Decoder:
    """Returns the decoder that holds the tensors from `match`. Its arrays are sharded on the mesh.

    The `target` in the decoder's config is set to that of the mesh's devices (see `models/target.py`).
    """
    config = dataclasses.replace(config, target=target_of(mesh))
    abstract, values = abstract_decoder(config, dtype), {}
    quantized = {} if quantize is None else linear_shapes(abstract)
    for name, parameter in named_parameters(abstract).items():
        module, _, leaf = name.partition("/")
        address = address_of(config, name)
        if leaf == "kernel" and module in quantized:
            columns = _column_reader(stored[name], config, address)
            values |= load_quantized(module, kind_of(config, module, quantize), parameter.shape, columns, mesh)
            continue
        sharding = None if mesh is None else parameter_sharding(mesh, name, parameter.shape)
        values[name] = load_parameter(stored[name], parameter, config, address, sharding)
    check_finite(values, stored)
    return with_parameters(abstract if quantize is None else abstract_quantized(abstract, quantize), values)


def check_finite(values: dict[str, jax.Array], stored: dict[str, StoredTensor]) -> None:
    """Raises `UserError` if a parameter is not finite. The error names the file and the tensor.

    Checks only parameters that have the same name in `values` and in `stored`. Quantised kernels have another name;
    `_column_reader` checks them.
    """
    for name, finite in finite_leaves({name: value for name, value in values.items() if name in stored}).items():
        if not finite:
            stored[name].refuse_not_finite()


def stored_shape(shape: tuple[int, ...], config: DecoderConfig, address: TensorAddress) -> tuple[int, ...]:
    """Returns the shape of the checkpoint's tensor that holds a parameter. `shape` is the parameter's shape."""
    if address.part is not None:
        shape = (*shape[:-1], stored_size(config, address.part))
    return shape[::-1] if address.transposed else shape


def stored_size(config: DecoderConfig, part: Part) -> int:
    """Returns the number of outputs of the fused tensor that holds this part."""
    return part.groups(config) * sum(part.sizes(config))


def part_of(fused: np.ndarray, config: DecoderConfig, part: Part) -> np.ndarray:
    """Returns the outputs of one part from the last axis of a fused array. Contiguous outputs are not copied."""
    sizes, groups = part.sizes(config), part.groups(config)
    start = sum(sizes[: part.index])
    outputs = slice(start, start + sizes[part.index])
    if groups == 1:
        return fused[..., outputs]
    return fused.reshape(*fused.shape[:-1], groups, sum(sizes))[..., outputs].reshape(*fused.shape[:-1], -1)


def _view(stored: StoredTensor, config: DecoderConfig, address: TensorAddress) -> np.ndarray:
    """Returns a parameter as a view of its file. Only a part of a fused tensor with several groups is a copy."""
    view = stored.view().T if address.transposed else stored.view()
    return view if address.part is None else part_of(view, config, address.part)


def _column_reader(
    stored: StoredTensor, config: DecoderConfig, address: TensorAddress
) -> Callable[[slice], np.ndarray]:
    """Returns a function that reads some columns (outputs) of a kernel as float32."""
    view = _view(stored, config, address)

    def read(columns: slice) -> np.ndarray:
        part = np.array(view[:, columns], np.float32)
        if not np.isfinite(part).all():
            stored.refuse_not_finite()
        return part

    return read


def load_parameter(
    stored: StoredTensor,
    parameter: jax.ShapeDtypeStruct,
    config: DecoderConfig,
    address: TensorAddress,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """Reads a parameter onto its devices. Each slice is read and cast separately."""
    view = _view(stored, config, address)

    def read(index: Any) -> np.ndarray:
        # The part must be a copy. On a CPU a jax array may share memory with numpy, and the file may change.
        with np.errstate(over="ignore"):
            part = np.array(view[index], dtype=parameter.dtype, order="C")
        if parameter.dtype == jnp.float16 and not np.isfinite(part).all():
            if not np.isfinite(np.asarray(view[index], np.float32)).all():
                stored.refuse_not_finite()
            raise UserError(
                f"{stored.file}: tensor {stored.name} has numbers that are too large for float16; load the model as "
                "bfloat16 or float32"
            )
        return part

    if sharding is None:
        return jnp.asarray(read(...))
    return jax.make_array_from_callback(parameter.shape, sharding, read)


def merged_tensors(base: Decoder, adapter: Adapter | None, dtype: str | None) -> tuple[dict[str, Pending], str]:
    """Merges the adapter into the base, and returns (tensors of the checkpoint, their dtype).

    If `dtype` is None, the tensors keep the dtype of the base.
    """

    def widen(value: jax.Array) -> jax.Array:
        return value.astype(jnp.float32) if jnp.issubdtype(value.dtype, jnp.floating) else value

    own_dtype = named_parameters(base)["embed_tokens/embedding"].dtype.name
    exact = base if dtype in (None, own_dtype) else jax.tree.map(widen, base)
    parts: dict[str, list[tuple[TensorAddress, jax.Array]]] = {}
    for name, value in named_parameters(merge(exact, adapter)).items():
        address = address_of(base.config, name)
        parts.setdefault(address.tensor, []).append((address, value))
    tensors = {name: _fused(base.config, values) for name, values in parts.items()}
    return {name: in_dtype(name, tensor, dtype) for name, tensor in tensors.items()}, dtype or own_dtype


def _fused(config: DecoderConfig, parts: list[tuple[TensorAddress, jax.Array]]) -> Pending:
    """Returns the tensor of the checkpoint that holds these parameters. Its `fetch` joins the parameters."""
    address, first = parts[0]
    if address.part is None:
        return pending(first, address.transposed)
    groups = address.part.groups(config)
    ordered = [value for _, value in sorted(parts, key=lambda part: part[0].part.index)]

    def join() -> np.ndarray:
        grouped = [value.reshape(*value.shape[:-1], groups, -1) for value in map(fetch, ordered)]
        fused = np.concatenate(grouped, axis=-1).reshape(*first.shape[:-1], -1)
        return fused.T if address.transposed else fused

    return Pending(first.dtype, stored_shape(first.shape, config, address), join)


def pending(value: jax.Array, transposed: bool = False) -> Pending:
    """Returns a tensor to write. It holds the array, or the transpose of the array."""
    shape = value.shape[::-1] if transposed else value.shape
    return Pending(value.dtype, shape, lambda: fetch(value).T if transposed else fetch(value))


def in_dtype(name: str, tensor: Pending, dtype: str | None) -> Pending:
    """Returns a tensor whose `fetch` also rounds to `dtype`. If `dtype` is None, the tensor keeps its dtype."""
    if dtype is None or tensor.dtype == jnp.dtype(dtype):
        return tensor

    def fetch_rounded() -> np.ndarray:
        with np.errstate(over="ignore"):
            rounded = tensor.fetch().astype(jnp.dtype(dtype))
        if dtype == "float16" and not np.isfinite(rounded).all():
            raise UserError(
                f"dtype: tensor {name} has numbers that are too large for float16; give bfloat16 or float32"
            )
        return rounded

    return Pending(jnp.dtype(dtype), tensor.shape, fetch_rounded)
