"""Loads pretrained model folders, and saves a base with its adapter merged into it.

Not here: adapters (`adapter_files.py`, `peft.py`) and sequence classifiers (`classifiers.py`).
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
    """Loads the decoder and the tokenizer (or None) of a Hugging Face folder or hub id.

    For a PEFT adapter's folder it loads the base with the adapter merged, and the adapter's tokenizer if there is one.
    Weights stored as float32, bfloat16 or float16 are cast to `dtype`; "auto" is the dtype of most of them. On a mesh
    each parameter is sharded by `models.sharding.parameter_sharding`, and each process reads only its own slices.
    `quantize` "int8" or "nf4" quantises the linear layers of the blocks on the host, a part at a time (see
    `quantize.py`). The target in the model's config is that of the mesh's devices, or of jax's default device, with
    full precision for float32 matrix products; `decoder.with_target` changes it. Raises `UserError` naming file and
    entry or tensor if the folder cannot be used.
    """
    check_dtype(None if dtype == AUTO else dtype)
    if quantize not in (None, *KINDS):
        raise UserError(f"quantize: must be one of {', '.join(KINDS)} or None, not {quantize!r}")
    folder, adapter = find_model(path)
    if adapter is not None and quantize is not None:
        raise UserError(
            f"{path}: an adapter cannot be merged into a base quantised as {quantize}; merge it first, or drop quantize"
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
    """Returns (base, tokenizer) for a tokenizer that is not the base's own; both get the stop tokens of both."""
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
    """Merges the adapter into the base and writes a folder that transformers opens.

    Weights are written in `dtype` (None: the dtype of the base), and are rounded once, after merging. A scalar head is
    not written. The folder is written atomically and replaces an older model. Raises `UserError` if the folder holds
    other files, or if a weight is too large for `dtype`.
    """
    target = Path(path).expanduser().absolute()
    check_dtype(dtype)
    check_replaceable(target, *EXPORTED)
    config = base.config
    tensors, dtype = merged_tensors(base, adapter, dtype)
    if address_of(config, "lm_head/kernel").tensor in tensors:  # an adapter may have untied it from the embedding
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
    """Returns (the config with its stop tokens and pad token, the tokenizer with the same stop tokens).

    The stop tokens are those of `generation_config.json`, `config.json`, the tokenizer and its chat template. If
    `config.json` names no stop token (`has_eos` is False), the default of the model family counts only when all other
    sources name none. If no pad
    token is given, a stop token or 0 is used; any token would do, because masks mark the padding.
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
                f"{info}: eos_token_id {token} is outside the vocabulary of {config.vocab_size} tokens; give an id "
                f"from 0 to {config.vocab_size - 1}"
            )
    if has_eos or not (stops or (tokenizer is not None and tokenizer.stop_ids)):
        stops = tuple(dict.fromkeys([*stops, *config.stop_tokens]))
    if tokenizer is not None:
        tokenizer = tokenizer.for_model(config.vocab_size, stops)
        stops = tokenizer.stop_ids
    stops = tuple(token for token in stops if token < config.vocab_size)  # a family's default may not fit
    own_pad = None if tokenizer is None else tokenizer.pad_id
    pads = (*tokens["pad_token_id"], config.pad_token, own_pad, *stops, 0)
    pad = next(token for token in pads if token is not None and token < config.vocab_size)
    return dataclasses.replace(config, stop_tokens=stops, pad_token=pad), tokenizer
