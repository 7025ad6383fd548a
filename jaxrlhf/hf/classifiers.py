"""Reads and writes reward and value models as transformers' `*ForSequenceClassification` decoders with one label.

The weight [1, D] of the head becomes an adapter that holds only `score`. transformers and `scoring.sequence_scores`
both use the output of the head at the last token that is not padding. transformers' format has no bias for the head. So
the bias of a value model is saved as the entry `score_bias` of `config.json`. transformers ignores this entry.

Process reward models are also read: `*ForTokenClassification` decoders with two labels, as TRL's PRMTrainer writes
them. Their score is logit 1 - logit 0, so its sigmoid is the probability of label 1.

Other models with several labels are not supported. `rewards/classifier.py` runs classifiers that are not decoders.
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
    check_finite,
    in_dtype,
    load_parameter,
    match,
    merged_tensors,
    pending,
    plain_tensors,
    read_decoder,
)
from jaxrlhf.hf.families import FAMILIES, address_of, config_document, read_config
from jaxrlhf.hf.folders import AUTO, EXPORTED, check_dtype, check_replaceable, find_model, written_once
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

CLASSIFIER, TOKEN_CLASSIFIER = "ForSequenceClassification", "ForTokenClassification"
LABEL = "LABEL_0"  # transformers' default name of a label
BIAS = "score_bias"  # only jaxrlhf uses this entry of config.json


def is_token_classifier(path: str | Path) -> bool:
    """Whether the folder or hub id is a `*ForTokenClassification` model."""
    folder, adapter = find_model(path)
    architectures = read_json(folder / "config.json").get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return adapter is None and any(str(name).endswith(TOKEN_CLASSIFIER) for name in names)


def load_token_classifier(
    path: str | Path, dtype: str = AUTO, mesh: jax.sharding.Mesh | None = None
) -> tuple[Decoder, Adapter, Tokenizer | None]:
    """Loads a token classifier with two labels, and returns (base, adapter, tokenizer).

    The output of the head is logit 1 - logit 0. Raises `UserError` as `load_sequence_classifier` does.
    """
    check_dtype(None if dtype == AUTO else dtype)
    folder, _ = find_model(path)
    document = read_json(folder / "config.json")
    config = dataclasses.replace(read_config(document, str(folder / "config.json")), tie_embeddings=True)
    tensors = plain_tensors(read_checkpoint(folder))
    name = address_of(config, f"{SCORE}/kernel").tensor
    bias = name.removesuffix("weight") + "bias"
    if name not in tensors:
        raise UserError(f"{folder}: tensor {name} is missing; this tensor is the head of a token classifier")
    tensors[name].check_shape((2, config.hidden_size), "a process reward model (two labels)")
    heads = {key: tensors.pop(key) for key in (name, bias) if key in tensors}
    stored = match(config, tensors, folder)
    base = read_decoder(config, stored, main_dtype(stored.values()) if dtype == AUTO else dtype, mesh)
    differences = {key: np.diff(np.asarray(head.view(), np.float32), axis=0) for key, head in heads.items()}
    check_finite({key: jnp.asarray(value) for key, value in differences.items()}, heads)
    score = {"kernel": jnp.asarray(differences[name].T)}
    if bias in differences:
        score["bias"] = jnp.asarray(differences[bias])
    return base, {SCORE: score}, load_tokenizer(str(folder))


def load_sequence_classifier(
    path: str | Path, dtype: str = AUTO, mesh: jax.sharding.Mesh | None = None
) -> tuple[Decoder, Adapter, Tokenizer | None]:
    """Loads a reward or value model, and returns (base, adapter, tokenizer).

    The adapter is {"score": {"kernel": f32[D,1]}}. If `save_sequence_classifier` wrote a bias, "score" also has a
    "bias" f32[1]. The tokenizer is None if the folder has none.

    `path` is the folder or hub id of a classifier with one label, or of a PEFT adapter. The base of a PEFT adapter may
    be a classifier or any decoder. The PEFT adapter's weights are merged into the base. Its head and its tokenizer
    replace those of the base. `dtype` and `mesh` are as in `load_pretrained`. The `lm_head` is tied to the embedding,
    so it takes no memory. In the config of the base, `pad_token` is the pad token of `config.json`, or None.
    transformers skips pad tokens at the end of a text.

    Raises `UserError` if the folder cannot be used. The error names the file, and the entry or tensor.
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
    score: Adapter = {}
    if head is not None:
        kernel = jax.ShapeDtypeStruct((config.hidden_size, 1), jnp.float32)
        sharding = None if mesh is None else parameter_sharding(mesh, f"{SCORE}/kernel", kernel.shape)
        address = address_of(config, f"{SCORE}/kernel")
        score = {SCORE: {"kernel": load_parameter(head, kernel, config, address, sharding)}}
        check_finite({head.name: score[SCORE]["kernel"]}, {head.name: head})
        if document.get(BIAS) is not None:
            score[SCORE]["bias"] = jnp.full(1, _bias(document[BIAS], folder / "config.json"))
    if adapter is not None:
        base, own = with_adapter(base, adapter, folder, mesh)
        score |= own
    if not score:
        raise UserError(
            f"{path}: the adapter has no scalar head, and its base {folder} is not a sequence classifier; give the "
            "adapter of a reward or value model"
        )
    return base, score, tokenizer


def save_sequence_classifier(
    path: str | Path,
    base: Decoder,
    adapter: Adapter,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Merges the adapter into the base, and writes a sequence classifier with one label for transformers.

    All weights are stored in `dtype`; None means the dtype of the base. `pad_token_id` and the tokenizer's pad token
    become a token that never ends a text. So transformers scores a completion at its EOS, as jaxrlhf does. If every
    special token ends texts, EOS becomes the pad token, and a warning is given. Another warning is given if the head
    has a bias, because transformers does not add the bias. The folder is written atomically and replaces an older
    model. Raises `UserError` if the folder holds other files, if the adapter has no scalar head, or if a weight is too
    large for `dtype`.
    """
    target = Path(path).expanduser().absolute()
    check_dtype(dtype)
    if SCORE not in adapter:
        raise UserError(f"{path}: the adapter has no scalar head; give the adapter of a reward or value model")
    check_replaceable(target, *EXPORTED)
    config = dataclasses.replace(base.config, pad_token=_pad_token(base.config, tokenizer))
    if config.pad_token in _ends(config, tokenizer):
        warnings.warn(
            f"{path}: every special token ends texts, so pad_token_id is EOS; transformers will score a text at the "
            "token before EOS",
            stacklevel=2,
        )
    if bias := float(np.asarray(adapter[SCORE].get("bias", 0.0)).sum()):
        warnings.warn(
            f"{path}: transformers does not add the head's bias of {bias:.6g} to its scores; config.json holds the "
            f"bias in the entry {BIAS}",
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
    """Raises `UserError` if `config.json` does not describe a sequence classifier with one label."""
    architectures = document.get("architectures")
    if not isinstance(architectures, list) or not any(str(name).endswith(CLASSIFIER) for name in architectures):
        expected = _architecture(config)
        raise UserError(f"{where}: architectures must be ['{expected}'] for a reward model, not {architectures!r}")
    for entry in ("id2label", "num_labels"):
        value = document.get(entry)
        if value is None:
            continue  # `_head` checks the shape of the head
        count = len(value) if isinstance(value, dict) else value
        if isinstance(count, bool) or count != 1:
            raise UserError(f"{where}: {entry} is {str(value)[:60]}, but a reward model must have one label")


def _bias(value: Any, where: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where}: {BIAS} must be a finite number, not {value!r}")
    return float(value)


def _head(tensors: dict[str, StoredTensor], config: DecoderConfig, folder: Path) -> StoredTensor:
    name = address_of(config, f"{SCORE}/kernel").tensor
    if name not in tensors:
        raise UserError(f"{folder}: tensor {name} is missing; this tensor is the head of a sequence classifier")
    tensors[name].check_shape((1, config.hidden_size), "config.json (one label)")
    return tensors[name]


def _ends(config: DecoderConfig, tokenizer: Tokenizer | None) -> set[int]:
    """Returns the tokens that end a text: the stop tokens of the model and the EOS of the tokenizer."""
    return {*config.stop_tokens, *([] if tokenizer is None or tokenizer.eos_id is None else [tokenizer.eos_id])}


def _pad_token(config: DecoderConfig, tokenizer: Tokenizer | None) -> int | None:
    """Returns the pad token to write. If possible, this token does not end texts.

    The candidates are the present pad token, then BOS, then the other special tokens of the tokenizer.
    """
    ends, size = _ends(config, tokenizer), config.vocab_size
    candidates = [config.pad_token, config.bos_token]
    if tokenizer is not None:  # the pad token must be a special token of the tokenizer
        own = tokenizer.special_ids
        candidates = [tokenizer.pad_id, *(token for token in candidates if token in own), *own]
    usable = [token for token in candidates if token is not None and token < size]
    no_end = [token for token in usable if token not in ends]
    return next(iter([*no_end, *usable, *sorted(ends)]), None)


def _document(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Returns a `config.json` with one label. The problem is a regression: the output of the model is the score."""
    return config_document(config, dtype) | {
        "architectures": [_architecture(config)],
        "id2label": {"0": LABEL},
        "label2id": {LABEL: 0},
        "problem_type": "regression",
    }


def _architecture(config: DecoderConfig) -> str:
    family = FAMILIES[config.family]
    return (family.classifier or family.architecture) + CLASSIFIER
