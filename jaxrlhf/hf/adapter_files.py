"""Adapters as folders of their own: `adapter.safetensors` and `adapter.json`.

Not here: PEFT's format (`peft.py`), which `load_adapter` opens too.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import UserError
from jaxrlhf.hf.decoder_tensors import pending
from jaxrlhf.hf.folders import check_replaceable, written_once
from jaxrlhf.hf.tensor_files import StoredTensor, read_json, read_tensors, write_json, write_tensors
from jaxrlhf.models.adapters import HEAD, SCORE
from jaxrlhf.models.decoder import Decoder, linear_shapes, named_parameters
from jaxrlhf.models.quantize import quantization
from jaxrlhf.records import Adapter

ADAPTER, ADAPTER_INFO = "adapter.safetensors", "adapter.json"
ADAPTER_FORMAT, ADAPTER_VERSION = "jaxrlhf-adapter", 1


def save_adapter(path: str | Path, adapter: Adapter) -> None:
    """Writes an adapter, scalar head included: `adapter.safetensors` and `adapter.json`, all or nothing."""
    target = Path(path).expanduser().absolute()
    check_replaceable(target, ADAPTER_INFO)
    leaves = {f"{module}/{leaf}": value for module, values in adapter.items() for leaf, value in values.items()}
    ranks = [value.shape[1] for name, value in leaves.items() if name.endswith("/lora_a")]
    info = {
        "format": ADAPTER_FORMAT,
        "version": ADAPTER_VERSION,
        "kind": _kind(leaves),
        "rank": max(ranks, default=None),
        "head": SCORE in adapter,
    }
    with written_once(target) as (folder, primary):
        write_tensors(folder / ADAPTER, {name: pending(value) for name, value in leaves.items()}, primary)
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
        from jaxrlhf.hf.peft import load_peft

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


def _kind(leaves: dict[str, Any]) -> str:
    """lora: with pairs; full: every weight; whole: every number of some modules, such as a DoRA adapter's."""
    if any(name.endswith("/lora_a") for name in leaves):
        return "lora"
    every = "embed_tokens/embedding" in leaves and any("norm/" in name for name in leaves)
    return "full" if every or not leaves else "whole"


def _check_adapter(stored: dict[str, StoredTensor], kind: Any, base: Decoder, file: Path) -> None:
    """`UserError` unless each tensor has its place in the base and each LoRA pair is whole."""
    parameters = {name: leaf.shape for name, leaf in named_parameters(base).items()}
    head = base.config.hidden_size, base.config.vocab_size  # also of a base whose head is its embedding
    layers = linear_shapes(base) | {HEAD: head}
    if kind == "full" and (codes := quantization(base)) is not None:
        raise UserError(f"{file}: a full adapter replaces every weight; this base is in {codes} codes")
    for name, tensor in stored.items():
        tensor.check_dtype()
        module, _, leaf = name.partition("/")
        if leaf in ("lora_a", "lora_b", "lora_scale"):
            pair = [stored.get(f"{module}/{part}") for part in ("lora_a", "lora_b", "lora_scale")]
            if None in pair:
                raise UserError(f"{file}: module {module} has no whole LoRA pair (lora_a, lora_b, lora_scale)")
            outer = layers.get(module)
            rank = pair[0].shape[-1] if pair[0].shape else 0
            wanted = outer and {"lora_a": (outer[0], rank), "lora_b": (rank, outer[1]), "lora_scale": ()}[leaf]
        elif module == SCORE:
            wanted = {"kernel": (base.config.hidden_size, 1), "bias": (1,)}.get(leaf)
        else:
            wanted = parameters.get(name, head if name == f"{HEAD}/kernel" else None)
        if wanted is None:
            raise UserError(f"{file}: tensor {name} has no place in this base; the adapter is another model's")
        if tensor.shape != wanted:
            raise UserError(f"{file}: tensor {name} has shape {list(tensor.shape)}; this base wants {list(wanted)}")
    missing = sorted(set(parameters) - set(stored)) if kind == "full" else []
    if missing:
        raise UserError(f"{file}: tensor {missing[0]} is missing from a full adapter")
