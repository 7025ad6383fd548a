"""Pretrained folders in, merged folders and adapters out.

A checkpoint is checked as a whole from its headers before anything is built. Then each tensor goes from the
mapped file straight to its devices, slice by slice: no host or device holds what it does not keep.

Not here: PEFT's adapter format (`peft.py`); downloading anything but JSON, safetensors and tokenizer files.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import UserError
from jaxrlhf.models.adapters import SCORE, merge
from jaxrlhf.models.decoder import (
    Decoder,
    DecoderConfig,
    abstract_decoder,
    linear_shapes,
    named_parameters,
    with_parameters,
)
from jaxrlhf.models.families import FAMILIES, config_document, is_ignored, place, read_config, token_entry, token_ids
from jaxrlhf.models.family import Part, Place
from jaxrlhf.models.quantize import KINDS, abstract_quantized, kind_of, load_quantized, quantization
from jaxrlhf.models.tensor_files import (
    Pending,
    StoredTensor,
    read_checkpoint,
    read_json,
    read_tensors,
    write_checkpoint,
    write_json,
    write_tensors,
)
from jaxrlhf.records import Adapter
from jaxrlhf.runtime.mesh import parameter_sharding
from jaxrlhf.runtime.run_dir import atomic_directory

if TYPE_CHECKING:
    from jaxrlhf.data.tokenizers import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")  # endings found in a folder that may be replaced
ADAPTER, ADAPTER_INFO = "adapter.safetensors", "adapter.json"
ADAPTER_FORMAT, ADAPTER_VERSION = "jaxrlhf-adapter", 1


def load_pretrained(
    path: str | Path,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    quantize: str | None = None,
) -> tuple[Decoder, "Tokenizer | None"]:
    """The decoder and the tokenizer (None where there is none) of a Hugging Face folder or hub id.

    Weights stored as float32, bfloat16 or float16 are cast to `dtype`. With a mesh each parameter is laid out as
    `runtime.mesh.parameter_sharding` says, and each process reads its own slices only. `quantize` "int8" or "nf4"
    keeps the linear layers of the blocks as codes (see `quantize.py`), made on the host a part at a time. Raises
    `UserError` naming file and entry or tensor where the folder cannot be used.
    """
    from jaxrlhf.data.tokenizers import load_tokenizer

    check_dtype(dtype)
    if quantize not in (None, *KINDS):
        raise UserError(f"quantize: must be one of {', '.join(KINDS)} or None, not {quantize!r}")
    folder = _find_folder(path)
    config = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    stored = _match(config, read_checkpoint(folder), folder)
    tokenizer = load_tokenizer(str(folder))
    return _read_decoder(_with_tokens(config, folder, tokenizer), stored, dtype, mesh, quantize), tokenizer


def save_pretrained(
    path: str | Path,
    base: Decoder,
    adapter: Adapter | None = None,
    tokenizer: "Tokenizer | None" = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
) -> None:
    """Writes base and adapter, merged, as a folder that transformers opens, in the base's dtype or the one given.

    Weights are rounded once, after merging. A scalar head is left out. The folder appears complete or not at all; an
    older model there is replaced. Raises `UserError` where anything else is there, and for a weight too large for
    `dtype`.
    """
    target = Path(path).expanduser().absolute()
    check_dtype(dtype)
    _check_replaceable(target, "config.json", lambda f: f.is_file() and f.suffix in MODEL_FILES)
    config = base.config
    tensors, dtype = _merged_tensors(base, adapter, dtype)
    generation = {
        "bos_token_id": config.bos_token,
        "eos_token_id": token_entry(config.stop_tokens),
        "pad_token_id": config.pad_token,
    }
    with _written_once(target) as (folder, primary):
        write_checkpoint(folder, tensors, max_shard_bytes, primary)
        if primary:
            write_json(folder / "config.json", config_document(config, dtype))
            write_json(folder / "generation_config.json", generation)
            if tokenizer is not None:
                tokenizer.save(str(folder))


def save_adapter(path: str | Path, adapter: Adapter) -> None:
    """Writes an adapter, scalar head included: `adapter.safetensors` and `adapter.json`, all or nothing."""
    target = Path(path).expanduser().absolute()
    _check_replaceable(target, ADAPTER_INFO, lambda f: f.name in (ADAPTER, ADAPTER_INFO))
    leaves = {f"{module}/{leaf}": value for module, values in adapter.items() for leaf, value in values.items()}
    ranks = [value.shape[1] for name, value in leaves.items() if name.endswith("/lora_a")]
    info = {
        "format": ADAPTER_FORMAT,
        "version": ADAPTER_VERSION,
        "kind": "lora" if ranks else "full",
        "rank": max(ranks, default=None),
        "head": SCORE in adapter,
    }
    with _written_once(target) as (folder, primary):
        write_tensors(folder / ADAPTER, {name: _pending(value) for name, value in leaves.items()}, primary)
        if primary:
            write_json(folder / ADAPTER_INFO, info)


def load_adapter(path: str | Path, base: Decoder) -> Adapter:
    """An adapter that `save_adapter` or PEFT wrote, checked against the base it is for; see `peft.load_peft`.

    Raises `UserError` naming file and tensor where names or shapes do not fit.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; an adapter is a folder with {ADAPTER_INFO} and {ADAPTER}")
    if not (folder / ADAPTER_INFO).exists() and (folder / "adapter_config.json").exists():
        from jaxrlhf.models.peft import load_peft

        return load_peft(folder, base)
    info = read_json(folder / ADAPTER_INFO)
    if (info.get("format"), info.get("version")) != (ADAPTER_FORMAT, ADAPTER_VERSION):
        raise UserError(
            f"{folder / ADAPTER_INFO}: format {info.get('format')!r} version {info.get('version')!r};"
            f" must be {ADAPTER_FORMAT!r} version {ADAPTER_VERSION}"
        )
    stored = read_tensors(folder / ADAPTER)
    _check_adapter(stored, info.get("kind"), base, folder / ADAPTER)
    adapter: Adapter = {}
    for name, tensor in stored.items():
        module, leaf = name.split("/")
        adapter.setdefault(module, {})[leaf] = jnp.asarray(np.array(tensor.view()))
    return adapter


def check_dtype(dtype: str | None) -> None:
    """`UserError` unless it is None or the name of a dtype that weights may have."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: must be one of {', '.join(DTYPES)}, not {dtype!r}")


def _find_folder(path: str | Path) -> Path:
    """The folder itself, or the local copy of a hub id's files."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path)):
        raise UserError(f"{path}: no such folder; want one with config.json and weights, or a hub id like owner/name")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:  # hub and connection errors are OSErrors, a malformed id a ValueError
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path}: no such folder here, and not to be had from the hub: {reason}") from None


def _match(config: DecoderConfig, tensors: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The stored tensor of each of our parameters; `UserError` where one is missing, misshapen or left over."""
    matched = {}
    prefix = FAMILIES[config.family].prefix
    bare = not any(name.startswith(prefix) for name in tensors)  # a checkpoint of the model without its head
    for name, wanted in named_parameters(abstract_decoder(config)).items():
        where = place(config, name)
        theirs = where.tensor.removeprefix(prefix) if bare else where.tensor
        if theirs not in tensors:
            raise UserError(f"{folder}: tensor {theirs} is missing, which {folder / 'config.json'} calls for")
        tensor = matched[name] = tensors[theirs]
        shape = _stored_shape(wanted.shape, config, where)
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.file}: tensor {theirs} has shape {list(tensor.shape)}; config.json calls for {list(shape)}"
            )
    known = {tensor.name for tensor in matched.values()}
    for tensor in tensors.values():
        if tensor.name not in known and not is_ignored(config, tensor.name):
            raise UserError(
                f"{tensor.file}: tensor {tensor.name} has no place in a {config.family} decoder with this config.json"
            )
    return matched


def _with_tokens(config: DecoderConfig, folder: Path, tokenizer: "Tokenizer | None") -> DecoderConfig:
    """The config with the tokens that end answers and fill up rows.

    `generation_config.json` wins over `config.json`, that over the tokenizer. Masks say what is real, so a
    missing pad token may be any: a stop token, or 0.
    """
    file = folder / "generation_config.json"
    generation = read_json(file) if file.exists() else {}
    found = {}
    for entry in ("eos_token_id", "pad_token_id"):
        try:
            found[entry] = token_ids(generation.get(entry))
        except ValueError as error:
            raise UserError(f"{file}: {entry} must be {error}, not {generation[entry]!r}") from None
    own_eos, own_pad = (tokenizer.eos_id, tokenizer.pad_id) if tokenizer is not None else (None, None)
    stops = found["eos_token_id"] or config.stop_tokens or token_ids(own_eos)
    for token in stops:
        if token >= config.vocab_size:
            raise UserError(f"{folder}: eos_token_id {token} is outside the vocabulary of {config.vocab_size} tokens")
    pads = (*found["pad_token_id"], config.pad_token, own_pad, *stops, 0)
    pad = next(token for token in pads if token is not None and token < config.vocab_size)
    return dataclasses.replace(config, stop_tokens=stops, pad_token=pad)


def _read_decoder(
    config: DecoderConfig,
    stored: dict[str, StoredTensor],
    dtype: str,
    mesh: jax.sharding.Mesh | None,
    quantize: str | None = None,
) -> Decoder:
    """The decoder of tensors that `_match` has found, each parameter laid out on the mesh."""
    abstract, values = abstract_decoder(config, dtype), {}
    quantized = {} if quantize is None else linear_shapes(abstract)
    for name, wanted in named_parameters(abstract).items():
        module, _, leaf = name.partition("/")
        where = place(config, name)
        if leaf == "kernel" and module in quantized:
            columns = _column_reader(stored[name], config, where)
            values |= load_quantized(module, kind_of(config, module, quantize), wanted.shape, columns, mesh)
            continue
        sharding = None if mesh is None else parameter_sharding(mesh, name, wanted.shape)
        values[name] = _load(stored[name], wanted, config, where, sharding)
    return with_parameters(abstract if quantize is None else abstract_quantized(abstract, quantize), values)


def _stored_shape(shape: tuple[int, ...], config: DecoderConfig, where: Place) -> tuple[int, ...]:
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


def _view(stored: StoredTensor, config: DecoderConfig, where: Place) -> np.ndarray:
    """A parameter as it lies in the file."""
    view = stored.view().T if where.transposed else stored.view()
    return view if where.part is None else _part_of(view, config, where.part)


def _column_reader(stored: StoredTensor, config: DecoderConfig, where: Place) -> Callable[[slice], np.ndarray]:
    """Reads outputs of a kernel, float32."""
    view = _view(stored, config, where)

    def read(columns: slice) -> np.ndarray:
        part = np.array(view[:, columns], np.float32)
        if not np.isfinite(part).all():
            raise UserError(f"{stored.file}: tensor {stored.name} has values that are no numbers; they have no codes")
        return part

    return read


def _load(
    stored: StoredTensor,
    wanted: jax.ShapeDtypeStruct,
    config: DecoderConfig,
    where: Place,
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


def _merged_tensors(base: Decoder, adapter: Adapter | None, dtype: str | None) -> tuple[dict[str, Pending], str]:
    """The checkpoint's tensors of base and adapter, and their dtype; None: the base's."""
    own_dtype = named_parameters(base)["embed_tokens/embedding"].dtype.name
    exact = base if dtype in (None, own_dtype) else jax.tree.map(_widened, base)
    pending = _tensors(base.config, named_parameters(merge(exact, adapter)))
    return {name: _in_dtype(name, tensor, dtype) for name, tensor in pending.items()}, dtype or own_dtype


def _tensors(config: DecoderConfig, parameters: dict[str, jax.Array]) -> dict[str, Pending]:
    """The checkpoint's tensors of our parameters; the parts of a fused one are put together when it is fetched."""
    pieces: dict[str, list[tuple[Place, jax.Array]]] = {}
    for name, value in parameters.items():
        where = place(config, name)
        pieces.setdefault(where.tensor, []).append((where, value))
    return {tensor: _fused(config, parts) for tensor, parts in pieces.items()}


def _fused(config: DecoderConfig, pieces: list[tuple[Place, jax.Array]]) -> Pending:
    where, first = pieces[0]
    if where.part is None:
        return _pending(first, where.transposed)
    groups = where.part.groups(config)
    ordered = [value for _, value in sorted(pieces, key=lambda piece: piece[0].part.index)]

    def fetch() -> np.ndarray:
        parts = [_on_host(value).reshape(*value.shape[:-1], groups, -1) for value in ordered]
        whole = np.concatenate(parts, axis=-1).reshape(*first.shape[:-1], -1)
        return whole.T if where.transposed else whole

    return Pending(first.dtype, _stored_shape(first.shape, config, where), fetch)


def _pending(value: jax.Array, transposed: bool = False) -> Pending:
    def fetch() -> np.ndarray:
        return _on_host(value).T if transposed else _on_host(value)

    return Pending(value.dtype, value.shape[::-1] if transposed else value.shape, fetch)


def _widened(value: jax.Array) -> jax.Array:
    return value.astype(jnp.float32) if jnp.issubdtype(value.dtype, jnp.floating) else value


def _in_dtype(name: str, tensor: Pending, dtype: str | None) -> Pending:
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


def _on_host(value: jax.Array) -> np.ndarray:
    """The whole array, gathered from all hosts where it lies on several."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


@contextlib.contextmanager
def _written_once(target: Path) -> Iterable[tuple[Path, bool]]:
    """A folder to write into and whether this process is the one that writes; the others wait for it."""
    primary = jax.process_index() == 0
    with atomic_directory(target, replace=True) if primary else contextlib.nullcontext(target) as folder:
        yield folder, primary
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"written {target.name}")


def _check_replaceable(target: Path, mark: str, expected: Callable[[Path], bool]) -> None:
    """`UserError` where a folder is there that holds anything but an older version of what is to be written."""
    if target.is_dir():
        files = list(target.iterdir())
        strangers = sorted(file.name for file in files if not expected(file))
        if strangers or (files and mark not in {file.name for file in files}):
            what = strangers[0] if strangers else files[0].name
            raise UserError(f"{target}: holds {what}, which would be lost; give a new or empty folder")


def _check_adapter(stored: dict[str, StoredTensor], kind: Any, base: Decoder, file: Path) -> None:
    """`UserError` unless each tensor has its place in the base and each LoRA pair is whole."""
    parameters = {name: leaf.shape for name, leaf in named_parameters(base).items()}
    layers = linear_shapes(base)
    if kind == "full" and (codes := quantization(base)) is not None:
        raise UserError(f"{file}: a full adapter replaces every weight; this base is in {codes} codes")
    for name, tensor in stored.items():
        module, _, leaf = name.partition("/")
        if leaf in ("lora_a", "lora_b", "lora_scale"):
            pair = [stored.get(f"{module}/{part}") for part in ("lora_a", "lora_b", "lora_scale")]
            if None in pair:
                raise UserError(f"{file}: module {module} has no whole LoRA pair (lora_a, lora_b, lora_scale)")
            outer = layers.get(module)
            rank = pair[0].shape[-1] if pair[0].shape else 0
            wanted = outer and {"lora_a": (outer[0], rank), "lora_b": (rank, outer[1]), "lora_scale": ()}[leaf]
        elif module == SCORE:
            wanted = (base.config.hidden_size, 1) if leaf == "kernel" else None
        else:
            wanted = parameters.get(name)
        if wanted is None:
            raise UserError(f"{file}: tensor {name} has no place in this base; the adapter is another model's")
        if tensor.shape != wanted:
            raise UserError(f"{file}: tensor {name} has shape {list(tensor.shape)}; this base wants {list(wanted)}")
    missing = sorted(set(parameters) - set(stored)) if kind == "full" else []
    if missing:
        raise UserError(f"{file}: tensor {missing[0]} is missing from a full adapter")
