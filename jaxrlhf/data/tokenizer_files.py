"""Reads and writes tokenizer files.

The file `tokenizer.json` decides how text becomes ids. This file is written back byte for byte. transformers' classes
such as LlamaTokenizer use only the vocabulary of the file and build another pipeline, but models are trained with the
pipeline of the file. So the library `tokenizers` reads the file. transformers' class `PreTrainedTokenizerFast` reads
the other files, which hold the names of special tokens, added tokens and chat templates.

If there is no `tokenizer.json`, transformers converts other files. Slow tokenizers and remote code are not supported,
on purpose.
"""

import contextlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from jaxrlhf.data import hub
from jaxrlhf.data.sources import HUB_ID
from jaxrlhf.errors import UserError, one_line

FILE, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
VOCABULARY_FILES = (
    FILE, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", CONFIG,
)  # fmt: skip
HUB_FILES = ("tokenizer*", "*.model", "vocab*", "merges*", "tekken.json", "special_tokens_map.json",
             "added_tokens.json", "chat_template*", "config.json")  # fmt: skip
# The name of this class is written into saved files. In transformers 4 and 5 this class follows tokenizer.json.
PLAIN_CLASS = "PreTrainedTokenizerFast"
# After the conversion of a sentencepiece model, the new tokenizer must give the model's ids for these texts.
PROBES = ("Hello world", "a b  c", " x", "it is 10 + 5 = 15.", "(a)\n\nb")


def find_folder(path: str) -> str | None:
    """Returns the local folder that holds the tokenizer files. Returns None if there are no tokenizer files.

    `path` is a folder or a hub id. The files of a hub id are downloaded. Raises UserError if there is neither a folder
    nor a hub id of this name.
    """
    folder = os.path.expanduser(path)
    if not os.path.isdir(folder):
        folder = _download(path)
    return folder if any(os.path.exists(os.path.join(folder, name)) for name in VOCABULARY_FILES) else None


def read_files(folder: str, name: str) -> tuple[Any, bytes | None]:
    """Reads a folder and returns (transformers' fast tokenizer, the bytes of `tokenizer.json` or None).

    Raises UserError if the files cannot be used. The message contains `name`, the tokenizer's name.
    """
    # If torch is missing, transformers prints a warning when it is imported. Nothing here needs torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    file = Path(folder, FILE)
    try:
        data = file.read_bytes() if file.exists() else None
        tokenizer = _convert(folder, name) if data is None else _from_file(folder, data)
    except UserError:
        raise
    except Exception as error:  # broken files may raise anything
        raise UserError(f"{name}: the tokenizer cannot be loaded: {one_line(error)}") from error
    for entry in ("is_local", "local_files_only"):  # else transformers writes these loading options into saved files
        tokenizer.init_kwargs.pop(entry, None)
    return tokenizer, data


def write_files(tokenizer: Any, data: bytes | None, path: str, pad_id: int | None = None) -> None:
    """Writes a fast tokenizer's files, including chat templates.

    `data` is the original `tokenizer.json` and is written unchanged. `pad_id` sets the pad token, but only in
    `tokenizer_config.json`.
    """
    tokenizer.save_pretrained(path)
    config = Path(path, CONFIG)
    document = json.loads(config.read_text(encoding="utf-8"))
    document["tokenizer_class"] = PLAIN_CLASS
    document.pop("auto_map", None)
    if pad_id is not None:
        document["pad_token"] = tokenizer.convert_ids_to_tokens(pad_id)
    if data is not None:
        Path(path, FILE).write_bytes(data)
        added = tokenizer.added_tokens_decoder
        if any(token.content not in _added(_backend(data)) for token in added.values()):
            document["added_tokens_decoder"] = {str(i): token.__getstate__() for i, token in sorted(added.items())}
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    config.write_text(text + "\n", encoding="utf-8")


def _from_file(folder: str, data: bytes) -> Any:
    """Returns a `PreTrainedTokenizerFast` with the pipeline of `tokenizer.json`.

    Tokens that only the other files of the folder name are added. They get the ids that transformers gives to them. A
    vocabulary word that is used as the pad token is not added and stays an ordinary word.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    if not (_has_entry(folder, "eos_token") or _has_entry(folder, "eos_token", SPECIAL)):
        _name_special_tokens(tokenizer, folder)
    backend = _backend(data)
    known = _added(backend)
    if tokenizer.pad_token not in (tokenizer.bos_token, tokenizer.eos_token) and tokenizer.pad_token is not None:
        known |= {tokenizer.pad_token} & {*backend.get_vocab()}
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.content not in known:
            add = backend.add_special_tokens if token.special else backend.add_tokens
            add([token])
    tokenizer._tokenizer = backend  # the backend of transformers has other added tokens and another post-processor
    tokenizer.split_special_tokens = False
    return tokenizer


def _name_special_tokens(tokenizer: Any, folder: str) -> None:
    """Sets BOS, EOS and the unknown token to those of transformers' class for this model.

    Some tokenizer files, such as the files of GPT-2, do not name these tokens.
    """
    from transformers import AutoTokenizer

    with contextlib.suppress(ValueError, OSError, KeyError):  # without a class for the model, no token is set
        known = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        for entry in ("bos_token", "eos_token", "unk_token"):
            if getattr(known, entry, None) in tokenizer.get_vocab():
                setattr(tokenizer, entry, getattr(known, entry))


def _backend(data: bytes) -> Any:
    """Returns the tokenizer of the file without truncation and padding, because the data modules limit lengths."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_buffer(data)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _added(backend: Any) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values()}


def _convert(folder: str, name: str) -> Any:
    """Returns the tokenizer of a folder that has no `tokenizer.json`. transformers converts the folder's files."""
    from transformers import AutoTokenizer

    for model in ("tokenizer.model", "spiece.model"):
        if os.path.exists(os.path.join(folder, model)):
            return _convert_sentencepiece(folder, model, name)
    return AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)


def _convert_sentencepiece(folder: str, model: str, name: str) -> Any:
    """Returns a fast tokenizer that gives the same ids for the texts `PROBES` as the sentencepiece model.

    `PreTrainedTokenizerFast` is tried first, because it follows the settings in the file `model`. Then transformers'
    class for the model family is tried.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    packages = (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf"))
    missing = [package for package, module in packages if _is_missing(module)]
    if missing:
        raise UserError(f"{name}: the folder has no {FILE}; to read {model}, run pip install {' '.join(missing)}")
    from sentencepiece import SentencePieceProcessor

    # Llama, Mistral and Gemma begin a text with BOS, unless the folder's add_bos_token says otherwise. transformers 5
    # does not add this BOS without the option.
    options = {} if model != "tokenizer.model" or _has_entry(folder, "add_bos_token") else {"add_bos_token": True}
    try:
        pieces = SentencePieceProcessor(model_file=os.path.join(folder, model))
    except (OSError, RuntimeError):  # the file has this name, but is no sentencepiece model
        return AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False, **options)
    fault: Exception | None = None
    for loader in (PreTrainedTokenizerFast, AutoTokenizer):
        try:
            tokenizer = loader.from_pretrained(folder, trust_remote_code=False, **options)
        except Exception as error:
            fault = error
            continue
        if all(tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text) for text in PROBES):
            return tokenizer
    reason = one_line(fault) if fault else "the new tokenizer gives other ids for the same texts"
    raise UserError(f"{name}: transformers cannot convert {model}: {reason}; use a folder that has a {FILE}")


def _has_entry(folder: str, entry: str, file: str = CONFIG) -> bool:
    """Whether the JSON file `file` of the folder exists and has the entry."""
    config = Path(folder, file)
    return config.exists() and entry in json.loads(config.read_text(encoding="utf-8"))


def _is_missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # the parent package of the module is missing
        return True


def _download(path: str) -> str:
    """Downloads the tokenizer files of a hub id and returns their folder."""
    if os.path.exists(path) or not HUB_ID.fullmatch(path):
        raise UserError(f"{path}: no such folder; give a folder with a tokenizer, or a hub id such as owner/name")
    try:
        return str(hub.download(path, [*HUB_FILES]))
    except Exception as error:  # not found, gated, offline, refused
        raise UserError(
            f"{path}: there is no such local folder, and the hub gives no files: {one_line(error)}"
        ) from error
