"""Decoders with a scalar head for whole texts: transformers' `*ForSequenceClassification` with one label, in and out.

The head's weight [1, D] is an adapter of the base with nothing but `score`; transformers reads it at the last token
that is not padding, as `scoring.sequence_scores` does by the mask.

The format has no bias for the head: that of a value model stands in `config.json` as `score_bias`, which we read.

Not here: several labels, and models that are no decoders (`rewards/classifier.py` scores with those).
"""

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.data.tokenizers import Tokenizer, load_tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.hf.decoder_tensors import (
    in_dtype,
    load_parameter,
    match,
    merged_tensors,
    pending,
    plain_tensors,
    read_decoder,
)
from jaxrlhf.hf.families import FAMILIES, address_of, config_document, read_config
from jaxrlhf.hf.folders import AUTO, check_dtype, check_replaceable, find_model, written_once
from jaxrlhf.hf.peft import with_adapter
from jaxrlhf.hf.tensor_files import (
    StoredTensor,
    main_dtype,
    read_checkpoint,
    read_json,
    write_checkpoint,
    write_json,
)
from jaxrlhf.models.adapters import SCORE
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.sharding import parameter_sharding
from jaxrlhf.records import Adapter

CLASSIFIER = "ForSequenceClassification"
LABEL = "LABEL_0"  # transformers' name for a label that has none
BIAS = "score_bias"  # our entry of config.json


def load_sequence_classifier(
    path: str | Path, dtype: str = AUTO, mesh: jax.sharding.Mesh | None = None
) -> tuple[Decoder, Adapter, Tokenizer | None]:
    """Base, adapter {"score": {"kernel": f32[D,1]}} and tokenizer (None where there is none) of a reward model.

    `path` is a folder or hub id with one label, or a PEFT adapter's, whose base is a classifier or any decoder: the
    adapter is merged, and its own head and tokenizer come before the base's. The base is in `dtype` and laid out on the
    mesh as `load_pretrained` does it; its tied `lm_head` takes no memory, since such a model gives no words. The base's
    `pad_token` is `config.json`'s, None where that has none: with a pad token, transformers does not read the tokens
    equal to it at a text's end. Raises `UserError` naming file and entry or tensor where the folder cannot be used.
    The adapter has a "bias" f32[1] as well where `save_sequence_classifier` wrote one.
    """
    check_dtype(None if dtype == AUTO else dtype)
    folder, adapter = find_model(path)
    document = read_json(folder / "config.json")
    config = dataclasses.replace(read_config(document, str(folder / "config.json")), tie_embeddings=True)
    tensors = plain_tensors(read_checkpoint(folder))
    head = None
    if adapter is None or address_of(config, f"{SCORE}/kernel").tensor in tensors:
        _check_labels(document, config, folder / "config.json")
        head = _head(tensors, config, folder)
    stored = match(config, {name: tensor for name, tensor in tensors.items() if tensor is not head}, folder)
    tokenizer = (load_tokenizer(str(adapter)) if adapter else None) or load_tokenizer(str(folder))
    base = read_decoder(config, stored, main_dtype(stored.values()) if dtype == AUTO else dtype, mesh)
    found: Adapter = {}
    if head is not None:
        wanted = jax.ShapeDtypeStruct((config.hidden_size, 1), jnp.float32)
        sharding = None if mesh is None else parameter_sharding(mesh, f"{SCORE}/kernel", wanted.shape)
        address = address_of(config, f"{SCORE}/kernel")
        found = {SCORE: {"kernel": load_parameter(head, wanted, config, address, sharding)}}
        if document.get(BIAS) is not None:
            found[SCORE]["bias"] = jnp.full(1, _bias(document[BIAS], folder / "config.json"))
    if adapter is not None:
        base, own = with_adapter(base, adapter, folder, mesh)
        found |= own
    if not found:
        raise UserError(f"{path}: the adapter has no scalar head, and {folder} is no sequence classifier")
    return base, found, tokenizer


def save_sequence_classifier(
    path: str | Path,
    base: Decoder,
    adapter: Adapter,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes base and adapter, merged, and the scalar head as a folder with one label that transformers opens.

    All is stored in `dtype`, None: the base's, the head included. `pad_token_id`, and the tokenizer's pad token, is a
    token that ends no text, so that transformers scores an answer at its EOS, as we do; where no token is known to be
    such, it is the EOS itself, and a warning says so; another tells of a head's bias, which transformers does not add.
    The folder appears complete or not at all; an older model there is replaced. Raises `UserError` where anything else
    is there, where the adapter has no head, and for a weight too large for `dtype`.
    """
    target = Path(path).expanduser().absolute()
    check_dtype(dtype)
    if SCORE not in adapter:
        raise UserError(f"{path}: the adapter has no scalar head; a value or reward adapter has one")
    check_replaceable(target, "config.json")
    config = dataclasses.replace(base.config, pad_token=_pad_token(base.config, tokenizer))
    if config.pad_token in _ends(config, tokenizer):
        warnings.warn(
            f"{path}: no token is free to pad with, so pad_token_id is EOS: transformers scores before it", stacklevel=2
        )
    if bias := float(np.asarray(adapter[SCORE].get("bias", 0.0)).sum()):
        warnings.warn(
            f"{path}: the head's bias of {bias:.6g} has no place in this format: transformers' scores are lower by it; "
            f"it is {BIAS} in config.json",
            stacklevel=2,
        )
    tensors, dtype = merged_tensors(base, adapter, dtype)
    tensors.pop(address_of(config, "lm_head/kernel").tensor, None)
    name = address_of(config, f"{SCORE}/kernel").tensor
    tensors[name] = in_dtype(name, pending(adapter[SCORE]["kernel"], transposed=True), dtype)
    with written_once(target) as (folder, primary):
        write_checkpoint(folder, tensors, max_shard_bytes, primary)
        if primary:
            write_json(folder / "config.json", _document(config, dtype) | ({BIAS: bias} if bias else {}))
            if tokenizer is not None:
                tokenizer.save(str(folder), config.pad_token)


def _check_labels(document: dict[str, Any], config: DecoderConfig, where: Path) -> None:
    """`UserError` unless `config.json` describes a sequence classifier with one label."""
    architectures = document.get("architectures")
    if not isinstance(architectures, list) or not any(str(name).endswith(CLASSIFIER) for name in architectures):
        wanted = _architecture(config)
        raise UserError(f"{where}: architectures is {architectures!r}; a reward model's is ['{wanted}']")
    for entry in ("id2label", "num_labels"):
        value = document.get(entry)
        if value is None:
            continue  # the shape of the head decides
        count = len(value) if isinstance(value, dict) else value
        if isinstance(count, bool) or count != 1:
            raise UserError(f"{where}: {entry} is {str(value)[:60]}; a reward model has one label")


def _bias(value: Any, where: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where}: {BIAS} is {value!r}; want a number")
    return float(value)


def _head(tensors: dict[str, StoredTensor], config: DecoderConfig, folder: Path) -> StoredTensor:
    name, wanted = address_of(config, f"{SCORE}/kernel").tensor, (1, config.hidden_size)
    if name not in tensors:
        raise UserError(f"{folder}: tensor {name} is missing, the head of a sequence classifier")
    if tensors[name].shape != wanted:
        raise UserError(
            f"{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)};"
            f" one label and config.json call for {list(wanted)}"
        )
    return tensors[name]


def _ends(config: DecoderConfig, tokenizer: Tokenizer | None) -> set[int]:
    """Tokens that a text may end with on purpose."""
    return {*config.stop_tokens, *([] if tokenizer is None or tokenizer.eos_id is None else [tokenizer.eos_id])}


def _pad_token(config: DecoderConfig, tokenizer: Tokenizer | None) -> int | None:
    """What fills up rows: the pad token, BOS or another special token, unless texts end with it."""
    ends, size = _ends(config, tokenizer), config.vocab_size
    candidates = [config.pad_token, config.bos_token]
    if tokenizer is not None:  # it must have a name for it
        own = tokenizer.special_ids
        candidates = [tokenizer.pad_id, *(token for token in candidates if token in own), *own]
    found = [token for token in candidates if token is not None and token < size]
    free = [token for token in found if token not in ends]
    return next(iter([*free, *found, *sorted(ends)]), None)


def _document(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """A `config.json` with one label, whose output is the score as it stands (a regression)."""
    return config_document(config, dtype) | {
        "architectures": [_architecture(config)],
        "id2label": {"0": LABEL},
        "label2id": {LABEL: 0},
        "problem_type": "regression",
    }


def _architecture(config: DecoderConfig) -> str:
    family = FAMILIES[config.family]
    return (family.classifier or family.architecture) + CLASSIFIER
