"""Tokenizer files in and out: `tokenizer.json` decides how a text becomes ids, and is written byte for byte as read.

transformers' own classes (LlamaTokenizer, GPT2Tokenizer and others) build a pipeline of their own from the file's
vocabulary; models are trained on the file's. So the file is read with `tokenizers`, and what stands beside it (names of
special tokens, added tokens, chat templates) with transformers' plain fast class.

Not here: slow tokenizers and remote code. Without a `tokenizer.json` transformers converts what there is.
"""

import contextlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from jaxrlhf.data.sources import HUB_ID, one_line
from jaxrlhf.errors import UserError

FILE, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
VOCABULARY_FILES = (
    FILE, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", CONFIG,
)  # fmt: skip
HUB_FILES = ("tokenizer*", "*.model", "vocab*", "merges*", "tekken.json", "special_tokens_map.json",
             "added_tokens.json", "chat_template*", "config.json")  # fmt: skip
# The class that readers of what we write take: in transformers 4 and 5 it follows the file.
PLAIN_CLASS = "PreTrainedTokenizerFast"
# A converted sentencepiece model must cut these as the model itself does.
PROBES = ("Hello world", "a b  c", " x", "it is 10 + 5 = 15.", "(a)\n\nb")


def find_folder(path: str) -> str | None:
    """The local folder of a folder or hub id; None where it holds no tokenizer files.

    UserError where there is no such folder and nothing comes from the hub.
    """
    folder = os.path.expanduser(path)
    if not os.path.isdir(folder):
        folder = _download(path)
    return folder if any(os.path.exists(os.path.join(folder, name)) for name in VOCABULARY_FILES) else None


def read_files(folder: str, name: str) -> tuple[Any, bytes | None]:
    """(transformers' fast tokenizer, the bytes of `tokenizer.json`) of a folder; None where there is no such file.

    UserError, naming `name`, where the files cannot be used.
    """
    # Without torch the library advises on every import that it is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    file = Path(folder, FILE)
    try:
        data = file.read_bytes() if file.exists() else None
        tokenizer = _converted(folder, name) if data is None else _as_the_file_says(folder, data)
    except UserError:
        raise
    except Exception as error:  # broken files raise whatever the library meets first
        raise UserError(f"{name}: its tokenizer cannot be loaded: {one_line(error)}") from error
    for entry in ("is_local", "local_files_only"):  # how it was read: saved again, it has the same bytes as before
        tokenizer.init_kwargs.pop(entry, None)
    return tokenizer, data


def write_files(tokenizer: Any, data: bytes | None, path: str, pad_id: int | None = None) -> None:
    """Writes a fast tokenizer's files, chat templates included.

    `data` is the `tokenizer.json` that it was read from, and is written as it is. Where `pad_id` is given,
    `tokenizer_config.json` alone names that token as pad.
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


def _as_the_file_says(folder: str, data: bytes) -> Any:
    """The plain fast tokenizer with the pipeline of `tokenizer.json`.

    Special and added tokens that only the files beside it name are added, with the ids that transformers gives them;
    but a word that is named to pad with stays a word.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    if not (_says(folder, "eos_token") or _says(folder, "eos_token", SPECIAL)):
        _name_as_the_class_does(tokenizer, folder)
    backend = _backend(data)
    known = _added(backend)
    if tokenizer.pad_token not in (tokenizer.bos_token, tokenizer.eos_token) and tokenizer.pad_token is not None:
        known |= {tokenizer.pad_token} & {*backend.get_vocab()}
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.content not in known:
            add = backend.add_special_tokens if token.special else backend.add_tokens
            add([token])
    tokenizer._tokenizer = backend  # transformers has changed its own copy's added tokens and post-processor
    tokenizer.split_special_tokens = False
    return tokenizer


def _name_as_the_class_does(tokenizer: Any, folder: str) -> None:
    """Names BOS, EOS and the unknown token where the files do not, as GPT-2's: transformers' class knows them."""
    from transformers import AutoTokenizer

    with contextlib.suppress(ValueError, OSError, KeyError):  # no class either: the tokenizer has none
        known = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        for entry in ("bos_token", "eos_token", "unk_token"):
            if getattr(known, entry, None) in tokenizer.get_vocab():
                setattr(tokenizer, entry, getattr(known, entry))


def _backend(data: bytes) -> Any:
    """The file's own tokenizer; how long a text may be is the data's business, so it neither cuts nor pads."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_buffer(data)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _added(backend: Any) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values()}


def _converted(folder: str, name: str) -> Any:
    """What transformers makes of a folder without a `tokenizer.json`."""
    from transformers import AutoTokenizer

    for model in ("tokenizer.model", "spiece.model"):
        if os.path.exists(os.path.join(folder, model)):
            return _of_pieces(folder, model, name)
    return AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)


def _of_pieces(folder: str, model: str, name: str) -> Any:
    """The fast tokenizer of a sentencepiece model, which cuts the probes as the model itself does.

    The plain class follows the model's own settings; the classes of single models only add what they know of them.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    packages = (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf"))
    missing = [package for package, module in packages if _is_missing(module)]
    if missing:
        raise UserError(f"{name}: reading {model} without a {FILE} needs pip install {' '.join(missing)}")
    from sentencepiece import SentencePieceProcessor

    # Llama, Mistral and Gemma begin a text with BOS unless the folder says otherwise; transformers 5 forgets that here.
    given = {} if model != "tokenizer.model" or _says(folder, "add_bos_token") else {"add_bos_token": True}
    try:
        pieces = SentencePieceProcessor(model_file=os.path.join(folder, model))
    except (OSError, RuntimeError):  # another kind of file with that name
        return AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False, **given)
    fault: Exception | None = None
    for loader in (PreTrainedTokenizerFast, AutoTokenizer):
        try:
            tokenizer = loader.from_pretrained(folder, trust_remote_code=False, **given)
        except Exception as error:
            fault = error
            continue
        if all(tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text) for text in PROBES):
            return tokenizer
    reason = f": {one_line(fault)}" if fault else ", which would cut texts otherwise than it does"
    raise UserError(f"{name}: transformers cannot convert {model}{reason}; give a folder with its {FILE}")


def _says(folder: str, entry: str, file: str = CONFIG) -> bool:
    """Whether `tokenizer_config.json`, or the file given, has the entry."""
    config = Path(folder, file)
    return config.exists() and entry in json.loads(config.read_text(encoding="utf-8"))


def _is_missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # the package that it lies in
        return True


def _download(path: str) -> str:
    """The local copy of a hub id's tokenizer files."""
    if os.path.exists(path) or not HUB_ID.fullmatch(path):
        raise UserError(f"{path}: no such folder; want one with a tokenizer, or a hub id such as owner/name")
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(path, allow_patterns=list(HUB_FILES))
    except Exception as error:  # not found, gated, offline, refused: all the same to the person who asked
        raise UserError(f"{path}: no such folder here, and not to be had from the hub: {one_line(error)}") from error
