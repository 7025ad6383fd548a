"""LoRA adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors`.

PEFT names the checkpoint's modules, and some checkpoints keep several of our modules in one (a fused tensor). On
the way in each of ours takes the fused pair's whole A and its own rows of B. On the way out the A's are stacked and
the B's stand block by block: exact, at the sum of the ranks.

Not here: whatever is no plain pair on a linear layer of the blocks (DoRA, trained embeddings or whole modules, ...).
"""

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import UserError
from jaxrlhf.models.adapters import LORA_LEAVES, SCORE, without_head
from jaxrlhf.models.decoder import Decoder, DecoderConfig, linear_shapes
from jaxrlhf.models.families import place
from jaxrlhf.models.family import Part
from jaxrlhf.models.folders import check_dtype, check_replaceable, written_once
from jaxrlhf.models.layout import in_dtype, on_host
from jaxrlhf.models.peft_config import PeftConfig, peft_document, read_peft_config
from jaxrlhf.models.tensor_files import Pending, StoredTensor, read_json, read_tensors, write_json, write_tensors
from jaxrlhf.records import Adapter

PEFT_INFO, PEFT_TENSORS, PEFT_PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
PAIR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight")
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
    `score` head are understood. Raises `UserError` naming file and entry or tensor where something is missing, left
    over or misshapen, or where an entry asks for what pairs cannot express.
    """
    folder = Path(path).expanduser()
    file = folder / PEFT_TENSORS
    document = read_json(folder / PEFT_INFO)
    config = read_peft_config(document, folder / PEFT_INFO)
    if not file.exists():
        pickled = (folder / PEFT_PICKLE).exists()
        reason = f"{folder / PEFT_PICKLE}: pickle files are not read; convert to safetensors"
        raise UserError(reason if pickled else f"{folder}: no {PEFT_TENSORS} in this folder")
    stored = read_tensors(file)
    for tensor in stored.values():
        tensor.check_dtype()
    head = stored.pop(HEAD_TENSOR, None)
    if document.get("modules_to_save") and head is None:
        raise UserError(f"{file}: tensor {HEAD_TENSOR} is missing, which modules_to_save calls for")
    if head is not None:
        _check_shape(head, (1, base.config.hidden_size))
    layers = _layers(base)
    pairs = _pairs(stored, layers, file)
    _check_pairs(pairs, layers, config, file)
    adapter: Adapter = {}
    for module, (stored_a, stored_b) in pairs.items():
        a_RI, b_OR = (np.array(tensor.view(), np.float32) for tensor in (stored_a, stored_b))
        for ours, outputs in layers[module].outputs.items():
            ranks = _own_ranks(b_OR, outputs)
            if ranks.any():
                adapter[ours] = {
                    "lora_a": jnp.asarray(a_RI[ranks].T),
                    "lora_b": jnp.asarray(b_OR[outputs][:, ranks].T),
                    "lora_scale": jnp.asarray(config.scale(module), jnp.float32),
                }
    if head is not None:
        adapter[SCORE] = {"kernel": jnp.asarray(np.array(head.view().T, np.float32))}
    return adapter


def save_peft(
    path: str | Path, base: Decoder, adapter: Adapter, base_path: str | None = None, dtype: str | None = None
) -> None:
    """Writes an adapter's LoRA pairs as a folder that PEFT opens on `base_path`, the base's folder or hub id.

    Pairs keep their dtype unless one is given; a scalar head is left out. The folder appears complete or not at
    all. Raises `UserError` for an adapter that holds whole weights or no pairs, and where other files would be lost.
    """
    target = Path(path).expanduser().absolute()
    check_dtype(dtype)
    check_replaceable(target, PEFT_INFO)
    layers = _layers(base)
    known = {ours for layer in layers.values() for ours in layer.outputs}
    for module, leaves in without_head(adapter).items():
        if set(leaves) != set(LORA_LEAVES):
            raise UserError(f"adapter: {module} holds whole weights, not a LoRA pair; export it merged, not as PEFT")
        if module not in known:
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
    numbers = {module: (len(a_RI), scale) for module, (a_RI, _, scale) in pairs.items()}
    conv_style = not next(iter(layers.values())).transposed  # the kernels of GPT-2
    document = peft_document(numbers, list(layers), base_path, conv_style)
    with written_once(target) as (folder, primary):
        write_tensors(folder / PEFT_TENSORS, tensors, primary)
        if primary:
            write_json(folder / PEFT_INFO, document)


# ---------------------------------------------------------------- modules


def _layers(base: Decoder) -> dict[str, _Layer]:
    """The checkpoint's linear layers inside the blocks, by the checkpoint's names."""
    layers: dict[str, _Layer] = {}
    for ours, (fan_in, fan_out) in linear_shapes(base).items():
        where = place(base.config, f"{ours}/kernel")
        outputs = np.arange(fan_out) if where.part is None else _outputs(base.config, where.part)
        module = where.tensor.removesuffix(".weight")
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
        (outputs, *(on_host(adapter[ours][leaf]) for leaf in LORA_LEAVES))
        for ours, outputs in layer.outputs.items()
        if ours in adapter
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


# ---------------------------------------------------------------- adapter_model.safetensors


def _pairs(
    stored: dict[str, StoredTensor], layers: dict[str, _Layer], file: Path
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """The tensors A and B of each module; `UserError` for one that is left over or has lost its other."""
    sides: dict[str, dict[str, StoredTensor]] = {}
    adapters = set()
    for name, tensor in stored.items():
        match = PAIR.fullmatch(name)
        if match is None or match["module"] not in layers:
            raise UserError(
                f"{file}: tensor {name} has no place in this base: LoRA pairs belong on the linear layers of its "
                "blocks; an adapter that trains embeddings or lm_head must be merged with PEFT first"
            )
        adapters.add(match["adapter"])
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if len(adapters) > 1:
        raise UserError(f"{file}: holds several adapters ({', '.join(sorted(map(str, adapters)))}); want one")
    if not sides:
        raise UserError(f"{file}: holds no LoRA pair")
    for module, pair in sides.items():
        for side in "AB":
            if side not in pair:
                raise UserError(f"{file}: tensor {PREFIX}{module}.lora_{side}.weight is missing")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _check_pairs(
    pairs: dict[str, tuple[StoredTensor, StoredTensor]], layers: dict[str, _Layer], config: PeftConfig, file: Path
) -> None:
    """`UserError` where a pair is missing, or has another shape than config and base say."""
    for module in layers:
        if config.calls_for(module) and module not in pairs:
            raise UserError(f"{file}: tensor {PREFIX}{module}.lora_A.weight is missing, which target_modules calls for")
    for module, (stored_a, stored_b) in pairs.items():
        rank = config.rank_of(module)
        _check_shape(stored_a, (rank, layers[module].fan_in))
        _check_shape(stored_b, (layers[module].fan_out, rank))


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)};"
            f" {PEFT_INFO} and this base call for {list(shape)}"
        )
