"""Between our parameters and a checkpoint's tensors: matched, read slice by slice, put together again.

A checkpoint is checked as a whole from its headers before anything is built. Then each tensor goes from the mapped
file straight to its devices: no host or device holds what it does not keep.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    """The stored tensor of each of our parameters; `UserError` where one is missing or misshapen.

    Tensors that the decoder has no place for are left out with a notice, as transformers leaves them out with a
    warning: a value head, a vision tower, biases and layers that `config.json` does not call for.
    """
    matched, used = {}, set()
    for name, wanted in named_parameters(abstract_decoder(config)).items():
        where = address_of(config, name)
        theirs = _name_in(tensors, config, where.tensor)
        if theirs not in tensors:
            hint = ""
            if name == "lm_head/kernel":
                hint = "; if the embedding is the head too, config.json must say tie_word_embeddings: true"
            raise UserError(f"{folder}: tensor {theirs} is missing, which {folder / 'config.json'} calls for{hint}")
        tensor = matched[name] = tensors[theirs]
        used.add(theirs)
        tensor.check_dtype()
        shape = stored_shape(wanted.shape, config, where)
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.file}: tensor {theirs} has shape {list(tensor.shape)}; config.json calls for {list(shape)}"
            )
    left = [tensor.name for name, tensor in tensors.items() if name not in used and not is_ignored(config, name)]
    if left:
        why = f"as a {config.family} decoder with this config.json has no place for them"
        notice(f"{folder}: left out, {why}: {_summary(left)}")
    return matched


def plain_tensors(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A checkpoint's tensors by the names of the plain text model, where a multimodal one is around it."""
    return {plain_name(name): tensor for name, tensor in tensors.items()}


def tied_as_stored(
    config: DecoderConfig, tensors: dict[str, StoredTensor], folder: Path
) -> tuple[DecoderConfig, dict[str, StoredTensor]]:
    """Config and tensors after the tensors have decided whether embedding and head are one, as in transformers 5.

    Tied, with a head that differs from the embedding: they are two. Tied, with the head alone: it is the embedding.
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
    notice(f"{folder}: config.json ties the embedding to the head, but {embedding} and {head} differ: both are read")
    return dataclasses.replace(config, tie_embeddings=False), tensors


def _name_in(tensors: dict[str, StoredTensor], config: DecoderConfig, tensor: str) -> str:
    """The name of a family's tensor in this checkpoint: that of a model saved without its head lacks the prefix."""
    prefix = FAMILIES[config.family].prefix
    bare = not any(name.startswith(prefix) for name in tensors)
    return tensor.removeprefix(prefix) if bare else tensor


def _equal(one: StoredTensor, other: StoredTensor, rows: int = 4096) -> bool:
    """Whether two tensors hold the same numbers, read a few rows at a time."""
    for tensor in (one, other):
        tensor.check_dtype()
    if one.shape != other.shape:
        return False
    a, b = one.view(), other.view()
    parts = range(0, len(a), rows)
    return all(np.array_equal(a[i : i + rows].astype(np.float32), b[i : i + rows].astype(np.float32)) for i in parts)


def _summary(names: list[str], shown: int = 4) -> str:
    """Tensors by the module that they stand in, one alone by its name: "v_head.summary (2 tensors) and 7 more"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.split(r"\.\d+\.|\.[^.]+$", name)[0], []).append(name)
    largest = sorted(groups, key=lambda group: -len(groups[group]))
    counted = {group: f"{group} ({len(inside)} tensors)" for group, inside in groups.items()}
    listed = [groups[group][0] if len(groups[group]) == 1 else counted[group] for group in largest[:shown]]
    rest = sum(len(groups[group]) for group in largest[shown:])
    return ", ".join(listed) + (f" and {rest} more" if rest else "")


def read_decoder(
    config: DecoderConfig,
    stored: dict[str, StoredTensor],
    dtype: str,
    mesh: jax.sharding.Mesh | None,
    quantize: str | None = None,
) -> Decoder:
    """The decoder of tensors that `match` has found, each parameter laid out on the mesh, for the mesh's devices."""
    config = dataclasses.replace(config, target=target_of(mesh))
    abstract, values = abstract_decoder(config, dtype), {}
    quantized = {} if quantize is None else linear_shapes(abstract)
    for name, wanted in named_parameters(abstract).items():
        module, _, leaf = name.partition("/")
        where = address_of(config, name)
        if leaf == "kernel" and module in quantized:
            columns = _column_reader(stored[name], config, where)
            values |= load_quantized(module, kind_of(config, module, quantize), wanted.shape, columns, mesh)
            continue
        sharding = None if mesh is None else parameter_sharding(mesh, name, wanted.shape)
        values[name] = load_parameter(stored[name], wanted, config, where, sharding)
    return with_parameters(abstract if quantize is None else abstract_quantized(abstract, quantize), values)


def stored_shape(shape: tuple[int, ...], config: DecoderConfig, where: TensorAddress) -> tuple[int, ...]:
    """The shape of the checkpoint's tensor in which a parameter of ours stands."""
    if where.part is not None:
        shape = (*shape[:-1], where.part.groups(config) * sum(where.part.sizes(config)))
    return shape[::-1] if where.transposed else shape


def _part_of(view: np.ndarray, config: DecoderConfig, part: Part) -> np.ndarray:
    """Our outputs, the last axis, of a fused tensor; a view where they stand together."""
    sizes, groups = part.sizes(config), part.groups(config)
    start = sum(sizes[: part.index])
    if groups == 1:
        return view[..., start : start + sizes[part.index]]
    grouped = view.reshape(*view.shape[:-1], groups, sum(sizes))
    return grouped[..., start : start + sizes[part.index]].reshape(*view.shape[:-1], -1)


def _view(stored: StoredTensor, config: DecoderConfig, where: TensorAddress) -> np.ndarray:
    """A parameter as it lies in the file."""
    view = stored.view().T if where.transposed else stored.view()
    return view if where.part is None else _part_of(view, config, where.part)


def _column_reader(stored: StoredTensor, config: DecoderConfig, where: TensorAddress) -> Callable[[slice], np.ndarray]:
    """Reads outputs of a kernel, float32."""
    view = _view(stored, config, where)

    def read(columns: slice) -> np.ndarray:
        part = np.array(view[:, columns], np.float32)
        if not np.isfinite(part).all():
            raise UserError(f"{stored.file}: tensor {stored.name} has values that are no numbers; they have no codes")
        return part

    return read


def load_parameter(
    stored: StoredTensor,
    wanted: jax.ShapeDtypeStruct,
    config: DecoderConfig,
    where: TensorAddress,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """A parameter on its devices, each slice read and cast on its own."""
    view = _view(stored, config, where)

    def read(index: Any) -> np.ndarray:
        # Always a copy: on CPU a jax array may share numpy's memory, and the file may change.
        with np.errstate(over="ignore"):
            part = np.array(view[index], dtype=wanted.dtype, order="C")
        if wanted.dtype == jnp.float16 and not np.isfinite(part).all():
            raise UserError(f"{stored.file}: tensor {stored.name} does not fit float16; load it as bfloat16 or float32")
        return part

    if sharding is None:
        return jnp.asarray(read(...))
    return jax.make_array_from_callback(wanted.shape, sharding, read)


def merged_tensors(base: Decoder, adapter: Adapter | None, dtype: str | None) -> tuple[dict[str, Pending], str]:
    """The checkpoint's tensors of base and adapter, and their dtype; None: the base's."""
    own_dtype = named_parameters(base)["embed_tokens/embedding"].dtype.name
    exact = base if dtype in (None, own_dtype) else jax.tree.map(_widened, base)
    pending = _tensors(base.config, named_parameters(merge(exact, adapter)))
    return {name: in_dtype(name, tensor, dtype) for name, tensor in pending.items()}, dtype or own_dtype


def _tensors(config: DecoderConfig, parameters: dict[str, jax.Array]) -> dict[str, Pending]:
    """The checkpoint's tensors of our parameters; the parts of a fused one are put together when it is fetched."""
    pieces: dict[str, list[tuple[TensorAddress, jax.Array]]] = {}
    for name, value in parameters.items():
        where = address_of(config, name)
        pieces.setdefault(where.tensor, []).append((where, value))
    return {tensor: _fused(config, parts) for tensor, parts in pieces.items()}


def _fused(config: DecoderConfig, pieces: list[tuple[TensorAddress, jax.Array]]) -> Pending:
    where, first = pieces[0]
    if where.part is None:
        return pending(first, where.transposed)
    groups = where.part.groups(config)
    ordered = [value for _, value in sorted(pieces, key=lambda piece: piece[0].part.index)]

    def fetch() -> np.ndarray:
        parts = [on_host(value).reshape(*value.shape[:-1], groups, -1) for value in ordered]
        whole = np.concatenate(parts, axis=-1).reshape(*first.shape[:-1], -1)
        return whole.T if where.transposed else whole

    return Pending(first.dtype, stored_shape(first.shape, config, where), fetch)


def pending(value: jax.Array, transposed: bool = False) -> Pending:
    def fetch() -> np.ndarray:
        return on_host(value).T if transposed else on_host(value)

    return Pending(value.dtype, value.shape[::-1] if transposed else value.shape, fetch)


def _widened(value: jax.Array) -> jax.Array:
    return value.astype(jnp.float32) if jnp.issubdtype(value.dtype, jnp.floating) else value


def in_dtype(name: str, tensor: Pending, dtype: str | None) -> Pending:
    """The tensor `name` rounded to `dtype` when it is fetched; None: as it is."""
    if dtype is None or tensor.dtype == jnp.dtype(dtype):
        return tensor

    def fetch() -> np.ndarray:
        with np.errstate(over="ignore"):
            rounded = tensor.fetch().astype(jnp.dtype(dtype))
        if dtype == "float16" and not np.isfinite(rounded).all():
            raise UserError(f"dtype: tensor {name} does not fit float16; bfloat16 or float32 would do")
        return rounded

    return Pending(jnp.dtype(dtype), tensor.shape, fetch)


def on_host(value: jax.Array) -> np.ndarray:
    """The whole array, gathered from all hosts where it lies on several."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)
