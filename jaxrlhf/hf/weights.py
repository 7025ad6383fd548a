"""Loads pretrained models from folders, merges an adapter into its base, and saves the result.

`adapter_files.py` and `peft.py` handle adapters. `classifiers.py` handles sequence classifiers.
"""

import dataclasses
from pathlib import Path

import jax

from jaxrlhf.data.tokenizers import Tokenizer, load_tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.hf.decoder_tensors import match, merged_tensors, plain_tensors, read_decoder, untie_if_different
from jaxrlhf.hf.families import address_of, config_document, read_config, token_entry, token_ids
from jaxrlhf.hf.folders import AUTO, EXPORTED, check_dtype, check_replaceable, find_model, written_once
from jaxrlhf.hf.peft import with_adapter
from jaxrlhf.hf.tensor_files import main_dtype, read_checkpoint, read_json, write_checkpoint, write_json
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder, with_config
from jaxrlhf.models.quantize import KINDS
from jaxrlhf.records import Adapter


def load_pretrained(
    path: str | Path,
    dtype: str = AUTO,
    mesh: jax.sharding.Mesh | None = None,
    quantize: str | None = None,
) -> tuple[Decoder, Tokenizer | None]:
    """Loads a decoder and its tokenizer from a Hugging Face folder or hub id. The tokenizer may be None.

    If `path` is a PEFT adapter, the function loads the base and merges the adapter into it. If the adapter has a
    tokenizer, this tokenizer is returned. Weights in the files are float32, bfloat16 or float16, and are cast to
    `dtype`. "auto" means the dtype of most weights. `models.sharding.parameter_sharding` shards each parameter on the
    mesh, and each process reads only its own slices. If `quantize` is "int8" or "nf4", the linear layers of the blocks
    are quantised on the host, one part after another (see `quantize.py`). The `target` in the model's config is set
    to that of the mesh's devices, or of jax's default device, with full precision for float32 matrix products.
    `decoder.with_target` sets another target.

    Raises `UserError` if the folder cannot be used. The error names the file, and the entry or tensor.
    """
    check_dtype(None if dtype == AUTO else dtype)
    if quantize not in (None, *KINDS):
        raise UserError(f"quantize: must be one of {', '.join(KINDS)} or None, not {quantize!r}")
    folder, adapter = find_model(path)
    if adapter is not None and quantize is not None:
        raise UserError(
            f"{path}: an adapter cannot be merged into a base quantised as {quantize}; merge the adapter first, or "
            "load without quantize"
        )
    document = read_json(folder / "config.json")
    config = read_config(document, str(folder / "config.json"))
    config, tensors = untie_if_different(config, plain_tensors(read_checkpoint(folder)), folder)
    stored = match(config, tensors, folder)
    dtype = main_dtype(stored.values()) if dtype == AUTO else dtype
    tokenizer = (load_tokenizer(str(adapter)) if adapter else None) or load_tokenizer(str(folder))
    has_eos = "eos_token_id" in {**document, **(document.get("text_config") or {})}
    config, tokenizer = _with_tokens(config, folder, tokenizer, has_eos)
    base = read_decoder(config, stored, dtype, mesh, quantize)
    return (base if adapter is None else with_adapter(base, adapter, folder, mesh)[0]), tokenizer


def with_tokenizer(base: Decoder, tokenizer: Tokenizer) -> tuple[Decoder, Tokenizer]:
    """Gives the base a tokenizer of another model, and returns (base, tokenizer).

    Both results have the stop tokens of the base and the stop tokens of the tokenizer.
    """
    tokenizer = tokenizer.for_model(base.config.vocab_size, base.config.stop_tokens, foreign=True)
    return with_config(base, dataclasses.replace(base.config, stop_tokens=tokenizer.stop_ids)), tokenizer


def save_pretrained(
    path: str | Path,
    base: Decoder,
    adapter: Adapter | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
) -> None:
    """Merges the adapter into the base, and writes the model to a folder. transformers can open the folder.

    Weights are written in `dtype`; None means the dtype of the base. They are rounded once, after the merge. A scalar
    head is not written. The folder is written atomically and replaces an older model. Raises `UserError` if the folder
    holds other files, or if a weight is too large for `dtype`.
    """
    target = Path(path).expanduser().absolute()
    check_dtype(dtype)
    check_replaceable(target, *EXPORTED)
    config = base.config
    tensors, dtype = merged_tensors(base, adapter, dtype)
    if address_of(config, "lm_head/kernel").tensor in tensors:  # an adapter may have untied the head
        config = dataclasses.replace(config, tie_embeddings=False)
    generation = {
        "bos_token_id": config.bos_token,
        "eos_token_id": token_entry(config.stop_tokens),
        "pad_token_id": config.pad_token,
    }
    with written_once(target) as (folder, primary):
        write_checkpoint(folder, tensors, max_shard_bytes, primary)
        if primary:
            write_json(folder / "config.json", config_document(config, dtype))
            write_json(folder / "generation_config.json", generation)
            if tokenizer is not None:
                tokenizer.save(str(folder))


def _with_tokens(
    config: DecoderConfig, folder: Path, tokenizer: Tokenizer | None, has_eos: bool
) -> tuple[DecoderConfig, Tokenizer | None]:
    """Returns (config, tokenizer). The config gets stop tokens and a pad token; the tokenizer gets the stop tokens.

    The stop tokens are those of `generation_config.json`, `config.json`, the tokenizer and its chat template. `has_eos`
    is False if `config.json` names no stop token. The default of the model family then counts only if all other sources
    name no stop token. If no source names a pad token, a stop token or 0 becomes the pad token. Masks mark the padding,
    so any pad token is correct.
    """
    file = folder / "generation_config.json"
    generation = read_json(file) if file.exists() else {}
    tokens = {}
    for entry in ("eos_token_id", "pad_token_id"):
        try:
            tokens[entry] = token_ids(generation.get(entry))
        except ValueError as error:
            raise UserError(f"{file}: {entry} must be {error}, not {generation[entry]!r}") from None
    stops = tokens["eos_token_id"]
    for token in (*stops, *(config.stop_tokens if has_eos else ())):
        if token >= config.vocab_size:
            info = file if token in stops else folder / "config.json"
            raise UserError(
                f"{info}: eos_token_id must be from 0 to {config.vocab_size - 1}, not {token}, because the model has a "
                f"vocabulary of {config.vocab_size} tokens"
            )
    if has_eos or not (stops or (tokenizer is not None and tokenizer.stop_ids)):
        stops = tuple(dict.fromkeys([*stops, *config.stop_tokens]))
    if tokenizer is not None:
        tokenizer = tokenizer.for_model(config.vocab_size, stops)
        stops = tokenizer.stop_ids
    stops = tuple(token for token in stops if token < config.vocab_size)  # the family's default may be too large
    own_pad = None if tokenizer is None else tokenizer.pad_id
    pads = (*tokens["pad_token_id"], config.pad_token, own_pad, *stops, 0)
    pad = next(token for token in pads if token is not None and token < config.vocab_size)
    return dataclasses.replace(config, stop_tokens=stops, pad_token=pad), tokenizer
