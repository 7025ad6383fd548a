"""Adapter folders: `adapter.safetensors` and `adapter.json`.

Not here: PEFT's format (`peft.py`), although `load_adapter` opens it too.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import UserError
from jaxrlhf.hf.decoder_tensors import check_finite, pending
from jaxrlhf.hf.folders import check_replaceable, written_once
from jaxrlhf.hf.tensor_files import read_json, read_tensors, write_json, write_tensors
from jaxrlhf.models.adapters import HEAD, SCORE
from jaxrlhf.models.decoder import Decoder, linear_shapes, named_parameters
from jaxrlhf.models.quantize import quantization
from jaxrlhf.records import Adapter

ADAPTER, ADAPTER_INFO = "adapter.safetensors", "adapter.json"
ADAPTER_FORMAT, ADAPTER_VERSION = "jaxrlhf-adapter", 1


def save_adapter(path: str | Path, adapter: Adapter) -> None:
    """Writes an adapter with its scalar head as `adapter.safetensors` and `adapter.json`, atomically."""
    target = Path(path).expanduser().absolute()
    check_replaceable(target, ADAPTER_INFO)
    leaves = {f"{module}/{leaf}": value for module, values in adapter.items() for leaf, value in values.items()}
    ranks = [value.shape[1] for name, value in leaves.items() if name.endswith("/lora_a")]
    info = {
        "format": ADAPTER_FORMAT,
        "version": ADAPTER_VERSION,
        "kind": kind_of(leaves),
        "rank": max(ranks, default=None),
        "head": SCORE in adapter,
    }
    with written_once(target) as (folder, primary):
        write_tensors(folder / ADAPTER, {name: pending(value) for name, value in leaves.items()}, primary)
        if primary:
            write_json(folder / ADAPTER_INFO, info)


def load_adapter(path: str | Path, base: Decoder) -> Adapter:
    """Loads an adapter from a folder that `save_adapter` or PEFT wrote, and checks that it fits the base.

    `peft.load_peft` reads PEFT's folders. Raises `UserError` naming file and tensor if names or shapes do not fit.
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
    for tensor in stored.values():
        tensor.check_dtype()
    check_leaves({name: tensor.shape for name, tensor in stored.items()}, info.get("kind"), base, folder / ADAPTER)
    leaves = {name: jnp.asarray(np.array(tensor.view())) for name, tensor in stored.items()}
    check_finite(leaves, stored)
    return nested(leaves)


def nested(leaves: dict[str, jax.Array]) -> Adapter:
    """Returns the adapter with these leaves; their names are "module/leaf"."""
    adapter: Adapter = {}
    for name, value in leaves.items():
        module, leaf = name.split("/")
        adapter.setdefault(module, {})[leaf] = value
    return adapter


def kind_of(leaves: Collection[str]) -> str:
    """Returns the kind of an adapter with these leaves, for `adapter.json`.

    "lora" has LoRA pairs, "full" has all weights, "whole" has all weights of some modules (from DoRA).
    """
    if any(name.endswith("/lora_a") for name in leaves):
        return "lora"
    all_modules = "embed_tokens/embedding" in leaves and any("norm/" in name for name in leaves)
    return "full" if all_modules or not leaves else "whole"


def check_leaves(stored: dict[str, tuple[int, ...]], kind: Any, base: Decoder, file: Path) -> None:
    """Raises `UserError` unless each tensor fits the base and each LoRA pair is complete; `stored` is name -> shape."""
    parameters = {name: leaf.shape for name, leaf in named_parameters(base).items()}
    head = base.config.hidden_size, base.config.vocab_size  # also if the head is tied to the embedding
    layers = linear_shapes(base) | {HEAD: head}
    if kind == "full" and (quantised := quantization(base)) is not None:
        raise UserError(f"{file}: a full adapter replaces every weight, but this base is quantised ({quantised})")
    for name, found in stored.items():
        module, _, leaf = name.partition("/")
        if leaf in ("lora_a", "lora_b", "lora_scale"):
            pair = [stored.get(f"{module}/{part}") for part in ("lora_a", "lora_b", "lora_scale")]
            if None in pair:
                raise UserError(f"{file}: module {module} needs a full LoRA pair (lora_a, lora_b, lora_scale)")
            kernel = layers.get(module)
            rank = pair[0][-1] if pair[0] else 0
            shape = kernel and {"lora_a": (kernel[0], rank), "lora_b": (rank, kernel[1]), "lora_scale": ()}[leaf]
        elif module == SCORE:
            shape = {"kernel": (base.config.hidden_size, 1), "bias": (1,)}.get(leaf)
        else:
            shape = parameters.get(name, head if name == f"{HEAD}/kernel" else None)
        if shape is None:
            raise UserError(f"{file}: this base has no tensor {name}; the adapter belongs to another model")
        if found != shape:
            raise UserError(f"{file}: tensor {name} has shape {list(found)}; this base requires {list(shape)}")
    missing = sorted(set(parameters) - set(stored)) if kind == "full" else []
    if missing:
        raise UserError(f"{file}: tensor {missing[0]} is missing from a full adapter")
