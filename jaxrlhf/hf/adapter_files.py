"""Reads and writes adapter folders. A folder holds `adapter.safetensors` and `adapter.json`.

`load_adapter` also opens folders in PEFT's format; `peft.py` reads and writes them.
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
    """Writes an adapter and its scalar head atomically, to `adapter.safetensors` and `adapter.json` in a folder."""
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
    """Loads an adapter from a folder that `save_adapter` or PEFT wrote, and checks that the adapter fits the base.

    `peft.load_peft` reads PEFT's folders. Raises `UserError` if a name or shape does not fit. The error names the file
    and the tensor.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give a folder that holds {ADAPTER_INFO} and {ADAPTER}")
    if not (folder / ADAPTER_INFO).exists() and (folder / "adapter_config.json").exists():
        from jaxrlhf.hf.peft import load_peft

        return load_peft(folder, base)
    info = read_json(folder / ADAPTER_INFO)
    if (info.get("format"), info.get("version")) != (ADAPTER_FORMAT, ADAPTER_VERSION):
        raise UserError(
            f"{folder / ADAPTER_INFO}: format and version must be {ADAPTER_FORMAT!r} and {ADAPTER_VERSION}, "
            f"not {info.get('format')!r} and {info.get('version')!r}"
        )
    stored = read_tensors(folder / ADAPTER)
    for tensor in stored.values():
        tensor.check_dtype()
    check_leaves({name: tensor.shape for name, tensor in stored.items()}, info.get("kind"), base, folder / ADAPTER)
    leaves = {name: jnp.asarray(np.array(tensor.view())) for name, tensor in stored.items()}
    check_finite(leaves, stored)
    return nested(leaves)


def nested(leaves: dict[str, jax.Array]) -> Adapter:
    """Returns the adapter that has these leaves. The names of the leaves are "module/leaf"."""
    adapter: Adapter = {}
    for name, value in leaves.items():
        module, leaf = name.split("/")
        adapter.setdefault(module, {})[leaf] = value
    return adapter


def kind_of(leaves: Collection[str]) -> str:
    """Returns the kind of an adapter from the names of its leaves. `adapter.json` holds the kind.

    An adapter of kind "lora" has LoRA pairs. An adapter of kind "full" has all weights of the model. An adapter of kind
    "whole" comes from DoRA, and has all weights of some modules.
    """
    if any(name.endswith("/lora_a") for name in leaves):
        return "lora"
    all_modules = "embed_tokens/embedding" in leaves and any("norm/" in name for name in leaves)
    return "full" if all_modules or not leaves else "whole"


def check_leaves(stored: dict[str, tuple[int, ...]], kind: Any, base: Decoder, file: Path) -> None:
    """Raises `UserError` if a tensor does not fit the base or a LoRA pair is incomplete.

    `stored` maps the names of the tensors to their shapes.
    """
    parameters = {name: leaf.shape for name, leaf in named_parameters(base).items()}
    head = base.config.hidden_size, base.config.vocab_size  # a tied head has this shape too
    layers = linear_shapes(base) | {HEAD: head}
    if kind == "full" and (quantised := quantization(base)) is not None:
        raise UserError(
            f"{file}: a full adapter needs a base that is not quantised, but this base is quantised ({quantised}); "
            "load the base without quantize"
        )
    for name, found in stored.items():
        module, _, leaf = name.partition("/")
        if leaf in ("lora_a", "lora_b", "lora_scale"):
            pair = [stored.get(f"{module}/{part}") for part in ("lora_a", "lora_b", "lora_scale")]
            if None in pair:
                raise UserError(
                    f"{file}: the LoRA pair of module {module} is incomplete; the file must hold lora_a, lora_b and "
                    "lora_scale of the module"
                )
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
            raise UserError(f"{file}: tensor {name} must have shape {list(shape)} for this base, not {list(found)}")
    missing = sorted(set(parameters) - set(stored)) if kind == "full" else []
    if missing:
        raise UserError(f"{file}: tensor {missing[0]} is missing, but a full adapter must hold every weight")
