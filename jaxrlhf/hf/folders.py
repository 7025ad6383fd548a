"""Finds folders of models and adapters, on disk or on the hub, and writes them atomically."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxrlhf.checkpoint.files import atomic_directory
from jaxrlhf.data import hub
from jaxrlhf.errors import UserError

MARK = ".jaxrlhf"  # this file lists the files in its folder that jaxrlhf wrote and may replace
DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"  # given as a dtype, stands for the dtype of most numbers in the checkpoint
PEFT_INFO, INDEX = "adapter_config.json", "model.safetensors.index.json"
EXPORTED = ("config.json", PEFT_INFO)  # each folder that `jaxrlhf export` writes has one of these files
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]


def check_dtype(dtype: str | None) -> None:
    """Raises `UserError` unless `dtype` is None or one of `DTYPES`."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: must be one of {', '.join(DTYPES)}, not {dtype!r}")


def find_folder(path: str | Path) -> Path:
    """Returns the folder at `path`, or the local copy of the hub repository with the id `path`."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path)):
        raise UserError(f"{path}: no such folder; want one with config.json and weights, or a hub id like owner/name")
    try:
        return hub.download(str(path), HUB_FILES)
    except (OSError, ValueError) as error:  # hub and connection errors are OSErrors, a malformed id a ValueError
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path}: no such folder here, and the hub cannot provide it: {reason}") from None


def find_model(path: str | Path) -> tuple[Path, Path | None]:
    """Returns (folder of a model, folder of a PEFT adapter or None).

    `path` is the folder or hub id of a model, or of an adapter. The base of an adapter is named by its
    `base_model_name_or_path`: a hub id, or a folder relative to the working directory or to the adapter.
    """
    from jaxrlhf.hf.tensor_files import read_json

    folder = find_folder(path)
    info = folder / PEFT_INFO
    if not info.is_file() or any((folder / name).exists() for name in ("model.safetensors", INDEX)):
        return folder, None
    base = read_json(info).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{info}: base_model_name_or_path is {base!r}; it must name the model that the adapter is for")
    beside = folder / Path(base).expanduser()
    try:
        return find_folder(beside if beside.is_dir() and not Path(base).expanduser().is_dir() else base), folder
    except UserError as error:
        raise UserError(f"{info}: base_model_name_or_path: {error}; correct the entry, or merge the adapter") from None


@contextlib.contextmanager
def written_once(target: Path) -> Iterator[tuple[Path, bool]]:
    """Yields (folder to write into, whether this process writes); all processes wait for each other at the end."""
    primary = jax.process_index() == 0
    with atomic_directory(target, replace=True) if primary else contextlib.nullcontext(target) as folder:
        yield folder, primary
        if primary:
            names = sorted(file.name for file in folder.iterdir())
            (folder / MARK).write_text("\n".join(["# jaxrlhf wrote these files, and may replace them", *names, ""]))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"written {target.name}")


def check_replaceable(target: Path, *of_kinds: str) -> None:
    """Raises `UserError` if a folder holds files that its `MARK` does not list.

    The list must contain one of the files `of_kinds`, so that an adapter does not replace an exported model.
    """
    if not target.is_dir():
        return
    try:
        written = {MARK, *(target / MARK).read_text(encoding="utf-8").splitlines()[1:]}
    except (OSError, ValueError):
        written = set()
    replaceable = written if written & {*of_kinds} else set()
    try:
        strangers = sorted({file.name for file in target.iterdir()} - replaceable)
    except OSError as error:
        raise UserError(f"{target}: cannot be read: {error.strerror}; give another folder") from None
    if strangers:
        raise UserError(f"{target}: holds {strangers[0]}, which would be deleted; give a new or empty folder")
