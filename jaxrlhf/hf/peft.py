"""LoRA adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors`.

PEFT names the checkpoint's modules, and some checkpoints keep several of our modules in one (a fused tensor). On
the way in each of ours takes the fused pair's whole A and its own rows of B. On the way out the A's are stacked and
the B's stand block by block: exact, at the sum of the ranks.

Not here: what becomes whole weights of ours (`peft_whole.py`), and what pairs and whole weights cannot express.
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.distributed.mesh import fetch
from jaxrlhf.errors import UserError
from jaxrlhf.hf.decoder_tensors import in_dtype, pending
from jaxrlhf.hf.families import address_of
from jaxrlhf.hf.family import Part
from jaxrlhf.hf.folders import PEFT_INFO, check_dtype, check_replaceable, written_once
from jaxrlhf.hf.peft_config import NEWER_NAMES, PeftConfig, peft_document, read_peft_config
from jaxrlhf.hf.peft_full import EMBEDDING, beyond_peft, check_foldable, folded_dora, module_of, whole_weights
from jaxrlhf.hf.tensor_files import Pending, StoredTensor, read_json, read_tensors, write_json, write_tensors
from jaxrlhf.hf.wrappers import plain_name
from jaxrlhf.models.adapters import HEAD, LORA_LEAVES, SCORE, merge, without_head
from jaxrlhf.models.config import DecoderConfig
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


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A linear layer of the checkpoint: our modules in it, and which of its outputs are theirs."""

    fan_in: int
    outputs: dict[str, np.ndarray]  # our path -> i64[out]
    transposed: bool

    @property
    def fan_out(self) -> int:
        return sum(map(len, self.outputs.values()))


def load_peft(path: str | Path, base: Decoder) -> Adapter:
    """The adapter of a PEFT LoRA folder, in float32, checked against the base it is for.

    Scales are alpha / r, or alpha / sqrt(r) with `use_rslora` (2312.03732); `rank_pattern`, `alpha_pattern` and a
    `score` head are understood. Saved modules, a pair on the embedding and DoRA become whole weights (`peft_whole`).
    Raises `UserError` naming file and entry or tensor where something is missing, left over or misshapen, or where an
    entry asks for what cannot be expressed.
    """
    folder = Path(path).expanduser()
    file = folder / PEFT_TENSORS
    config = read_peft_config(read_json(folder / PEFT_INFO), folder / PEFT_INFO)
    if not file.exists():
        pickled = (folder / PEFT_PICKLE).exists()
        reason = f"{folder / PEFT_PICKLE}: pickle files are not read; convert to safetensors"
        raise UserError(reason if pickled else f"{folder}: no {PEFT_TENSORS} in this folder")
    stored = {_plain(name): tensor for name, tensor in read_tensors(file).items()}
    for tensor in stored.values():
        tensor.check_dtype()
    head = stored.pop("score.weight", None)
    if config.has_head and head is None:
        raise UserError(f"{file}: tensor {HEAD_TENSOR} is missing, which modules_to_save calls for")
    if head is not None:
        _check_shape(head, (1, base.config.hidden_size))
    magnitudes = _taken(stored, MAGNITUDE)
    embedding = module_of(base, EMBEDDING)
    sides = {match["side"]: tensor for match, tensor in _matched(stored, EMBEDDING_PAIR, embedding)}
    if embedding in magnitudes or len(sides) == 1:
        what = "DoRA on the embedding" if embedding in magnitudes else "half a pair on the embedding"
        raise UserError(f"{file}: {what} cannot be read; merge it with PEFT (merge_and_unload)")
    layers = _layers(base)
    pairs = _pairs(stored, layers, file, allow_none=bool(sides))
    embedding_pair = (sides["A"], sides["B"]) if sides else None
    adapter = whole_weights(base, stored, embedding_pair, module_of(base, HEAD) in pairs, config, file)
    for name, tensor in stored.items():
        raise UserError(f"{file}: tensor {tensor.name} has no place in this base ({name} is no weight of it)")
    _check_pairs(pairs, layers, config, magnitudes, file)
    for module, tensors in pairs.items():
        magnitude, scale = magnitudes.get(module), config.scale(module)
        for ours, leaves in _own_leaves(base, layers[module], tensors, magnitude, scale, adapter).items():
            adapter[ours] = adapter.get(ours, {}) | leaves
    if magnitudes:
        check_foldable(base, folder / PEFT_INFO)
        notice(f"{folder}: DoRA: pairs and magnitudes of {len(magnitudes)} modules are folded into whole weights")
    if head is not None:
        adapter[SCORE] = {"kernel": jnp.asarray(np.array(head.view().T, np.float32))}
    return adapter


def with_adapter(
    base: Decoder, folder: Path, base_folder: Path, mesh: jax.sharding.Mesh | None
) -> tuple[Decoder, Adapter]:
    """The base with the adapter of a PEFT folder merged, and the adapter's scalar head alone, {} where it has none."""
    adapter = load_peft(folder, base)
    notice(f"{folder}: an adapter; it is merged into its base, {base_folder}")
    adapter = adapter if mesh is None else shard(mesh, adapter)
    return merge(base, adapter), {SCORE: adapter[SCORE]} if SCORE in adapter else {}


def save_peft(
    path: str | Path, base: Decoder, adapter: Adapter, base_path: str | None = None, dtype: str | None = None
) -> None:
    """Writes an adapter's LoRA pairs as a folder that PEFT opens on `base_path`, the base's folder or hub id.

    Whole weights of embedding and head go into `modules_to_save`. All keep their dtype unless one is given; a scalar
    head is left out. The folder appears complete or not at all. Raises `UserError` for an adapter that holds other
    whole weights or no pairs, and where other files would be lost.
    """
    target = Path(path).expanduser().absolute()
    check_dtype(dtype)
    check_replaceable(target, PEFT_INFO)
    layers = _layers(base)
    known = {ours for layer in layers.values() for ours in layer.outputs}
    for module, leaves in without_head(adapter).items():
        if beyond_peft(module, leaves):
            raise UserError(f"adapter: {module} holds whole weights, not a LoRA pair; export it merged, not as PEFT")
        if module not in known and module != EMBEDDING:
            raise UserError(f"adapter: {module} has no place in this base; the adapter is another model's")
    fused = {module: _fused_pair(layer, adapter) for module, layer in layers.items()}
    pairs = {module: pair for module, pair in fused.items() if pair is not None}
    if not pairs:
        raise UserError("adapter: has no LoRA pair, so there is nothing to write in PEFT's format")
    tensors: dict[str, Pending] = {}
    for module, (a_RI, b_OR, _) in pairs.items():
        for side, array in (("A", a_RI), ("B", b_OR)):
            name = f"{PREFIX}{module}.lora_{side}.weight"
            tensors[name] = in_dtype(name, Pending(array.dtype, array.shape, lambda array=array: array), dtype)
    saved = _saved(base, adapter)
    tensors |= {f"{PREFIX}{module}.weight": in_dtype(module, table, dtype) for module, table in saved.items()}
    numbers = {module: (len(a_RI), scale) for module, (a_RI, _, scale) in pairs.items()}
    conv_style = not next(iter(layers.values())).transposed  # the kernels of GPT-2
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
    """The leaves of each of our modules in a layer: its pair, or a DoRA layer's whole kernel."""
    a_RI, b_OR = (np.array(tensor.view(), np.float32) for tensor in pair)
    found = {}
    for ours, outputs in layer.outputs.items():
        if magnitude is not None:
            length = np.array(magnitude.view(), np.float32)[outputs]
            before = adapter.get(ours, {}).get("kernel")
            found[ours] = folded_dora(base, before, ours, (a_RI, b_OR[outputs]), length, scale)
            continue
        ranks = _own_ranks(b_OR, outputs)
        if ranks.any():
            found[ours] = {
                "lora_a": jnp.asarray(a_RI[ranks].T),
                "lora_b": jnp.asarray(b_OR[outputs][:, ranks].T),
                "lora_scale": jnp.asarray(scale, jnp.float32),
            }
    return found


def _layers(base: Decoder) -> dict[str, _Layer]:
    """The checkpoint's linear layers inside the blocks, and the head, by the checkpoint's names."""
    layers: dict[str, _Layer] = {}
    head = {HEAD: (base.config.hidden_size, base.config.vocab_size)}
    for ours, (fan_in, fan_out) in (linear_shapes(base) | head).items():
        where = address_of(base.config, f"{ours}/kernel")
        outputs = np.arange(fan_out) if where.part is None else _outputs(base.config, where.part)
        module = module_of(base, ours)
        layers.setdefault(module, _Layer(fan_in, {}, where.transposed)).outputs[ours] = outputs
    return layers


def _outputs(config: DecoderConfig, part: Part) -> np.ndarray:
    """Which outputs of a fused layer are a part's; i64[out]."""
    sizes, groups = part.sizes(config), part.groups(config)
    start = sum(sizes[: part.index])
    by_group = np.arange(groups * sum(sizes)).reshape(groups, sum(sizes))
    return by_group[:, start : start + sizes[part.index]].ravel()


def _own_ranks(b_OR: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Which ranks of a fused pair are one module's: those that are not zero for it and at work in another; bool[R]."""
    at_work_R = (b_OR != 0).any(axis=0)
    return (b_OR[outputs] != 0).any(axis=0) | ~at_work_R


def _fused_pair(layer: _Layer, adapter: Adapter) -> tuple[np.ndarray, np.ndarray, np.float32] | None:
    """(A [R, in], B [out, R], scale) of the pairs in a layer, which become one; None where there are none."""
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
    """Whole embedding and head of an adapter, by the checkpoint's modules.

    PEFT trains copies: a head that is tied to a trained embedding, as ours is, is written as a copy of its own.
    """
    found = {}
    if EMBEDDING in adapter:
        found[module_of(base, EMBEDDING)] = pending(adapter[EMBEDDING]["embedding"])
        if base.lm_head is None and HEAD not in adapter:
            found[module_of(base, HEAD)] = pending(adapter[EMBEDDING]["embedding"])
    if "kernel" in adapter.get(HEAD, {}):
        found[module_of(base, HEAD)] = pending(adapter[HEAD]["kernel"], transposed=True)
    return found


# ---------------------------------------------------------------- adapter_model.safetensors


def _plain(name: str) -> str:
    """A tensor's name without PEFT's wrappers, and without a multimodal model's around the text part."""
    if match := SAVED.fullmatch(name):
        name = f"{match[1]}.{match[2]}"
    name = plain_name(name.removeprefix(PREFIX))
    module, dot, rest = name.partition(".")
    return NEWER_NAMES.get(module, module) + dot + rest


def _matched(
    stored: dict[str, StoredTensor], pattern: re.Pattern, module: str | None = None
) -> list[tuple[re.Match, StoredTensor]]:
    """Takes out the tensors whose names match, of one module where it is given."""
    found = [(match, name) for name in stored if (match := pattern.fullmatch(name))]
    return [(match, stored.pop(name)) for match, name in found if module in (None, match["module"])]


def _taken(stored: dict[str, StoredTensor], pattern: re.Pattern) -> dict[str, StoredTensor]:
    """The same by module."""
    return {match["module"]: tensor for match, tensor in _matched(stored, pattern)}


def _pairs(
    stored: dict[str, StoredTensor], layers: dict[str, _Layer], file: Path, allow_none: bool
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Takes out the tensors A and B of each module; `UserError` for one that has lost its other or has no module."""
    sides: dict[str, dict[str, StoredTensor]] = {}
    adapters = set()
    for match, tensor in _matched(stored, PAIR):
        if match["module"] not in layers:
            raise UserError(
                f"{file}: tensor {tensor.name} has no place in this base: pairs belong on the linear layers of its "
                "blocks, on its head and its embedding"
            )
        adapters.add(match["adapter"])
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if len(adapters) > 1:
        raise UserError(f"{file}: holds several adapters ({', '.join(sorted(map(str, adapters)))}); want one")
    if not sides and not allow_none:
        raise UserError(f"{file}: holds no LoRA pair")
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
    """`UserError` where a pair or its magnitude is missing, or has another shape than config and base say."""
    for module in layers:
        if config.calls_for(module) and module not in pairs:
            raise UserError(f"{file}: tensor {PREFIX}{module}.lora_A.weight is missing, which target_modules calls for")
    for module, (stored_a, stored_b) in pairs.items():
        rank = config.rank_of(module)
        _check_shape(stored_a, (rank, layers[module].fan_in))
        _check_shape(stored_b, (layers[module].fan_out, rank))
        if config.dora and module not in magnitudes:
            name = f"{PREFIX}{module}.lora_magnitude_vector"
            raise UserError(f"{file}: tensor {name} is missing, which use_dora calls for")
    for module, tensor in magnitudes.items():
        if module not in pairs or not config.dora:
            why = "has no pair" if config.dora else f"belongs to no plain pair: {PEFT_INFO} does not say use_dora"
            raise UserError(f"{file}: tensor {tensor.name} {why}")
        _check_shape(tensor, (layers[module].fan_out,))


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)};"
            f" {PEFT_INFO} and this base call for {list(shape)}"
        )
