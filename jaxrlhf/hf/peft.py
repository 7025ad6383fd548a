"""Reads and writes LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors` in a folder.

PEFT uses the module names of the checkpoint. Some checkpoints fuse several modules of the decoder into one tensor. A
LoRA pair of a fused tensor is read in parts: each module gets the whole matrix A and its own rows of B. The LoRA pairs
of these modules are written as one pair: the A matrices are stacked, and the B matrices form a block matrix. The result
is exact. Its rank is the sum of the ranks of the pairs.

`peft_full.py` reads PEFT tensors that become full weights. PEFT adapters of other kinds are not supported.
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.distributed.mesh import fetch
from jaxrlhf.errors import UserError
from jaxrlhf.hf.decoder_tensors import in_dtype, part_of, pending, stored_size
from jaxrlhf.hf.families import address_of
from jaxrlhf.hf.folders import EXPORTED, PEFT_INFO, check_dtype, check_replaceable, written_once
from jaxrlhf.hf.peft_config import NEWER_NAMES, PeftConfig, peft_document, read_peft_config
from jaxrlhf.hf.peft_full import EMBEDDING, beyond_peft, check_foldable, folded_dora, full_weights, module_of
from jaxrlhf.hf.tensor_files import Pending, StoredTensor, read_json, read_tensors, write_json, write_tensors
from jaxrlhf.hf.wrappers import plain_name
from jaxrlhf.models.adapters import HEAD, LORA_LEAVES, SCORE, merge, without_head
from jaxrlhf.models.decoder import Decoder, linear_shapes
from jaxrlhf.models.sharding import shard
from jaxrlhf.records import Adapter
from jaxrlhf.tracking.notices import notice

PEFT_TENSORS, PEFT_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight")
EMBEDDING_PAIR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.(?P<adapter>[^.]+))?")
MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.(?!weight)[^.]+)?(\.weight)?")
SAVED = re.compile(r"(.+)\.(?:modules_to_save(?:\.[^.]+)?|base_layer)\.(weight|bias)")
HEAD_TENSOR = f"{PREFIX}score.weight"
SHAPE_SOURCE = f"{PEFT_INFO} and this base"


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A linear layer of the checkpoint. The layer holds modules of the decoder; each module has some of the outputs."""

    fan_in: int
    outputs: dict[str, np.ndarray]  # path of a module in the decoder -> indices of its outputs, i64[out]
    transposed: bool  # True if the checkpoint's kernel is [out, in]

    @property
    def fan_out(self) -> int:
        return sum(map(len, self.outputs.values()))


def load_peft(path: str | Path, base: Decoder) -> Adapter:
    """Loads a LoRA adapter in float32 from a PEFT folder, and checks that the adapter fits the base.

    The scale of a LoRA pair is alpha / r. If `use_rslora` is true, the scale is alpha / sqrt(r) (2312.03732).
    `rank_pattern`, `alpha_pattern` and a `score` head are supported. Modules in `modules_to_save`, a LoRA pair on the
    embedding, and DoRA become full weights (see `peft_full`). Raises `UserError` if an entry is not supported, or if a
    tensor is missing, unused, not finite or of a wrong shape. The error names the file, and the entry or tensor.
    """
    folder = Path(path).expanduser()
    file = folder / PEFT_TENSORS
    config = read_peft_config(read_json(folder / PEFT_INFO), folder / PEFT_INFO)
    if not file.exists():
        pickled = (folder / PEFT_PICKLE).exists()
        reason = f"{folder / PEFT_PICKLE}: pickle files are not read; convert the file to safetensors"
        raise UserError(reason if pickled else f"{folder}: this folder has no {PEFT_TENSORS}")
    stored = {_plain(name): tensor for name, tensor in read_tensors(file).items()}
    for tensor in stored.values():
        tensor.check_dtype()
        if not np.isfinite(np.asarray(tensor.view(), np.float32)).all():
            tensor.refuse_not_finite()
    head = stored.pop("score.weight", None)
    if config.has_head and head is None:
        raise UserError(f"{file}: tensor {HEAD_TENSOR} is missing, but modules_to_save lists the head")
    if head is not None:
        head.check_shape((1, base.config.hidden_size), SHAPE_SOURCE)
    magnitudes = {match["module"]: tensor for match, tensor in _take(stored, MAGNITUDE)}
    embedding = module_of(base, EMBEDDING)
    sides = {match["side"]: tensor for match, tensor in _take(stored, EMBEDDING_PAIR, embedding)}
    if embedding in magnitudes or len(sides) == 1:
        what = "DoRA on the embedding" if embedding in magnitudes else "half a LoRA pair on the embedding"
        raise UserError(f"{file}: {what} cannot be read; merge the adapter with PEFT (merge_and_unload)")
    layers = _layers(base)
    pairs = _pairs(stored, layers, file, allow_none=bool(sides))
    embedding_pair = (sides["A"], sides["B"]) if sides else None
    adapter = full_weights(base, stored, embedding_pair, module_of(base, HEAD) in pairs, config, file)
    for name, tensor in stored.items():
        raise UserError(f"{file}: tensor {tensor.name} does not belong to this base, because the base has no {name}")
    _check_pairs(pairs, layers, config, magnitudes, file)
    for module, tensors in pairs.items():
        magnitude, scale = magnitudes.get(module), config.scale(module)
        for ours, leaves in _own_leaves(base, layers[module], tensors, magnitude, scale, adapter).items():
            adapter[ours] = adapter.get(ours, {}) | leaves
    if magnitudes:
        check_foldable(base, folder / PEFT_INFO)
        notice(f"{folder}: DoRA pairs and magnitudes of {len(magnitudes)} modules are merged into full weights")
    if head is not None:
        adapter[SCORE] = {"kernel": jnp.asarray(np.array(head.view().T, np.float32))}
    return adapter


def with_adapter(
    base: Decoder, folder: Path, base_folder: Path, mesh: jax.sharding.Mesh | None
) -> tuple[Decoder, Adapter]:
    """Merges the adapter of a PEFT folder into the base, and returns (base, adapter).

    The returned adapter holds only the scalar head. If there is no scalar head, the returned adapter is {}.
    """
    adapter = load_peft(folder, base)
    notice(f"{folder}: this folder holds an adapter; the adapter is merged into its base {base_folder}")
    adapter = adapter if mesh is None else shard(mesh, adapter)
    return merge(base, adapter), {SCORE: adapter[SCORE]} if SCORE in adapter else {}


def save_peft(
    path: str | Path, base: Decoder, adapter: Adapter, base_path: str | None = None, dtype: str | None = None
) -> None:
    """Writes the LoRA pairs of an adapter to a folder in PEFT's format. `base_path` is the base's folder or hub id.

    Full weights of embedding and head become `modules_to_save`. If `dtype` is None, all dtypes are kept. A scalar head
    is not written. The folder is written atomically. Raises `UserError` if the adapter has other full weights or no
    LoRA pair, or if the folder holds files that jaxrlhf may not replace.
    """
    target = Path(path).expanduser().absolute()
    check_dtype(dtype)
    check_replaceable(target, *EXPORTED)
    layers = _layers(base)
    known = {ours for layer in layers.values() for ours in layer.outputs}
    for module, leaves in without_head(adapter).items():
        if beyond_peft(module, leaves):
            raise UserError(
                f"the adapter's module {module} holds full weights, but PEFT's format needs a LoRA pair; export the "
                "adapter merged into its base"
            )
        if module not in known and module != EMBEDDING:
            raise UserError(f"this base has no module {module}; the adapter belongs to another model")
    fused = {module: _fused_pair(layer, adapter) for module, layer in layers.items()}
    pairs = {module: pair for module, pair in fused.items() if pair is not None}
    if not pairs:
        raise UserError(
            "the adapter has no LoRA pair, but PEFT's format needs one; export the adapter merged into its base"
        )
    tensors: dict[str, Pending] = {}
    for module, (a_RI, b_OR, _) in pairs.items():
        for side, array in (("A", a_RI), ("B", b_OR)):
            name = f"{PREFIX}{module}.lora_{side}.weight"
            tensors[name] = in_dtype(name, Pending(array.dtype, array.shape, lambda array=array: array), dtype)
    saved = _saved(base, adapter)
    tensors |= {f"{PREFIX}{module}.weight": in_dtype(module, table, dtype) for module, table in saved.items()}
    numbers = {module: (len(a_RI), scale) for module, (a_RI, _, scale) in pairs.items()}
    conv_style = not next(iter(layers.values())).transposed  # true for GPT-2
    names = [module.rpartition(".")[2] for module in saved]
    document = peft_document(numbers, list(layers), base_path, conv_style, names)
    with written_once(target) as (folder, primary):
        write_tensors(folder / PEFT_TENSORS, tensors, primary)
        if primary:
            write_json(folder / PEFT_INFO, document)


# ---------------------------------------------------------------- modules


def _own_leaves(
    base: Decoder,
    layer: _Layer,
    pair: tuple[StoredTensor, StoredTensor],
    magnitude: StoredTensor | None,
    scale: float,
    adapter: Adapter,
) -> dict[str, dict[str, jnp.ndarray]]:
    """Returns the leaves of each module of the decoder in a layer. They are a LoRA pair, or DoRA's merged kernel."""
    a_RI, b_OR = (np.array(tensor.view(), np.float32) for tensor in pair)
    modules = {}
    for ours, outputs in layer.outputs.items():
        if magnitude is not None:
            length = np.array(magnitude.view(), np.float32)[outputs]
            saved_kernel = adapter.get(ours, {}).get("kernel")
            modules[ours] = folded_dora(base, saved_kernel, ours, (a_RI, b_OR[outputs]), length, scale)
            continue
        # A module gets the columns of B that are nonzero in its own rows. Every module gets the columns of zeros.
        ranks = (b_OR[outputs] != 0).any(axis=0) | ~(b_OR != 0).any(axis=0)
        if ranks.any():
            modules[ours] = {
                "lora_a": jnp.asarray(a_RI[ranks].T),
                "lora_b": jnp.asarray(b_OR[outputs][:, ranks].T),
                "lora_scale": jnp.asarray(scale, jnp.float32),
            }
    return modules


def _layers(base: Decoder) -> dict[str, _Layer]:
    """Returns the linear layers of the blocks and the head, by module name in the checkpoint."""
    layers: dict[str, _Layer] = {}
    head = {HEAD: (base.config.hidden_size, base.config.vocab_size)}
    for ours, (fan_in, fan_out) in (linear_shapes(base) | head).items():
        address = address_of(base.config, f"{ours}/kernel")
        outputs = np.arange(fan_out)
        if address.part is not None:
            outputs = part_of(np.arange(stored_size(base.config, address.part)), base.config, address.part)
        module = module_of(base, ours)
        layers.setdefault(module, _Layer(fan_in, {}, address.transposed)).outputs[ours] = outputs
    return layers


def _fused_pair(layer: _Layer, adapter: Adapter) -> tuple[np.ndarray, np.ndarray, np.float32] | None:
    """Joins the LoRA pairs of a layer's modules into one LoRA pair, and returns (A [R, in], B [out, R], scale).

    Returns None if no module of the layer has a LoRA pair.
    """
    pairs = [
        (outputs, *(fetch(adapter[ours][leaf]) for leaf in LORA_LEAVES))
        for ours, outputs in layer.outputs.items()
        if "lora_a" in adapter.get(ours, {})
    ]
    if not pairs:
        return None
    scale = np.float32(max((own_scale for *_, own_scale in pairs), key=abs))
    a_RI = np.concatenate([lora_a.T for _, lora_a, _, _ in pairs])
    b_OR = np.zeros((layer.fan_out, len(a_RI)), jnp.result_type(*(lora_b for _, _, lora_b, _ in pairs)))
    start = 0
    for outputs, lora_a, lora_b, own_scale in pairs:
        end = start + lora_a.shape[1]
        b_OR[outputs, start:end] = (lora_b if own_scale == scale else lora_b * (own_scale / scale)).T
        start = end
    return a_RI, b_OR, scale


def _saved(base: Decoder, adapter: Adapter) -> dict[str, Pending]:
    """Returns the adapter's full weights of embedding and head, by module name in the checkpoint.

    PEFT unties the modules in `modules_to_save`. So if the head is tied to a trained embedding, the head is written as
    a copy of the embedding.
    """
    saved = {}
    if EMBEDDING in adapter:
        saved[module_of(base, EMBEDDING)] = pending(adapter[EMBEDDING]["embedding"])
        if base.lm_head is None and HEAD not in adapter:
            saved[module_of(base, HEAD)] = pending(adapter[EMBEDDING]["embedding"])
    if "kernel" in adapter.get(HEAD, {}):
        saved[module_of(base, HEAD)] = pending(adapter[HEAD]["kernel"], transposed=True)
    return saved


# ---------------------------------------------------------------- adapter_model.safetensors


def _plain(name: str) -> str:
    """Returns the name of a tensor without the prefixes of PEFT and of multimodal models."""
    if match := SAVED.fullmatch(name):
        name = f"{match[1]}.{match[2]}"
    name = plain_name(name.removeprefix(PREFIX))
    module, dot, rest = name.partition(".")
    return NEWER_NAMES.get(module, module) + dot + rest


def _take(
    stored: dict[str, StoredTensor], pattern: re.Pattern, module: str | None = None
) -> list[tuple[re.Match, StoredTensor]]:
    """Removes from `stored` the tensors with a name that matches the pattern, and returns them.

    If `module` is given, removes only the tensors of this module.
    """
    matches = [(match, name) for name in stored if (match := pattern.fullmatch(name))]
    return [(match, stored.pop(name)) for match, name in matches if module in (None, match["module"])]


def _pairs(
    stored: dict[str, StoredTensor], layers: dict[str, _Layer], file: Path, allow_none: bool
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Removes the tensors A and B of each LoRA pair from `stored`, and returns them by module.

    Raises `UserError` if one of the two tensors is missing, or if the base does not have the module.
    """
    sides: dict[str, dict[str, StoredTensor]] = {}
    adapters = set()
    for match, tensor in _take(stored, PAIR):
        if match["module"] not in layers:
            raise UserError(
                f"{file}: tensor {tensor.name} does not belong to this base; LoRA pairs must be on linear layers of "
                "the blocks, on the head or on the embedding"
            )
        adapters.add(match["adapter"])
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if len(adapters) > 1:
        raise UserError(
            f"{file}: holds several adapters ({', '.join(sorted(map(str, adapters)))}); give a file with one adapter"
        )
    if not sides and not allow_none:
        raise UserError(f"{file}: the file has no LoRA pair; give the file of a LoRA adapter")
    for module, pair in sides.items():
        for side in "AB":
            if side not in pair:
                raise UserError(f"{file}: tensor {PREFIX}{module}.lora_{side}.weight is missing")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _check_pairs(
    pairs: dict[str, tuple[StoredTensor, StoredTensor]],
    layers: dict[str, _Layer],
    config: PeftConfig,
    magnitudes: dict[str, StoredTensor],
    file: Path,
) -> None:
    """Raises `UserError` if a LoRA pair or DoRA magnitude is missing, or if its shape is wrong for config and base."""
    for module in layers:
        if config.targets_module(module) and module not in pairs:
            raise UserError(f"{file}: tensor {PREFIX}{module}.lora_A.weight is missing, but target_modules requires it")
    for module, (stored_a, stored_b) in pairs.items():
        rank = config.rank_of(module)
        stored_a.check_shape((rank, layers[module].fan_in), SHAPE_SOURCE)
        stored_b.check_shape((layers[module].fan_out, rank), SHAPE_SOURCE)
        if config.dora and module not in magnitudes:
            raise UserError(
                f"{file}: tensor {PREFIX}{module}.lora_magnitude_vector is missing, but use_dora requires it"
            )
    for module, tensor in magnitudes.items():
        if not config.dora:
            raise UserError(
                f"{file}: tensor {tensor.name} is a DoRA magnitude, but use_dora is not true in {PEFT_INFO}"
            )
        if module not in pairs:
            raise UserError(f"{file}: tensor {tensor.name} is a DoRA magnitude, but its module has no LoRA pair")
        tensor.check_shape((layers[module].fan_out,), SHAPE_SOURCE)
