"""Finds folders of models and adapters on disk or on the hub, and writes folders atomically."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxrlhf.checkpoint.files import atomic_directory
from jaxrlhf.data import hub
from jaxrlhf.errors import UserError

MARK = ".jaxrlhf"  # name of the marker file, a list of the files in its folder that jaxrlhf wrote and may replace
DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"  # as a dtype, means the dtype of most numbers in the checkpoint
PEFT_INFO, INDEX = "adapter_config.json", "model.safetensors.index.json"
EXPORTED = ("config.json", PEFT_INFO)  # every folder of `jaxrlhf export` has one of these files
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]


def check_dtype(dtype: str | None) -> None:
    """Raises `UserError` if `dtype` is neither None nor one of `DTYPES`."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: must be one of {', '.join(DTYPES)}, not {dtype!r}")


def find_folder(path: str | Path) -> Path:
    """Returns the folder at `path`. If `path` is a hub id, returns the local copy of the hub repository."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path)):
        raise UserError(f"{path}: no such folder; give a folder with config.json and weights, or a hub id")
    try:
        return hub.download(str(path), HUB_FILES)
    except (OSError, ValueError) as error:  # errors of hub and connection are OSErrors; a malformed id is a ValueError
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path}: no such folder on this machine, and the hub cannot provide it: {reason}") from None


def find_model(path: str | Path) -> tuple[Path, Path | None]:
    """Returns (folder of a model, folder of a PEFT adapter or None).

    `path` is the folder or hub id of a model or of an adapter. The entry `base_model_name_or_path` of an adapter names
    its base. The entry is a hub id or a folder. The path of the folder may be relative to the working directory or to
    the adapter's folder.
    """
    from jaxrlhf.hf.tensor_files import read_json

    folder = find_folder(path)
    info = folder / PEFT_INFO
    if not info.is_file() or any((folder / name).exists() for name in ("model.safetensors", INDEX)):
        return folder, None
    base = read_json(info).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{info}: base_model_name_or_path must name the base of the adapter, not {base!r}")
    beside = folder / Path(base).expanduser()
    try:
        return find_folder(beside if beside.is_dir() and not Path(base).expanduser().is_dir() else base), folder
    except UserError as error:
        raise UserError(f"{info}: base_model_name_or_path: {error}; correct the entry, or merge the adapter") from None


@contextlib.contextmanager
def written_once(target: Path) -> Iterator[tuple[Path, bool]]:
    """Yields (folder, primary). New files go into the folder. `primary` is True in the process that writes files.

    At the end, all processes wait for each other, and the new folder replaces `target`.
    """
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
    """Raises `UserError` if the folder `target` holds files that jaxrlhf may not replace.

    The marker file `MARK` lists the files that jaxrlhf may replace. If the list has none of the file names `of_kinds`,
    no file may be replaced. So, for example, an adapter does not replace an exported model.
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
        raise UserError(f"{target}: writing would delete {strangers[0]} in this folder; give a new or empty folder")
